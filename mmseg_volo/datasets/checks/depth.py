"""Tell which files of 16 bits become nearly black in a decoder that keeps the upper 8 bits."""

from pathlib import Path

import cv2
import numpy as np

from .headers import read_header

_FEW = 2**14  # values of 16-bit files below this are nearly black in 8 bits
DARK = _FEW >> 8


def lost_bits(path: str | Path) -> str | None:
    """Say what an 8-bit decoder makes of a 16-bit file that does not use its upper bits; None for other files."""
    try:
        data = Path(path).read_bytes()
        if read_header(data).bits != 16:
            return None
    except (OSError, ValueError):
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.max() >= _FEW:
        return None
    low, high = int(image.min()), int(image.max())
    bits = high.bit_length()
    return (
        f'the file has 16 bits and values from {low} to {high}; a decoder to 8 bits keeps the upper ones, which leaves '
        f'{low >> 8} to {high >> 8} of 255. If these are values of {bits} bits, multiply them by {2 ** (16 - bits)}, '
        'or load them unchanged'
    )
