"""Outlook attention as one function with several implementations."""

import functools
import logging

import torch

from . import fused
from .reference import outlook_attention_reference
from .slices import outlook_attention_slices

__all__ = ['IMPLEMENTATIONS', 'outlook_attention', 'use_fused_outlook']

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
    """Outlook attention (VOLO paper, equations 3-5), without the projections before and after it.

    The centre of each k x k window has predicted K x K attention logits, K = k * k. Their softmax mixes the K values of
    the window; results of overlapping windows are summed.

    Args:
        v: values, (B, H, W, C), any floating dtype.
        logits: attention before scale and softmax, (B, h, w, M, K, K), with M heads and the window grid
            h = (H + 2 padding - kernel_size) // stride + 1, w likewise. The softmax runs over the last axis.
        scale: factor on the logits, (C / M) ** -0.5 in VOLO.
        kernel_size: k, side of the window in tokens.
        stride: step between windows in tokens.
        padding: tokens of zeros around ``v``.
        impl: the implementation. 'fused': Triton kernels on a GPU, Numba kernels on a CPU, softmax in float32;
            'reference': the definition in plain PyTorch, with unfold and fold; 'slices': plain PyTorch without unfold
            and fold, for exporters; 'auto': 'slices' while a model is exported or traced, else 'fused' where it can
            run, else 'slices' on a CPU and 'reference' on other devices.

    Returns:
        (B, H, W, C), dtype and device of ``v``.

    Raises:
        ValueError: inconsistent shapes, an unknown ``impl``, or 'fused' where it cannot run.
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

    options = dict(scale=scale, kernel_size=kernel_size, stride=stride, padding=padding)
    if impl == 'auto':
        impl, reason = _choose(v, logits, options)
        if not torch.compiler.is_compiling():
            _log(f'outlook attention on {v.device.type} in {v.dtype}: {impl}, {reason}')
    elif impl == 'fused' and (reason := fused.why_not(v, logits, **options)):
        raise ValueError(f"impl='fused' cannot run: {reason}; impl='auto' picks one that can")
    if impl == 'fused':
        return fused.outlook_attention_fused(v, logits, scale, stride, padding)
    return (outlook_attention_slices if impl == 'slices' else outlook_attention_reference)(v, logits, **options)


def _choose(v: torch.Tensor, logits: torch.Tensor, options: dict) -> tuple[str, str]:
    """The implementation for 'auto', and the reason."""
    if torch.jit.is_tracing() or _exporting():
        return 'slices', 'since the model is being exported or traced'
    reason = fused.why_not(v, logits, **options)
    if reason is None:
        return 'fused', 'which is the fastest'
    # Measured on a CPU: slices take 40 to 60 % of the time of the reference forward, at most 60 % with the backward.
    return 'slices' if v.device.type == 'cpu' else 'reference', f'not fused: {reason}'


def _exporting() -> bool:
    is_exporting = getattr(torch.compiler, 'is_exporting', None)  # PyTorch 2.7
    return is_exporting() if is_exporting else torch.onnx.is_in_onnx_export()


@functools.cache
def _log(line: str) -> None:
    logging.getLogger(__name__).debug(line)


def _s(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape)


from .replacing import use_fused_outlook  # noqa: E402 - it imports the function above
