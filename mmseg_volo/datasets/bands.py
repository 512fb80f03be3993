"""Read TIFF and GeoTIFF images of any number of bands and depth, whole or window by window, with rasterio."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from ..errors import ConfigError, DataError

MOST_BANDS = 16
# Kinds of values that a file may have; float32 holds all but the largest of them exactly.
DTYPES = 'uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float32', 'float64'
# Decoded blocks that GDAL keeps. By default it takes a twentieth of the machine's memory.
_CACHE = 256 * 2**20  # bytes; two rows of tiles of 20,000 pixels x 4 bands of 16 bits take 164 MB


class BandFile:
    """An open TIFF, and the bands of it that are read; see :func:`open_bands`.

    Attributes:
        file: rasterio's dataset.
        bands: numbers of the bands, from 1.
        shape: (height, width).
        has_nodata: whether the file marks pixels without data, by a nodata value, a mask or transparency.
    """

    def __init__(self, file, path: str, bands: Sequence[int] | None, fill: float | Sequence[float]):
        from rasterio.enums import ColorInterp, MaskFlags

        self.file, self.path, self.shape = file, path, (file.height, file.width)
        if bands is None and file.count > MOST_BANDS:
            raise DataError(
                f'{path}: it has {file.count} bands; choose at most {MOST_BANDS} of them with LoadBands(bands=(...)), '
                'counted from 1'
            )
        self.bands = list(bands or range(1, file.count + 1))
        if max(self.bands) > file.count:
            raise DataError(
                f'{path}: it has {file.count} bands, but LoadBands reads band {max(self.bands)} (bands='
                f'{tuple(self.bands)}); correct bands in the config, or take the file out of the data set'
            )
        if odd := [kind for kind in map(file.dtypes.__getitem__, self._indices) if kind not in DTYPES]:
            raise DataError(f'{path}: its values are {odd[0]}; LoadBands reads {", ".join(DTYPES)}: convert the file')
        self.dtype = np.dtype(np.uint8 if self.stored_dtypes == {'uint8'} else np.float32)
        if not np.iterable(fill):
            fill = [fill] * len(self.bands)
        if len(fill) != len(self.bands):
            raise DataError(f'{path}: LoadBands has {len(fill)} numbers in fill, but reads {len(self.bands)} bands')
        self._fill = np.array(fill).astype(self.dtype)
        flags = [file.mask_flag_enums[i] for i in self._indices]
        alpha = next((i + 1 for i, one in enumerate(file.colorinterp) if one is ColorInterp.alpha), 0)
        # A transparency that is read is data: GDAL calls the fourth of four 8-bit bands so, also near infrared.
        self.has_nodata = any(
            MaskFlags.all_valid not in one and not (MaskFlags.alpha in one and alpha in self.bands) for one in flags
        )

    @property
    def _indices(self) -> list[int]:
        return [band - 1 for band in self.bands]

    @property
    def stored_dtypes(self) -> set[str]:
        """The kinds of values in the file, of the bands that are read."""
        return {self.file.dtypes[i] for i in self._indices}

    def read(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Read a window, which must lie within the image.

        Returns:
            The bands (C, height, width): uint8 if the file has 8 bits, else float32. Values without data are replaced
            by ``fill``. And which values have no data, (C, height, width), bool, or None if all have.

        Raises:
            DataError: the file is damaged, or has values that are NaN or infinite.
        """
        from rasterio.windows import Window

        window, missing = Window(left, top, width, height), None
        with _one_line(self.path):
            stored = self.file.read(self.bands, window=window)
            if self.has_nodata:
                missing = self.file.read_masks(self.bands, window=window) == 0
        with np.errstate(over='ignore'):
            values = stored.astype(self.dtype, copy=False)
        if missing is not None:
            for band, gone, fill in zip(values, missing, self._fill, strict=True):
                band[gone] = fill
        if stored.dtype.kind == 'f':
            self._check_finite(values, top, left)
        return values, missing if missing is not None and missing.any() else None

    def without_data(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Whether all bands that are read are missing, (height, width), bool; None if the file marks no such pixels."""
        from rasterio.windows import Window

        if not self.has_nodata:
            return None
        with _one_line(self.path):
            valid = self.file.read_masks(self.bands, window=Window(left, top, width, height))
        return ~valid.any(0)

    def _check_finite(self, values: np.ndarray, top: int, left: int) -> None:
        wrong = ~np.isfinite(values)
        if wrong.any():
            band, row, column = (int(one[0]) for one in wrong.nonzero())
            raise DataError(
                f'{self.path}: band {self.bands[band]} has values that are not finite (NaN or infinite), the first at '
                f'row {top + row}, column {left + column}; repair the file, or declare them as missing: '
                f'rio edit-info --nodata nan {self.path}'
            )


@contextlib.contextmanager
def open_bands(
    path: str | PathLike, bands: Sequence[int] | None = None, fill: float | Sequence[float] = 0, **options
) -> Iterator[BandFile]:
    """Open a TIFF.

    Args:
        path: a file on the disk; tiles, strips, all compressions of GDAL, BigTIFF.
        bands: numbers of the bands to read, from 1, in this order; by default all, which may be 16.
        fill: what values without data become; one number, or one for each band.
        options: of ``rasterio.open``.

    Raises:
        ConfigError: rasterio is not installed.
        DataError: it is no TIFF, or damaged; it lacks a band, or has more than 16 and ``bands`` is None; or its
            values are complex.
        OSError: there is no such file, or it cannot be read.
    """
    require_rasterio()
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    path = str(path)
    with open(path, 'rb') as file:  # an OSError with the system's words
        if not file.read(1):
            raise DataError(f'{path}: it is empty (0 bytes)')
    with rasterio.Env(GDAL_CACHEMAX=_CACHE):
        with _one_line(path), warnings.catch_warnings():
            warnings.simplefilter('ignore', NotGeoreferencedWarning)  # plain TIFFs are welcome too
            opened = rasterio.open(path, driver='GTiff', **options)
        with opened:
            yield BandFile(opened, path, bands, fill)


@contextlib.contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turn errors of GDAL into a DataError."""
    from rasterio.errors import RasterioError

    try:
        yield
    except RasterioError as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        told = ' '.join(str(cause).split()).removeprefix(f'{path}: ')
        raise DataError(f'{path}: it cannot be read as a TIFF, or is damaged ({told}); restore it') from error


def require_rasterio() -> None:
    """Raise ConfigError if rasterio is not installed."""
    if importlib.util.find_spec('rasterio') is None:
        raise ConfigError("LoadBands needs rasterio: pip install -e '.[geo]' in the clone")


@TRANSFORMS.register_module()
class LoadBands(BaseTransform):
    """Load a TIFF or GeoTIFF of 1 to 16 bands with 8, 16 or 32 bits, integers or floats.

    The bands keep the order of the file: R, G, B for colours, so ``data_preprocessor`` has ``bgr_to_rgb=False``. Files
    of 8 bits become uint8; all others float32, which holds integers of up to 24 bits exactly.

    Values that the file marks as missing (nodata value, mask, transparency) become ``fill``. Where all bands that are
    read are missing, :class:`~mmseg_volo.datasets.loading.LoadCheckedAnnotations` sets the label to 255, ignored. A
    transparency band that is read counts as data.

    Args:
        bands: numbers of the bands to read, from 1, in this order, such as ``(4, 3, 2, 8)``; by default all.
        fill: what missing values become; one number, or one for each band.

    Raises:
        ConfigError: rasterio is not installed, or the arguments are wrong.
    """

    def __init__(self, bands: Sequence[int] | None = None, fill: float | Sequence[float] = 0):
        require_rasterio()
        if bands is not None:
            numbers = all(isinstance(band, int) and band >= 1 for band in bands)
            if not numbers or not 1 <= len(bands) <= MOST_BANDS:
                raise ConfigError(f'LoadBands: bands={bands} must be 1 to {MOST_BANDS} whole numbers, from 1')
        self.bands, self.fill = bands, fill

    def transform(self, results: dict) -> dict:
        """Add ``img`` (H, W, C), its shapes and ``order``, and ``nodata`` (H, W), bool, if a pixel has no data.

        Raises:
            DataError: the file cannot be read, lacks a band, or has values that are NaN or infinite.
        """
        path = results['img_path']
        try:
            with open_bands(path, self.bands, self.fill) as file:
                values, missing = file.read(0, 0, *file.shape)
        except OSError as error:
            raise DataError(
                f'{path}: the image cannot be read ({error.strerror or error}); check the path and the disk'
            ) from error
        results['img'] = np.ascontiguousarray(values.transpose(1, 2, 0))
        results['img_shape'] = results['ori_shape'] = values.shape[1:]
        results['order'] = 'rgb'  # for what shows the image: the first three bands are red, green and blue
        if missing is not None and (nodata := missing.all(0)).any():
            results['nodata'] = nodata
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(bands={self.bands}, fill={self.fill})'
