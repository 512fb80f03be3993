"""Draw segmentation results: overlays, side-by-side panels and legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

IGNORE = 255
TITLE_HEIGHT = 26
GAP = 4
_TITLE_SIZE = 14
# Widths in multiples of the text size.
_LONGEST = 13  # of a name in a legend; longer names are cut, because they would cost a column
_LEAST_WIDTH = 9  # of a legend, so that names can be read below very narrow images
# Matplotlib ships this font: Latin, Greek, Cyrillic, Arabic and more, but no Chinese, Japanese or Korean.
_FONT = str(Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf'))
_WHITE = (255, 255, 255)


def _colour(labels: np.ndarray, palette: np.ndarray, name: str) -> np.ndarray:
    """Map labels (H, W) to BGR colours (H, W, 3); ignored pixels are black."""
    present = np.unique(labels)
    unknown = [int(label) for label in present if not 0 <= label < len(palette) and label != IGNORE]
    if unknown:
        raise ValueError(f'{name} has labels {unknown[:8]}, but the palette has {len(palette)} colours (0 and up)')
    table = np.zeros((max(256, len(palette)), 3), np.uint8)
    table[: len(palette)] = palette[:, ::-1]
    if len(palette) <= IGNORE:
        table[IGNORE] = 0
    return table[labels.astype(np.uint8 if len(table) == 256 else np.uint16)]


@cache
def _characters(font: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # a broken font file, or one without a character map
        return frozenset()


@cache
def _font_for(text: str) -> str | None:
    """Find a font file with all characters of a text: Matplotlib's font, or else a font of the system."""
    needed = {ord(c) for c in text if not c.isspace()}
    if needed <= _characters(_FONT):
        return _FONT
    return next((font for font in sorted(findSystemFonts()) if needed <= _characters(font)), None)


@cache
def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_for(text) or _FONT, size)


def _width(text: str, size: int) -> int:
    return math.ceil(_font(text, size).getlength(text))


def _write(draw: ImageDraw.ImageDraw, text: str, left: int, middle: float, size: int, room: int) -> None:
    """Write black text. Shrink text that is wider than ``room`` while it stays readable, then cut it."""
    if room < size:
        return
    least = min(size, max(9, round(0.75 * size)))
    while size > least and _width(text, size) > room:
        size -= 1
    font, whole = _font(text, size), len(text)
    while text and font.getlength(text if len(text) == whole else f'{text}…') > room:
        text = text[:-1]
    draw.text((left, middle), text if len(text) == whole else f'{text.rstrip()}…', (0, 0, 0), font, anchor='lm')


def text_size(height: int, width: int) -> int:
    """Return a text size in pixels that is readable when the whole image is shown."""
    return max(13, round(max(height, width) / 64))


def strip_width(width: int, size: int) -> int:
    """Return the width of the legend below an image of this width: the same, but enough for a name."""
    return max(width, _LEAST_WIDTH * size)


def column_width(names: Sequence[str], size: int) -> int:
    """Return the width in pixels that a legend gives to these names at this text size."""
    return min(max((_width(name, size) for name in names), default=0), _LONGEST * size)


def legend(
    width: int, entries: Sequence[tuple[str, Sequence[int]]], size: int, widest: int | None = None
) -> np.ndarray:
    """Draw a white strip with a coloured box and a name for each entry, in as many columns as fit.

    Args:
        width: width of the strip in pixels.
        entries: names and RGB colours; see :func:`entries_of`. An entry with an empty name leaves its place empty.
        size: text size in pixels; see :func:`text_size`. Names that do not fit are shrunk, then cut.
        widest: width of the names in pixels; default: their :func:`column_width`.

    Returns:
        The strip (h, width, 3), uint8, BGR.
    """
    if widest is None:
        widest = column_width([name for name, _ in entries], size)
    margin, box, row = size // 2, round(1.4 * size), round(1.5 * size)
    indent = box + margin  # of the name in its column
    columns = max(1, min((width - margin) // (indent + widest + size), len(entries)))
    column = (width - margin) // columns
    if columns > 1:
        column = min(column, indent + widest + 3 * size)
    rows = -(-len(entries) // columns)
    strip = Image.new('RGB', (width, rows * row + 2 * (margin // 2 + 1)), _WHITE)
    draw = ImageDraw.Draw(strip)
    for index, (name, colour) in enumerate(entries):
        if not name:
            continue
        left = margin + index % columns * column
        top = margin // 2 + 1 + index // columns * row
        upper = top + (row - size) // 2
        edges = (left, upper, left + box - 1, upper + size - 1)
        draw.rectangle(edges, tuple(int(c) for c in colour), (0, 0, 0), max(1, size // 16))
        _write(draw, name, left + indent, top + row / 2, size, column - indent - margin)
    return np.ascontiguousarray(np.asarray(strip)[..., ::-1])


def entries_of(
    classes: Sequence[str] | None, palette: Sequence[Sequence[int]], *labels: np.ndarray
) -> list[tuple[str, Sequence[int]]]:
    """Return the legend of label maps: names and RGB colours of the classes that occur, in order of their ids.

    A class is named 'class 0', 'class 1', ... if it has no name or no installed font has all its characters.
    """
    entries = []
    for label in sorted({int(label) for one in labels for label in np.unique(one)}):
        if label == IGNORE and len(palette) <= IGNORE:
            entries.append(('ignored', (0, 0, 0)))
        else:
            name = str(classes[label]).strip() if classes is not None else ''
            known = name and name.isprintable() and _font_for(name)
            entries.append((name if known else f'class {label}', palette[label]))
    return entries


def add_legend(image: np.ndarray, entries: Sequence[tuple[str, Sequence[int]]]) -> np.ndarray:
    """Add a legend below an image (H, W, 3), uint8, BGR.

    Returns:
        The image (H + legend, W, 3); a very narrow image gets a white border at the right, so that names can be read.
    """
    size = text_size(*image.shape[:2])
    width = strip_width(image.shape[1], size)
    image = cv2.copyMakeBorder(image, 0, 0, 0, width - image.shape[1], cv2.BORDER_CONSTANT, value=_WHITE)
    return np.concatenate((image, legend(width, entries, size)))


def overlay(
    image: np.ndarray, prediction: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.5
) -> np.ndarray:
    """Blend the colours of the classes over an image.

    Args:
        image: (H, W, 3), uint8, BGR.
        prediction: class ids (H, W), integers; 255 is drawn black.
        palette: RGB colour of each class.
        opacity: weight of the colours, from 0 to 1.

    Returns:
        The overlay (H, W, 3), uint8, BGR.

    Raises:
        ValueError: a class id is neither 255 nor in the palette.
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
    """Draw an image, its ground truth and a prediction as panels in one image, with titles and a legend.

    The panels lie from left to right, ``GAP`` pixels apart, below a strip of titles ``TITLE_HEIGHT`` pixels high: the
    pixel (row, column) of panel ``p`` is at ``[TITLE_HEIGHT + row, p * (W + GAP) + column]``. The legend below names
    the classes in the ground truth and the prediction.

    Args:
        image: (H, W, 3), uint8, BGR.
        truth: ground truth (H, W), integers; 255 is drawn black.
        prediction: class ids (H, W), integers; 255 is drawn black.
        palette: RGB colour of each class.
        classes: name of each class; default: 'class 0', 'class 1', ...

    Returns:
        The panels (TITLE_HEIGHT + H + legend, 3 * W + 2 * GAP, 3), uint8, BGR.

    Raises:
        ValueError: shapes or dtypes do not fit, or a class id is neither 255 nor in the palette.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f'image must be (H, W, 3) uint8, got {image.shape} {image.dtype}')
    for name, labels in (('truth', truth), ('prediction', prediction)):
        if labels.shape != image.shape[:2] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f'{name} must be integers of shape {image.shape[:2]}, like the image, got {labels.shape} {labels.dtype}'
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
    top = Image.new('RGB', (3 * width + 2 * GAP, TITLE_HEIGHT), _WHITE)
    draw = ImageDraw.Draw(top)
    size = max(9, min(_TITLE_SIZE, round(_TITLE_SIZE * width / (_width('ground truth', _TITLE_SIZE) + GAP))))
    for index, title in enumerate(panels):
        left = index * (width + GAP) + max((width - _width(title, size)) // 2, 0)
        _write(draw, title, left, TITLE_HEIGHT / 2, size, width)
    gap = np.full((height, GAP, 3), 255, np.uint8)
    first, second, third = panels.values()
    entries = entries_of(classes, palette, truth, prediction)
    rows = (
        np.asarray(top)[..., ::-1],
        np.concatenate((first, gap, second, gap, third), axis=1),
        legend(top.width, entries, text_size(height, width)),
    )
    return np.concatenate(rows)
