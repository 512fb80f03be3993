"""Read Label Studio's JSON export: brush, polygons, rectangles, ellipses. Later regions cover earlier ones."""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .annotations import Annotations, Images, Notes, Shape, read_json, reading
from .shapes import Patch, Size, brush, ellipse, polygons, rectangle

_LABELS = ('brushlabels', 'polygonlabels', 'rectanglelabels', 'ellipselabels', 'labels')
_IMAGE = re.compile(r'\.(jpe?g|png|bmp|tiff?|webp|gif)$', re.IGNORECASE)
_UPLOADED = re.compile(r'^[0-9a-f]{8}-')  # before the name of an uploaded file


def read(files: list[Path], src: Path, images: Images, names: list[str] | None = None) -> Annotations:
    """Read all files ("JSON", not "JSON-MIN"). The export has no list of classes, so they are sorted by name.

    Of several annotations of a task, the one marked as ground truth counts, or else the first.
    """
    result, found = Annotations([], []), set()
    for file in files:
        with reading(file, 'Label Studio'):
            for task in read_json(file):
                url = _url(task)
                done = [each for each in task.get('annotations') or () if not each.get('was_cancelled')]
                done.sort(key=lambda each: not each.get('ground_truth'))
                name = _name(url, images, file.parent)
                if len(done) > 1:
                    result.notes.note('tasks with several annotations, of which one is used', name)
                regions = done[0]['result'] if done else []
                shapes = tuple(_shapes(name, regions, result.notes))
                found.update(shape.label for shape in shapes)
                size = next(
                    (
                        (region['original_height'], region['original_width'])
                        for region in regions
                        if 'original_width' in region
                    ),
                    None,
                )
                result.items.append(
                    images.item(name, name, near=file.parent, size=size, shapes=shapes, listed=bool(done))
                )
    result.classes = sorted(found)
    return result


def _url(task: dict) -> str:
    """The task's image: the field of that name, or the first whose value ends as names of images do."""
    values = {key: value for key, value in task['data'].items() if isinstance(value, str)}
    if 'image' in values:
        return values['image']
    found = next((value for value in values.values() if _IMAGE.search(urlsplit(value).path + _local(value))), None)
    if found is None:
        raise ValueError(f'a task without an image: {str(task["data"])[:100]}')
    return found


def _local(url: str) -> str:
    return parse_qs(urlsplit(url).query).get('d', [''])[0]


def _name(url: str, images: Images, near: Path) -> str:
    """File name behind a URL such as /data/upload/1/0a1b2c3d-a.jpg or /data/local-files/?d=folder/a.jpg."""
    name = unquote(_local(url) or urlsplit(url).path).lstrip('/')
    last = name.rpartition('/')[2]
    known = (name, last, _UPLOADED.sub('', last))
    return next((each for each in known if images.find(each, near)), last)


def _shapes(name: str, regions: list[dict], notes: Notes) -> Iterable[Shape]:
    named = {region['id']: label for region in regions if 'id' in region and (label := _label(region))}
    drawn = set()
    for region in regions:
        identity, value = region.get('id', id(region)), region.get('value', {})
        if region.get('image_rotation'):
            notes.note('regions of an image that was rotated in Label Studio: look at them', name)
        draw, label = _drawing(value), _label(region) or named.get(identity)
        if draw and label and identity not in drawn:
            drawn.add(identity)  # with the tags Brush and Labels, two results with one id make a region
            yield Shape(label, draw)
        elif draw and not label:
            notes.note('regions without a class, left out', name)
        elif not draw and value.keys() & {'x', 'points', 'vertices'}:
            notes.note(f'regions without an area, left out: {region.get("type")}', name)


def _label(region: dict) -> str:
    return next((str(region['value'][key][0]) for key in _LABELS if region.get('value', {}).get(key)), '')


def _drawing(value: dict) -> partial | None:
    if value.get('format') == 'rle' or 'rle' in value:
        return partial(brush, data=value['rle'])
    if 'points' in value:
        corners = [number for point in value['points'] for number in point]
        return partial(polygons, parts=[corners], relative=100) if len(corners) >= 6 else None
    for kind, across, down in (('ellipse', 'radiusX', 'radiusY'), ('rectangle', 'width', 'height')):
        if across in value and down in value:
            percent = tuple(float(value[key]) for key in ('x', 'y', across, down))
            return partial(_turned, kind=kind, percent=percent, degrees=float(value.get('rotation') or 0))
    return None


def _turned(size: Size, kind: str, percent: tuple[float, ...], degrees: float) -> Patch:
    """Draw a rectangle or an ellipse: the angle is one of pixels, not of percents."""
    x, y, across, down = (value * side / 100 for value, side in zip(percent, (*size[::-1],) * 2, strict=True))
    corners = ellipse(x, y, across, down, degrees) if kind == 'ellipse' else None
    return polygons(size, [corners or rectangle(x, y, across, down, degrees, around='corner')])
