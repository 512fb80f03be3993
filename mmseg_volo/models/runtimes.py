"""Start onnxruntime, OpenVINO or TensorRT with an ONNX file."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError, ConfigError

METADATA_KEY = 'mmseg_volo'
RUNTIMES = 'onnxruntime', 'openvino', 'tensorrt'
# Precisions that a runtime can compute in, with its names for them; onnxruntime follows the file.
HINTS = {
    'onnxruntime': {},
    'openvino': {'fp32': 'f32', 'bf16': 'bf16'},
    'tensorrt': {'fp32': {}, 'fp16': {'trt_fp16_enable': True}, 'bf16': {'trt_bf16_enable': True}},
}


def check_packages(*names: str, extra: str = 'export') -> None:
    """Raise ConfigError if one of these packages of an extra is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {", ".join(missing)}: pip install -e ".[{extra}]" in the clone')


# What a runtime gives: a function from an image and names of outputs to these outputs, the metadata, and the names of
# all inputs and outputs.
_Started = tuple[Callable[[np.ndarray, list[str]], list[np.ndarray]], str | None, list[str], list[str]]


def _start_onnxruntime(path: str, device: torch.device, threads: int) -> _Started:
    if device.type == 'cuda':
        session = _session(path, threads, 'CUDAExecutionProvider', dict(device_id=device.index or 0))
    else:
        session = _session(path, threads, 'CPUExecutionProvider', {})

    def run(image: np.ndarray, names: list[str]) -> list[np.ndarray]:
        return session.run(names, {'image': image})

    return run, *_contents(session)


def _start_tensorrt(path: str, device: torch.device, threads: int) -> _Started:
    """Let onnxruntime build a TensorRT engine of the file, for each precision when it is first asked for."""
    provider, options = 'TensorrtExecutionProvider', dict(device_id=device.index or 0)
    if device.type != 'cuda':
        raise ConfigError(f'TensorRT runs on a GPU, not on {device}: use --device cuda')
    if why := why_no_tensorrt():
        raise ConfigError(f'TensorRT cannot run here: {why}')

    @functools.cache
    def session(precision: str) -> Any:
        return _session(path, threads, provider, {**options, **HINTS['tensorrt'][precision]})

    def run(image: np.ndarray, names: list[str]) -> list[np.ndarray]:
        return session(_precision('cuda')).run(names, {'image': image})

    return run, *_contents(session('fp32'))


def why_no_tensorrt() -> str | None:
    """Why TensorRT cannot run here, or None if it can."""
    import onnxruntime

    if not torch.cuda.is_available():
        return 'there is no GPU'
    if 'TensorrtExecutionProvider' not in onnxruntime.get_available_providers():
        return 'onnxruntime has no TensorrtExecutionProvider: pip install onnxruntime-gpu tensorrt'
    return None


def _session(path: str, threads: int, provider: str, options: dict) -> Any:
    """Start onnxruntime with a provider.

    Raises:
        ConfigError: the provider is not installed, or cannot start.
        CheckpointError: the file is broken.
    """
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(f'onnxruntime has no {provider}: pip install onnxruntime-gpu, or use --device cpu')
    of_session = onnxruntime.SessionOptions()
    of_session.intra_op_num_threads = threads
    of_session.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, of_session, providers=[(provider, options)])
    except Exception as error:  # onnxruntime has an exception class for each reason
        raise CheckpointError(f'{path} is broken or not an ONNX file: {str(error).splitlines()[0]}') from error
    if provider not in session.get_providers():  # onnxruntime went on with the CPU
        raise ConfigError(f"onnxruntime's {provider} cannot start; see its output above, or use --device cpu")
    return session


def _contents(session: Any) -> tuple[str | None, list[str], list[str]]:
    """The metadata, and the names of inputs and outputs."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return text, [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]


def _precision(device: str) -> str:
    """The precision that autocast asks for."""
    if not torch.is_autocast_enabled(device):
        return 'fp32'
    return {torch.bfloat16: 'bf16', torch.float16: 'fp16'}.get(torch.get_autocast_dtype(device), 'fp32')


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
    hints, options = HINTS['openvino'], dict(INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT='LATENCY')

    @functools.cache
    def compiled(names: tuple[str, ...], precision: str) -> openvino.CompiledModel:
        part = openvino.Model([model.output(name) for name in names], model.get_parameters())
        try:
            return core.compile_model(part, 'CPU', {**options, 'INFERENCE_PRECISION_HINT': hints[precision]})
        except RuntimeError:  # such as an int8 file in bfloat16; its text names C++ files alone
            raise ConfigError(f'OpenVINO cannot run {path} in {precision} on this CPU; leave out --precision') from None

    def run(image: np.ndarray, names: list[str]) -> list[np.ndarray]:
        precision = _precision('cpu')
        found = compiled(tuple(names), precision if precision in hints else 'fp32')([image])
        return [np.array(found[i]) for i in range(len(names))]

    def names_of(ports: list) -> list[str]:
        return [port.get_any_name() for port in ports]

    return run, text, names_of(model.inputs), names_of(model.outputs)


START = dict(onnxruntime=_start_onnxruntime, openvino=_start_openvino, tensorrt=_start_tensorrt)
