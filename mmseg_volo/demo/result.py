"""What the page shows and gives away of one prediction."""

import base64
import gzip
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..inference.predictor import Prediction
from ..inference.visualize import overlay

_SHOWN = 2048  # pixels of the longer side, as shown; class ids keep the picture's own size


def shown(image: np.ndarray, found: Prediction, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> dict:
    """One result for ``viewer.js``: plain values that travel as JSON.

    Args:
        image: BGR (H, W, 3), uint8.
        found: what the model made of it.
        classes, palette: names and RGB colours.

    Returns:
        ``width``, ``height``; ``picture``, a data URL; ``ids``, the class ids, and ``confidence`` (or None), whole per
        cent: rows of bytes (ids: two bytes each, little-endian, where ``wide``), gzipped, in base64; ``names`` and
        ``colours`` by id; ``shares``, [id, part of the pixels] of the classes present, the largest first.
    """
    height, width = image.shape[:2]
    ids = found.classes.astype(np.int64)
    counts = np.bincount(ids.ravel(), minlength=len(classes))
    present = sorted(np.flatnonzero(counts).tolist(), key=lambda i: -counts[i])
    small = image
    if max(height, width) > _SHOWN:
        scale = _SHOWN / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    wide = len(counts) > 256
    return dict(
        width=width,
        height=height,
        picture=f'data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}',
        wide=wide,
        ids=_packed(ids.astype('<u2' if wide else np.uint8)),
        confidence=None if found.confidence is None else _packed(np.rint(found.confidence * 100).astype(np.uint8)),
        names=[str(name) for name in classes],
        colours=[[int(c) for c in colour] for colour in palette],
        shares=[[i, int(counts[i]) / ids.size] for i in present],
    )


def save(
    image: np.ndarray,
    found: Prediction,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    folder: Path,
    name: str,
) -> tuple[str, str]:
    """Write what ``tools/predict.py`` writes: NAME_classes.png, ids of 8 bit (16 above 256 classes); NAME_overlay.png.

    Raises:
        OSError: the disk is full, or the like.
    """
    paths = folder / f'{name}_classes.png', folder / f'{name}_overlay.png'
    ids = found.classes.astype(np.uint8 if len(classes) <= 256 else np.uint16)
    for path, picture in zip(paths, (ids, overlay(image, found.classes.astype(np.int64), palette)), strict=True):
        path.write_bytes(cv2.imencode('.png', picture)[1].tobytes())
    return str(paths[0]), str(paths[1])


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(values.tobytes(), 5)).decode()
