"""Outlook attention as one operation: one front door, the implementations behind it."""

import torch

from .reference import outlook_attention_reference

__all__ = ['outlook_attention']

_IMPLEMENTATIONS = {'reference': outlook_attention_reference}


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
        impl: 'auto' for the best that can run, or 'reference', the definition in plain PyTorch.

    Returns:
        (B, H, W, C), dtype and device of ``v``.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown ``impl``.
    """
    if impl != 'auto' and impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {sorted(_IMPLEMENTATIONS)}, got {impl!r}")
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
    run = _IMPLEMENTATIONS['reference' if impl == 'auto' else impl]
    return run(v, logits, scale=scale, kernel_size=kernel_size, stride=stride, padding=padding)


def _s(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape)
