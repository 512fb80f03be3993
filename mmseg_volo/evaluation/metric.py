"""mmseg's IoUMetric from one confusion matrix per image, with the validation loss and the calibration of a sample."""

import heapq
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dist import get_rank
from mmseg.evaluation import IoUMetric
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import METRICS
from torch import Tensor
from torch.nn import ModuleList

from ..errors import DataError
from ..models.losses import BandedLoss
from ..models.predictions import SAMPLE_STEP
from ..utils.files import atomic_write
from .boundary import boundary_counts

BINS = 20  # of confidence, of equal width
# A CPU counts so many pixels at a time: they stay in its cache.
_CPU_PIXELS = 2**15


@METRICS.register_module()
class ConfusionIoUMetric(IoUMetric):
    """mmseg's :class:`IoUMetric`, with the same arguments and figures, and exact counts.

    IoUMetric counts in float32, which is wrong for a class of more than 2^24 pixels in an image and for sums over large
    data sets. This metric counts each image once, into a confusion matrix in int64, on the device of the prediction. It
    keeps what it found in each image: :class:`~mmseg_volo.evaluation.EvaluationRecordHook` writes that to a file.

    Predictions with ``sampled_logits`` (the logits of a fixed grid of pixels, see
    :class:`~mmseg_volo.models.segmentors.StreamingEncoderDecoder`) also give the calibration of the confidence and,
    where ``head`` is set, the validation loss: ``val/loss`` and its parts, such as ``val/decode.loss_ce``.

    Attributes:
        keep: how many images with the lowest mIoU, and with the highest, keep prediction and ground truth as PNG.
        head: the decode head whose loss is measured, or None.
        boundary: measure the boundary IoU too.
        images: after an evaluation, on rank 0: one dict per image in the order of the data set, with ``path``,
            ``truth`` (path of the ground truth), ``confusion`` (sparse (C + 1, C + 1), int64, see
            :func:`confusion_of`), ``pixels`` (those with a class in the ground truth), ``mIoU`` (over the classes in
            the ground truth) and ``accuracy`` (both from 0 to 1, or None without such pixels); where it was measured,
            ``calibration`` (see :func:`bins_of`), ``boundary`` (see
            :func:`~mmseg_volo.evaluation.boundary.boundary_counts`), ``losses`` by name with their ``weight``, and
            ``pngs``.

    Raises:
        ValueError: a prediction and a ground truth of different sizes.
        DataError: two images would be saved under the same name in ``output_dir``.
    """

    keep = 0
    head: BaseDecodeHead | None = None
    boundary = False
    images: list[dict] | None = None
    _saved: dict[str, str] | None = None  # images by the name of their PNG

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the images of a batch.

        Where ``output_dir`` is set, save their predictions as IoUMetric does, with 16 bits if an id can be above 255.
        """
        if not self.results:
            self._worst, self._best = [], []  # heaps of (order, index, image), the least wanted image first
        folder, self.output_dir = self.output_dir, None  # IoUMetric would write 8 bits
        super().process(data_batch, data_samples)
        self.output_dir = folder
        for sample in data_samples if folder is not None else ():
            self._save(sample)
        if self.format_only:
            return
        for i, sample in enumerate(data_samples, len(self.results) - len(data_samples)):
            self._describe(i, self.results[i], sample)

    @staticmethod
    def intersect_and_union(pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int) -> dict:
        """Count one image: the dict that :meth:`process` completes, where IoUMetric returns four histograms."""
        return dict(confusion=confusion_of(pred_label, label, num_classes, ignore_index))

    def _save(self, sample: dict) -> None:
        path = Path(self.output_dir, f'{Path(sample["img_path"]).stem}.png')
        if self._saved is None:
            self._saved = {}
        if (other := self._saved.setdefault(path.name, sample['img_path'])) != sample['img_path']:
            raise DataError(
                f'{other} and {sample["img_path"]} would both be saved as {path}; tools/test.py keeps their folders, '
                'so set output_dir in test_evaluator alone'
            )
        reduced = sample.get('reduce_zero_label', False)
        write_ids(path, sample['pred_sem_seg']['data'], len(self.dataset_meta['classes']), reduced)

    def _describe(self, index: int, image: dict, sample: dict) -> None:
        dense = image['confusion']
        image['confusion'] = dense.to_sparse()  # hundreds of classes leave most of it empty
        confusion = dense[:-1, :-1].numpy()
        pixels = int(confusion.sum())
        image.update(
            path=sample.get('img_path'), truth=sample.get('seg_map_path'), pixels=pixels, mIoU=None, accuracy=None
        )
        predicted = sample['pred_sem_seg']['data'].squeeze(0)  # (H, W)
        truth = sample['gt_sem_seg']['data'].squeeze(0).to(predicted.device)
        if 'sampled_logits' in sample or 'sampled_probabilities' in sample:
            self._measure_sample(image, sample, predicted[::SAMPLE_STEP, ::SAMPLE_STEP].long(), truth)
        if not pixels:
            return
        if self.boundary:
            image['boundary'] = boundary_counts(predicted, truth, len(confusion), self.ignore_index)
        image['mIoU'] = float(iou_of(confusion)[confusion.sum(1) > 0].mean())
        image['accuracy'] = int(confusion.trace()) / pixels
        # Of images with equal mIoU, the first counts as the worse one.
        for heap, order in ((self._worst, (-image['mIoU'], -index)), (self._best, (image['mIoU'], index))):
            if len(heap) == self.keep and not (heap and order > heap[0][0]):
                continue
            if 'pngs' not in image:
                image['pngs'] = ids_as_png(predicted), ids_as_png(truth)
            heapq.heappush(heap, (order, index, image))
            if len(heap) > self.keep:
                dropped = heapq.heappop(heap)[2]
                if not any(dropped is one for _, _, one in self._worst + self._best):
                    del dropped['pngs']

    def _measure_sample(self, image: dict, sample: dict, predicted: Tensor, truth: Tensor) -> None:
        truth = truth[::SAMPLE_STEP, ::SAMPLE_STEP].long()
        if 'sampled_logits' in sample:
            logits = sample['sampled_logits']['data']  # (C, h, w)
            if self.head is not None:
                image['losses'], image['weight'] = losses_of(self.head, logits, truth)
            probabilities = logits.softmax(0) if len(logits) > 1 else logits.sigmoid()
        else:
            probabilities = sample['sampled_probabilities']['data']
        if len(probabilities) > 1:
            confidence = probabilities.amax(0)
        else:
            confidence = torch.where(predicted > 0, probabilities[0], 1 - probabilities[0])
        counted = (truth >= 0) & (truth < len(self.dataset_meta['classes'])) & (truth != self.ignore_index)
        image['calibration'] = bins_of(confidence[counted], (predicted == truth)[counted])

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """The figures of all images: those of IoUMetric in percent, and the validation loss.

        The loss of each image is weighted by its pixels, as :func:`losses_of` counts them.
        """
        if self.format_only:
            return super().compute_metrics(results)
        self.images = results
        confusion = sum_of(results).double()
        intersection, predicted, truth = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
        areas = intersection, predicted + truth - intersection, predicted, truth
        metrics = super().compute_metrics([[area[:-1] for area in areas]])
        measured = [image for image in results if image.get('weight')]
        total = sum(image['weight'] for image in measured)
        for name in measured[0]['losses'] if measured else ():
            metrics[f'val/{name}'] = sum(image['losses'][name] * image['weight'] for image in measured) / total
        return metrics


def confusion_of(predicted: Tensor, truth: Tensor, classes: int, ignore_index: int = 255) -> Tensor:
    """Count how many pixels of each class were predicted as each class.

    Args:
        predicted, truth: class ids of one shape, on one device.
        classes: their number, C.
        ignore_index: ground truth that does not count.

    Returns:
        (C + 1, C + 1), int64, on the CPU: rows are the ground truth, columns the prediction. The last row and the last
        column count the values that are no class.

    Raises:
        ValueError: two shapes.
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f'prediction {tuple(predicted.shape)} and ground truth {tuple(truth.shape)} have different sizes; a '
            'pipeline that resizes must load annotations after Resize, so that they keep their size'
        )
    C = classes
    counts = torch.zeros(C + 3, C + 2, dtype=torch.int64, device=truth.device)
    step = _CPU_PIXELS if truth.device.type == 'cpu' else max(truth.numel(), 1)
    for of_truth, of_prediction in zip(truth.flatten().split(step), predicted.flatten().split(step), strict=True):
        # Row and column 0 are for negative values, C + 1 for values of C and more; one more row is for ignored pixels,
        # which is faster than to select the others first.
        rows = of_truth.long().clamp(-1, C).masked_fill_(of_truth == ignore_index, C + 1)
        index = of_prediction.long().clamp(-1, C).add_(rows, alpha=C + 2).add_(C + 3)
        counts += torch.bincount(index, minlength=counts.numel()).view(counts.shape)
    counts[C + 1] += counts[0]
    counts[:, C + 1] += counts[:, 0]
    return counts[1 : C + 2, 1:].cpu()


def sum_of(images: Sequence[dict]) -> Tensor:
    """The sum of the images' confusion matrices, (C + 1, C + 1), int64."""
    total = torch.zeros(images[0]['confusion'].shape, dtype=torch.int64)
    for image in images:
        total += image['confusion']
    return total


def iou_of(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class (C,), float64, from a confusion matrix (C, C); NaN where a class has no pixel in it."""
    right = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def bins_of(confidence: Tensor, right: Tensor) -> np.ndarray:
    """(3, BINS), float64: in each bin of confidence the pixels, the sum of their confidence, and the right pixels.

    Args:
        confidence: (N,), from 0 to 1; NaN counts as 0.
        right: (N,), whether the prediction is the ground truth.
    """
    confidence = np.nan_to_num(confidence.double().cpu().numpy())
    of_bin = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return np.stack([np.bincount(of_bin, weights, BINS) for weights in (None, confidence, right.cpu().numpy())])


def has_sampled_loss(head: object) -> bool:
    """Whether :func:`losses_of` is this head's loss: of its logits alone, and without a pixel sampler."""
    own = BaseDecodeHead.loss_by_feat, BandedLoss.loss_by_feat
    return isinstance(head, BaseDecodeHead) and type(head).loss_by_feat in own and head.sampler is None


@torch.no_grad()
def losses_of(head: BaseDecodeHead, logits: Tensor, truth: Tensor) -> tuple[dict[str, float], int]:
    """The losses that training would have for these pixels.

    Args:
        head: the decode head, with its losses.
        logits: (C, h, w), float32.
        truth: (h, w), int64; what is no class of the head is ignored.

    Returns:
        Each loss by its name in the training log, such as 'decode.loss_ce', and their sum, 'loss'; and the pixels that
        they are a mean of: all, or those not ignored where the losses have ``avg_non_ignore``.
    """
    ignored = (truth < 0) | (truth >= head.num_classes) | (truth == head.ignore_index)
    truth = truth.masked_fill(ignored, head.ignore_index)
    if torch.are_deterministic_algorithms_enabled():  # where PyTorch refuses cross entropy of maps on a GPU
        logits, truth = logits.cpu(), truth.cpu()
    modules = head.loss_decode if isinstance(head.loss_decode, ModuleList) else [head.loss_decode]
    losses: dict[str, float] = {}
    for module in modules:  # as BaseDecodeHead.loss_by_feat, which would also resize and measure the accuracy
        name = f'decode.{module.loss_name}'
        value = module(logits[None], truth[None], ignore_index=head.ignore_index)
        losses[name] = losses.get(name, 0.0) + float(value)
    losses['loss'] = sum(losses.values())
    without_ignored = all(getattr(module, 'avg_non_ignore', False) for module in modules)
    return losses, int((~ignored).sum()) if without_ignored else truth.numel()


def ids_as_png(ids: Tensor, least: int = 0) -> bytes:
    """Encode class ids (H, W) as PNG: with 8 bits if they and ``least`` are below 256, else with 16 bits."""
    ids = ids.cpu().numpy()
    dtype = np.uint8 if max(ids.max(), least) < 256 else np.uint16
    return cv2.imencode('.png', ids.astype(dtype))[1].tobytes()


def write_ids(path: Path, ids: Tensor, classes: int, reduced: bool = False) -> None:
    """Save a prediction as PNG.

    Args:
        path: of the file; its folder is created where it is missing.
        ids: class ids (1, H, W).
        classes: number of classes of the data set: above 256 ids, the file has 16 bits.
        reduced: add 1 to the ids, as in the files of a data set with ``reduce_zero_label``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, f'.{get_rank()}') as part:  # two ranks may have the same image
        part.write_bytes(ids_as_png(ids[0] + bool(reduced), classes - 1 + bool(reduced)))
