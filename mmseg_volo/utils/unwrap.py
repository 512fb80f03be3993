"""Look below the wrappers of models and of data sets."""

from collections.abc import Mapping

from torch import nn


def bare_model(model: nn.Module) -> nn.Module:
    """The segmentor inside wrappers for distributed training and test-time augmentation."""
    while not hasattr(model, 'decode_head') and isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    return model


def bare_dataset(config: Mapping | None) -> Mapping:
    """The config of a data set without wrappers such as ``RepeatDataset``; of several data sets the first."""
    config = config or {}
    while 'dataset' in config or 'datasets' in config:
        config = config['dataset'] if 'dataset' in config else config['datasets'][0]
    return config
