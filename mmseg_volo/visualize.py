"""Pictures of segmentation results: colours over an image, or image, truth and prediction side by side."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

IGNORE = 255
TITLE_HEIGHT = 26
GAP = 4
_LEGEND_ROW = 24
_BACKGROUND = 255
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_SCALE = 0.5


def _colour(labels: np.ndarray, palette: np.ndarray, name: str) -> np.ndarray:
    """Labels (H, W) to BGR colours (H, W, 3), black where ignored."""
    present = np.unique(labels)
    unknown = [int(label) for label in present if not 0 <= label < len(palette) and label != IGNORE]
    if unknown:
        raise ValueError(f'{name} has labels {unknown[:8]}, but the palette has {len(palette)} colours (0 and up)')
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette[:, ::-1]
    table[IGNORE] = 0
    return table[labels.astype(np.uint8)]


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)[0][0]


def _write(picture: np.ndarray, text: str, left: int, baseline: int, room: int) -> None:
    """Write black text, shrunk where it is wider than ``room``."""
    scale = _FONT_SCALE * min(1.0, room / max(_text_width(text), 1))
    cv2.putText(picture, text, (left, baseline), _FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)


def _legend(width: int, entries: list[tuple[str, tuple[int, ...]]]) -> np.ndarray:
    """A white strip with a colour box and a name for each entry, in as many columns as fit."""
    widest = max((_text_width(name) for name, _ in entries), default=0)
    column = min(widest + 46, width)
    columns = min(max(1, width // column), max(len(entries), 1))
    rows = -(-len(entries) // columns)
    strip = np.full((rows * _LEGEND_ROW + 8, width, 3), _BACKGROUND, np.uint8)
    for index, (name, colour) in enumerate(entries):
        left, top = index % columns * column + 6, index // columns * _LEGEND_ROW + 6
        cv2.rectangle(strip, (left, top), (left + 20, top + 15), colour, cv2.FILLED)
        cv2.rectangle(strip, (left, top), (left + 20, top + 15), (0, 0, 0), 1)
        _write(strip, name, left + 27, top + 13, max(column - 36, 1))
    return strip


def overlay(
    image: np.ndarray, prediction: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.5
) -> np.ndarray:
    """Lay the classes' colours over an image.

    Args:
        image: The picture (H, W, 3) uint8, BGR.
        prediction: Labels (H, W) of an integer type; 255 leaves the image black there.
        palette: The colour of each class, RGB as in MMSegmentation.
        opacity: Weight of the colours, from 0 to 1.

    Returns:
        The picture (H, W, 3) uint8, BGR.

    Raises:
        ValueError: If a label is neither 255 nor in the palette.
    """
    colours = _colour(prediction, np.asarray(palette), 'prediction')
    return cv2.addWeighted(image, 1 - opacity, colours, opacity, 0)


def side_by_side(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    palette: Sequence[Sequence[int]],
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """Put an image, its ground truth and a prediction into one picture.

    The panels lie from left to right, ``GAP`` pixels apart, below a strip of titles ``TITLE_HEIGHT`` pixels high: the
    pixel (row, column) of panel ``p`` is at ``[TITLE_HEIGHT + row, p * (W + GAP) + column]``. A legend below names the
    classes that occur in the truth or the prediction.

    Args:
        image: The picture (H, W, 3) uint8, BGR.
        truth: Labels (H, W) of an integer type; 255 is ignored and painted black.
        prediction: Labels (H, W) of an integer type; 255 is painted black.
        palette: The colour of each class, RGB as in MMSegmentation.
        classes: The name of each class; without them the legend says 'class 0' and so on.

    Returns:
        The picture (TITLE_HEIGHT + H + legend, 3 * W + 2 * GAP, 3) uint8, BGR.

    Raises:
        ValueError: If shapes or types do not fit, or a label is neither 255 nor in the palette.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f'image must be (H, W, 3) uint8, got {image.shape} {image.dtype}')
    for name, labels in (('truth', truth), ('prediction', prediction)):
        if labels.shape != image.shape[:2] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f'{name} must be integers of the shape {image.shape[:2]} of the image, got {labels.shape} '
                f'{labels.dtype}'
            )
    colours = np.asarray(palette)
    if colours.ndim != 2 or colours.shape[1] != 3 or len(colours) > IGNORE:
        raise ValueError(f'palette must be at most {IGNORE} RGB colours, got an array of shape {colours.shape}')
    if not np.issubdtype(colours.dtype, np.integer) or colours.min(initial=0) < 0 or colours.max(initial=0) > 255:
        raise ValueError('palette must hold integers from 0 to 255')
    if classes is not None and len(classes) != len(colours):
        raise ValueError(f'got {len(classes)} class names for {len(colours)} colours in the palette')

    height, width = image.shape[:2]
    panels = {
        'image': image,
        'ground truth': _colour(truth, colours, 'truth'),
        'prediction': _colour(prediction, colours, 'prediction'),
    }
    top = np.full((TITLE_HEIGHT + height, 3 * width + 2 * GAP, 3), _BACKGROUND, np.uint8)
    for index, (title, panel) in enumerate(panels.items()):
        left = index * (width + GAP)
        top[TITLE_HEIGHT:, left : left + width] = panel
        _write(top, title, left + max((width - _text_width(title)) // 2, 0), TITLE_HEIGHT - 8, width)

    present = [int(label) for label in np.union1d(truth, prediction) if label != IGNORE]
    entries = [
        (classes[label] if classes is not None else f'class {label}', tuple(int(c) for c in colours[label][::-1]))
        for label in present
    ]
    if (truth == IGNORE).any() or (prediction == IGNORE).any():
        entries.append(('ignored', (0, 0, 0)))
    return np.concatenate((top, _legend(top.shape[1], entries)))
