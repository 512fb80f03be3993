"""Cross entropy of logits that are upsampled on the fly: Triton kernels for ``upsampled_cross_entropy.py``.

A "cell" is the pixels between rows i and i + 1 of the logits, whose first source row is i. A thread owns a column of
pixels: it interpolates two columns of logits once per cell, and then needs one multiplication per pixel and class.
Neighbouring threads own neighbouring columns. Exponents have base 2: the interpolation weights include log2(e).

    loss[y, x]         = weight[label] (log sum over c of exp(z[c, y, x]) - z[label, y, x])
    grad z[c, y, x]    = weight[label] (exp(z[c, y, x] - logsumexp[y, x]) - [c == label])
    grad logits[c, i, j] = sum over y and x of hat(y - i) hat(x - j) grad z[c, y, x]

A program of the backward pass owns a block of logits and sums their gradient, so there are no atomic additions and
results are bitwise reproducible. It walks down the rows; only along x is each pixel computed twice. Importing this
module imports Triton.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .gpu import on_device

# Forward: columns and rows of pixels per program. Backward: threads, classes and rows of logits per program.
_COLUMNS, _PIXEL_ROWS = 128, 8
_LANES, _CLASSES, _ROWS = 128, 4, 16  # tuned on an H200: 1.68 ms with 4 classes, 1.90 with 8, 2.12 with 16
_IGNORED, _UNKNOWN = tl.constexpr(-1), tl.constexpr(-2)  # targets that are not a class
_SIZES = 'C', 'h', 'w', 'H', 'W', 'tiles'


@triton.jit
def _column(a, b, left, right):
    """Interpolate two columns, times log2(e). The explicit fma makes all calls round alike."""
    return tl.fma(right, b.to(tl.float32), left * a.to(tl.float32))


@triton.jit
def _sources(index, fraction, place, live, size):
    """The two source indices of each pixel of a row or column, and their weights."""
    first = tl.load(index + place, mask=live, other=0)
    share = tl.load(fraction + place, mask=live, other=0.0)
    return first, tl.minimum(first + 1, size - 1), 1.0 - share, share


@triton.jit(do_not_specialize=(*_SIZES, 'ignore_index'))
def _forward_kernel(
    logits,  # (B, C, h, w)
    labels,  # (B, H, W) in int64
    weights,  # (C,) in float32; read if WEIGHTED
    index_y,  # (H,) in int32, the cell of each row
    fraction_y,  # (H,) in float32
    index_x,  # (W,)
    fraction_x,  # (W,)
    starts,  # first row of each tile, in int32, and H
    sums,  # loss of each program, in float32
    right_ones,  # number of correct pixels of each program, in int32
    logsumexp,  # (B, H, W) in float32, base 2; written if KEEP
    targets,  # (B, H, W) in int16, -1 for ignored pixels; written if KEEP
    ignore_index,
    C,
    h,
    w,
    H,
    W,
    tiles,  # along x
    WEIGHTED: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Loss, accuracy and log-sum-exp of a tile of pixels, whose rows belong to one cell."""
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(starts + tile // tiles)
    y = start + tl.arange(0, ROWS)
    in_y, in_x = y < tl.load(starts + tile // tiles + 1), x < W
    live = in_y[:, None] & in_x[None, :]
    x0, x1, left, right = _sources(index_x, fraction_x, x, in_x, w)
    left, right = left * LOG2E, right * LOG2E
    down = tl.load(fraction_y + y, mask=in_y, other=0.0)
    cell = tl.load(index_y + start)
    row0, row1 = cell * w, tl.minimum(cell + 1, h - 1) * w
    logits += image * C * h * w

    pixels = (y * W)[:, None] + x[None, :]
    label = tl.load(labels + image * H * W + pixels, mask=live, other=ignore_index)
    target = tl.where((label >= 0) & (label < C), label, _UNKNOWN)
    target = tl.where(live & (label != ignore_index), target, _IGNORED).to(tl.int32)

    top = tl.full((ROWS, COLUMNS), -3.0e38, tl.float32)  # not -inf: -inf minus a logit of -inf is NaN
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_target = tl.zeros((ROWS, COLUMNS), tl.float32)
    best = tl.zeros((ROWS, COLUMNS), tl.int32)
    a, b = tl.load(logits + row0 + x0), tl.load(logits + row0 + x1)
    c, d = tl.load(logits + row1 + x0), tl.load(logits + row1 + x1)
    for k in range(C):
        upper, lower = _column(a, b, left, right), _column(c, d, left, right)
        # Prefetch the next class.
        logits += tl.where(k + 1 < C, h * w, 0)
        a, b = tl.load(logits + row0 + x0), tl.load(logits + row0 + x1)
        c, d = tl.load(logits + row1 + x0), tl.load(logits + row1 + x1)
        z = tl.fma(down[:, None], lower[None, :], (1.0 - down)[:, None] * upper[None, :])
        # One of exp(z - new top) and exp(old top - new top) is 1.
        above = z - top
        power = tl.exp2(-tl.abs(above))
        higher = above > 0
        total = tl.where(higher, tl.fma(total, power, 1.0), total + power)
        best = tl.where(higher, k, best)
        of_target = tl.where(target == k, z, of_target)
        top = tl.maximum(top, z)

    # An infinite logit or an unknown label makes the loss and the gradient NaN.
    broken = (tl.abs(top) == float('inf')) | (target == _UNKNOWN)
    extra = tl.where(broken, float('nan'), tl.log2(total))
    loss = (extra + (top - of_target)) * 0.6931471805599453
    if WEIGHTED:
        loss *= tl.load(weights + target, mask=target >= 0, other=1.0)
    tl.store(sums + image * tl.num_programs(0) + tile, tl.sum(tl.where(target == _IGNORED, 0.0, loss)))
    tl.store(right_ones + image * tl.num_programs(0) + tile, tl.sum((best == target).to(tl.int32)))
    if KEEP:
        kept = tl.where(target == _IGNORED, float('inf'), top + extra)
        tl.store(logsumexp + image * H * W + pixels, kept, mask=live)
        tl.store(targets + image * H * W + pixels, target.to(tl.int16), mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    factor,  # gradient of the loss, one element in float32
    logits,  # (B, C, h, w)
    logsumexp,  # (B, H, W) in float32, base 2
    targets,  # (B, H, W) in int16
    weights,  # (C,) in float32; read if WEIGHTED
    fraction_y,  # (H,) in float32
    first_y,  # (h + 1,) in int32, first pixel row of each cell
    index_x,  # (W,) in int32
    fraction_x,  # (W,) in float32
    begin_x,  # (w,) in int32, first pixel that a column of logits contributes to
    end_x,  # (w,) in int32, the pixel after the last one
    grad,  # (B, C, h, w)
    C,
    h,
    w,
    H,
    W,
    tiles,  # along x
    WEIGHTED: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,  # of logits
    SPAN: tl.constexpr,  # power of two that holds the pixels of a row that a logit contributes to
    ROWS: tl.constexpr,  # of logits
):
    """Gradient of a block of logits; one thread per column of logits and pixel of a row that it contributes to."""
    LOG2E: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(C, CLASSES)
    place, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k = place % blocks * CLASSES + tl.arange(0, CLASSES)
    tile = place // blocks % tiles
    top_row = place // blocks // tiles * ROWS
    lane = tl.arange(0, COLUMNS * SPAN)
    j = tile * COLUMNS + lane // SPAN
    x = tl.load(begin_x + j, mask=j < w, other=0) + lane % SPAN
    live = x < tl.load(end_x + j, mask=j < w, other=0)
    x0, x1, left, right = _sources(index_x, fraction_x, x, live, w)
    share = tl.where(x0 == j, left, right)
    left, right = (left * LOG2E)[None, :], (right * LOG2E)[None, :]
    x0, x1 = x0[None, :], x1[None, :]
    planes = logits + (image * C + k)[:, None] * (h * w)
    read = (k < C)[:, None] & live[None, :]
    logsumexp += image * H * W + x
    targets += image * H * W + x

    upper_sum = tl.zeros((CLASSES, COLUMNS * SPAN), tl.float32)  # gradient of the row of logits above the cell
    lower_sum = tl.zeros((CLASSES, COLUMNS * SPAN), tl.float32)
    first_cell, last_cell = tl.maximum(top_row - 1, 0), tl.minimum(top_row + ROWS, h)
    a = tl.load(planes + first_cell * w + x0, mask=read, other=0.0)
    b = tl.load(planes + first_cell * w + x1, mask=read, other=0.0)
    lower = _column(a, b, left, right)
    y = tl.load(first_y + first_cell)
    # Prefetch the next row of pixels.
    row = tl.minimum(y, H - 1)
    next_down = tl.load(fraction_y + row)
    next_sum = tl.load(logsumexp + row * W, mask=live, other=float('inf'))
    next_target = tl.load(targets + row * W, mask=live, other=-1).to(tl.int32)
    for cell in range(first_cell, last_cell):
        upper = lower
        row = tl.minimum(cell + 1, h - 1) * w
        a = tl.load(planes + row + x0, mask=read, other=0.0)
        b = tl.load(planes + row + x1, mask=read, other=0.0)
        lower = _column(a, b, left, right)
        end = tl.load(first_y + cell + 1)
        while y < end:
            y += 1
            down, sums, target = next_down, next_sum, next_target
            row = tl.minimum(y, H - 1)
            next_down = tl.load(fraction_y + row)
            next_sum = tl.load(logsumexp + row * W, mask=live, other=float('inf'))
            next_target = tl.load(targets + row * W, mask=live, other=-1).to(tl.int32)
            up = 1.0 - down
            hit = target[None, :] == k[:, None]
            value = tl.exp2(tl.fma(down, lower, up * upper) - sums[None, :])
            if WEIGHTED:
                weight = tl.load(weights + target, mask=target >= 0, other=0.0)
                value = (value - tl.where(hit, 1.0, 0.0)) * weight[None, :]
            else:
                value -= tl.where(hit, 1.0, 0.0)
            upper_sum = tl.fma(value, up, upper_sum)
            lower_sum = tl.fma(value, down, lower_sum)
        if cell >= top_row:
            parts = tl.reshape(upper_sum * share[None, :], (CLASSES, COLUMNS, SPAN))
            out = tl.sum(parts, axis=2) * tl.load(factor)
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            to = grad + (image * C + k)[:, None] * (h * w) + (cell * w + column)[None, :]
            tl.store(to, out.to(grad.dtype.element_ty), mask=(k < C)[:, None] & (column < w)[None, :])
        upper_sum = lower_sum
        lower_sum = tl.zeros((CLASSES, COLUMNS * SPAN), tl.float32)


class _Axis(NamedTuple):
    """Which logits the pixels of a row or column read; int32, except for the fraction in float32."""

    index: torch.Tensor  # (out,), the logit before each pixel
    fraction: torch.Tensor  # (out,), weight of the logit after it
    first: torch.Tensor  # (size + 1,), first pixel with each index
    begin: torch.Tensor  # (size,), first pixel that each logit contributes to
    end: torch.Tensor  # (size,), the pixel after the last one
    tiles: torch.Tensor  # first pixel of each tile, which has at most `tile` pixels of one index; then `out`
    tile: int
    span: int  # maximum of pixels that a logit contributes to


@functools.lru_cache(64)
def _axis(size: int, out: int, align_corners: bool, device: torch.device) -> _Axis:
    """Compute the sources as ``torch.nn.functional.interpolate`` does, in float64."""
    if align_corners:
        source = np.arange(out) * ((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        source = np.maximum((np.arange(out) + 0.5) * (size / out) - 0.5, 0.0)
    index = np.minimum(np.floor(source), size - 1)
    fraction = np.where(index < size - 1, source - index, 0.0)
    first = np.searchsorted(index, np.arange(size + 1))
    begin = np.minimum(np.searchsorted(source, np.arange(size) - 1.0, side='right'), first[:-1])
    tile = min(_PIXEL_ROWS, triton.next_power_of_2(int(np.diff(first).max())))
    tiles = [start for one, end in itertools.pairwise(first) for start in range(one, end, tile)]
    arrays = [torch.from_numpy(a.astype(np.int32)) for a in (index, first, begin, first[1:], np.array([*tiles, out]))]
    index, first, begin, end, tiles = (array.to(device) for array in arrays)
    fraction = torch.from_numpy(fraction.astype(np.float32)).to(device)
    span = int((first[1:] - begin).max())
    return _Axis(index, fraction, first, begin, end, tiles, tile, span)


def forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    align_corners: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`mmseg_volo.ops.upsampled_cross_entropy.upsampled_cross_entropy`."""
    logits, labels = logits.contiguous(), labels.contiguous()
    B, C, h, w = logits.shape
    H, W = labels.shape[1:]
    rows, columns = _axis(h, H, align_corners, logits.device), _axis(w, W, align_corners, logits.device)
    tiles = triton.cdiv(W, _COLUMNS)
    grid = tiles * (len(rows.tiles) - 1), B
    sums = torch.empty(math.prod(grid), dtype=torch.float32, device=logits.device)
    right = torch.empty_like(sums, dtype=torch.int32)
    logsumexp = torch.empty(labels.shape if keep else (0,), dtype=torch.float32, device=logits.device)
    targets = torch.empty_like(logsumexp, dtype=torch.int16)
    given = weights if weights is not None else sums  # not read without weights, but the kernel needs an address
    taps = rows.index, rows.fraction, columns.index, columns.fraction, rows.tiles
    tensors = logits, labels, given, *taps, sums, right, logsumexp, targets
    flags = weights is not None, keep, rows.tile, _COLUMNS
    with on_device(logits):
        _forward_kernel[grid](*tensors, ignore_index, C, h, w, H, W, tiles, *flags, num_warps=4)
    return sums.sum(), right.sum(), logsumexp, targets


def backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    align_corners: bool,
) -> torch.Tensor:
    """Gradient of the logits from the gradient of the loss."""
    logits = logits.contiguous()
    B, C, h, w = logits.shape
    H, W = targets.shape[1:]
    rows, columns = _axis(h, H, align_corners, logits.device), _axis(w, W, align_corners, logits.device)
    span = max(2, triton.next_power_of_2(columns.span))
    lanes = max(_LANES, span)
    classes = _CLASSES * (lanes // _LANES)  # with fewer, the widest span spills registers on compute capability 10.0
    tiles = triton.cdiv(w, lanes // span)
    grid = triton.cdiv(C, classes) * tiles * triton.cdiv(h, _ROWS), B
    out = torch.empty_like(logits)
    given = weights if weights is not None else logsumexp
    taps = rows.fraction, rows.first, columns.index, columns.fraction, columns.begin, columns.end
    tensors = grad.float(), logits, logsumexp, targets, given, *taps, out
    flags = weights is not None, classes, lanes // span, span, _ROWS
    with on_device(logits):
        _backward_kernel[grid](*tensors, C, h, w, H, W, tiles, *flags, num_warps=lanes // 32)
    return out
