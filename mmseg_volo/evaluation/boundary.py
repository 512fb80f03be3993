"""Boundary IoU: how well the outlines of the classes fit (Cheng et al., CVPR 2021, arXiv:2103.16562, equation 4)."""

from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor

RATIO = 0.02  # of the image's diagonal: the width of a boundary region, as in the authors' code for whole images
_NONE = 2**16 - 1  # stands for what is outside of the image


def boundary_counts(predicted: Tensor, truth: Tensor, classes: int, ignore_index: int = 255) -> np.ndarray:
    """Count the pixels in which the boundary regions of the predicted and the true classes meet.

    The boundary region of a class are its pixels that are close to another class or to the border of the image, as the
    authors' erosion finds them. Ignored pixels belong to no region, and their edge is no boundary.

    Args:
        predicted, truth: class ids (H, W).
        classes: their number, C, at most 65,533.
        ignore_index: ground truth that does not count.

    Returns:
        (2, C), int64: pixels in the intersection and in the union of the two regions of each class.
    """
    predicted, truth = (ids.cpu().numpy().astype(np.int64) for ids in (predicted, truth))
    counted = (truth >= 0) & (truth < classes) & (truth != ignore_index)
    width = max(1, round(RATIO * float(np.hypot(*truth.shape))))
    inside = [_boundary(ids, counted, width) for ids in (predicted, truth)]
    areas = [_pixels(ids, region, classes) for ids, region in zip((predicted, truth), inside, strict=True)]
    both = _pixels(truth, inside[0] & inside[1] & (predicted == truth), classes)
    return np.stack([both, areas[0] + areas[1] - both])


def _boundary(ids: np.ndarray, counted: np.ndarray, width: int) -> np.ndarray:
    """Which counted pixels have a pixel of another class, or the outside, at a chessboard distance of ``width``."""
    values = np.where(counted, np.clip(ids, -1, _NONE - 2) + 1, 0).astype(np.uint16)
    square = np.ones((3, 3), np.uint8)
    # Ignored pixels are the lowest value of the maximum and the highest of the minimum.
    greatest = cv2.dilate(cv2.copyMakeBorder(values, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=_NONE), square)[1:-1, 1:-1]
    least = cv2.erode(np.where(counted, values, _NONE), square)
    edge = counted & (greatest != least)
    distance = cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_C, 3)
    return counted & (distance < width)


def _pixels(ids: np.ndarray, region: np.ndarray, classes: int) -> np.ndarray:
    found = ids[region]
    return np.bincount(found[(found >= 0) & (found < classes)], minlength=classes)


def boundary_iou(images: Sequence[dict]) -> dict | None:
    """Boundary IoU of all images, from 0 to 1.

    Args:
        images: of :class:`~mmseg_volo.evaluation.ConfusionIoUMetric`.

    Returns:
        ``iou`` of each class, None for a class without a boundary; ``mIoU``, their mean; and ``ratio``, the width of a
        region in diagonals of the image. None where it was not measured.
    """
    measured = [image['boundary'] for image in images if 'boundary' in image]
    if not measured or not (total := sum(measured))[1].any():
        return None
    iou = [round(both / either, 6) if either else None for both, either in total.T.tolist()]
    known = [value for value in iou if value is not None]
    return dict(iou=iou, mIoU=round(sum(known) / len(known), 6), ratio=RATIO)
