"""What the readers of all formats return: images with shapes, in the order in which they are drawn."""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ...errors import DataError
from ..checks.listing import is_image, names_below
from .shapes import Patch, Size

Colour = tuple[int, int, int]

_SPLITS = re.compile(r'(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(\d{4})?', re.IGNORECASE)
_NO_SCENE = {'images', 'labels', 'annotations', 'data', 'jpegimages'}  # folders that say nothing about their files
_MASKS = {'SegmentationClass', 'SegmentationObject'}  # VOC's folders of labels
_SAME = {'.jpeg': '.jpg', '.jpe': '.jpg', '.jfif': '.jpg', '.tiff': '.tif'}


@dataclass(frozen=True)
class Shape:
    """One shape: its class, and a function that draws it for the (height, width) of the image."""

    label: str
    draw: Callable[[Size], Patch]


@dataclass(frozen=True)
class Item:
    """One image with its annotation.

    Attributes:
        name: path of the image below ``images/SPLIT`` of the result, with its folders.
        image: the image file, or None if it does not exist.
        where: what a message names: the image as the annotation calls it, or the annotation's file.
        split: 'train', 'val' or 'test', or None if the source does not say.
        size: (height, width) that the annotation states, or None.
        shapes: in the order in which they are drawn: later ones cover earlier ones.
        colours: file of colours in place of shapes, or None.
        embedded: JSON file of LabelMe that holds the image, used if ``image`` is None.
        listed: whether the annotation knows the image.
    """

    name: str
    image: str | None
    where: str
    split: str | None = None
    size: Size | None = None
    shapes: tuple[Shape, ...] = ()
    colours: str | None = None
    embedded: str | None = None
    listed: bool = True


@dataclass
class Notes:
    """Counts and names of what an import met: kind to names. Faults stop the import; only drawing finds them."""

    notes: dict[str, list[str]] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, name: str) -> None:
        self.notes.setdefault(kind, []).append(name)

    def fault(self, kind: str, name: str) -> None:
        self.faults.setdefault(kind, []).append(name)


@dataclass
class Annotations:
    """The content of a source.

    Attributes:
        classes: names in the order of the annotation.
        items: its images.
        palette: colours that the annotation gives to classes.
        background: what uncovered pixels are called; None if the format has none.
        notes: what the reader met.
    """

    classes: list[str]
    items: list[Item]
    palette: dict[str, Colour] = field(default_factory=dict)
    background: str | None = 'background'
    notes: Notes = field(default_factory=Notes)


class Images:
    """The images below some folders, found by the names that annotations give them."""

    def __init__(self, folders: Iterable[Path]):
        self.roots = [Path(folder) for folder in folders]
        self.paths: dict[str, PurePosixPath] = {}  # file to its path below its root
        self._named: dict[str, list[str]] = {}  # by names with and without suffix
        for root in self.roots:
            for path in names_below(str(root), folders=False):
                below = PurePosixPath(Path(path).relative_to(root).as_posix())
                if is_image(below.name) and path not in self.paths and not _MASKS & {*below.parts}:
                    self.paths[path] = below
                    for name in (below.name, below.stem):
                        self._named.setdefault(name, []).append(path)

    def find(self, name: str, near: Path | None = None, split: str | None = None) -> str | None:
        """Return the file with this name, or None.

        Args:
            name: as in the annotation, with or without folders and suffix.
            near: a folder whose files come first.
            split: of several files with this name, prefer those in folders of this split.

        Raises:
            DataError: several files have the name.
        """
        parts = tuple(part for part in name.replace('\\', '/').split('/') if part not in ('', '.'))
        if not parts:
            return None
        for folder in filter(None, (near, *self.roots)):
            direct = os.path.join(folder, *parts)
            if '..' not in parts and os.path.isfile(direct):
                return direct
        found = self._named.get(parts[-1], [])
        for length in range(2, len(parts) + 1):  # each folder of the name narrows the choice
            found = [path for path in found if Path(path).parts[-length:-1] == parts[-length:-1]] or found
        if near is not None and len(found) > 1:
            found = [path for path in found if Path(path).is_relative_to(near)] or found
        if split and len(found) > 1:
            found = [path for path in found if split_of(self.paths[path].parent.parts) == split] or found
        if len(found) > 1:
            raise DataError(
                f'{name}: {len(found)} images have this name, such as {found[0]} and {found[1]}; '
                'import their folders one by one, or write the folder into the annotation'
            )
        return found[0] if found else None

    def item(self, name: str, where: str, **fields) -> Item:
        """The item of the image ``name``; arguments as for :meth:`find` and :class:`Item`, or the file as ``path``."""
        split, near, path = fields.get('split'), fields.pop('near', None), fields.pop('path', None)
        path = path or self.find(name, near, split)
        below = self.paths.get(path) if path else None
        if below is None:
            below = PurePosixPath((path or name).replace('\\', '/'))
            below = PurePosixPath(below.name) if path or below.is_absolute() else below
        fields['split'] = split or split_of(below.parts[:-1])
        return Item(result_name(below), path, where, **fields)

    def unused(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield an item without annotation for each image that no item has."""
        used = {os.path.realpath(item.image) for item in items if item.image}
        for path, below in self.paths.items():
            if os.path.realpath(path) not in used:
                yield Item(result_name(below), path, str(below), split_of(below.parts[:-1]), listed=False)


def split_of(parts: Iterable[str]) -> str | None:
    """The split that names of folders or files state: 'instances_val2017' is 'val'; None if none or two do."""
    found = set()
    for part in parts:
        for word in re.split(r'[^a-zA-Z0-9]+', part):
            if match := _SPLITS.fullmatch(word):
                found.add({'tr': 'train', 'va': 'val', 'te': 'test'}[match[1][:2].lower()])
    return found.pop() if len(found) == 1 else None


def result_name(path: PurePosixPath) -> str:
    """Path of an image in the result: without folders that only say 'images' or 'train', and with a usual suffix."""
    parts = [part for part in path.parts[:-1] if part not in ('..', '/', '.')]
    kept = [part for part in parts if part.lower() not in _NO_SCENE and not _SPLITS.fullmatch(part)]
    suffix = path.suffix.lower()
    return '/'.join([*kept, path.stem + _SAME.get(suffix, suffix)])


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn the errors of code that reads a structure into a DataError that names the file."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f'no {error}' if isinstance(error, KeyError) else error
        raise DataError(f'{path}: not a readable {kind} file ({reason}); export it again') from error


def read_json(path: Path) -> object:
    """Parse a JSON file; raises DataError when it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}: not a readable JSON file ({error}); export it again') from error


def read_text(path: Path) -> str:
    """Read a text file; raises DataError when it is none."""
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: not a text file in UTF-8 ({error}); save it as one') from error


def similar(name: str, names: Iterable[str]) -> str:
    """``, did you mean 'x'?`` where a known name is close, else the first of the known names."""
    names = list(names)
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f'did you mean {close[0]!r}?'
    return f'the annotation has {", ".join(names[:20])}' + (', ...' if len(names) > 20 else '')
