"""Look below the wrappers of models and of data sets, and at the class that a config names."""

from collections.abc import Mapping

from mmengine.registry import Registry
from torch import nn


def bare_model(model: nn.Module) -> nn.Module:
    """The segmentor inside wrappers for distributed training and test-time augmentation."""
    while not hasattr(model, 'decode_head') and isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    return model


def bare_datasets(config: Mapping | None) -> list[Mapping]:
    """The configs of the data sets inside wrappers such as ``ConcatDataset`` and ``RepeatDataset``, in their order."""
    config = config or {}
    inner = config.get('datasets') or config.get('dataset')
    inner = [inner] if isinstance(inner, Mapping) else inner
    if isinstance(inner, (list, tuple)) and all(isinstance(one, Mapping) for one in inner):
        return [found for one in inner for found in bare_datasets(one)]
    return [config]


def bare_dataset(config: Mapping | None) -> Mapping:
    """The first of :func:`bare_datasets`."""
    return bare_datasets(config)[0]


def class_of(config: Mapping | None, registry: Registry) -> type | None:
    """The class that the ``type`` of a config names or is; None if there is none."""
    kind = config.get('type') if isinstance(config, Mapping) else None
    return registry.get(kind) if isinstance(kind, str) else kind
