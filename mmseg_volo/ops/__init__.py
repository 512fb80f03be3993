"""Outlook attention as one operation: one front door, the implementations behind it."""

import functools
import logging

import torch

from . import fused
from .reference import outlook_attention_reference
from .slices import outlook_attention_slices

__all__ = ['IMPLEMENTATIONS', 'outlook_attention']

IMPLEMENTATIONS = 'auto', 'fused', 'reference', 'slices'


def outlook_attention(
    v: torch.Tensor,
    logits: torch.Tensor,
    *,
    scale: float,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    impl: str = 'auto',
) -> torch.Tensor:
    """Outlook attention (VOLO paper, equations 3-5) between the value projection and the output projection.

    Each window of ``kernel_size x kernel_size`` values is mixed by K x K attention weights, K = kernel_size squared,
    that the window's centre has predicted; overlapping windows are summed.

    Args:
        v: values, (B, H, W, C), any floating dtype.
        logits: attention before scale and softmax, (B, h, w, M, K, K), with M heads and the window grid
            h = (H + 2 padding - kernel_size) // stride + 1, w likewise. The last axis is normalised.
        scale: factor on the logits, (C / M) ** -0.5 in VOLO.
        kernel_size: k, side of the window in tokens.
        stride: tokens between two windows.
        padding: tokens of zeros around ``v``.
        impl: 'fused', kernels that make no copies of the map, with the softmax in float32 (Triton on a GPU, Numba on a
            CPU); 'reference', the definition with unfold and fold in plain PyTorch; 'slices', plain PyTorch
            without unfold and fold, as exporters need it; or 'auto': slices while a model is exported or traced, else
            fused where it can run, else slices on a CPU and the reference elsewhere.

    Returns:
        (B, H, W, C), dtype and device of ``v``.

    Raises:
        ValueError: shapes that do not fit each other, an unknown ``impl``, or 'fused' where it cannot run, with the
            reason.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'impl must be one of {", ".join(IMPLEMENTATIONS)}, got {impl!r}')
    if v.dim() != 4 or logits.dim() != 6:
        raise ValueError(f'v must be (B, H, W, C) and logits (B, h, w, M, K, K), got {_s(v)} and {_s(logits)}')
    batch, height, width, channels = v.shape
    heads, window = logits.shape[3], kernel_size * kernel_size
    grid = tuple((side + 2 * padding - kernel_size) // stride + 1 for side in (height, width))
    expected = (batch, *grid, heads, window, window)
    if tuple(logits.shape) != expected:
        raise ValueError(
            f'logits must be {expected} for v {_s(v)}, kernel_size={kernel_size}, stride={stride}, '
            f'padding={padding}; got {_s(logits)}'
        )
    if channels % heads:
        raise ValueError(f'{channels} channels of v cannot be split into the {heads} heads of logits')

    numbers = dict(scale=scale, kernel_size=kernel_size, stride=stride, padding=padding)
    if impl == 'auto':
        impl, reason = _choose(v, logits, numbers)
        if not torch.compiler.is_compiling():
            _log(f'outlook attention on {v.device.type} in {v.dtype}: {impl}, {reason}')
    elif impl == 'fused' and (reason := fused.why_not(v, logits, **numbers)):
        raise ValueError(f"impl='fused' cannot run: {reason}; 'auto' takes what can")
    if impl == 'fused':
        return fused.outlook_attention_fused(v, logits, scale, stride, padding)
    return (outlook_attention_slices if impl == 'slices' else outlook_attention_reference)(v, logits, **numbers)


def _choose(v: torch.Tensor, logits: torch.Tensor, numbers: dict) -> tuple[str, str]:
    """The implementation for 'auto', and why."""
    if torch.jit.is_tracing() or _exporting():
        return 'slices', 'since the model is exported or traced'
    reason = fused.why_not(v, logits, **numbers)
    if reason is None:
        return 'fused', 'which is the fastest'
    # Measured on a CPU: slices take 40 to 60 % of the time of unfold and fold, and with the backward as much or less.
    return 'slices' if v.device.type == 'cpu' else 'reference', f'not fused: {reason}'


def _exporting() -> bool:
    is_exporting = getattr(torch.compiler, 'is_exporting', None)  # PyTorch 2.7
    return is_exporting() if is_exporting else torch.onnx.is_in_onnx_export()


@functools.cache
def _log(line: str) -> None:
    logging.getLogger(__name__).debug(line)


def _s(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape)
