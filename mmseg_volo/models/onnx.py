"""Run an exported ONNX file as the network of a segmentor, with the same windows, augmentation and metrics.

onnxruntime, OpenVINO or TensorRT runs the file (``model.test_cfg.runtime``).
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .runtimes import HINTS, RUNTIMES, START, check_packages

STEP = 16  # height and width of dynamic inputs are multiples of this
_LONGEST = 2**20  # characters of the metadata
COARSE = 'coarse_logits'  # name of the output with the decode head's logits before upsampling
# test_cfg options that the export has fixed, or that only PyTorch has.
_SETTLED = 'precision', 'compile', 'channels_last', 'cuda_graph', 'runtime'
Run = Callable[[np.ndarray], list[np.ndarray]]


def is_settled(option: str, value: object, runtime: str) -> bool:
    """Whether an option of ``model.test_cfg`` cannot be chosen for a network in an ONNX file."""
    return option in _SETTLED and not (option == 'precision' and value in HINTS[runtime])


def is_onnx(checkpoint: object) -> bool:
    """Whether a checkpoint is an ONNX file, by its suffix."""
    return str(checkpoint).lower().endswith('.onnx')


def use_runtime(config: Config, checkpoint: object, runtime: str | None) -> None:
    """Write what runs an ONNX file into ``model.test_cfg``, where :func:`with_onnx` reads it.

    Raises:
        ConfigError: the checkpoint is no ONNX file.
    """
    if runtime is None:
        return
    if not is_onnx(checkpoint):
        raise ConfigError(f'--runtime {runtime}: {checkpoint} is no .onnx file; tools/export.py writes one')
    config.model.test_cfg = {**(config.model.get('test_cfg') or {}), 'runtime': runtime}


def with_onnx(config: Config, path: str, device: str = 'cpu') -> tuple[Config, dict]:
    """Replace the network in a segmentor's config by an ONNX file.

    If the file has a fixed input size, the windows get this size. ``model.test_cfg.runtime`` of the config says what
    runs it: 'onnxruntime' (default), 'openvino' or 'tensorrt'.

    Args:
        config: the config that the file was exported with; it is not changed.
        path: path of the file.
        device: 'cpu', 'cuda', 'cuda:1', ...

    Returns:
        The new config, and the file's content in the form of a checkpoint; see :class:`OnnxNetwork`.

    Raises:
        CheckpointError, ConfigError, FileNotFoundError: see :func:`open_onnx`.
    """
    config = copy.deepcopy(config)
    model = config.model
    runtime = (model.get('test_cfg') or {}).get('runtime') or RUNTIMES[0]
    content = _as_checkpoint(open_onnx(path, device, runtime=runtime)[1])
    about = content['meta']['exported']
    model.backbone = dict(type='OnnxNetwork', path=str(path), device=str(device), runtime=runtime)
    model.neck = model.auxiliary_head = model.pretrained = None
    model.decode_head = dict(
        type='OnnxHead',
        num_classes=len(about['classes']),
        out_channels=about['out_channels'],
        threshold=about['threshold'],
        align_corners=about['align_corners'],
    )
    test_cfg = {k: v for k, v in (model.get('test_cfg') or {}).items() if not is_settled(k, v, runtime)}
    if about['size']:
        size = tuple(about['size'])
        if test_cfg.get('mode') != 'slide' or tuple(test_cfg['crop_size']) != size:
            stride = tuple(-(-side * 2 // 3) for side in size)
            test_cfg.update(mode='slide', crop_size=size, stride=stride)
            print_log(
                f'{path} takes {size[0]} x {size[1]} pixels: images are predicted in windows of this size at a '
                f'stride of {stride[0]} x {stride[1]}; a file exported with --dynamic follows the config',
                logger='current',
            )
    model.test_cfg = test_cfg
    return config, content


def _as_checkpoint(about: dict) -> dict:
    """The file's metadata in the form of a checkpoint without weights."""
    dataset_meta = dict(classes=about['classes'], palette=about['palette'])
    return dict(meta=dict(dataset_meta=dataset_meta, exported=about))


def open_onnx(path: str | Path, device: str = 'cpu', threads: int = 0, runtime: str = RUNTIMES[0]) -> tuple[Run, dict]:
    """Open an ONNX file.

    Args:
        path: a file written by ``tools/export.py``.
        device: 'cpu', 'cuda', 'cuda:1', ...; GPUs need onnxruntime-gpu.
        threads: threads per image; 0 takes PyTorch's number.
        runtime: one of :data:`RUNTIMES`; OpenVINO runs on a CPU, TensorRT on a GPU.

    Returns:
        A function from an input array to the two output arrays, and the file's metadata.

    Raises:
        ConfigError: the runtime is not known, not installed, or not for this device.
        CheckpointError: the file is broken, or ``tools/export.py`` did not write it.
        FileNotFoundError: the file does not exist.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f'runtime must be one of {", ".join(RUNTIMES)}, got {runtime!r}')
    if runtime == 'openvino':
        check_packages('openvino', extra='openvino')
    else:
        check_packages('onnxruntime')
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist')
    run, text, inputs, outputs = START[runtime](str(path), torch.device(device), threads or torch.get_num_threads())
    if text is None:
        raise CheckpointError(f'{path} was not written by tools/export.py: it has no metadata about classes')
    about = _metadata(text, path)
    names = [about['output'], COARSE]
    if set(names) - set(outputs) or inputs != ['image']:
        raise CheckpointError(f'{path} was not written by tools/export.py: it has other inputs or outputs')

    def run_named(image: np.ndarray, names: list[str] = names) -> list[np.ndarray]:
        return run(image, names)

    return run_named, about


def _metadata(text: str, path: str | Path) -> dict:
    """Parse and check the metadata of :func:`mmseg_volo.export.exporting.export_model`."""

    def numbers(value: object, count: int | None = None) -> bool:
        return isinstance(value, list) and count in (None, len(value)) and all(type(n) in (int, float) for n in value)

    wanted = dict(
        output=lambda v: v in ('logits', 'classes'),
        size=lambda v: v is None or (numbers(v, 2) and all(type(n) is int and 0 < n <= 2**14 for n in v)),
        preprocess=lambda v: isinstance(v, bool),
        mean=lambda v: numbers(v, 3) if about['preprocess'] else v is None or numbers(v),
        std=lambda v: numbers(v, 3) if about['preprocess'] else v is None or numbers(v),
        classes=lambda v: isinstance(v, list) and v != [] and all(isinstance(name, str) for name in v),
        palette=lambda v: isinstance(v, list) and all(numbers(colour, 3) for colour in v),
        out_channels=lambda v: type(v) is int and v in (1, len(about['classes'])),
        align_corners=lambda v: isinstance(v, bool),
        threshold=lambda v: v is None or type(v) in (int, float),
        swap=lambda v: isinstance(v, bool),
    )
    refusal = f'{path} was not written by tools/export.py:'
    try:
        about = json.loads(text) if len(text) < _LONGEST else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise CheckpointError(f'{refusal} its metadata is no JSON object')
    wrong = next((key for key, fits in wanted.items() if key not in about or not fits(about[key])), None)
    if wrong:
        raise CheckpointError(f'{refusal} {wrong} in its metadata is missing or wrong')
    return about


@MODELS.register_module()
class OnnxNetwork(BaseModule):
    """Backbone and decode head in an ONNX file.

    Takes normalised images (B, 3, H, W) and returns the decode head's logits, ((B, C, h, w),). If the file does not
    support the size, the images are padded with zeros at the right and the bottom. OpenVINO and TensorRT compute in the
    dtype of autocast.

    Args:
        path: a file written by ``tools/export.py``.
        device: the device of the runtime.
        runtime: 'onnxruntime', 'openvino' or 'tensorrt'.

    Attributes:
        content: the file in the form of a checkpoint: no weights, and ``meta`` with ``dataset_meta`` (``classes``,
            ``palette``) and ``exported`` (size, precision and other metadata of ``tools/export.py``).
    """

    def __init__(self, path: str, device: str = 'cpu', runtime: str = RUNTIMES[0]):
        super().__init__()
        self.path, self.device, self.runtime = path, device, runtime
        self._run, self._about = open_onnx(path, device, runtime=runtime)
        self.content = _as_checkpoint(self._about)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        size = tuple(x.shape[2:])
        padded = self._about['size'] or [max(-(-side // STEP), 2) * STEP for side in size]
        if any(side > limit for side, limit in zip(size, padded, strict=True)):
            raise ValueError(f'{self.path} takes images of {padded[0]} x {padded[1]} pixels, got {size[0]} x {size[1]}')
        image = F.pad(x.float(), (0, padded[1] - size[1], 0, padded[0] - size[0]))
        if self._about['preprocess']:
            image = self._raw(image)
        (coarse,) = self._run(np.ascontiguousarray(image.cpu().numpy()), [COARSE])
        if coarse.ndim != 4 or coarse.shape[:2] != (len(image), self._about['out_channels']):
            raise CheckpointError(
                f'{self.path}: {COARSE} has the shape {coarse.shape}, which does not fit its metadata'
            )
        rows, columns = (-(-side * of // limit) for side, of, limit in zip(size, coarse.shape[2:], padded, strict=True))
        return (torch.from_numpy(coarse[:, :, :rows, :columns]).to(x.device),)

    def _raw(self, image: Tensor) -> Tensor:
        """Undo the normalisation, which the file contains: (B, H, W, 3), BGR, uint8."""
        mean, std = (image.new_tensor(self._about[name]).view(3, 1, 1) for name in ('mean', 'std'))
        raw = (image * std + mean).round().clamp(0, 255).to(torch.uint8)
        if self._about['swap']:
            raw = raw.flip(1)
        return raw.permute(0, 2, 3, 1)


@MODELS.register_module()
class OnnxHead(BaseDecodeHead):
    """Decode head that returns the logits of :class:`OnnxNetwork`."""

    def __init__(self, num_classes: int, out_channels: int, threshold: float | None, align_corners: bool):
        super().__init__(
            in_channels=1,
            channels=1,
            num_classes=num_classes,
            out_channels=out_channels,
            threshold=threshold,
            align_corners=align_corners,
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0]
