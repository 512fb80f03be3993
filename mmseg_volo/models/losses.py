"""Cross entropy of enlarged logits, without ever holding logits in the size of the labels.

mmseg enlarges a head's logits to the size of the labels and keeps several tensors of that size: for 150 classes and a
batch of 16 at 512 x 512, 2.5 GB each. On a GPU a kernel enlarges, and keeps two numbers a pixel
(:mod:`mmseg_volo.ops.upsampled_cross_entropy`). Elsewhere, and where the kernel cannot run, a band of rows is enlarged,
its loss and gradient are taken, and the band is forgotten: what stays is the gradient of the logits as the head made
them.
"""

import functools

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import FCNHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS
from mmseg.utils import SampleList
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.upsampled_cross_entropy import upsampled_cross_entropy, why_not

# Logits of a band: what a CPU's caches hold; on a GPU enough that launching kernels weighs little (not tuned).
_BAND, _BAND_GPU = 2**22, 2**26
# Where interpolation is the fastest. On a GPU a matrix product is, and its backward adds in one order, not atomically.
_INTERPOLATES = ('cpu',)


class BandedLoss:
    """For decode heads of mmseg, before their class: the same losses and accuracy from bands of rows, or by a kernel.

    It stands in for one :class:`CrossEntropyLoss` with softmax and without a pixel sampler, class weights and
    ``avg_non_ignore`` included; with any other loss the head does what it does in mmseg. On a GPU a label that is
    neither a class nor ignored makes the loss nan.
    """

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            seg_logits: (B, classes, h, w).
            batch_data_samples: with labels of one size (H, W) in ``gt_sem_seg``.

        Returns:
            The loss by its name, and ``acc_seg``, the share of right pixels in percent, not counting ignored ones.
        """
        loss = self.loss_decode
        plain = type(loss) is CrossEntropyLoss and not loss.use_sigmoid and not loss.use_mask
        if not plain or loss.reduction != 'mean' or self.sampler is not None or self.ignore_index is None:
            return super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        options = dict(ignore_index=self.ignore_index, align_corners=self.align_corners)
        if why_not(seg_logits, labels, self.align_corners) is None:
            weights = _weights(loss, labels.device)
            total, right = upsampled_cross_entropy(seg_logits, labels, weights, **options)
            total = total * loss.loss_weight
        else:
            total, right = _BandedCrossEntropy.apply(seg_logits, labels, loss, *options.values())
        counted = labels != self.ignore_index
        eps = torch.finfo(torch.float32).eps  # as mmseg has it, for labels that are all ignored
        return {
            loss.loss_name: total / (_divisor(loss, labels, counted) + eps),
            'acc_seg': 100 * (right.reshape(1) + eps) / (counted.sum() + eps),
        }


@MODELS.register_module()
class LeanFCNHead(BandedLoss, FCNHead):
    """mmseg's :class:`FCNHead` with the same weights and losses, in less memory."""


def _weights(loss: CrossEntropyLoss, device: torch.device) -> Tensor | None:
    """The weight of each class in float32, None where there are none."""
    if loss.class_weight is None:
        return None
    return _kept_weights(tuple(map(float, loss.class_weight)), device)


@functools.lru_cache(32)
def _kept_weights(weights: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a backward pass may need it later
        return torch.tensor(weights, device=device)


def _divisor(loss: CrossEntropyLoss, labels: Tensor, counted: Tensor) -> Tensor | int:
    """What mmseg divides the sum by: the pixels, the counted ones, or the sum of their classes' weights."""
    weights = _weights(loss, labels.device)
    if weights is not None:
        # Not weights[labels[counted]], whose size the CPU would wait for.
        return torch.where(counted, weights[labels.clamp(0, len(weights) - 1)], 0).sum()
    return counted.sum() if loss.avg_non_ignore else labels.numel()


class _BandedCrossEntropy(torch.autograd.Function):
    """Sum of a loss over all pixels, and the number of right ones; the gradient is made on the way."""

    @staticmethod
    def forward(ctx, logits, labels, loss, ignore_index, align_corners):
        wanted = ctx.needs_input_grad[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        B, classes, h, w = logits.shape
        H, W = labels.shape[1:]
        enlarge, first, last = _enlarging(h, H, align_corners, dtype, logits.device)
        columns = None
        if logits.device.type not in _INTERPOLATES:
            columns = _enlarging(w, W, align_corners, dtype, logits.device)[0].T
        total = torch.zeros((), dtype=dtype, device=logits.device)
        right = torch.zeros((), dtype=torch.long, device=logits.device)
        grad = torch.zeros(logits.shape, dtype=dtype, device=logits.device) if wanted else None
        rows = max(1, (_BAND if logits.device.type == 'cpu' else _BAND_GPU) // (B * classes * W))
        with torch.autocast(logits.device.type, enabled=False):
            for top in range(0, H, rows):
                bottom = min(H, top + rows)
                source = slice(first[top], last[bottom - 1] + 1)
                part = logits[:, :, source].to(dtype).requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    band = enlarge[top:bottom, source] @ part
                    if columns is None:
                        band = F.interpolate(band, (bottom - top, W), mode='bilinear', align_corners=align_corners)
                    else:
                        band = band @ columns
                    of_band = labels[:, top:bottom]
                    value = loss(band, of_band, reduction_override='none', ignore_index=ignore_index).sum()
                if wanted:
                    grad[:, :, source] += torch.autograd.grad(value, part)[0]
                total += value.detach()
                right += ((band.detach().argmax(1) == of_band) & (of_band != ignore_index)).sum()
        ctx.mark_non_differentiable(right)
        if wanted:
            ctx.save_for_backward(grad)
            ctx.dtype = logits.dtype
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx, of_total, _):
        (grad,) = ctx.saved_tensors
        return (grad * of_total).to(ctx.dtype), None, None, None, None


@functools.lru_cache(32)
def _enlarging(
    size: int, out: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[int], list[int]]:
    """The matrix (out, size) that enlarges a line, and the first and last point that each row of it reads."""
    with torch.inference_mode(False):  # a backward pass may need it later
        line = torch.eye(size, dtype=dtype)
        matrix = F.interpolate(line[None], out, mode='linear', align_corners=align_corners)[0].T.contiguous()
        read = (matrix != 0).long()
        return matrix.to(device), read.argmax(1).tolist(), (size - 1 - read.flip(1).argmax(1)).tolist()
