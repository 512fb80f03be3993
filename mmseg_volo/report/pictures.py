"""The worst and the best pictures of an evaluation, as data URIs: image, truth, prediction and errors."""

import base64
import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..inference.images import read_image
from .reading import Evaluation

_SIDE = 480  # pixels of the longer side, at most
_QUALITY = 70
_LOSSLESS = 101
_WRONG = (30, 120, 255)  # BGR
_NAMED = 12  # classes in the legend of a picture


@dataclass
class Panel:
    """One picture of a row; ``uri`` is None where it cannot be shown, and ``alt`` then says why."""

    title: str
    uri: str | None
    alt: str
    width: int = 0
    height: int = 0


@dataclass
class Shown:
    """One row: a picture of the data set with its panels, and the classes in it with their colours."""

    name: str
    miou: float
    accuracy: float
    panels: list[Panel]
    legend: list[tuple[str, str]]


def shown_pictures(evaluation: Evaluation, most: int = 6) -> tuple[list[Shown], list[Shown]]:
    """The worst pictures, worst first, and the best ones, best first, of those whose predictions were kept."""
    kept = [one for one in evaluation.pictures if one.get('prediction') and isinstance(one.get('mIoU'), (int, float))]
    kept.sort(key=lambda one: one['mIoU'])
    half = min(most, -(-len(kept) // 2))
    worst, best = kept[:half], kept[half:][-most:]
    return [_shown(evaluation, one) for one in worst], [_shown(evaluation, one) for one in reversed(best)]


def colours(evaluation: Evaluation) -> np.ndarray:
    """RGB (C, 3), uint8: the data set's, else hues of equal distance."""
    if evaluation.palette:
        return np.clip(np.array(evaluation.palette), 0, 255).astype(np.uint8)
    count = len(evaluation.classes)
    hues = [colorsys.hsv_to_rgb(i / count, 0.75, 0.55 + 0.45 * (i % 2)) for i in range(count)]
    return np.rint(255 * np.array(hues)).astype(np.uint8)


def _shown(evaluation: Evaluation, picture: dict) -> Shown:
    predicted = _labels(evaluation, picture.get('prediction'))
    truth = _labels(evaluation, picture.get('truth_map'))
    image, why = _image(evaluation, str(picture.get('path')))
    palette, classes = colours(evaluation), evaluation.classes
    panels = [_photo(image) if image is not None else Panel('Image', None, why)]
    for title, labels in (('Truth', truth), ('Prediction', predicted)):
        if labels is None:
            panels.append(Panel(title, None, 'It was not kept, or is not there any more.'))
        else:
            panels.append(_panel(title, _painted(labels, palette), _LOSSLESS, f'{title}: {_in_words(labels, classes)}'))
    legend: list[tuple[str, str]] = []
    if truth is None or predicted is None or truth.shape != predicted.shape:
        panels.append(Panel('Errors', None, 'Needs truth and prediction.'))
    else:
        panels.append(_errors(image, truth, predicted, classes, evaluation.record.get('ignore_index', 255)))
        counts = np.bincount(np.concatenate([truth.ravel(), predicted.ravel()]), minlength=len(classes))
        order = np.argsort(-counts[: len(classes)], kind='stable')[:_NAMED]
        legend = [(classes[k], '#{:02x}{:02x}{:02x}'.format(*palette[k])) for k in order if counts[k]]
    accuracy = picture.get('accuracy')
    accuracy = accuracy if isinstance(accuracy, (int, float)) else math.nan
    return Shown(Path(str(picture.get('path'))).name, 100 * picture['mIoU'], 100 * accuracy, panels, legend)


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
    started_in = evaluation.dataset.get('started_in') or '.'
    for path in (Path(name), Path(str(started_in), name)):
        try:
            if path.is_file():
                return read_image(path), ''
        except (OSError, ValueError) as error:
            return None, f'{name} cannot be read: {error}'
    return None, f'{name} is not there any more.'


def _photo(image: np.ndarray) -> Panel:
    height, width = image.shape[:2]
    return _panel('Image', image, _QUALITY, f'The picture, {width} × {height} pixels.')


def _painted(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """BGR; black where the label is no class."""
    table = np.zeros((2**16, 3), np.uint8)
    table[: len(palette)] = palette[:, ::-1]
    return table[_small(labels)]


def _errors(
    image: np.ndarray | None, truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str], ignore: int
) -> Panel:
    """The picture in dark grey, what is wrong in a light orange over it, what does not count in black."""
    counted = (truth < len(classes)) & (truth != ignore)
    wrong = counted & (truth != predicted)
    ground = np.full((*truth.shape, 3), 60, np.uint8)
    if image is not None:
        grey = cv2.cvtColor(cv2.resize(image, truth.shape[::-1], interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
        ground = np.repeat((25 + grey // 3)[..., None], 3, axis=2)
    ground[wrong] = _WRONG
    ground[~counted] = 0
    pixels, total = int(wrong.sum()), int(counted.sum())
    alt = f'Errors: {pixels / max(total, 1):.1%} of the labelled pixels are wrong'
    if pixels:
        pairs = truth[wrong].astype(np.int64) * 2**16 + predicted[wrong]
        values, counts = np.unique(pairs, return_counts=True)
        row, column = divmod(int(values[counts.argmax()]), 2**16)
        taken = classes[column] if column < len(classes) else f'class {column}'
        alt += f', most of all {classes[row]} taken for {taken} ({counts.max() / max(total, 1):.1%})'
    return _panel('Errors', ground, _QUALITY, f'{alt}.', nearest=True)


def _in_words(labels: np.ndarray, classes: Sequence[str]) -> str:
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind='stable')[:6]
    parts = [(classes[values[i]] if values[i] < len(classes) else 'not labelled', counts[i]) for i in order]
    return ', '.join(f'{name} {count / labels.size:.0%}' for name, count in parts)


def _small(picture: np.ndarray, nearest: bool = True) -> np.ndarray:
    height, width = picture.shape[:2]
    scale = min(_SIDE / max(height, width), 1)
    if scale == 1:
        return picture
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if nearest else cv2.INTER_AREA)


def _panel(title: str, picture: np.ndarray, quality: int, alt: str, nearest: bool = False) -> Panel:
    picture = _small(picture, nearest)
    data = cv2.imencode('.webp', picture, [cv2.IMWRITE_WEBP_QUALITY, quality])[1]
    uri = f'data:image/webp;base64,{base64.b64encode(data).decode()}'
    return Panel(title, uri, alt, picture.shape[1], picture.shape[0])
