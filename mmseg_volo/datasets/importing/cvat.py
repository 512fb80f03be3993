"""Read CVAT's XML ("CVAT for images 1.1"). Shapes are drawn by their z_order, and in the order of the file."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from ...errors import DataError
from .annotations import Annotations, Images, Notes, Shape, reading, split_of
from .shapes import cvat_runs, ellipse, polygons, rectangle


def read(files: list[Path], src: Path, images: Images, names: list[str] | None = None) -> Annotations:
    """Read all files; classes and colours are those of the task."""
    result = Annotations([], [])
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f'{file}: not a readable XML file ({error}); export it again') from error
        if root.find('track') is not None:
            raise DataError(f'{file}: tracks of a video; export the task as "CVAT for images 1.1"')
        with reading(file, 'CVAT'):
            for label in root.iterfind('meta//labels/label'):
                name, colour = label.findtext('name') or '', label.findtext('color') or ''
                result.classes += [name] if name not in result.classes else []
                if len(colour) == 7:
                    result.palette[name] = tuple(bytes.fromhex(colour[1:]))
            for image in root.iterfind('image'):
                name = image.attrib['name']
                size = int(image.attrib['height']), int(image.attrib['width'])
                shapes = tuple(_shapes(name, image, result.notes))
                split = split_of([image.get('subset', '')]) or split_of([file.stem])
                result.items.append(images.item(name, name, near=file.parent, split=split, size=size, shapes=shapes))
    used = {shape.label: None for item in result.items for shape in item.shapes}
    result.classes += [name for name in used if name not in result.classes]
    return result


def _shapes(name: str, image: ElementTree.Element, notes: Notes) -> Iterable[Shape]:
    order = sorted(image, key=lambda shape: int(shape.get('z_order', 0)))
    for shape in order:
        draw = _drawing(shape)
        if draw:
            yield Shape(shape.attrib['label'], draw)
        elif shape.tag != 'tag':
            notes.note(f'shapes without an area, left out: {shape.tag}', name)


def _drawing(shape: ElementTree.Element) -> partial | None:
    def value(key: str) -> float:
        return float(shape.attrib[key])

    turned = float(shape.get('rotation', 0))
    if shape.tag == 'polygon':
        corners = [float(number) for point in shape.attrib['points'].split(';') for number in point.split(',')]
        return partial(polygons, parts=[corners])
    if shape.tag == 'box':
        left, top = value('xtl'), value('ytl')
        return partial(polygons, parts=[rectangle(left, top, value('xbr') - left, value('ybr') - top, turned)])
    if shape.tag == 'ellipse':
        return partial(polygons, parts=[ellipse(value('cx'), value('cy'), value('rx'), value('ry'), turned)])
    if shape.tag == 'mask':
        box = {key: int(value(key)) for key in ('left', 'top', 'width', 'height')}
        return partial(cvat_runs, counts=[int(number) for number in shape.attrib['rle'].split(',')], **box)
    return None
