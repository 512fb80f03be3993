"""Run an exported ONNX file as the network of a segmentor, with the same windows, augmentation and metrics.

onnxruntime or OpenVINO runs the file (``model.test_cfg.runtime``).
"""

import copy
import functools
import importlib.util
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

STEP = 16  # height and width of dynamic inputs are multiples of this
METADATA_KEY = 'mmseg_volo'
_LONGEST = 2**20  # characters of the metadata
COARSE = 'coarse_logits'  # name of the output with the decode head's logits before upsampling
# test_cfg options that the export has fixed, or that only PyTorch has.
_SETTLED = 'precision', 'compile', 'channels_last', 'cuda_graph', 'runtime'
RUNTIMES = 'onnxruntime', 'openvino'
_HINTS = {'fp32': 'f32', 'bf16': 'bf16'}  # OpenVINO's names of the precisions that it computes in
Run = Callable[[np.ndarray], list[np.ndarray]]


def is_settled(option: str, value: object, runtime: str) -> bool:
    """Whether an option of ``model.test_cfg`` cannot be chosen for a network in an ONNX file."""
    if option == 'precision' and runtime == 'openvino':
        return value not in _HINTS
    return option in _SETTLED


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
    runs it, 'onnxruntime' (default) or 'openvino'.

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


def check_packages(*names: str, extra: str = 'export') -> None:
    """Raise ConfigError if one of these packages of an extra is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {", ".join(missing)}: pip install -e ".[{extra}]" in the clone')


def open_onnx(path: str | Path, device: str = 'cpu', threads: int = 0, runtime: str = RUNTIMES[0]) -> tuple[Run, dict]:
    """Open an ONNX file.

    Args:
        path: a file written by ``tools/export.py``.
        device: 'cpu', 'cuda', 'cuda:1', ...; GPUs need onnxruntime-gpu.
        threads: threads per image; 0 takes PyTorch's number.
        runtime: one of :data:`RUNTIMES`; OpenVINO runs on a CPU.

    Returns:
        A function from an input array to the two output arrays, and the file's metadata.

    Raises:
        ConfigError: the runtime is not known, not installed, or not for this device.
        CheckpointError: the file is broken, or ``tools/export.py`` did not write it.
        FileNotFoundError: the file does not exist.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f'runtime must be one of {", ".join(RUNTIMES)}, got {runtime!r}')
    check_packages(runtime, extra='export' if runtime == RUNTIMES[0] else runtime)
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist')
    start = _start_openvino if runtime == 'openvino' else _start_onnxruntime
    run, text, inputs, outputs = start(str(path), torch.device(device), threads or torch.get_num_threads())
    if text is None:
        raise CheckpointError(f'{path} was not written by tools/export.py: it has no metadata about classes')
    about = _metadata(text, path)
    names = [about['output'], COARSE]
    if set(names) - set(outputs) or inputs != ['image']:
        raise CheckpointError(f'{path} was not written by tools/export.py: it has other inputs or outputs')

    def run_named(image: np.ndarray, names: list[str] = names) -> list[np.ndarray]:
        return run(image, names)

    return run_named, about


# What a runtime gives: a function from an image and names of outputs to these outputs, the metadata, and the names of
# all inputs and outputs.
_Started = tuple[Callable[[np.ndarray, list[str]], list[np.ndarray]], str | None, list[str], list[str]]


def _start_onnxruntime(path: str, device: torch.device, threads: int) -> _Started:
    import onnxruntime

    provider = 'CUDAExecutionProvider' if device.type == 'cuda' else 'CPUExecutionProvider'
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(f'onnxruntime has no {provider}: pip install onnxruntime-gpu, or use --device cpu')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    providers = [(provider, {'device_id': device.index or 0})] if device.type == 'cuda' else [provider]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime has an exception class for each reason
        raise CheckpointError(f'{path} is broken or not an ONNX file: {str(error).splitlines()[0]}') from error
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)

    def run(image: np.ndarray, names: list[str]) -> list[np.ndarray]:
        return session.run(names, {'image': image})

    return run, text, [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]


def _start_openvino(path: str, device: torch.device, threads: int) -> _Started:
    import openvino

    if device.type != 'cpu':
        raise ConfigError(f'OpenVINO runs on the CPU here, not on {device}: use --device cpu')
    core = openvino.Core()
    try:
        model = core.read_model(path)
    except Exception as error:  # OpenVINO's own exceptions have no common class
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith('Exception from')]
        raise CheckpointError(f'{path} is broken or not an ONNX file: {" ".join(lines)}') from error
    place = ['framework', METADATA_KEY]
    text = str(model.get_rt_info(place).value) if model.has_rt_info(place) else None
    options = dict(INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT='LATENCY')

    @functools.cache
    def compiled(names: tuple[str, ...], precision: str) -> openvino.CompiledModel:
        part = openvino.Model([model.output(name) for name in names], model.get_parameters())
        try:
            return core.compile_model(part, 'CPU', {**options, 'INFERENCE_PRECISION_HINT': _HINTS[precision]})
        except RuntimeError as error:  # such as an int8 file in bfloat16
            raise ConfigError(f'OpenVINO cannot run {path} in {precision} on this CPU') from error

    def run(image: np.ndarray, names: list[str]) -> list[np.ndarray]:
        bf16 = torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16
        found = compiled(tuple(names), 'bf16' if bf16 else 'fp32')([image])
        return [np.array(found[i]) for i in range(len(names))]

    def names_of(ports: list) -> list[str]:
        return [port.get_any_name() for port in ports]

    return run, text, names_of(model.inputs), names_of(model.outputs)


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
    support the size, the images are padded with zeros at the right and the bottom. OpenVINO computes in bfloat16 under
    autocast to bfloat16, else in float32.

    Args:
        path: a file written by ``tools/export.py``.
        device: the device of the runtime.
        runtime: 'onnxruntime' or 'openvino'.

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
