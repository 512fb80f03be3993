"""Predict TIFF and GeoTIFF scenes of any size window by window, and write GeoTIFFs that keep the georeference."""

import contextlib
import json
import multiprocessing
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..datasets.bands import BandFile, open_bands
from ..errors import DataError
from ..utils.files import atomic_write
from .outputs import OutputError, result_of
from .predictor import Predictor

_BLOCK = 512  # pixels a side of the blocks of a result, and the height of what is written at once
_MOST_AT_ONCE = 2**26  # pixels of an image that is predicted as a whole

Tile = tuple[slice, slice, np.ndarray, np.ndarray | None]  # rows, columns, class ids, confidence


def predict_scene(
    predictor: Predictor, path: Path, folder: Path, target: Path, check: Callable[[], None] = lambda: None
) -> list[str]:
    """Predict a file that the predictor's loader, ``LoadBands``, reads; write the results.

    Only the windows that are due are in memory, unless the pipeline or the model needs the whole image (see
    :meth:`~mmseg_volo.inference.Predictor.needs_whole`).

    Args:
        predictor: the model.
        path: a TIFF.
        folder: the output folder, which gets ``NAME.tif`` with class ids, 255 where the scene has no data (16 bits
            and 65535 for more than 255 classes); and with the option ``confidence`` ``NAME_confidence.tif``, where 255
            means certain, and 0 is written where there is no data. Georeference, colours and class names are in them.
        target: path of the results in the folder, without a suffix.
        check: called between windows; an exception from it ends the prediction, and no result stays.

    Returns:
        The paths of the results below the folder.

    Raises:
        OSError, ValueError: the file cannot be read, or lacks what the model needs.
        OutputError: a result cannot be written.
    """
    loader, confident = predictor.pipeline.bands, predictor.confident
    names = [result_of(target, ending) for ending in ('.tif', '_confidence.tif')[: 1 + confident]]
    try:
        with (
            open_bands(path, loader.bands, loader.fill, num_threads='all_cpus') as file,
            contextlib.ExitStack() as stack,
        ):
            tiles, by_rows = _tiles(predictor, file, check)
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            parts = [stack.enter_context(atomic_write(folder / name)) for name in names]
            strips = []
            for part, name in zip(parts, names, strict=True):
                stack.enter_context(_write_errors(folder / name))
                writer = stack.enter_context(_writer(predictor, file, part, ids=part is parts[0]))
                strips.append(Strips(file, writer, by_rows))
            with contextlib.closing(tiles):
                for rows, columns, classes, confidence in tiles:
                    strips[0].put(rows, columns, classes)
                    if confident:
                        strips[1].put(rows, columns, np.rint(confidence * 255))
            for strip, part, name in zip(strips, parts, names, strict=True):
                with _write_errors(folder / name):
                    strip.finish()
                    strip.compare(part)
    except DataError as error:
        raise ValueError(str(error).removeprefix(f'{path}: ')) from error
    return [str(name) for name in names]


def _tiles(predictor: Predictor, file: BandFile, check: Callable[[], None]) -> tuple[Iterator[Tile], bool]:
    """The tiles of a prediction, and whether they come from top to bottom; otherwise they come from left to right."""
    height, width = file.shape
    if why := predictor.needs_whole:
        if height * width > _MOST_AT_ONCE:
            raise ValueError(f'{width} x {height} pixels are too many to be predicted at once, but {why}')
        return _tiles_of_whole(predictor, file.path, check), True

    def read(top: int, left: int, rows: int, columns: int) -> torch.Tensor:
        if not rows or not columns:  # only padding
            return torch.zeros(len(file.bands), rows, columns)
        return torch.from_numpy(file.read(top, left, rows, columns)[0])

    middle = max(height // 2 - _BLOCK // 2, 0), max(width // 2 - _BLOCK // 2, 0)
    predictor.check(read(*middle, min(_BLOCK, height), min(_BLOCK, width)), file.path)
    # A file in strips is read in whole rows: going along the columns would decode it as a whole for each of them.
    by_rows = height >= width or file.file.block_shapes[0][1] == width
    return _with_bar(predictor, file.shape, read, by_rows, Path(file.path).name, check), by_rows


def _with_bar(
    predictor: Predictor, size: tuple[int, int], read: Callable, by_rows: bool, name: str, check: Callable[[], None]
) -> Iterator[Tile]:
    """Yield the tiles, with a progress bar of windows on a terminal."""
    hidden = True if multiprocessing.parent_process() else None  # None: where stderr is no terminal
    with tqdm(desc=name, unit='window', leave=False, position=1, disable=hidden, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            check()
            bar.total = total
            bar.update(done - bar.n)

        yield from predictor.predict_windows(size, read, by_rows, progress)


def _tiles_of_whole(predictor: Predictor, path: str, check: Callable[[], None]) -> Iterator[Tile]:
    classes, confidence = predictor.predict(predictor.prepare(path), lambda *_: check())
    everything = slice(0, classes.shape[1])
    for top in range(0, len(classes), _BLOCK):
        rows = slice(top, min(top + _BLOCK, len(classes)))
        yield rows, everything, classes[rows], None if confidence is None else confidence[rows]


@contextlib.contextmanager
def _writer(predictor: Predictor, file: BandFile, part: Path, ids: bool) -> Iterator:
    """Open a GeoTIFF of one band, of class ids or confidence, with the georeference of the scene.

    It has no ``num_threads``: GDAL's threads do not report that the disk is full.
    """
    import rasterio

    source, wide = file.file, len(predictor.classes) > 255
    profile = dict(
        driver='GTiff',
        height=source.height,
        width=source.width,
        count=1,
        dtype='uint16' if ids and wide else 'uint8',
        crs=source.crs,
        tiled=True,
        blockxsize=_BLOCK,
        blockysize=_BLOCK,
        compress='deflate',
        BIGTIFF='IF_SAFER',
    )
    if not source.transform.is_identity:
        profile['transform'] = source.transform
    if ids:
        profile['nodata'] = 65535 if wide else 255
    with rasterio.open(part, 'w', **profile) as result:
        points, crs = source.gcps
        if points:
            result.gcps = points, crs
        if source.rpcs:
            result.rpcs = source.rpcs
        if ids:
            if not wide:
                colours = {i: (*map(int, colour), 255) for i, colour in enumerate(predictor.palette)}
                result.write_colormap(1, {**colours, 255: (0, 0, 0, 0)})
            result.update_tags(1, classes=json.dumps(list(predictor.classes), ensure_ascii=False))
        yield result


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn errors of GDAL, which it gives for a full disk, into an OutputError."""
    from rasterio.errors import RasterioError

    try:
        yield
    except RasterioError as error:
        told = ' '.join(str(error.__cause__ or error).split())
        raise OutputError(f'{path} cannot be written ({told})') from error


class Strips:
    """Collect tiles, and write them in strips of whole blocks.

    Args:
        file: the scene.
        writer: rasterio's dataset of the result.
        by_rows: whether the tiles come from top to bottom, not from left to right.
    """

    def __init__(self, file: BandFile, writer, by_rows: bool):
        self._file, self._writer, self._by_rows = file, writer, by_rows
        self._length, across = file.shape if by_rows else file.shape[::-1]
        self._start = 0
        self._buffer = np.zeros((2 * _BLOCK, across), writer.dtypes[0])  # (along the way, across)
        self._empty = 0 if writer.nodata is None else int(writer.nodata)
        self._sums: list[tuple[object, int]] = []

    def put(self, rows: slice, columns: slice, values: np.ndarray) -> None:
        """Add a tile, which may begin before the end of the one before it only across the way."""
        along, across = (rows, columns) if self._by_rows else (columns, rows)
        while along.start >= self._start + _BLOCK:
            self._flush()
        place = slice(along.start - self._start, along.stop - self._start)
        self._buffer[place, across] = values if self._by_rows else values.T

    def finish(self) -> None:
        """Write what is left, and close the file."""
        while self._start < self._length:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        from rasterio.windows import Window

        count = min(_BLOCK, self._length - self._start)
        strip = self._buffer[:count]
        window = Window(0, self._start, strip.shape[1], count)
        if not self._by_rows:
            strip = strip.T
            window = Window(self._start, 0, count, strip.shape[0])
        missing = self._file.without_data(window.row_off, window.col_off, window.height, window.width)
        if missing is not None:
            strip[missing] = self._empty
        self._writer.write(strip, 1, window=window)
        self._sums.append((window, zlib.crc32(np.ascontiguousarray(strip))))
        self._buffer[:_BLOCK] = self._buffer[_BLOCK:]
        self._start += count

    def compare(self, path: Path) -> None:
        """Read the closed file and compare it with what was written: GDAL does not report each failed write.

        Raises:
            RasterioError: the file cannot be read, or its content differs.
        """
        import rasterio
        from rasterio.errors import RasterioError

        with rasterio.open(path) as written:
            if any(zlib.crc32(written.read(1, window=window)) != crc for window, crc in self._sums):
                raise RasterioError('its content differs after writing')
