"""The matrices of an axis against mmseg's chain of resizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmseg_volo.models.streaming import Axis

CPU = torch.device('cpu')


def resized(x: torch.Tensor, size: int, align_corners: bool) -> torch.Tensor:
    return F.interpolate(x[None, None], size, mode='linear', align_corners=align_corners)[0, 0]


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize(
    ('length', 'window', 'stride', 'size', 'out', 'before', 'after'),
    [
        (96, 64, 43, 8, 91, 0, 5),  # an overlap, padding at the end
        (200, 64, 20, 8, 130, 3, 0),  # every pixel in up to four windows
        (48, 64, 43, 6, 70, 0, 0),  # smaller than the window, upsampled
        (128, 64, 64, 64, 128, 0, 0),  # no overlap, logits of the window's size
        (64, 64, 64, 9, 1, 0, 1),
    ],
)
def test_matrix_equals_the_resizes_of_mmseg(length, window, stride, size, out, before, after, flip, align_corners):
    axis = Axis(length, window, stride, out, before, after, flip, align_corners)
    logits = torch.randn(len(axis.starts), size, dtype=torch.float64)
    total, count = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    # The loop of EncoderDecoder.slide_inference.
    for i in range(max(length - window + stride - 1, 0) // stride + 1):
        end = min(i * stride + window, length)
        start = max(end - window, 0)
        total[start:end] += resized(logits[i], end - start, align_corners)
        count[start:end] += 1
    assert count.min() > 0
    view = (total / count)[before : length - after]
    expected = resized(view.flip(0) if flip else view, out, align_corners)

    step = 40
    for (first, last), (parts, matrix, _) in zip(axis.pieces(step), axis.plan(step, size, CPU), strict=True):
        assert {i for i, *_ in parts} <= set(axis.windows(first, last))
        got = matrix.double() @ torch.cat([logits[i, low:high] for i, low, high in parts])
        torch.testing.assert_close(got, expected[first:last], rtol=1e-5, atol=1e-5)


def test_short_band_needs_few_windows_and_few_logits():
    axis = Axis(10500, 512, 341, 6000)
    assert len(axis.starts) == 31 and axis.windows(0, 64) == [0] and axis.windows(3000, 3064) == [14, 15]
    plan = axis.plan(64, 64, CPU)
    assert max(piece.matrix.shape[1] for piece in plan) < 60
    # Window 14 starts at pixel 4774 of the view, which is 2728 of the result; its 512 pixels have 64 logits.
    assert plan[2700 // 64].needed[14] == (0, 64) and 14 not in plan[3100 // 64].needed
    low, high = plan[2900 // 64].needed[14]
    assert high == 64 and 30 < low < 40


def linear(out: int, size: int, align_corners: bool) -> np.ndarray:
    """The matrix (out, size) of a linear resize."""
    line = torch.eye(size, dtype=torch.float64)[None]
    return F.interpolate(line, out, mode='linear', align_corners=align_corners)[0].T.numpy()


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(
    ('length', 'window', 'stride', 'size', 'out', 'step'),
    [
        (200, 64, 20, 8, 130, 40),  # every pixel in up to four windows
        (96, 64, 43, 8, 300, 64),  # upsampled
        (900, 32, 32, 4, 5, 2),  # so small that some windows have no pixel in the result
        (70, 70, 70, 9, 70, 512),  # one window, one piece
    ],
)
def test_matrix_equals_the_dense_product(length, window, stride, size, out, step, align_corners):
    axis = Axis(length, window, stride, out, align_corners=align_corners)
    hits = np.zeros(length)
    for start in axis.starts:
        hits[start : start + window] += 1
    whole = linear(out, length, align_corners) / hits
    upsample = linear(window, size, align_corners)
    plan = axis.plan(step, size, CPU)
    for (first, last), piece in zip(axis.pieces(step), plan, strict=True):
        found = np.zeros((last - first, len(axis.starts), size))
        done = 0
        for i, low, high in piece.parts:
            found[:, i, low:high] = piece.matrix[:, done : done + high - low]
            done += high - low
        assert done == piece.matrix.shape[1] and piece.matrix.dtype == torch.float32
        for i, start in enumerate(axis.starts):
            expected = whole[first:last, start : start + window] @ upsample
            np.testing.assert_allclose(found[:, i], expected, rtol=0, atol=1e-7)
    assert len({piece.matrix.untyped_storage().data_ptr() for piece in plan}) == 1  # one copy to the device


@pytest.mark.gpu
def test_matrices_on_a_gpu(gpu):
    axis = Axis(200, 64, 20, 130)
    for one, other in zip(axis.plan(40, 8, CPU), axis.plan(40, 8, torch.device(gpu)), strict=True):
        assert one.parts == other.parts and torch.equal(one.matrix, other.matrix.cpu())
