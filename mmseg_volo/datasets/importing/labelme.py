"""Read LabelMe's JSON files, one for each image. Later shapes of a file cover earlier ones.

These are the files of the application labelme; the XML of the older web site LabelMe is another format.
"""

import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from ...errors import DataError
from ..checks.listing import is_image
from .annotations import Annotations, Images, Item, Notes, Shape, read_json, read_text, reading
from .shapes import broken, ellipse, png_mask, polygons

BACKGROUND, IGNORED = '_background_', '__ignore__'  # names with this meaning in labelme's own converters


def read(files: list[Path], src: Path, images: Images, names: list[str] | None = None) -> Annotations:
    """Read all files. Classes are sorted by name, unless a ``labels.txt`` in the source lists them."""
    result, found = Annotations([], []), set()
    for file in files:
        where = file.relative_to(src).as_posix() if file != src else file.name
        try:
            with reading(file, 'LabelMe'):
                item = _item(file, where, images, result.notes)
        except DataError as error:
            path = images.find(file.stem, file.parent)
            if path is None:
                raise
            reason = str(error).removeprefix(f'{file}: ')
            item = images.item(path, where, path=path, shapes=(Shape('', partial(broken, reason=reason)),))
        result.items.append(item)
        found.update(shape.label for shape in item.shapes if shape.label)
    listing = (src if src.is_dir() else src.parent) / 'labels.txt'
    listed = [line.strip() for line in read_text(listing).splitlines()] if listing.is_file() else []
    ordered = [name for name in listed if name and name not in (IGNORED, BACKGROUND)]
    result.classes = list(dict.fromkeys([*ordered, *sorted(found - {IGNORED, BACKGROUND})]))
    return result


def _item(file: Path, where: str, images: Images, notes: Notes) -> Item:
    content = read_json(file)
    shapes = tuple(_shapes(where, content['shapes'], notes))
    name = PurePosixPath(str(content.get('imagePath') or '').replace('\\', '/'))
    height, width = content.get('imageHeight'), content.get('imageWidth')
    size = (int(height), int(width)) if height and width else None
    path = os.path.normpath(file.parent / name)
    if not os.path.isfile(path):  # moved or renamed since
        path = images.find(name.name, file.parent) or images.find(file.stem, file.parent)
    embedded = str(file) if path is None and content.get('imageData') else None
    known = PurePosixPath(where).parent / (name.name if is_image(name.name) else f'{file.stem}.jpg')
    return images.item(str(known), where, path=path, size=size, shapes=shapes, embedded=embedded)


def _shapes(where: str, shapes: Iterable[dict], notes: Notes) -> Iterable[Shape]:
    for shape in shapes:
        label, kind, points = str(shape['label']), shape.get('shape_type') or 'polygon', shape['points']
        corners = [value for point in points for value in point]
        x, y = points[0] if points else (0, 0)
        if kind == 'mask':
            yield Shape(label, partial(png_mask, text=shape['mask'], left=round(x), top=round(y)))
        elif kind == 'circle':
            radius = math.dist(points[0], points[1])
            yield Shape(label, partial(polygons, parts=[ellipse(x, y, radius, radius)]))
        elif kind == 'rectangle' and len(points) == 2:
            right, bottom = points[1]
            yield Shape(label, partial(polygons, parts=[[x, y, right, y, right, bottom, x, bottom]]))
        elif kind in ('polygon', 'rectangle', 'oriented_rectangle') and len(points) >= 3:
            yield Shape(label, partial(polygons, parts=[corners]))
        else:
            notes.note(f'shapes without an area, left out: {kind} of {len(points)} points', where)
