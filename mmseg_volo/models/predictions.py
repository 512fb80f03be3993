"""Turn the logits of windows into predictions of full size: class ids, confidence, and logits where asked for."""

from collections.abc import Iterator

import torch
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import Tensor

from .streaming import View
from .windows import WindowNetwork

# Evaluation samples every 7th pixel in both directions: 43,000 pixels of 1024 x 2048. The step is odd, so that the
# sample has all positions between two logits, which are 4, 8 or 16 pixels apart.
SAMPLE_STEP = 7


@torch.no_grad()
def results_of(
    segmentor: EncoderDecoder,
    network: WindowNetwork,
    images: list[list[View]],
    average: bool = False,
    sigmoid_twice: bool = False,
) -> list[dict[str, PixelData]]:
    """Class ids of each image, given by its views, and confidence and logits if ``test_cfg`` asks for them.

    ``average`` averages the probabilities of the views, as ``SegTTAModel`` does; without it each image has one view. If
    ``network.sampled`` is set, the results have ``sampled_probabilities``, or without ``average`` ``sampled_logits``,
    (C, ceil(H / SAMPLE_STEP), ceil(W / SAMPLE_STEP)).
    """
    C, cfg = segmentor.out_channels, segmentor.test_cfg
    device = network.device
    sample = 'sampled_probabilities' if average else 'sampled_logits'
    maps: list[dict[str, Tensor]] = []
    for views in images:
        shape = views[0].shape
        found = dict(pred_sem_seg=torch.empty(1, *shape, dtype=torch.int64 if C > 1 else torch.float32, device=device))
        if cfg.get('confidence'):
            found['seg_confidence'] = torch.empty(1, *shape, device=device)
        if cfg.get('return_logits') or network.logits:
            found['seg_logits'] = torch.empty(C, *shape, device=device)
        if network.sampled:
            sizes = [-(-size // SAMPLE_STEP) for size in shape]
            found[sample] = torch.empty(C, *sizes, device=device)
        maps.append(found)

    for n, along, across, scores, logits in _scores(segmentor, network, images, average, sigmoid_twice):
        found = {name: data.mT if images[n][0].transposed else data for name, data in maps[n].items()}
        classes = classes_of(segmentor, scores, dim=1)
        found['pred_sem_seg'][0, along, across] = classes[:, 0]
        if sample in found:
            (rows, to_rows), (columns, to_columns) = map(_sampled, (along, across))
            source = scores if average else logits
            found[sample][:, to_rows, to_columns] = source[rows, :, columns].transpose(0, 1)
        if 'seg_logits' in found:
            found['seg_logits'][:, along, across] = scores.transpose(0, 1)
        if 'seg_confidence' in found:
            found['seg_confidence'][0, along, across] = _confidence(scores, classes, 1, average)[:, 0]
    return [{name: PixelData(data=data) for name, data in found.items()} for found in maps]


def _scores(
    segmentor: EncoderDecoder,
    network: WindowNetwork,
    images: list[list[View]],
    average: bool = False,
    sigmoid_twice: bool = False,
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor]]:
    """Yield for each tile the image's index, where it is along and across the walk, and its scores (R, C, T).

    These are logits, or probabilities averaged over views, or probabilities of one channel. The last item is the logits
    of the last view.
    """
    with network.running():
        for n, along, across, tiles in network.stream(images):
            scores = None
            for logits in tiles:
                score = logits
                if segmentor.out_channels == 1:
                    score = score.sigmoid()
                    if average and sigmoid_twice:
                        score = score.sigmoid()
                elif average:
                    score = score.softmax(1)
                scores = score if scores is None else scores.add_(score)
            if average:
                scores /= len(images[n])
            yield n, along, across, scores, logits


@torch.no_grad()
def tiles_of_one(
    segmentor: EncoderDecoder, network: WindowNetwork, view: View
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Yield the rows and columns of each tile of one view, its class ids, and its confidence if ``test_cfg`` asks."""
    for _, along, across, scores, _ in _scores(segmentor, network, [[view]]):
        classes = classes_of(segmentor, scores, dim=1)
        confidence = _confidence(scores, classes, 1, False)[:, 0] if segmentor.test_cfg.get('confidence') else None
        classes = classes[:, 0]
        if view.transposed:
            yield across, along, classes.mT, None if confidence is None else confidence.mT
        else:
            yield along, across, classes, confidence


def classes_of(segmentor: EncoderDecoder, scores: Tensor, dim: int) -> Tensor:
    """Class ids of logits or probabilities; ``dim`` has the classes, and size 1 in the result."""
    if scores.shape[dim] == 1:
        return (scores > segmentor.decode_head.threshold).to(scores)
    # On a CPU PyTorch's argmax takes four times as long as max, and as long as a small network.
    return scores.max(dim, keepdim=True).indices if scores.is_cpu else scores.argmax(dim, keepdim=True)


def _confidence(scores: Tensor, classes: Tensor, dim: int, average: bool) -> Tensor:
    """Probability of the predicted class; ``scores`` are logits, or probabilities if ``average`` or of one channel."""
    if scores.shape[dim] == 1:
        return torch.where(classes > 0, scores, 1 - scores)
    return (scores if average else scores.softmax(dim)).amax(dim, keepdim=True)


def complete(network: WindowNetwork, sample: SegDataSample, average: bool) -> None:
    """Add to a prediction with the ``seg_logits`` of all pixels what else is asked for; see :func:`results_of`."""
    if not isinstance(sample, SegDataSample) or 'seg_logits' not in sample or 'pred_sem_seg' not in sample:
        return
    scores, classes = sample.seg_logits.data, sample.pred_sem_seg.data
    if (network.segmentor.test_cfg or {}).get('confidence'):
        sample.seg_confidence = PixelData(data=_confidence(scores, classes, 0, average))
    if network.sampled:
        chosen = scores[:, ::SAMPLE_STEP, ::SAMPLE_STEP]
        if average:
            sample.sampled_probabilities = PixelData(data=chosen)
        else:  # of one channel, `seg_logits` is the probability
            sample.sampled_logits = PixelData(data=chosen.logit(1e-6) if len(chosen) == 1 else chosen)


def _sampled(tile: slice) -> tuple[slice, slice]:
    """The sampled pixels of a tile along one axis, and their indices in the sample."""
    first = -(-tile.start // SAMPLE_STEP)
    return slice(first * SAMPLE_STEP - tile.start, None, SAMPLE_STEP), slice(first, -(-tile.stop // SAMPLE_STEP))
