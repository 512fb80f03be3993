"""Read the segmentation labels of Ultralytics YOLO: text files of polygons. Later lines cover earlier ones.

Ultralytics takes an image without a text file for background. Here it counts as not annotated: it may be just that.
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml

from ...errors import DataError
from ..checks.listing import is_image, names_below
from .annotations import Annotations, Images, Notes, Shape, read_text, reading
from .shapes import broken, polygons

SUFFIXES = ('.yaml', '.yml')
_SPLITS = ('train', 'val', 'test')


def read(files: list[Path], src: Path, images: Images, names: list[str] | None = None) -> Annotations:
    """Read the data set that a YAML file describes, or all images with a folder ``labels`` beside ``images``.

    Args:
        files: the YAML file, or nothing.
        names: class names in the order of the ids, for sources that do not state them.
    """
    root = src if src.is_dir() else src.parent
    if len(files) > 1:
        raise DataError(f'{src}: several YAML files ({", ".join(map(str, files[:3]))}); name one of them as SRC')
    with reading(files[0] if files else root, 'YAML'):
        content = _content(files[0]) if files else {}
        result = Annotations(_names(content, root, names), [])
    chosen = {split: paths for split in _SPLITS if (paths := _images(content, split, files, root))}
    if not chosen:
        chosen = {None: list(images.paths)}
    for split, paths in chosen.items():
        for path in paths:
            label = _label_of(Path(path))
            labelled = label.is_file()
            shapes = tuple(_shapes(label, result.classes, result.notes)) if labelled else ()
            where, there = str(images.paths.get(path, path)), path if os.path.isfile(path) else None
            result.items.append(images.item(path, where, path=there, split=split, shapes=shapes, listed=labelled))
    return result


def _content(path: Path) -> dict:
    try:
        return dict(yaml.safe_load(read_text(path)))
    except yaml.YAMLError as error:
        raise DataError(f'{path}: not a readable YAML file ({" ".join(str(error).split())})') from error


def _names(content: dict, root: Path, names: list[str] | None) -> list[str]:
    stated = content.get('names')
    if isinstance(stated, dict):
        stated = {int(index): str(name) for index, name in stated.items()}
        return [stated.get(index, f'class{index}') for index in range(max(stated) + 1)]
    if stated:
        return [str(name) for name in stated]
    listing = next((root / name for name in ('classes.txt', 'labels/classes.txt') if (root / name).is_file()), None)
    if listing:
        return [line.strip() for line in read_text(listing).splitlines() if line.strip()]
    if not names:
        raise DataError(
            f'{root}: neither data.yaml nor classes.txt names the classes; give them in the order of their ids: '
            '--classes NAME NAME ...'
        )
    return list(names)


def _images(content: dict, split: str, files: list[Path], root: Path) -> list[str]:
    """Images of a split: those below its folders, or those that its text files list."""
    entries = content.get(split) or []
    found = []
    for entry in [entries] if isinstance(entries, str) else entries:
        stated = Path(content.get('path') or '.') / entry
        # 'path' is often that of another machine, and Roboflow writes '../train/images' for 'train/images'.
        tries = [files[0].parent / stated, files[0].parent / re.sub(r'^(\.\./)+', '', entry)]
        place = next((path for path in tries if path.exists()), None)
        if place is None:
            raise DataError(f'{files[0]}: {split} is {entry!r}, but {tries[0]} does not exist; correct the path')
        if place.is_dir():
            found += [path for path in names_below(str(place), folders=False) if is_image(path)]
        else:
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            found += [str(place.parent / line) for line in lines]
    return found


def _label_of(image: Path) -> Path:
    """The label of an image: the last folder 'images' of its path becomes 'labels'; else the text file beside it."""
    parts = list(image.parts)
    if 'images' in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index('images')] = 'labels'
        return Path(*parts).with_suffix('.txt')
    return image.with_suffix('.txt')


def _shapes(path: Path, classes: list[str], notes: Notes) -> Iterator[Shape]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        place = f'{path.name}, line {number}'
        try:
            index, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            index, values = 0, []
        if len(values) == 4:
            notes.note('boxes, left out', place)
        elif len(values) < 6 or len(values) % 2:
            yield Shape('', partial(broken, reason=f'line {number} is not a class id and three or more points'))
        elif not 0 <= index < len(classes):
            reason = f'line {number} has class id {index}, but there are {len(classes)} classes'
            yield Shape('', partial(broken, reason=reason))
        else:
            yield Shape(classes[index], partial(polygons, parts=[values], relative=1))
