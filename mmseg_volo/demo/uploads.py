"""Validate uploads before decoding and refuse them with a message that their owner understands."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from ..datasets.checks.headers import read_header
from ..inference.pipeline import LoadedImage

_MOST_SCANS = 50  # of a progressive JPEG; encoders write up to about 20
_AGAIN = 'Please save it again as PNG or JPEG.'
_TOO_SLOW = f'Decoding the file takes too long. {_AGAIN}'
# What both PIL and OpenCV read. PIL also opens MPO as JPEG: many cameras store a second image in it.
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF')
FORMATS = 'PNG, JPEG, WebP, BMP, TIFF or GIF'


class Limits(NamedTuple):
    """Limits on an upload: millions of pixels, and megabytes (2**20 bytes) of the file, which Gradio checks."""

    megapixels: float = 16
    megabytes: float = 20


class RefusedImage(ValueError):
    """A file that is not accepted; the message is for the person who uploaded it."""


def read_upload(path: str | Path, megapixels: float, read: Callable[[Path], LoadedImage]) -> LoadedImage:
    """Read an uploaded image. Its format and size are taken from the header, before anything is decoded.

    Args:
        path: the file.
        megapixels: the largest size accepted, in millions of pixels.
        read: reads the file as the model's config does; see :meth:`~mmseg_volo.inference.Predictor.read`.

    Returns:
        The image, for the model.

    Raises:
        RefusedImage: the file is missing, too large, an animation, not an image, or broken.
    """
    path = Path(path)
    if not path.is_file():
        raise RefusedImage('The image is no longer on the server. Please upload it again.')
    if not path.stat().st_size:
        raise RefusedImage('The file is empty (0 bytes). Please choose another one.')
    try_decoding(path, megapixels)
    width, height = _size(path)
    if width * height > megapixels * 1e6:
        raise RefusedImage(
            f'The image has {width} x {height} pixels ({width * height / 1e6:.1f} megapixels); the limit is '
            f'{megapixels:g} megapixels. Please make it smaller.'
        )
    try:
        return read(path)
    except ValueError as error:
        raise RefusedImage(f'The file cannot be read: {error}. {_AGAIN}') from error


def _size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the header of a single image."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # our own limit is checked instead
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.format == 'MPO' or not getattr(image, 'is_animated', False):
                    return image.size
                number = image.n_frames
        except Image.DecompressionBombError as error:
            raise RefusedImage('The image has far too many pixels. Please make it smaller.') from error
        except UnidentifiedImageError as error:
            raise RefusedImage(f'The file is not an image in a supported format: {FORMATS}.') from error
        except Exception as error:  # PIL's parsers raise nearly anything on broken files
            raise RefusedImage('The file is broken: its header cannot be read.') from error
    raise RefusedImage(f'The file holds {number} images (an animation, or pages). Please save one of them by itself.')


def try_decoding(path: Path, megapixels: float, seconds: float = 10) -> None:
    """Refuse an upload that keeps a decoder busy for long, as small files can.

    The time that a PNG or JPEG takes follows from its size, and from its number of scans. Others are decoded once in
    another process, which is ended when its time is over.

    Args:
        path: the file.
        megapixels: the largest size that is decoded, in millions of pixels.
        seconds: how long decoding may take.

    Raises:
        RefusedImage: the file is broken, or decoding takes too long. What else is wrong, :func:`read_upload` says.
    """
    try:
        header = read_header(path.read_bytes())
    except ValueError as error:
        raise RefusedImage(f'The file cannot be read: {error}. {_AGAIN}') from error
    if header.scans > _MOST_SCANS:
        raise RefusedImage(_TOO_SLOW)
    if header.format in ('png', 'jpeg'):
        return
    command = [sys.executable, str(Path(__file__).with_name('decode.py')), str(path), str(megapixels)]
    try:
        null = subprocess.DEVNULL
        done = subprocess.run(command, timeout=seconds, stdin=null, stdout=null, stderr=null, check=False)
    except subprocess.TimeoutExpired as error:
        raise RefusedImage(_TOO_SLOW) from error
    if done.returncode < 0:  # a signal ended it
        raise RefusedImage(f'The file is broken: decoding it fails. {_AGAIN}')
