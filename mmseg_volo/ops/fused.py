"""Fused outlook attention as a PyTorch operator: Numba kernels for CPUs, Triton kernels for GPUs.

``torch.compile`` and FakeTensor see one node. Only ``v`` and the logits are saved for the backward.
"""

import functools
import importlib
import math

import torch

_KERNELS = {'cpu': '.cpu', 'cuda': '.gpu'}  # imported on first use
_CPU_DTYPES = torch.float32, torch.bfloat16
_GPU_DTYPES = torch.float32, torch.float16, torch.bfloat16
_GPU_LIMIT = 2**31  # elements of one image: offsets within it are 32-bit integers


def why_not(
    v: torch.Tensor, logits: torch.Tensor, *, scale: float, kernel_size: int, stride: int, padding: int
) -> str | None:
    """Why the fused kernels cannot run on these tensors, as a phrase; None if they can. Shapes must be consistent."""
    device, head_size = v.device.type, v.shape[-1] // logits.shape[3]
    if logits.device != v.device:
        return f'v is on {v.device}, but logits are on {logits.device}'
    if device not in _KERNELS:
        return f'there is no kernel for {device} devices'
    missing = what_is_missing(device, v.device.index)
    if missing:
        return missing
    if kernel_size != 3:
        return f'the kernels support only kernel_size=3, got {kernel_size}'
    if scale <= 0:
        return f'the kernels need a scale above 0, got {scale}'
    if not 0 <= padding <= 2:
        return f'the kernels need a padding of 0, 1 or 2, got {padding}'
    if 0 in (*v.shape, *logits.shape):
        return f'v {tuple(v.shape)} or logits {tuple(logits.shape)} have no elements'
    if device == 'cpu':
        if v.dtype != logits.dtype or v.dtype not in _CPU_DTYPES:
            return f'the CPU kernels take float32 or bfloat16, the same for both, got {v.dtype} and {logits.dtype}'
        return None
    if v.dtype not in _GPU_DTYPES or logits.dtype not in _GPU_DTYPES:
        return f'the GPU kernels take float32, float16 and bfloat16, got {v.dtype} and {logits.dtype}'
    if stride not in (1, 2):
        return f'the GPU kernels support strides 1 and 2, got {stride}'
    if not 8 <= head_size <= 128:
        return f'the GPU kernels take heads of 8 to 128 channels, got {head_size}'
    # The transposed attention of the backward pass has ten elements where the logits have nine.
    largest = max(math.prod(v.shape[1:]), math.prod(logits.shape[1:]) * 10 // 9)
    if largest >= _GPU_LIMIT:
        return f'the GPU kernels take less than 2**31 elements per image, got {largest}'
    return None


@torch.compiler.assume_constant_result
def what_is_missing(device: str, index: int | None) -> str | None:
    """What the kernels of a device need and this machine lacks, as a phrase; None if nothing."""
    return _missing_once(device, index)


@functools.cache
def _missing_once(device: str, index: int | None) -> str | None:
    package = {'cpu': 'Numba', 'cuda': 'Triton'}[device]
    if device == 'cuda' and torch.cuda.get_device_capability(index) < (8, 0):
        return f'the GPU kernels need compute capability 8.0 or higher, {torch.cuda.get_device_name(index)} has less'
    try:
        kernels = importlib.import_module(_KERNELS[device], __package__)
        kernels.check()
    except Exception as error:  # of any kind: NumPy is too new for Numba, Triton finds no C compiler, ...
        return f'{package} cannot be used: {error}'
    return None


def _kernels(device: torch.device):
    return importlib.import_module(_KERNELS[device.type], __package__)


@torch.library.custom_op('mmseg_volo::outlook_attention', mutates_args=())
def outlook_attention_fused(
    v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int
) -> torch.Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    return _kernels(v.device).forward(v, logits, scale, stride, padding)


@torch.library.custom_op('mmseg_volo::outlook_attention_backward', mutates_args=())
def _backward_op(
    grad: torch.Tensor, v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernels(v.device).backward(grad, v, logits, scale, stride, padding)


@outlook_attention_fused.register_fake
def _(v, logits, scale, stride, padding):
    return v.new_empty(v.shape)


@_backward_op.register_fake
def _(grad, v, logits, scale, stride, padding):
    return v.new_empty(v.shape), logits.new_empty(logits.shape)


def _keep(ctx, inputs, output) -> None:
    v, logits, *ctx.options = inputs
    ctx.save_for_backward(v, logits)


def _backward(ctx, grad):
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None


outlook_attention_fused.register_autograd(_backward, setup_context=_keep)
