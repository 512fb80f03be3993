"""Check files that LoadBands reads, and measure the mean and deviation of their channels."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from ..bands import BandFile, open_bands
from .headers import read_header
from .listing import Finding

_PIXELS = 2**21  # of a window that is checked at once


class Statistics(NamedTuple):
    """Of each channel the number of values, their mean, and the sum of squared differences to it, (C,) float64."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    def __add__(self, other: 'Statistics') -> 'Statistics':
        """The statistics of the values of both (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        apart = other.mean - self.mean
        return Statistics(
            count, self.mean + share * apart, self.squares + other.squares + apart**2 * self.count * share
        )

    @property
    def deviation(self) -> np.ndarray:
        return np.sqrt(self.squares / np.maximum(self.count, 1))


class BandsInfo(NamedTuple):
    """What a file has: (height, width), its number of bands, the kind of its values, and of the bands that are read the
    statistics of the values that are not missing.
    """

    shape: tuple[int, int]
    bands: int
    dtype: str
    statistics: Statistics


def check_bands(path: str, bands: Sequence[int] | None, fill: float | Sequence[float]) -> BandsInfo:
    """Read a whole file, window by window.

    Args:
        path, bands, fill: see :func:`~mmseg_volo.datasets.bands.open_bands`.

    Raises:
        DataError: the file cannot be read, or has values that are not finite.
        OSError: there is no such file, or it cannot be read.
    """
    with open_bands(path, bands, fill) as file:
        total = Statistics(*np.zeros((3, len(file.bands))))
        for window in _windows(file):
            total += measure(*file.read(*window))
        return BandsInfo(file.shape, file.file.count, ', '.join(sorted(file.stored_dtypes)), total)


def measure(values: np.ndarray, missing: np.ndarray | None) -> Statistics:
    """The statistics of an array (C, H, W); ``missing`` says which values do not count."""
    found = []
    for i, channel in enumerate(values):
        mask = None if missing is None else (~missing[i]).astype(np.uint8)
        mean, deviation = cv2.meanStdDev(channel, mask=mask)  # it adds in float64
        count = channel.size if mask is None else cv2.countNonZero(mask)
        found.append((count, mean[0, 0], deviation[0, 0] ** 2 * count))
    return Statistics(*np.array(found, np.float64).T)


def _windows(file: BandFile) -> Iterator[tuple[int, int, int, int]]:
    """Split an image into windows of whole blocks: (top, left, height, width)."""
    (height, width), (rows, columns) = file.shape, file.file.block_shapes[0]
    across = min(width, -(-2048 // columns) * columns)
    along = max(_PIXELS // across // rows, 1) * rows
    for top in range(0, height, along):
        for left in range(0, width, across):
            yield top, left, min(along, height - top), min(across, width - left)


def dropped_bands(data: bytes, flag: str | int) -> str:
    """Say which bands of a TIFF mmcv's loader drops; '' if none."""
    header = read_header(data)
    if (header.bands or 0) < 4 or not str(flag).startswith('color'):
        return ''
    return f'the file has {header.bands} bands, but the loader gives 3 (color_type={flag!r})'


def odd_files(split: str, infos: Mapping[str, BandsInfo], chosen: Sequence[int] | None) -> list[Finding]:
    """Find files with other bands or other kinds of values than most files of a split.

    Args:
        split: name of the split.
        infos: what each file has.
        chosen: the argument ``bands`` of LoadBands.
    """

    def differing(kind: str, values: Mapping[str, object], problem: str, remedy: str, fault: bool) -> Iterator[Finding]:
        counts = Counter(values.values())
        usual, number = counts.most_common(1)[0]
        for path, value in values.items():
            if value != usual:
                told = problem.format(value=value, number=number, usual=usual)
                yield Finding(split, kind, path, told, remedy, fault)

    if not infos:
        return []
    found = []
    if chosen is None:
        problem = 'it has {value} bands, and {number} other images have {usual}'
        remedy = 'choose bands with LoadBands(bands=(...)), or take the file out'
        bands = {path: info.bands for path, info in infos.items()}
        found += differing('bands of an image', bands, problem, remedy, fault=True)
    problem = 'its values are {value}, and those of {number} other images {usual}'
    remedy = 'one mean and std hold only for files of one kind: convert the file'
    dtypes = {path: info.dtype for path, info in infos.items()}
    found += differing('values of an image', dtypes, problem, remedy, fault=False)
    return found


def misfits(split: str, config: Mapping, where: str, statistics: Statistics, measured: bool) -> list[Finding]:
    """Find disagreements of a config with the images: number of channels, and if ``measured`` mean and deviation.

    Args:
        split: name of the split.
        config: with ``model``.
        where: the folder of the images.
        statistics: of all its images.
        measured: whether the model normalises with the statistics of these images.
    """
    model, found = config.get('model') or {}, []
    given = len(statistics.count)
    takes = (model.get('backbone') or {}).get('in_channels', 3)
    if takes != given:
        problem = f'images of {given} channels are read, but model.backbone.in_channels is {takes}'
        remedy = 'set it to the number of bands that LoadBands reads, and mean and std of data_preprocessor too'
        found.append(Finding(split, 'channels', where, problem, remedy))
    pre = model.get('data_preprocessor') or config.get('data_preprocessor') or {}
    mean, std = pre.get('mean'), pre.get('std')
    if mean is not None and len(mean) not in (1, given):
        problem = f'images of {given} channels are read, but data_preprocessor has {len(mean)} numbers in mean'
        found.append(Finding(split, 'channels', where, problem, 'give mean and std one number for each channel'))
    elif measured and mean is not None and std is not None and len(std) == len(mean):
        mean, std = (np.broadcast_to(np.array(one, np.float64), given) for one in (mean, std))
        own = np.maximum(statistics.deviation, 1e-12)
        far = (np.abs(mean - statistics.mean) > 0.5 * own) | (std > 2 * own) | (std < own / 2)
        for channel in np.flatnonzero(far * (statistics.count > 0))[:1]:
            problem = (
                f'the images have mean {statistics.mean[channel]:.6g} and deviation {own[channel]:.6g} in channel '
                f'{channel + 1}, but data_preprocessor has mean {mean[channel]:.6g} and std {std[channel]:.6g}'
            )
            remedy = 'copy the measured numbers below, unless the model was trained with these'
            found.append(Finding(split, 'mean and deviation', where, problem, remedy, fault=False))
    return found
