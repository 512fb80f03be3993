"""Read images and convert arrays to the form that most models take: BGR (H, W, 3), uint8."""

import warnings
from pathlib import Path

import cv2
import mmcv
import numpy as np

from ..datasets.checks.depth import DARK, lost_bits
from ..datasets.checks.headers import read_header


def as_bgr(image: np.ndarray) -> np.ndarray:
    """Convert an image to BGR (H, W, 3), uint8. Return an image of this form as it is, not a copy.

    Args:
        image: (H, W) or (H, W, 1), grey; (H, W, 3), BGR; or (H, W, 4), BGR and alpha, which is dropped. Values are
            integers from 0 to 255, or floats from 0 to 1 or from 0 to 255. If uint16 values exceed 255, the upper 8
            bits are used, as OpenCV does with files of 16 bits. A warning tells if these are near black.

    Raises:
        ValueError: another shape or dtype, no pixels, or values that are out of range or not finite.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f'expected an image as a NumPy array (H, W, 3), BGR, uint8, got {type(image).__name__}')
    what = f'an image of shape {image.shape}, {image.dtype}'
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
    if not is_image or image.dtype.kind not in 'uif':
        raise ValueError(f'{what}: expected (H, W, 3), BGR, uint8; (H, W) and 4 channels, 16 bits and floats work too')
    if not image.size:
        raise ValueError(f'{what}: it has no pixels')
    if image.dtype == np.uint16 and (high := image.max()) > 255:
        if high < 2**14:
            warnings.warn(
                f'{what}: values up to {high}, of which the upper 8 bits are used: 0 to {high >> 8} of 255. Multiply '
                f'values of {int(high).bit_length()} bits by {2 ** (16 - int(high).bit_length())} first',
                stacklevel=2,
            )
        image = (image >> 8).astype(np.uint8)
    elif image.dtype != np.uint8:
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 255):  # false for NaN too
            raise ValueError(f'{what}: values from {low} to {high}, expected 0 to 255, or 0 to 1 for floats')
        if image.dtype.kind == 'f':
            image = np.rint(image * 255 if high <= 1 else image)
        image = image.astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., :3] if image.shape[2] == 4 else image


def read_image(path: Path) -> np.ndarray:
    """Read an image file: BGR (H, W, 3), uint8, turned as its EXIF orientation says.

    A warning tells if a file of 16 bits becomes near black, because it does not use its upper bits.

    For the pixels that the loader of a config reads, use :meth:`mmseg_volo.inference.Predictor.read`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no image, or broken.
    """
    data = Path(path).read_bytes()
    check_complete(data)
    try:
        image = mmcv.imfrombytes(data)
        if image is None:  # OpenCV converts only up to 16 bits per value
            image = mmcv.imfrombytes(data, flag='unchanged')
    except (cv2.error, AttributeError, ValueError) as error:
        raise ValueError(why_unreadable(data)) from error
    if image is None:
        raise ValueError(why_unreadable(data))
    if image.dtype == np.uint8 and image.max() < DARK and (lost := lost_bits(path)):
        warnings.warn(f'{path}: {lost}', stacklevel=2)
    return as_bgr(image)


def check_complete(data: bytes) -> None:
    """Raise ValueError if an image file is empty, cut off or damaged, as far as its headers and checksums tell."""
    try:
        read_header(data)
    except ValueError as error:
        raise ValueError(f'it is no image, or broken: {error}') from error


def why_unreadable(data: bytes, loader: str = 'OpenCV', most: int = 4) -> str:
    """Say why a loader that reads at most ``most`` bands did not decode a file."""
    bands = read_header(data).bands or 0
    return (
        f'it is an image of {bands} bands; {loader} reads {most}'
        if bands > max(most, 4)
        else 'it is no image, or broken'
    )


def for_display(image: np.ndarray) -> np.ndarray:
    """Convert what a loader returned to BGR (H, W, 3), uint8, to be looked at.

    Args:
        image: (H, W) or (H, W, C) of any dtype. Of more than three channels the first three are shown, of two the
            first. Integers of more than 8 bits, and floats out of 0 to 255, are stretched from their 1st to their 99th
            percentile.
    """
    image = image.reshape(*image.shape[:2], -1)
    image = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    image = np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0)
    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        low, high = np.percentile(image[::4, ::4], (1, 99)) if min(image.shape[:2]) > 4 else (low, high)
        image = (image - low) * (255 / max(high - low, 1e-6))
    elif high <= 1:
        image = image * 255
    return np.rint(image).clip(0, 255).astype(np.uint8)
