"""Build a model from a config and a checkpoint, as mmseg's ``init_model`` does."""

import copy
from collections.abc import Mapping
from os import PathLike

import mmseg.apis
import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, load_state_dict
from mmseg.registry import DATASETS
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..checkpoints.compatibility import check_checkpoint, check_class_names, dataset_meta_of
from ..models.onnx import OnnxNetwork, is_onnx, with_onnx
from ..utils.devices import check_device
from ..utils.unwrap import bare_dataset


def init_model(
    config: str | PathLike | Config,
    checkpoint: str | PathLike | None = None,
    device: str | None = None,
    cfg_options: dict | None = None,
) -> nn.Module:
    """Build a config's model and load a checkpoint into it: mmseg's :func:`~mmseg.apis.init_model`, with differences.

    The default ``device`` is a GPU where there is one, else the CPU. A ``config`` object is not changed. Weights
    without ``meta`` are taken; names and colours of the classes then come from the config's data set. A checkpoint of
    another model, or of classes with other names, is refused unless ``model.test_cfg.allow_mismatch`` is true.

    Args:
        config: config file or object.
        checkpoint: path or URL; without one the weights are random. An ``.onnx`` file of ``tools/export.py`` stands for
            the whole network.
        device: 'cpu', 'cuda', 'cuda:1', ...
        cfg_options: overrides of the config, as ``dict(model=dict(test_cfg=dict(allow_mismatch=True)))``.

    Returns:
        The model in eval mode, with ``cfg`` and ``dataset_meta`` (``classes`` and ``palette``, RGB), as
        :func:`mmseg.apis.inference_model` and :func:`mmseg.apis.show_result_pyplot` want it.

    Raises:
        CheckpointError, FileNotFoundError: see :mod:`mmseg_volo.checkpoints.reading` and
            :mod:`mmseg_volo.checkpoints.compatibility`.
        ConfigError: there is no such GPU.
    """
    device = device or get_device()
    check_device(device)
    config = copy.deepcopy(config) if isinstance(config, Config) else Config.fromfile(config)
    if cfg_options:
        config.merge_from_dict(cfg_options)
    if is_onnx(checkpoint):
        config, checkpoint = with_onnx(config, checkpoint, device)[0], None
    model = mmseg.apis.init_model(config, device='cpu')
    init_default_scope(config.get('default_scope', 'mmseg'))
    known, content = dataset_meta(config), None
    if isinstance(model.backbone, OnnxNetwork):
        content = model.backbone.content
    elif checkpoint is not None:
        content = CheckpointLoader.load_checkpoint(str(checkpoint), 'cpu', 'current')
    if content is not None:
        check_checkpoint(model, content, 'infer', known.get('classes'))
        if content['state_dict']:
            consume_prefix_in_state_dict_if_present(content['state_dict'], 'module.')
            load_state_dict(model, content['state_dict'], logger='current')
    model.dataset_meta = _complete(dataset_meta_of(content or {}), known, model.decode_head.num_classes)
    return model.to(device).eval()


def exported_config(config: Config, path: str, device: str, allow_mismatch: bool = False) -> Config:
    """A config whose network is an exported file, after comparing the classes of both, for a runner.

    Args:
        config: it is not changed.
        path: an ``.onnx`` file of ``tools/export.py``.
        device: where it runs.
        allow_mismatch: take other classes than those of the data set.

    Raises:
        CheckpointError: the names of the classes differ.
        CheckpointError, ConfigError, FileNotFoundError: see :func:`~mmseg_volo.models.onnx.with_onnx`.
    """
    config, content = with_onnx(config, path, device)
    known = dataset_meta(config).get('classes')
    if known and not allow_mismatch and not config.model.test_cfg.get('allow_mismatch'):
        check_class_names(dataset_meta_of(content)['classes'], known, path)
    return config


def dataset_meta(config: Config) -> dict:
    """Names and colours of the classes of the data set that a config tests on: ``classes`` and ``palette``, if any."""
    dataset = bare_dataset((config.get('test_dataloader') or {}).get('dataset'))
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    own = dict(getattr(kind, 'METAINFO', {}))
    asked = dataset.get('metainfo')
    asked = {k: v for k, v in (asked or {}).items() if not isinstance(v, str)}  # text names a file of them
    meta = {**own, **asked}
    if 'classes' in asked and 'palette' not in asked:  # a part of the data set's own classes
        colours = dict(zip(own.get('classes', ()), own.get('palette', ()), strict=False))
        meta['palette'] = [colours[name] for name in asked['classes'] if name in colours]
    return {name: list(meta[name]) for name in ('classes', 'palette') if meta.get(name)}


def _complete(given: Mapping, known: Mapping, count: int) -> dict:
    """The checkpoint's classes, or the data set's where they are as many as the model's, or numbers; with colours."""
    classes = given.get('classes')
    if not classes:
        classes = known['classes'] if len(known.get('classes', ())) == count else [str(i) for i in range(count)]
    palettes = [given.get('palette'), known.get('palette')]
    palette = next((p for p in palettes if p is not None and len(p) == len(classes)), None)
    if palette is None:  # as mmseg draws them
        palette = np.random.RandomState(42).randint(0, 255, (len(classes), 3)).tolist()
    return dict(classes=classes, palette=palette)
