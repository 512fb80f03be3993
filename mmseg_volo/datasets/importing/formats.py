"""The formats, and how a source is recognised.

Each format is one module with a function ``read``. Datumaro reads four of the six formats, but neither labelme's JSON
nor Label Studio's, and it requires opencv-python-headless, which overwrites opencv-python.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from ..checks.listing import names_below
from . import coco, cvat, label_studio, labelme, voc, yolo
from .annotations import Annotations, Images

FORMATS = {
    'coco': coco,
    'labelme': labelme,
    'voc': voc,
    'yolo': yolo,
    'cvat': cvat,
    'label-studio': label_studio,
}
_HEAD = 2**16  # bytes in which a file shows its format
_EXPECTED = (
    'a JSON file of COCO, labelme or Label Studio, an XML file of CVAT, data.yaml or labels/*.txt of YOLO, or a folder '
    'SegmentationClass'
)


def read_annotations(
    src: Path, chosen: str | None = None, folders: Sequence[Path] = (), names: Sequence[str] | None = None
) -> tuple[str, Annotations, Images]:
    """Read a source.

    Args:
        src: a folder, or one file of annotations.
        chosen: name of the format; by default recognised.
        folders: where the images are; by default ``src``, or the folder of the file.
        names: class names, for YOLO without a file that states them.

    Returns:
        Name of the format, annotations, and images.

    Raises:
        DataError: the source does not exist, is in no or in several known formats, or cannot be read.
    """
    if not src.exists():
        raise DataError(f'{src}: no such file or folder')
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f'{folder}: no such folder of images')
    found = _recognise(src)
    if chosen is None and len(found) > 1:
        raise DataError(f'{src} holds several formats ({", ".join(found)}); choose one with --format')
    kind = chosen or next(iter(found), None)
    if kind is None or (kind not in found and kind != 'yolo'):
        raise DataError(f'{src}: no annotations{f" in the format {kind}" if kind else ""}; expected {_EXPECTED}')
    images = Images(folders or [src if src.is_dir() else src.parent])
    return kind, FORMATS[kind].read(found.get(kind, []), src, images, list(names or ()) or None), images


def _recognise(src: Path) -> dict[str, list[Path]]:
    """Format to its annotation files. The files of ``SegmentationClass`` are not opened."""
    found: dict[str, list[Path]] = {}
    texts = False
    for path in [src] if src.is_file() else sorted(map(Path, names_below(str(src)))):
        if path.name == voc.MASKS and path.is_dir():
            found.setdefault('voc', []).append(path)
        elif kind := _kind_of(path):
            found.setdefault(kind, []).append(path)
        texts |= path.suffix == '.txt' and 'labels' in path.parts
    if texts and not found:
        found['yolo'] = []
    return found


def _kind_of(path: Path) -> str | None:
    """The format of a JSON, XML or YAML file, by its beginning."""
    suffix = path.suffix.lower()
    if suffix not in ('.json', '.xml', *yolo.SUFFIXES) or not path.is_file():
        return None
    with open(path, 'rb') as file:
        head = file.read(_HEAD).decode('utf-8', 'replace').lstrip('\ufeff \t\r\n')
    if suffix == '.xml':
        return 'cvat' if '<annotations' in head else None
    if suffix != '.json':
        return 'yolo' if re.search(r'^names\s*:', head, re.MULTILINE) else None
    if head.startswith('['):
        return 'label-studio' if re.search(r'"(annotations|completions|predictions)"\s*:', head) else None
    if re.search(r'"(shapes|imageData)"\s*:', head):
        return 'labelme'
    return 'coco' if re.search(r'"(categories|category_id|file_name)"\s*:', head) else None
