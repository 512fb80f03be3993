"""Check an image file as the config's loader reads it: whether it can be read, and whether all its bits arrive."""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
from PIL import Image

from ...utils.processes import init_worker
from .headers import Header, read_header

_IGNORE_ORIENTATION = ('color_ignore_orientation', 'grayscale_ignore_orientation', 'unchanged')
_APPLE_DOUBLE = b'\x00\x05\x16\x07'
_LONGEST = 1_000_000  # pixels a side that libpng, and so OpenCV, reads
RESTORE = 'restore it, or take the pair out of the data set'
UNKNOWN_TIFF = 'it is damaged, or a kind of TIFF that imdecode_backend={!r} does not support'
_TOO_LARGE = '{} pixels are more than {} accepts; the file may be whole'
_TILES = 'cut the image and its label into tiles'
_NOT_PILLOW = "or set imdecode_backend='cv2' in the transform that loads it"
_PACKAGES = {'tifffile': 'tifffile', 'turbojpeg': 'PyTurboJPEG'}  # backends whose package mmcv does not require
_DARK = 64  # of 255: an image whose values end here looks nearly black
_messages = None  # in a worker process: the file that replaces stderr


class ImageError(ValueError):
    """An image that the config's loader cannot read: the ``reason``, the ``problem`` with it, and a ``remedy``."""

    def __init__(self, reason: str, remedy: str = RESTORE):
        self.reason, self.problem, self.remedy = reason, f'the image cannot be read ({reason})', remedy
        super().__init__(f'{self.problem}; {remedy}')


class ImageInfo(NamedTuple):
    """An image that can be read.

    Attributes:
        shape: (height, width) after loading.
        orientation: EXIF orientation that the loader applies, 1 if none.
        damage: the decoder's warning about damage, or ''.
        loss: what the loader loses of values with more than 8 bits, or ''.
    """

    shape: tuple[int, int]
    orientation: int
    damage: str
    loss: str


def check_image(data: bytes, flag: str, backend: str) -> ImageInfo:
    """Check an image file.

    The checksums of a PNG prove that it is intact. A JPEG has none, so it is decoded at an eighth of its size, to see
    the warnings. Other formats, and values of more than 8 bits, are decoded whole.

    Args:
        data: content of the file.
        flag, backend: ``color_type`` and ``imdecode_backend`` of ``LoadImageFromFile``.

    Raises:
        ImageError: the loader cannot read the file.
    """
    damage, loss = '', ''
    try:
        header = read_header(data)
    except ValueError as error:
        raise ImageError(str(error)) from error
    if header.format in ('png', 'jpeg'):  # these are not decoded whole
        check_size(header, backend)
    orientation = 1 if flag in _IGNORE_ORIENTATION else header.orientation
    if header.format == 'jpeg':
        with _decoder_warnings() as lines:
            _decode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8, 'cv2')
        damage = ' '.join(lines)
    if header.format in ('png', 'jpeg') and orientation == 1 and header.bits <= 8:
        return ImageInfo(header.shape, orientation, damage, loss)
    image = _decode(data, flag, backend)
    if image.dtype == np.uint8 and (header.bits > 8 or header.format == 'other'):
        loss = _lost_bits(data, image)
    return ImageInfo(image.shape[:2], orientation, damage, loss)


def _decode(data: bytes, flag: str | int, backend: str) -> np.ndarray:
    try:
        image = mmcv.imfrombytes(data, flag=flag, backend=backend)
    except Exception as error:  # decoders may raise anything on broken data
        raise why_unreadable(data, flag, backend, error) from error
    if image is None or image.ndim not in (2, 3):
        raise why_unreadable(data, flag, backend)
    return image


def check_size(header: Header, backend: str) -> None:
    """Raise ImageError if an image has more pixels than a decoder accepts."""
    height, width = header.shape
    if backend == 'cv2':
        set_limit = os.environ.get('OPENCV_IO_MAX_IMAGE_PIXELS', '')
        limit, longest = int(set_limit) if set_limit.isdigit() else 2**30, _LONGEST
    elif backend == 'pillow' and Image.MAX_IMAGE_PIXELS:
        limit, longest = 2 * Image.MAX_IMAGE_PIXELS, float('inf')
    else:
        return
    if width * height > limit or max(width, height) > longest:
        if backend == 'cv2':
            raise ImageError(_TOO_LARGE.format(f'its {width} x {height}', 'OpenCV'), _TILES)
        raise ImageError(_TOO_LARGE.format(f'its {width} x {height}', 'Pillow'), f'{_TILES}, {_NOT_PILLOW}')


def why_unreadable(data: bytes, flag: str | int, backend: str, error: Exception | None = None) -> ImageError:
    """Explain why a loader could not read an image file.

    Args:
        data: content of the file.
        flag, backend: ``color_type`` and ``imdecode_backend`` of the loader.
        error: what the decoder raised, if it did.
    """
    general = general_reason(data, backend, error)
    if general:
        return general
    header = read_header(data)
    if header.bands and header.bands > 4 and backend != 'tifffile':
        return ImageError(
            f'it has {header.bands} bands, but the loader reads at most 4',
            'load it with LoadBands, with in_channels of the backbone and mean and std of data_preprocessor for '
            f'{header.bands} bands, or save three of the bands',
        )
    if header.bits > 16 and backend == 'cv2' and flag != 'unchanged':
        return ImageError(
            f'its values have {header.bits} bits, which color_type={flag!r} cannot convert',
            "set color_type='unchanged' and to_float32=True in the transform that loads it, with mean and std of "
            'data_preprocessor in the range of the values, or save the image with 8 bits',
        )
    if header.format == 'tiff':
        return ImageError(UNKNOWN_TIFF.format(backend), 'restore it, or save it without compression and with 8 bits')
    return ImageError('it is damaged or not an image')


def general_reason(data: bytes, backend: str, error: Exception | None) -> ImageError | None:
    """Explain why a file could not be read, if the reason is none that only images can have; see why_unreadable."""
    if data.startswith(_APPLE_DOUBLE):
        return ImageError('it holds what macOS notes about another file, no image', 'take it out of the data set')
    try:
        header = read_header(data)
        if header.shape:
            check_size(header, backend)
    except ImageError as size:
        return size
    except ValueError as broken:
        return ImageError(str(broken))
    if isinstance(error, MemoryError) or getattr(error, 'code', None) == cv2.Error.StsNoMem:
        return ImageError('there is not enough memory for it', _TILES)
    if backend in _PACKAGES and importlib.util.find_spec(backend) is None:
        package = _PACKAGES[backend]
        return ImageError(f'imdecode_backend={backend!r} needs the package {package}', f'pip install {package}')
    if 'imagecodecs' in str(error):  # tifffile's message
        return ImageError('its compression needs the package imagecodecs', 'pip install imagecodecs')
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(_TOO_LARGE.format('its', 'Pillow'), f'{_TILES}, {_NOT_PILLOW}')
    return None


def _lost_bits(data: bytes, image: np.ndarray) -> str:
    """Say what is lost if a file of more than 8 bits per value is loaded as ``image``, uint8; '' if nothing is."""
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype == np.uint8:
        return ''
    bits = 8 * deep.itemsize
    if deep.dtype != np.uint16:
        return f'the file has {bits} bits per value ({deep.dtype}), but the loader gives 8 bits'
    values = _occurring(deep)
    # A conversion to grey mixes values, so count those that the upper 8 bits could tell apart too.
    kept = max(len(_occurring(image)), len(np.unique(values >> 8)))
    if kept >= len(values):
        return ''
    used = int(values[-1]).bit_length()
    dark = ' and the image is nearly black' if image.max() <= _DARK else ''
    return (
        f'the file has {bits} bits per value, and {used} of them are in use, but the loader gives 8 bits: '
        f'of {len(values)} different values {kept} remain{dark}'
    )


def _occurring(array: np.ndarray) -> np.ndarray:
    """Values that occur in a uint8 or uint16 array (H, W) or (H, W, C), sorted; several times as fast as np.unique."""
    size = np.iinfo(array.dtype).max + 1
    channels = range(1 if array.ndim == 2 else array.shape[2])
    return np.flatnonzero(sum(cv2.calcHist([array], [c], None, [size], [0, size]).ravel() for c in channels))


def init_checker() -> None:
    """Initialise a worker process. libjpeg reports damage on stderr only, so a file replaces stderr."""
    global _messages
    init_worker()
    cv2.setNumThreads(0)
    _messages = tempfile.TemporaryFile()  # noqa: SIM115 (stays open as long as the worker)
    os.dup2(_messages.fileno(), 2)


@contextlib.contextmanager
def _decoder_warnings() -> Iterator[list[str]]:
    """Yield a list that holds, after the block, the first line that a decoder printed; empty outside a worker."""
    lines: list[str] = []
    before = os.lseek(2, 0, os.SEEK_END) if _messages else 0
    yield lines
    if _messages and os.lseek(2, 0, os.SEEK_END) > before:
        _messages.seek(before)
        lines += _messages.read().decode(errors='replace').splitlines()[:1]
