"""From windows to the picture a band of rows at a time, without logits of the picture's size.

Between the decode head and the softmax or argmax mmseg does nothing but linear maps: the logits of each window are
upsampled to the window, overlapping windows are averaged, padding is taken off, the view is flipped back and resized
to the original picture (``EncoderDecoder.slide_inference``, ``BaseDecodeHead.predict_by_feat``,
``BaseSegmentor.postprocess_result``). Each of them acts on rows and on columns apart, so the whole chain is

    result = sum over windows (i, j) of  rows_i @ logits_ij @ columns_j^T

with two small matrices per window, nearly all zeros, which :class:`Axis` makes. :func:`stream` walks down the result in
bands of rows, runs the network on the windows that the band needs, and keeps their small logits only as long as a band
needs them. Memory grows with the width of the picture, whatever its height, the classes only with the band.

Shapes: C classes; h, w what the decode head returns for one window; n windows side by side; R, T the tile's rows and
columns.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Elements (R x C x T) of the tiles that logits of the picture's size exist in, and T: on a CPU such that a tile stays
# in the cache, on a GPU such that it is busy.
_TILE = {'cpu': (2**18, 128), 'cuda': (2**25, 4096)}
_MAX_BAND = {'cpu': 128, 'cuda': 4096}


class Axis:
    """One axis of one view: how the logits of its windows become rows (or columns) of the result.

    Args:
        length: pixels of the view, padding included.
        window, stride: of the sliding windows, in pixels; a window over ``length`` is cut to it.
        out: pixels of the result.
        before, after: padding in the view, in pixels.
        flip: the view is mirrored along this axis.
        align_corners: how logits are resized, as in ``F.interpolate``.
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
        # The windows of EncoderDecoder.slide_inference: the last one ends with the view.
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
        self._matrices: dict[tuple, list] = {}

    def windows(self, first: int, last: int) -> list[int]:
        """Indices of the windows that the results ``first``...``last - 1`` come from."""
        low, high = self._span(first, last)
        return [i for i, start in enumerate(self.starts) if start < high and start + self.window > low]

    def pieces(self, step: int) -> list[tuple[int, int]]:
        """The results in pieces of ``step``, each as ``first, last``."""
        return [(first, min(first + step, self.out)) for first in range(0, self.out, step)]

    def matrices(self, step: int, size: int, device: torch.device) -> list[tuple[list[tuple], Tensor]]:
        """For each piece of the results, the matrix that it comes from the windows' logits by, its zeros left out.

        Args:
            step: of :meth:`pieces`.
            size: length of a window's logits along this axis.
            device: of the matrices.

        Returns:
            For each piece the logits that take part, as ``(window, low, high)`` for each window that does, and the
            matrix (last - first, all these logits in order), float32.
        """
        key = step, size, device
        if key not in self._matrices:
            # All at once: small tensors made between large ones that come and go would keep the heap from shrinking.
            self._matrices[key] = [self._matrix(first, last, size, device) for first, last in self.pieces(step)]
        return self._matrices[key]

    def _span(self, first: int, last: int) -> tuple[int, int]:
        positions = np.concatenate([taps[first:last] for taps in self._taps[:2]])
        return int(positions.min()), int(positions.max()) + 1

    def _matrix(self, first: int, last: int, size: int, device: torch.device) -> tuple[list[tuple], Tensor]:
        low, high = self._span(first, last)
        # rows of the result x pixels of the view
        resize = np.zeros((last - first, high - low))
        below, above, weight = (taps[first:last] for taps in self._taps)
        index = np.arange(last - first)
        np.add.at(resize, (index, below - low), 1 - weight)
        np.add.at(resize, (index, above - low), weight)
        resize *= self._share[low:high]

        parts, matrices = [], []
        below, above, weight = _linear_taps(self.window, size, self.align_corners)
        for i in self.windows(first, last):
            start = self.starts[i]
            a, b = max(low, start), min(high, start + self.window)
            inside = slice(a - start, b - start)
            base, top = int(below[inside].min()), int(above[inside].max()) + 1
            # pixels of the view x logits of the window
            upsample = np.zeros((b - a, top - base))
            index = np.arange(b - a)
            np.add.at(upsample, (index, below[inside] - base), 1 - weight[inside])
            np.add.at(upsample, (index, above[inside] - base), weight[inside])
            parts.append((i, base, top))
            matrices.append(resize[:, a - low : b - low] @ upsample)
        matrix = torch.from_numpy(np.concatenate(matrices, 1).astype(np.float32))
        if device.type == 'cuda':  # from pinned memory the copy does not wait for the device
            matrix = matrix.pin_memory()
        return parts, matrix.to(device, non_blocking=True)


# Pictures of one size share their axes, and with them the matrices.
axis = lru_cache(maxsize=64)(Axis)


def _linear_taps(out: int, size: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A linear resize from ``size`` to ``out`` points, as ``F.interpolate`` defines it.

    Returns:
        For each result the two points that it lies between, and the weight of the second.
    """
    position = np.arange(out, dtype=np.float64)
    if align_corners:
        position *= (size - 1) / (out - 1) if out > 1 else 0
    else:
        position = np.maximum((position + 0.5) * (size / out) - 0.5, 0)
    below = np.minimum(position.astype(np.int64), size - 1)
    return below, np.minimum(below + 1, size - 1), position - below


class View:
    """One view of a picture: windows to look at, and the logits of those that are still needed.

    Args:
        crop: gives the window (channels, height, width), ready for the network, at ``(top, left, height, width)``.
        rows, columns: the view's axes.
    """

    def __init__(self, crop: Callable[[int, int, int, int], Tensor], rows: Axis, columns: Axis):
        self.crop, self.rows, self.columns = crop, rows, columns
        self._logits: dict[int, Tensor] = {}  # row of windows: (h, C, n, w)
        self._spare: list[Tensor] = []

    @property
    def window_shape(self) -> tuple[int, int]:
        return self.rows.window, self.columns.window

    def missing(self, first: int, last: int) -> list[tuple['View', int, int]]:
        """The windows that rows ``first``...``last - 1`` of the result need and that have no logits yet."""
        needed = [i for i in self.rows.windows(first, last) if i not in self._logits]
        return [(self, i, j) for i in needed for j in range(len(self.columns.starts))]

    def window(self, i: int, j: int) -> Tensor:
        return self.crop(self.rows.starts[i], self.columns.starts[j], *self.window_shape)

    def put(self, i: int, j: int, logits: Tensor) -> None:
        """Keep the logits (C, h, w) of window ``i, j``."""
        C, h, w = logits.shape
        if i not in self._logits:
            shape = (h, C, len(self.columns.starts), w)
            new = not self._spare
            self._logits[i] = torch.empty(shape, device=logits.device) if new else self._spare.pop()
        self._logits[i][:, :, j] = logits.transpose(0, 1)

    def keep(self, first: int, last: int) -> None:
        """Forget what rows ``first``...``last - 1`` of the result do not need."""
        needed = self.rows.windows(first, last)
        for i in [i for i in self._logits if i not in needed]:
            dropped = self._logits.pop(i)
            if not dropped.requires_grad:  # else the backward pass may still read it
                self._spare.append(dropped)

    def fold_rows(self, step: int, k: int) -> Tensor:
        """The ``k``-th ``step`` rows of the result, columns still those of the windows: (R, C, n, w)."""
        shape = next(iter(self._logits.values())).shape
        folded = None
        parts, matrix = self.rows.matrices(step, shape[0], self._device)[k]
        of_part = matrix.split([high - low for _, low, high in parts], 1)
        for (i, low, high), weights in zip(parts, of_part, strict=True):
            logits = self._logits[i][low:high].flatten(1)
            folded = weights @ logits if folded is None else folded.addmm_(weights, logits)
        return folded.view(-1, *shape[1:])

    def fold_columns(self, folded: Tensor, step: int, k: int) -> Tensor:
        """The ``k``-th ``step`` columns of what :meth:`fold_rows` gave: (R, C, T)."""
        R, C, _, w = folded.shape
        parts, matrix = self.columns.matrices(step, w, self._device)[k]
        logits = torch.cat([folded[:, :, j, low:high] for j, low, high in parts], 2)
        return (logits.view(R * C, -1) @ matrix.T).view(R, C, -1)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._logits.values())).device


def stream(
    pictures: Sequence[Sequence[View]], encode: Callable[[list[tuple[View, int, int]]], None], classes: int, device: str
) -> Iterator[tuple[int, slice, slice, Iterator[Tensor]]]:
    """Walk over pictures tile by tile.

    Args:
        pictures: the views of each picture; all views of one give a result of the same size.
        encode: runs the network on windows and puts their logits where they belong (:meth:`View.put`).
        classes: C.
        device: type of the device, 'cpu' or 'cuda', which sets the size of the tiles.

    Yields:
        Index of the picture; rows and columns of the tile; for each view, in order, its logits there (R, C, T).
    """
    elements, step_across = _TILE.get(device, _TILE['cuda'])
    limit = _MAX_BAND.get(device, _MAX_BAND['cuda'])
    steps, bands, tiles = [], [], []
    for views in pictures:
        rows, columns = views[0].rows, views[0].columns
        steps.append(min(max(elements // (classes * min(step_across, columns.out)), 8), limit))
        bands.append(rows.pieces(steps[-1]))
        tiles.append(columns.pieces(step_across))
    for k in range(max(map(len, bands))):
        running = [n for n in range(len(pictures)) if k < len(bands[n])]
        encode([window for n in running for view in pictures[n] for window in view.missing(*bands[n][k])])
        for n in running:
            folded = [(view, view.fold_rows(steps[n], k)) for view in pictures[n]]
            for t, (left, right) in enumerate(tiles[n]):
                of_views = (view.fold_columns(rows, step_across, t) for view, rows in folded)
                yield n, slice(*bands[n][k]), slice(left, right), of_views
            if k + 1 < len(bands[n]):
                for view in pictures[n]:
                    view.keep(*bands[n][k + 1])
