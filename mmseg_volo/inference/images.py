"""Read images and convert arrays to the form that the models take: BGR (H, W, 3), uint8."""

from pathlib import Path

import cv2
import mmcv
import numpy as np

from ..datasets.checks.headers import read_header


def as_bgr(image: np.ndarray) -> np.ndarray:
    """Convert an image to BGR (H, W, 3), uint8. Return an image of this form as it is, not a copy.

    Args:
        image: (H, W) or (H, W, 1), grey; (H, W, 3), BGR; or (H, W, 4), BGR and alpha, which is dropped. Values are
            integers from 0 to 255, or floats from 0 to 1 or from 0 to 255. If uint16 values exceed 255, the upper 8
            bits are used.

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
    if image.dtype == np.uint16 and image.max() > 255:
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
    """Read an image file: BGR (H, W, 3), uint8.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no image, or broken.
    """
    data = path.read_bytes()
    try:
        read_header(data)
        image = mmcv.imfrombytes(data)
        if image is None:  # OpenCV converts only up to 16 bits per value
            image = mmcv.imfrombytes(data, flag='unchanged')
    except ValueError as error:
        raise ValueError(f'it is no image, or broken: {error}') from error
    except (cv2.error, AttributeError) as error:
        raise ValueError('it is no image, or broken') from error
    if image is None:
        raise ValueError('it is no image, or broken')
    return as_bgr(image)
