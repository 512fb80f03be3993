"""Cross entropy of upsampled logits, without logits of the labels' size.

mmseg upsamples a head's logits to the labels' size and keeps several tensors of that size: 2.5 GB each for 150 classes
and a batch of 16 at 512 x 512. Here a GPU kernel upsamples on the fly and keeps two numbers per pixel
(:mod:`mmseg_volo.ops.upsampled_cross_entropy`). Where the kernel cannot run, the loss and the gradient are computed
band by band: a band of rows is upsampled, and only the gradient of the coarse logits is kept.
"""

import functools

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import FCNHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.utils import SampleList
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.upsampled_cross_entropy import upsampled_cross_entropy, why_not

# Logits per band: on a CPU what fits the cache; on a GPU enough to hide the launches (not tuned).
_BAND, _BAND_GPU = 2**22, 2**26
# Devices on which F.interpolate is fastest. On a GPU a matrix product is faster, and its backward is deterministic.
_INTERPOLATES = ('cpu',)


class BandedLoss:
    """Mixin for mmseg's decode heads, first in the bases: the same losses and accuracy in less memory.

    It handles one :class:`CrossEntropyLoss` with softmax and without a pixel sampler, including class weights and
    ``avg_non_ignore``; with any other loss the head runs mmseg's code, and corrects the accuracy of one output. On a
    GPU a label that is neither a class nor ignored makes the loss NaN.
    """

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            seg_logits: (B, classes, h, w).
            batch_data_samples: with labels of one size (H, W) in ``gt_sem_seg``.

        Returns:
            The loss under its name, and ``acc_seg``, the percentage of correct pixels among those not ignored.
        """
        loss = self.loss_decode
        plain = type(loss) is CrossEntropyLoss and not loss.use_sigmoid and not loss.use_mask
        if not plain or loss.reduction != 'mean' or self.sampler is not None or self.ignore_index is None:
            found = super().loss_by_feat(seg_logits, batch_data_samples)
            if self.out_channels == 1:  # mmseg compares the labels with the index of the only output, which is 0
                found['acc_seg'] = self._accuracy_of_one_output(seg_logits, batch_data_samples)
            return found
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        options = dict(ignore_index=self.ignore_index, align_corners=self.align_corners)
        if why_not(seg_logits, labels, self.align_corners) is None:
            weights = _weights(loss, labels.device)
            total, correct = upsampled_cross_entropy(seg_logits, labels, weights, **options)
            total = total * loss.loss_weight
        else:
            total, correct = _BandedCrossEntropy.apply(seg_logits, labels, loss, *options.values())
        counted = labels != self.ignore_index
        eps = torch.finfo(torch.float32).eps  # as in mmseg, in case all labels are ignored
        return {
            loss.loss_name: total / (_divisor(loss, labels, counted) + eps),
            'acc_seg': 100 * (correct.reshape(1) + eps) / (counted.sum() + eps),
        }

    @torch.no_grad()
    def _accuracy_of_one_output(self, seg_logits: Tensor, batch_data_samples: SampleList) -> Tensor:
        labels = self._stack_batch_gt(batch_data_samples)
        logits = resize(seg_logits, labels.shape[2:], mode='bilinear', align_corners=self.align_corners)
        counted = labels != self.ignore_index
        correct = counted & ((logits.sigmoid() > self.threshold) == (labels == 1))
        eps = torch.finfo(torch.float32).eps
        return 100 * (correct.sum().reshape(1) + eps) / (counted.sum() + eps)


@MODELS.register_module()
class LeanFCNHead(BandedLoss, FCNHead):
    """mmseg's :class:`FCNHead` with the same weights and losses in less memory."""


def _weights(loss: CrossEntropyLoss, device: torch.device) -> Tensor | None:
    """The class weights in float32, or None."""
    if loss.class_weight is None:
        return None
    return _cached_weights(tuple(map(float, loss.class_weight)), device)


@functools.lru_cache(32)
def _cached_weights(weights: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may need it for a backward pass
        return torch.tensor(weights, device=device)


def _divisor(loss: CrossEntropyLoss, labels: Tensor, counted: Tensor) -> Tensor | int:
    """mmseg's divisor of the sum: the number of pixels, of pixels not ignored, or the sum of their class weights."""
    weights = _weights(loss, labels.device)
    if weights is not None:
        # Not weights[labels[counted]]: its size would make the CPU wait for the GPU.
        return torch.where(counted, weights[labels.clamp(0, len(weights) - 1)], 0).sum()
    return counted.sum() if loss.avg_non_ignore else labels.numel()


class _BandedCrossEntropy(torch.autograd.Function):
    """Sum of a loss over all pixels and number of correct pixels; the forward computes the gradient too."""

    @staticmethod
    def forward(ctx, logits, labels, loss, ignore_index, align_corners):
        wanted = ctx.needs_input_grad[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        B, classes, h, w = logits.shape
        H, W = labels.shape[1:]
        upsample, first, last = _resize_matrix(h, H, align_corners, dtype, logits.device)
        columns = None
        if logits.device.type not in _INTERPOLATES:
            columns = _resize_matrix(w, W, align_corners, dtype, logits.device)[0].T
        total = torch.zeros((), dtype=dtype, device=logits.device)
        correct = torch.zeros((), dtype=torch.long, device=logits.device)
        grad = torch.zeros(logits.shape, dtype=dtype, device=logits.device) if wanted else None
        rows = max(1, (_BAND if logits.device.type == 'cpu' else _BAND_GPU) // (B * classes * W))
        with torch.autocast(logits.device.type, enabled=False):
            for top in range(0, H, rows):
                bottom = min(H, top + rows)
                source = slice(first[top], last[bottom - 1] + 1)
                part = logits[:, :, source].to(dtype).requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    band = upsample[top:bottom, source] @ part
                    if columns is None:
                        band = F.interpolate(band, (bottom - top, W), mode='bilinear', align_corners=align_corners)
                    else:
                        band = band @ columns
                    band_labels = labels[:, top:bottom]
                    value = loss(band, band_labels, reduction_override='none', ignore_index=ignore_index).sum()
                if wanted:
                    grad[:, :, source] += torch.autograd.grad(value, part)[0]
                total += value.detach()
                correct += ((band.detach().max(1).indices == band_labels) & (band_labels != ignore_index)).sum()
        ctx.mark_non_differentiable(correct)
        if wanted:
            ctx.save_for_backward(grad)
            ctx.dtype = logits.dtype
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(ctx.dtype), None, None, None, None


@functools.lru_cache(32)
def _resize_matrix(
    size: int, out: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[int], list[int]]:
    """Matrix (out, size) of a linear resize, and the first and last point that each of its rows reads."""
    with torch.inference_mode(False):  # a later call may need it for a backward pass
        line = torch.eye(size, dtype=dtype)
        matrix = F.interpolate(line[None], out, mode='linear', align_corners=align_corners)[0].T.contiguous()
        read = (matrix != 0).long()
        return matrix.to(device), read.argmax(1).tolist(), (size - 1 - read.flip(1).argmax(1)).tolist()
