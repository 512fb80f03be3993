"""How an image file stores its values: bands of a TIFF, and the range of values of 16-bit files."""

import io
import struct
from pathlib import Path

import cv2
import numpy as np
from PIL import TiffImagePlugin

_PNG = b'\x89PNG\r\n\x1a\n'
_BITS, _BANDS = 258, 277  # TIFF tags
_FEW = 2**14  # values of 16-bit files below this are near black in 8 bits
DARK = _FEW >> 8


def tiff_tags(data: bytes) -> dict:
    """Return the tags of a TIFF file's first image; empty for other files and broken ones."""
    if data[:4] not in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        return {}
    file = io.BytesIO(data)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if data[2:3] == b'+' or data[3:4] == b'+' else 8))
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    except (SyntaxError, OSError, ValueError, TypeError, struct.error, OverflowError, KeyError):
        return {}


def bands_of(data: bytes) -> int:
    """Return the number of bands of a TIFF file; 0 if unknown."""
    bands = tiff_tags(data).get(_BANDS, 0)
    return bands if isinstance(bands, int) else 0


def lost_bits(path: str | Path) -> str | None:
    """Say what an 8-bit decoder makes of a 16-bit file that does not use its upper bits; None for other files."""
    found = stored_range(path)
    if found is None or found[1] >= _FEW:
        return None
    low, high = found
    bits = high.bit_length()
    return (
        f'the file has 16 bits and values from {low} to {high}; a decoder to 8 bits keeps the upper ones, which leaves '
        f'{low >> 8} to {high >> 8} of 255. If these are values of {bits} bits, multiply them by {2 ** (16 - bits)}, '
        'or load them unchanged'
    )


def stored_range(path: str | Path) -> tuple[int, int] | None:
    """Return the least and the greatest value of a PNG or TIFF file of 16 bits; None for other files."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None
    bits = tiff_tags(data).get(_BITS, ())
    is_deep = data[24:25] == b'\x10' if data.startswith(_PNG) else 16 in (bits if isinstance(bits, tuple) else (bits,))
    if not is_deep:
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return None if image is None or image.dtype != np.uint16 else (int(image.min()), int(image.max()))
