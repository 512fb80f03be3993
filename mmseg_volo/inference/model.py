"""Build a model from a config and a checkpoint, like mmseg's ``init_model``."""

import copy
from collections.abc import Mapping
from os import PathLike

import mmseg.apis
import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import load_state_dict
from mmseg.registry import DATASETS
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..checkpoints.compatibility import allows_mismatch, check_checkpoint, check_class_names, dataset_meta_of
from ..checkpoints.reading import load_checkpoint
from ..config_check import building, check_model
from ..models.onnx import OnnxNetwork, is_onnx, with_onnx
from ..utils.devices import check_device
from ..utils.unwrap import bare_dataset, class_of


def init_model(
    config: str | PathLike | Config,
    checkpoint: str | PathLike | None = None,
    device: str | None = None,
    cfg_options: dict | None = None,
) -> nn.Module:
    """Build the model of a config and load a checkpoint into it.

    Differs from mmseg's :func:`~mmseg.apis.init_model`: a checkpoint of another model, or of other class names, is
    refused unless ``model.test_cfg.allow_mismatch`` is true; a checkpoint without ``meta`` is accepted, and gets the
    class names and colours of the config's data set; a ``config`` object is not changed.

    Args:
        config: config file or object.
        checkpoint: path or URL, or an ``.onnx`` file of ``tools/export.py``; without one the weights are random.
        device: 'cpu', 'cuda', 'cuda:1', ...; default: a GPU if there is one, else the CPU.
        cfg_options: overrides of the config, such as ``dict(model=dict(test_cfg=dict(allow_mismatch=True)))``.

    Returns:
        The model in eval mode, with ``cfg`` and ``dataset_meta`` (``classes`` and ``palette``, RGB), which
        :func:`mmseg.apis.inference_model` and :func:`mmseg.apis.show_result_pyplot` need.

    Raises:
        CheckpointError, FileNotFoundError: see :mod:`mmseg_volo.checkpoints.reading` and
            :mod:`mmseg_volo.checkpoints.compatibility`.
        ConfigError: the device does not exist, or the model's part of the config has a fault; see
            :func:`~mmseg_volo.config_check.check_model`.
    """
    device = device or get_device()
    check_device(device)
    config = copy.deepcopy(config) if isinstance(config, Config) else Config.fromfile(config)
    if cfg_options:
        config.merge_from_dict(cfg_options)
    check_model(config, any_classes=allows_mismatch(config.get('model')))
    if is_onnx(checkpoint):
        config, checkpoint = with_onnx(config, checkpoint, device)[0], None
    if 'data_preprocessor' in config:  # for a model without its own, as in mmengine's Runner
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    with building(config, 'model'):
        model = mmseg.apis.init_model(config, device='cpu')
    init_default_scope(config.get('default_scope', 'mmseg'))
    known, content = dataset_meta(config), None
    if isinstance(model.backbone, OnnxNetwork):  # has its own weights
        content = model.backbone.content
        if known.get('classes') and not allows_mismatch(model):
            check_class_names(dataset_meta_of(content)['classes'], known['classes'], model.backbone.path)
    elif checkpoint is not None:
        content = load_checkpoint(checkpoint)
        check_checkpoint(model, content, 'infer', known.get('classes'))
        consume_prefix_in_state_dict_if_present(content['state_dict'], 'module.')
        load_state_dict(model, content['state_dict'], logger='current')
    head = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
    model.dataset_meta = _complete(dataset_meta_of(content or {}), known, head.num_classes)
    return model.to(device).eval()


def exported_config(config: Config, path: str, device: str, allow_mismatch: bool = False) -> Config:
    """Return a config for a runner whose network is an exported file with the classes of the config's data set.

    Args:
        config: not changed.
        path: an ``.onnx`` file of ``tools/export.py``.
        device: 'cpu', 'cuda', 'cuda:1', ...
        allow_mismatch: accept other class names than those of the data set.

    Raises:
        CheckpointError: the class names differ.
        CheckpointError, ConfigError, FileNotFoundError: see :func:`~mmseg_volo.models.onnx.with_onnx`.
    """
    config, content = with_onnx(config, path, device)
    known = dataset_meta(config).get('classes')
    if known and not allow_mismatch and not config.model.test_cfg.get('allow_mismatch'):
        check_class_names(dataset_meta_of(content)['classes'], known, path)
    return config


def dataset_meta(config: Config) -> dict:
    """Return ``classes`` and ``palette`` (RGB) of a config's test data set, as far as they are known."""
    dataset = bare_dataset((config.get('test_dataloader') or {}).get('dataset'))
    kind = class_of(dataset, DATASETS)
    default = dict(getattr(kind, 'METAINFO', {}))
    given = dataset.get('metainfo') or {}
    given = {key: value for key, value in given.items() if not isinstance(value, str | None)}  # a string is a file name
    meta = {**default, **given}
    if 'classes' in given and 'palette' not in given:  # a part of the default classes
        colours = dict(zip(default.get('classes', ()), default.get('palette', ()), strict=False))
        meta['palette'] = [colours[name] for name in given['classes'] if name in colours]
    return {name: list(meta[name]) for name in ('classes', 'palette') if meta.get(name)}


def _complete(given: Mapping, known: Mapping, count: int) -> dict:
    """Return ``classes`` and ``palette``: the checkpoint's, else the data set's if the count fits, else defaults."""
    classes = given.get('classes')
    if not classes:
        classes = known['classes'] if len(known.get('classes', ())) == count else [str(i) for i in range(count)]
    palettes = [given.get('palette'), known.get('palette')]
    palette = next((p for p in palettes if p is not None and len(p) == len(classes)), None)
    if palette is None:  # mmseg's random colours
        palette = np.random.RandomState(42).randint(0, 255, (len(classes), 3)).tolist()
    return dict(classes=classes, palette=palette)
