"""Boundary IoU against the definition of the paper, a pixel at a time."""

import math

import cv2
import numpy as np
import pytest
import torch

from mmseg_volo.evaluation.boundary import boundary_counts, boundary_iou

CLASSES = 4


def blobs(height: int, width: int, seed: int, classes: int = CLASSES) -> np.ndarray:
    """Smooth regions of random classes."""
    coarse = np.random.default_rng(seed).normal(size=(classes, 5, 6)).astype(np.float32)
    return np.stack([cv2.resize(one, (width, height), interpolation=cv2.INTER_CUBIC) for one in coarse]).argmax(0)


def region(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask that have a pixel outside of it, or of the image, at a distance of at most ``width``."""
    padded = np.pad(mask, width)
    rows, columns = mask.shape
    out = np.zeros_like(mask)
    for i in range(rows):
        for k in range(columns):
            out[i, k] = mask[i, k] and not padded[i : i + 2 * width + 1, k : k + 2 * width + 1].all()
    return out


def expected(predicted: np.ndarray, truth: np.ndarray, width: int) -> np.ndarray:
    out = np.zeros((2, CLASSES), np.int64)
    for c in range(CLASSES):
        one, other = (region(ids == c, width) for ids in (predicted, truth))
        out[:, c] = (one & other).sum(), (one | other).sum()
    return out


# The diagonals give regions of 1 (the least), 2 and 3 pixels.
@pytest.mark.parametrize(('height', 'width', 'distance'), [(20, 24, 1), (61, 75, 2), (90, 120, 3)])
def test_the_regions_are_those_of_the_erosion(height, width, distance):
    assert max(1, round(0.02 * math.hypot(height, width))) == distance
    truth, predicted = blobs(height, width, 1), blobs(height, width, 1)
    predicted[:, 5:] = truth[:, :-5]
    found = boundary_counts(torch.from_numpy(predicted), torch.from_numpy(truth), CLASSES)
    assert found.tolist() == expected(predicted, truth, distance).tolist()
    assert (found[1] > found[0]).all() and found[0].any()
    same = boundary_counts(torch.from_numpy(truth), torch.from_numpy(truth), CLASSES)
    assert (same[0] == same[1]).all()


def test_ignored_pixels_and_what_is_no_class():
    """An ignored stripe between two classes is not their boundary, and what is predicted there does not count."""
    truth = np.zeros((60, 80), np.int64)
    truth[:, 40:] = 1
    truth[:, 36:44] = 255
    found = []
    for seed in (0, 1):
        predicted = truth.copy()
        predicted[:, 36:44] = blobs(60, 8, seed)
        found.append(boundary_counts(torch.from_numpy(predicted), torch.from_numpy(truth), CLASSES))
    assert (found[0] == found[1]).all()
    frame = 36 * 60 - (36 - 2) * (60 - 4)  # two pixels along the border of the image, none along the stripe
    assert found[0].tolist() == [[frame, frame, 0, 0]] * 2
    predicted[0] = 9  # no class of the data set: it counts nowhere, and its edge is a boundary
    found = boundary_counts(torch.from_numpy(predicted), torch.from_numpy(truth), CLASSES)
    assert found[1].sum() >= found[0].sum() and found.shape == (2, CLASSES)


def test_pixels_of_all_images_are_summed():
    images = [dict(boundary=np.array([[2, 0, 0], [4, 5, 0]])), {}, dict(boundary=np.array([[1, 0, 0], [4, 0, 0]]))]
    assert boundary_iou(images) == dict(iou=[3 / 8, 0.0, None], mIoU=3 / 16, ratio=0.02)
    assert boundary_iou([{}]) is None
    assert boundary_iou([dict(boundary=np.zeros((2, 3), np.int64))]) is None
