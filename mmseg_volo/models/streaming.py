"""Merge windows into an image one narrow band at a time, without logits of the image's size.

Between the decode head and the softmax or argmax, mmseg applies only linear maps: it upsamples the logits of each
window to the window, averages overlapping windows, removes padding, flips the view back and resizes it to the original
image (``EncoderDecoder.slide_inference``, ``BaseDecodeHead.predict_by_feat``, ``BaseSegmentor.postprocess_result``).
Each map is separable into rows and columns, so the whole chain is

    result = sum over windows (i, j) of  rows_i @ logits_ij @ columns_j^T

with two small, sparse matrices per window (:class:`Axis`). :func:`stream` walks along the result in narrow bands, runs
the network on the windows that a band needs, and drops their small logits after the last band that needs them. Besides
the image and its class ids, memory grows only with the image's shorter side.

Shapes: C classes; h, w size of the decode head's logits for one window; n windows across the walk; R, T pixels of a
tile along the walk and across it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Elements (R x C x T) of a tile, and T: a tile fits a CPU's cache, or keeps a GPU busy. An H200 merges ten views of
# 1024 x 2048 in 8.8 ms (19 classes) and 69 ms (150 classes); with T = 4096 in 9.5 and 84 ms, since the matrices are
# nearly all zeros; with T = 256 in 25 and 85 ms.
_TILE = {'cpu': (2**18, 128), 'cuda': (2**25, 512)}
_MAX_BAND = {'cpu': 128, 'cuda': 512}
# Rows per slice: logits of windows are stored in slices, which are freed one by one. On a GPU few copies matter more.
_SLICE = {'cpu': 8, 'cuda': 4096}


class Piece(NamedTuple):
    """How results ``first``...``last - 1`` of an axis are computed from the windows' logits.

    Attributes:
        parts: ``(window, low, high)`` for each window used: its logits ``low``...``high - 1`` are.
        matrix: (last - first, number of these logits) in float32.
        needed: ``{window: (low, high)}``, the logits that this or a later piece uses.
    """

    parts: list[tuple[int, int, int]]
    matrix: Tensor
    needed: dict[int, tuple[int, int]]


class Axis:
    """One axis of a view: how the logits of its windows become rows (or columns) of the result.

    Args:
        length: length of the view in pixels, including padding.
        window, stride: of the sliding windows, in pixels; a longer window is cut to ``length``.
        out: length of the result in pixels.
        before, after: padding of the view in pixels.
        flip: whether the view is flipped along this axis.
        align_corners: as in ``F.interpolate``.
    """

    def __init__(
        self,
        length: int,
        window: int,
        stride: int,
        out: int,
        before: int = 0,
        after: int = 0,
        flip: bool = False,
        align_corners: bool = False,
    ):
        self.out, self.align_corners = out, align_corners
        # The windows of EncoderDecoder.slide_inference: the last one ends at the end of the view.
        count = max(length - window + stride - 1, 0) // stride + 1
        self.window = min(window, length)
        self.starts = [max(min(i * stride + window, length) - window, 0) for i in range(count)]
        hits = np.zeros(length)
        for start in self.starts:
            hits[start : start + self.window] += 1
        self._share = 1 / hits
        valid = length - before - after
        below, above, weight = _linear_taps(out, valid, align_corners)
        if flip:
            below, above = valid - 1 - below, valid - 1 - above
        self._taps = below + before, above + before, weight
        self._plans: dict[tuple, list[Piece]] = {}

    def windows(self, first: int, last: int) -> list[int]:
        """Indices of the windows that results ``first``...``last - 1`` depend on."""
        low, high = self._span(first, last)
        return [i for i, start in enumerate(self.starts) if start < high and start + self.window > low]

    def pieces(self, step: int) -> list[tuple[int, int]]:
        """Split the results into pieces of length ``step``, each ``(first, last)``."""
        return [(first, min(first + step, self.out)) for first in range(0, self.out, step)]

    def plan(self, step: int, size: int, device: torch.device) -> list[Piece]:
        """The :class:`Piece` for each of :meth:`pieces`, cached.

        Args:
            step: length of a piece.
            size: length of a window's logits along this axis.
            device: device of the matrices.
        """
        key = step, size, device
        if key not in self._plans:
            pieces = [self._matrix(first, last, size) for first, last in self.pieces(step)]
            matrices = _copied_at_once([matrix for _, matrix in pieces], device)
            needed: dict[int, tuple[int, int]] = {}
            plan = []
            for (parts, _), matrix in zip(reversed(pieces), reversed(matrices), strict=True):
                for i, low, high in parts:
                    low_later, high_later = needed.get(i, (low, high))
                    needed[i] = min(low, low_later), max(high, high_later)
                plan.insert(0, Piece(parts, matrix, dict(needed)))
            self._plans[key] = plan
        return self._plans[key]

    def _span(self, first: int, last: int) -> tuple[int, int]:
        positions = np.concatenate([taps[first:last] for taps in self._taps[:2]])
        return int(positions.min()), int(positions.max()) + 1

    def _matrix(self, first: int, last: int, size: int) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        # Each result lies between two pixels of the view, and each pixel between two logits of each window.
        pixels = np.stack([taps[first:last] for taps in self._taps[:2]])  # (2, results)
        weight = self._taps[2][first:last]
        shares = np.stack([1 - weight, weight]) * self._share[pixels]
        below, above, weight = _linear_taps(self.window, size, self.align_corners)
        parts, matrices = [], []
        for i in self.windows(first, last):
            places = pixels - self.starts[i]
            inside = (places >= 0) & (places < self.window)
            if not inside.any():
                continue
            place, share, row = places[inside], shares[inside], inside.nonzero()[1]
            base, top = int(below[place].min()), int(above[place].max()) + 1
            # (results, logits of the window); weights of taps with the same place add up.
            shape = last - first, top - base
            where = np.concatenate([row * shape[1] + logit[place] - base for logit in (below, above)])
            values = np.concatenate([share * (1 - weight[place]), share * weight[place]])
            parts.append((i, base, top))
            matrices.append(np.bincount(where, values, shape[0] * shape[1]).reshape(shape))
        return parts, np.concatenate(matrices, 1)


def _copied_at_once(matrices: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy matrices to a device in float32, all in one copy and one allocation."""
    # Many small tensors between large ones would keep a CPU's heap from shrinking. A copy from pinned memory does not
    # wait for the device. Each matrix is aligned to 64 elements, where a GPU reads fastest.
    places = np.cumsum([0, *(-(-matrix.size // 64) * 64 for matrix in matrices)])
    memory = torch.empty(int(places[-1]), pin_memory=device.type == 'cuda')
    for matrix, place in zip(matrices, places, strict=False):
        memory.numpy()[place : place + matrix.size] = matrix.ravel()
    memory = memory.to(device, non_blocking=True)
    return [
        memory[place : place + matrix.size].view(matrix.shape) for matrix, place in zip(matrices, places, strict=False)
    ]


# Images of one size share their axes, and so the matrices.
axis = lru_cache(maxsize=64)(Axis)


def _linear_taps(out: int, size: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Taps of a linear resize from ``size`` to ``out`` points, as ``F.interpolate`` defines it.

    Returns:
        For each result the two points between which it lies, and the weight of the second.
    """
    position = np.arange(out, dtype=np.float64)
    if align_corners:
        position *= (size - 1) / (out - 1) if out > 1 else 0
    else:
        position = np.maximum((position + 0.5) * (size / out) - 0.5, 0)
    below = np.minimum(position.astype(np.int64), size - 1)
    return below, np.minimum(below + 1, size - 1), position - below


class View:
    """One view of an image: its windows, and the logits of windows that are still needed.

    The walk goes along the longer side of the result, since fewer windows fit across the shorter side.

    Args:
        crop: returns the preprocessed window (channels, height, width) at ``(top, left, height, width)``.
        rows, columns: the view's axes.
        transposed: walk along the columns; default: if the result is wider than high.
        known: keeps the logits of the last windows in which all pixels were equal, as where a scene has no data, so
            that they are computed once. It is for windows from a file: to look at the pixels is to wait for a GPU.

    Attributes:
        shape: (height, width) of the result.
        transposed: whether the walk goes along the columns of the result.
        along, across: the axes along the walk and across it.
    """

    def __init__(
        self,
        crop: Callable[[int, int, int, int], Tensor],
        rows: Axis,
        columns: Axis,
        transposed: bool | None = None,
        known: dict[tuple, Tensor] | None = None,
    ):
        self.crop, self.rows, self.columns, self.known = crop, rows, columns, known
        self.shape = rows.out, columns.out
        self.transposed = columns.out > rows.out if transposed is None else transposed
        self.along, self.across = (columns, rows) if self.transposed else (rows, columns)
        self._size = 0, 0  # h, w
        # Slices (rows, C, n, w) by window index along the walk and first row, as long as they are needed.
        self._logits: dict[int, dict[int, Tensor]] = {}
        self._spare: list[Tensor] = []  # dropped slices, to be reused

    @property
    def window_shape(self) -> tuple[int, int]:
        """(height, width)."""
        shape = self.along.window, self.across.window
        return shape[::-1] if self.transposed else shape

    def missing(self, first: int, last: int) -> list[tuple['View', int, int]]:
        """The windows without logits that ``first``...``last - 1`` along the result need."""
        needed = [i for i in self.along.windows(first, last) if i not in self._logits]
        return [(self, i, j) for i in needed for j in range(len(self.across.starts))]

    def window(self, i: int, j: int) -> Tensor:
        corner = self.along.starts[i], self.across.starts[j]
        return self.crop(*(corner[::-1] if self.transposed else corner), *self.window_shape)

    def put(self, i: int, j: int, logits: Tensor) -> None:
        """Store the logits (C, height, width) of window ``i, j``."""
        logits = (logits.mT if self.transposed else logits).transpose(0, 1)  # h, C, w
        h, C, w = logits.shape
        self._size = h, w
        step = min(self._slice(logits.device), h)
        slices = self._logits.setdefault(i, {})
        for low in range(0, h, step):
            if low not in slices:
                shape = step, C, len(self.across.starts), w
                slices[low] = self._spare.pop() if self._spare else torch.empty(shape, device=logits.device)
            part = logits[low : low + step]
            slices[low][: len(part), :, j] = part

    def drop(self, step: int, k: int, device: torch.device) -> None:
        """Drop the logits that no piece after the ``k``-th needs."""
        plan = self.along.plan(step, self._size[0], device)
        needed = plan[k + 1].needed if k + 1 < len(plan) else {}
        rows = self._slice(device)
        for i, slices in list(self._logits.items()):
            begin, end = needed.get(i, (0, 0))
            for low in [low for low in slices if low >= end or low + rows <= begin]:
                dropped = slices.pop(low)
                if not dropped.requires_grad:  # otherwise the backward pass may read it
                    self._spare.append(dropped)
            if not slices:
                del self._logits[i]

    @staticmethod
    def _slice(device: torch.device) -> int:
        return _SLICE.get(device.type, _SLICE['cuda'])

    def fold_along(self, step: int, k: int, device: torch.device) -> Tensor:
        """Merge along the walk: the ``k``-th piece, (R, C, n, w), still in windows across the walk."""
        folded, done, rows = None, 0, self._slice(device)
        piece = self.along.plan(step, self._size[0], device)[k]
        for i, low, high in piece.parts:
            for begin in range(low // rows * rows, high, rows):
                a, b = max(low, begin), min(high, begin + rows)
                logits = self._logits[i][begin][a - begin : b - begin]
                weights, done = piece.matrix[:, done : done + b - a], done + b - a
                if folded is None:
                    folded, shape = weights @ logits.flatten(1), logits.shape[1:]
                else:
                    folded.addmm_(weights, logits.flatten(1))
        return folded.view(-1, *shape)

    def fold_across(self, folded: Tensor, step: int, k: int) -> Tensor:
        """Merge the result of :meth:`fold_along` across the walk: the ``k``-th piece, (R, C, T)."""
        R, C, _, w = folded.shape
        parts, matrix, _ = self.across.plan(step, w, folded.device)[k]
        logits = [folded[:, :, j, low:high].flatten(0, 1) for j, low, high in parts]
        logits = torch.cat(logits, 1) if len(logits) > 1 else logits[0]
        return (logits @ matrix.T).view(R, C, -1)


def stream(
    images: Sequence[Sequence[View]],
    encode: Callable[[list[tuple[View, int, int]]], None],
    classes: int,
    device: torch.device,
) -> Iterator[tuple[int, slice, slice, Iterator[Tensor]]]:
    """Walk over images tile by tile.

    Args:
        images: the views of each image; the results of all its views have the same size.
        encode: runs the network on windows and stores their logits with :meth:`View.put`.
        classes: C.
        device: device of the logits.

    Yields:
        Index of the image; slices of the tile along and across the walk (columns and rows if the views are
        ``transposed``); an iterator over the views' logits (R, C, T) in this tile.
    """
    elements, step_across = _TILE.get(device.type, _TILE['cuda'])
    limit = _MAX_BAND.get(device.type, _MAX_BAND['cuda'])
    steps, bands, tiles = [], [], []
    for views in images:
        along, across = views[0].along, views[0].across
        steps.append(min(max(elements // (classes * min(step_across, across.out)), 8), limit))
        bands.append(along.pieces(steps[-1]))
        tiles.append(across.pieces(step_across))
    for k in range(max(map(len, bands))):
        running = [n for n in range(len(images)) if k < len(bands[n])]
        encode([window for n in running for view in images[n] for window in view.missing(*bands[n][k])])
        for n in running:
            folded = [(view, view.fold_along(steps[n], k, device)) for view in images[n]]
            for t, tile in enumerate(tiles[n]):
                of_views = (view.fold_across(band, step_across, t) for view, band in folded)
                yield n, slice(*bands[n][k]), slice(*tile), of_views
            for view in images[n]:
                view.drop(steps[n], k, device)
