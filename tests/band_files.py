"""TIFF and GeoTIFF files for tests, written with rasterio."""

import warnings
from pathlib import Path

import numpy as np
import pytest

rasterio = pytest.importorskip('rasterio', reason="needs the extra 'geo'")


def write_tiff(path: Path, array: np.ndarray, mask: np.ndarray | None = None, **options) -> Path:
    """Write bands (C, H, W), in strips of rows unless options say otherwise."""
    count, height, width = array.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, 'w', driver='GTiff', count=count, height=height, width=width, dtype=array.dtype, **options
        ) as file:
            file.write(array)
            if mask is not None:
                file.write_mask(mask)
    return path


def scene(seed: int, shape: tuple[int, int, int], dtype: str = 'uint16', high: int = 4000) -> np.ndarray:
    """Smooth random bands (C, H, W) with values from 0 to about ``high``."""
    rng = np.random.default_rng(seed)
    count, height, width = shape
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(y / rng.uniform(5, 20) + rng.uniform(0, 6))
        + np.cos(x / rng.uniform(5, 20))
        + rng.random((height, width))
        for _ in range(count)
    ]
    return ((np.stack(waves) + 2) / 5 * high).astype(dtype)
