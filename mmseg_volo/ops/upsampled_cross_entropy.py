"""Cross entropy of logits that are upsampled to the labels' size, as a PyTorch operator with Triton kernels for GPUs.

``torch.compile`` and FakeTensor see one node. Saved for the backward are the logits before the upsampling, and for each
pixel its log-sum-exp in float32 and its class in int16.
"""

import importlib
import math

import torch

from .fused import what_is_missing

_DTYPES = torch.float32, torch.float16, torch.bfloat16
_LIMIT = 2**31  # elements of one image: offsets within it are 32-bit integers
_CLASSES = 2**15  # targets are stored in int16
_SPAN = 256  # pixels of a row that one logit contributes to; more would need more registers


def why_not(logits: torch.Tensor, labels: torch.Tensor, align_corners: bool) -> str | None:
    """Why the kernels cannot run on these tensors, as a phrase; None if they can."""
    if logits.device.type != 'cuda' or labels.device != logits.device:
        return f'the kernels run on CUDA, got logits on {logits.device} and labels on {labels.device}'
    if logits.dtype not in _DTYPES or labels.dtype != torch.int64:
        return f'the kernels take 16- or 32-bit logits and int64 labels, got {logits.dtype} and {labels.dtype}'
    w, (H, W) = logits.shape[3], labels.shape[1:]
    if 0 in (*logits.shape, *labels.shape):
        return f'logits {tuple(logits.shape)} or labels {tuple(labels.shape)} have no elements'
    if max(math.prod(logits.shape[1:]), H * W) >= _LIMIT or logits.shape[1] >= _CLASSES or len(logits) >= 2**16:
        return f'logits {tuple(logits.shape)} or labels {tuple(labels.shape)} are too large for the kernels'
    step = (W - 1) / (w - 1) if align_corners and w > 1 else W / w
    if (W if w == 1 else 2 * step + 1) > _SPAN:
        return f'the kernels upsample to at most {_SPAN // 2} times the width, got {w} to {W}'
    return what_is_missing('cuda', logits.device.index)


def _kernels():
    """Import the kernels on first use, since Triton may be missing."""
    return importlib.import_module('.gpu_loss', __package__)


def upsampled_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross entropy of all pixels, with logits upsampled bilinearly to the labels' size.

    The sum equals ``cross_entropy(interpolate(logits, (H, W), mode='bilinear'), labels, weights, reduction='sum')`` in
    float32, but no C x H x W tensor is allocated. The order of additions is fixed: results are bitwise reproducible.

    Args:
        logits: (B, C, h, w) in float32, float16 or bfloat16, on a CUDA device; :func:`why_not` checks all limits.
        labels: (B, H, W) in int64. A label that is neither a class nor ``ignore_index`` makes the loss and the
            gradient NaN, where PyTorch raises a device assertion.
        weights: (C,) in float32, factors on the loss of each class.
        ignore_index: label of ignored pixels.
        align_corners: as in ``interpolate``.

    Returns:
        The sum in float32, and the number of correct pixels in int64; both are scalars on the device of the logits. The
        sum can be differentiated once, with respect to ``logits``.

    Raises:
        ValueError: the batch sizes differ, or the number of weights is not the number of classes.
    """
    if labels.dim() != 3 or len(labels) != len(logits):
        raise ValueError(
            f'labels must be ({len(logits)}, H, W) for logits {tuple(logits.shape)}, got {tuple(labels.shape)}'
        )
    if weights is not None and weights.shape != logits.shape[1:2]:
        raise ValueError(f'got {len(weights)} class weights for {logits.shape[1]} classes')
    keep = torch.is_grad_enabled() and logits.requires_grad
    return _forward_op(logits, labels, weights, ignore_index, align_corners, keep)[:2]


@torch.library.custom_op('mmseg_volo::upsampled_cross_entropy', mutates_args=())
def _forward_op(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    align_corners: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum, correct pixels, and with ``keep`` the log-sum-exp and class of each pixel (B, H, W) for the backward."""
    return _kernels().forward(logits, labels, weights, ignore_index, align_corners, keep)


@torch.library.custom_op('mmseg_volo::upsampled_cross_entropy_backward', mutates_args=())
def _backward_op(
    grad: torch.Tensor,
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    align_corners: bool,
) -> torch.Tensor:
    return _kernels().backward(grad, logits, logsumexp, targets, weights, align_corners)


@_forward_op.register_fake
def _(logits, labels, weights, ignore_index, align_corners, keep):
    kept = labels.shape if keep else (0,)
    total, correct = logits.new_empty((), dtype=torch.float32), logits.new_empty((), dtype=torch.int64)
    return total, correct, logits.new_empty(kept, dtype=torch.float32), logits.new_empty(kept, dtype=torch.int16)


@_backward_op.register_fake
def _(grad, logits, logsumexp, targets, weights, align_corners):
    return logits.new_empty(logits.shape)


def _keep(ctx, inputs, output) -> None:
    logits, _, weights, _, ctx.align_corners, _ = inputs
    ctx.save_for_backward(logits, *output[2:], weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zero gradients for the saved outputs


def _backward(ctx, grad, *_):
    return _backward_op(grad, *ctx.saved_tensors, ctx.align_corners), *[None] * 5


_forward_op.register_autograd(_backward, setup_context=_keep)
