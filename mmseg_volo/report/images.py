"""The worst and the best images of an evaluation as data URIs: image, ground truth, prediction and errors."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.colors import to_hex

from ..inference.images import read_image
from .reading import Evaluation

_SIDE = 480  # pixels of the longer side, at most
_QUALITY, _LOSSLESS = 70, 101  # of WebP
_WRONG = (30, 120, 255)  # BGR
_NAMED = 12  # classes in the legend of an image


@dataclass
class Panel:
    """One of the panels of an image. ``uri`` is None if there is nothing to show; then ``alt`` says why."""

    title: str
    uri: str | None
    alt: str
    width: int = 0
    height: int = 0


@dataclass
class Shown:
    """One image of the data set with its panels and its legend (class names and hex colours)."""

    name: str
    miou: float
    accuracy: float
    panels: list[Panel]
    legend: list[tuple[str, str]]


def shown_images(evaluation: Evaluation, most: int = 6) -> tuple[list[Shown], list[Shown]]:
    """Return the worst images, worst first, and the best ones, best first, of those with a stored prediction."""
    kept = [one for one in evaluation.images if one.get('prediction') and isinstance(one.get('mIoU'), (int, float))]
    kept.sort(key=lambda one: one['mIoU'])
    half = min(most, -(-len(kept) // 2))
    worst, best = kept[:half], kept[half:][-most:]
    return [_shown(evaluation, one) for one in worst], [_shown(evaluation, one) for one in reversed(best)]


def hex_colours(evaluation: Evaluation) -> list[str]:
    """Return the colour of each class for CSS."""
    return [to_hex(colour) for colour in evaluation.palette / 255]


def _shown(evaluation: Evaluation, stored: dict) -> Shown:
    """Draw the panels of one image from its entry in the record."""
    path, classes = str(stored.get('path')), evaluation.classes
    image, problem = _image(evaluation, path)
    if image is None:
        panels = [Panel('Image', None, problem)]
    else:
        height, width = image.shape[:2]
        panels = [_panel('Image', _small(image, cv2.INTER_AREA), _QUALITY, f'The image, {width} × {height} pixels.')]
    truth, prediction = (_labels(evaluation, stored.get(key)) for key in ('truth_map', 'prediction'))
    for title, labels in (('Ground truth', truth), ('Prediction', prediction)):
        if labels is None:
            panels.append(Panel(title, None, 'It was not stored, or the file no longer exists.'))
        else:
            painted = _painted(_small(labels), evaluation.palette)
            panels.append(_panel(title, painted, _LOSSLESS, f'{title}: {_in_words(labels, classes)}'))
    legend: list[tuple[str, str]] = []
    if truth is None or prediction is None or truth.shape != prediction.shape:
        panels.append(Panel('Errors', None, 'Needs ground truth and prediction.'))
    else:
        panels.append(_errors(image, truth, prediction, classes, evaluation.record.get('ignore_index', 255)))
        counts = np.bincount(np.concatenate([truth.ravel(), prediction.ravel()]), minlength=len(classes))
        order = np.argsort(-counts[: len(classes)], kind='stable')[:_NAMED]
        colours = hex_colours(evaluation)
        legend = [(classes[k], colours[k]) for k in order if counts[k]]
    accuracy = stored.get('accuracy')
    accuracy = accuracy if isinstance(accuracy, (int, float)) else math.nan
    return Shown(Path(path).name, 100 * stored['mIoU'], 100 * accuracy, panels, legend)


def _labels(evaluation: Evaluation, name: object) -> np.ndarray | None:
    if not isinstance(name, str):
        return None
    try:
        data = np.frombuffer((evaluation.path.parent / name).read_bytes(), np.uint8)
        labels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if len(data) else None
    except (OSError, ValueError, cv2.error):
        return None
    return labels if labels is not None and labels.ndim == 2 else None


def _image(evaluation: Evaluation, name: str) -> tuple[np.ndarray | None, str]:
    """Return an image of the data set, or None and the reason."""
    started_in = evaluation.dataset.get('started_in') or '.'
    for path in (Path(name), Path(str(started_in), name)):
        try:
            if path.is_file():
                return read_image(path), ''
        except (OSError, ValueError) as error:
            return None, f'{name} cannot be read: {error}'
    return None, f'{name} no longer exists.'


def _painted(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Map labels to BGR; black where the label is no class."""
    table = np.zeros((2**16, 3), np.uint8)
    table[: len(palette)] = palette[:, ::-1]
    return table[labels]


def _errors(
    image: np.ndarray | None, truth: np.ndarray, prediction: np.ndarray, classes: Sequence[str], ignore: int
) -> Panel:
    """Draw wrong pixels light orange over the dark grey image, and pixels that do not count black."""
    counted = (truth < len(classes)) & (truth != ignore)
    wrong = counted & (truth != prediction)
    drawn = np.full((*truth.shape, 3), 60, np.uint8)
    if image is not None:
        grey = cv2.cvtColor(cv2.resize(image, truth.shape[::-1], interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
        drawn = np.repeat((25 + grey // 3)[..., None], 3, axis=2)
    drawn[wrong] = _WRONG
    drawn[~counted] = 0
    pixels, total = int(wrong.sum()), int(counted.sum())
    alt = f'Errors: {pixels / max(total, 1):.1%} of the labelled pixels are wrong'
    if pixels:
        pairs = truth[wrong].astype(np.int64) * 2**16 + prediction[wrong]
        values, counts = np.unique(pairs, return_counts=True)
        row, column = divmod(int(values[counts.argmax()]), 2**16)
        taken = classes[column] if column < len(classes) else f'class {column}'
        alt += f', most of all {classes[row]} taken for {taken} ({counts.max() / max(total, 1):.1%})'
    return _panel('Errors', _small(drawn), _QUALITY, f'{alt}.')


def _in_words(labels: np.ndarray, classes: Sequence[str]) -> str:
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind='stable')[:6]
    parts = [(classes[values[i]] if values[i] < len(classes) else 'not labelled', counts[i]) for i in order]
    return ', '.join(f'{name} {count / labels.size:.0%}' for name, count in parts)


def _small(image: np.ndarray, interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    height, width = image.shape[:2]
    scale = min(_SIDE / max(height, width), 1)
    if scale == 1:
        return image
    return cv2.resize(image, (max(round(width * scale), 1), max(round(height * scale), 1)), interpolation=interpolation)


def _panel(title: str, image: np.ndarray, quality: int, alt: str) -> Panel:
    data = cv2.imencode('.webp', image, [cv2.IMWRITE_WEBP_QUALITY, quality])[1]
    uri = f'data:image/webp;base64,{base64.b64encode(data).decode()}'
    return Panel(title, uri, alt, image.shape[1], image.shape[0])
