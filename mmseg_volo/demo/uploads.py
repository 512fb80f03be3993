"""Pictures from strangers: looked at before they are decoded, refused in words that their owner understands."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..datasets.checks.headers import read_header
from ..inference.images import read_image

# What both PIL and OpenCV read. As JPEG, PIL also opens MPO, the kind with a second picture in it of many cameras.
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF')
KINDS = 'PNG, JPEG, WebP, BMP, TIFF or GIF'
_SMALLEST = 16  # pixels a side: the coarsest grid of the network has then one cell


class Limits(NamedTuple):
    """What a picture may have at most: millions of pixels, and megabytes (of 2**20) of its file."""

    megapixels: float = 16
    megabytes: float = 20


class RefusedPicture(ValueError):
    """A file that is not taken; the message is a sentence for who gave it."""


def read_upload(path: str | Path, limits: Limits) -> np.ndarray:
    """The picture in an uploaded file, BGR (H, W, 3), uint8, turned as its EXIF data say.

    Raises:
        RefusedPicture: it is over the limits, moves, is no picture, or broken.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limits.megabytes * 2**20:
            raise RefusedPicture(
                f'The file has {size / 2**20:.1f} MB; at most {limits.megabytes:g} MB are taken. Make it smaller first.'
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise RefusedPicture('The picture is no longer on the server. Please choose it again.') from error
    if not data:
        raise RefusedPicture('The file is empty (0 bytes). Please choose another one.')
    width, height = _size(path)
    if width * height > limits.megapixels * 1e6:
        raise RefusedPicture(
            f'The picture has {width} x {height} pixels, {width * height / 1e6:.1f} megapixels; at most '
            f'{limits.megapixels:g} are taken. Make it smaller first.'
        )
    if min(width, height) < _SMALLEST:
        raise RefusedPicture(
            f'The picture has {width} x {height} pixels: too small to see anything in it. Each side needs {_SMALLEST} '
            'or more.'
        )
    try:
        read_header(data)
    except ValueError as error:
        raise RefusedPicture(f'The file is broken: {error}. Please save or copy it again.') from error
    try:
        return read_image(path)
    except ValueError as error:
        raise RefusedPicture(
            'The file is broken: it cannot be decoded. Please save it again as PNG or JPEG.'
        ) from error


def _size(path: Path) -> tuple[int, int]:
    """(width, height) as the header says, of a single picture."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # it is under a limit of our own
        try:
            with Image.open(path, formats=_FORMATS) as picture:
                if picture.format != 'MPO' and getattr(picture, 'is_animated', False):
                    raise RefusedPicture(
                        f'The {picture.format} file holds {picture.n_frames} pictures (an animation, or pages). Save '
                        'one of them by itself.'
                    )
                return picture.size
        except Image.DecompressionBombError as error:
            raise RefusedPicture('The picture has far too many pixels. Make it smaller first.') from error
        except UnidentifiedImageError as error:
            raise RefusedPicture(f'This is not a picture of a kind that is read here: {KINDS}.') from error
        except RefusedPicture:
            raise
        except Exception as error:  # PIL's parsers raise nearly anything on broken files
            raise RefusedPicture('The file is broken: its header cannot be read.') from error
