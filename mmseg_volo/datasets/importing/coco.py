"""Read COCO's JSON: polygons and run lengths. Later annotations of the file cover earlier ones."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from .annotations import Annotations, Images, Notes, Shape, read_json, reading, split_of
from .shapes import broken, coco_runs, polygons


def read(files: list[Path], src: Path, images: Images, names: list[str] | None = None) -> Annotations:
    """Read all files with instances; files of captions and key points beside files ``instances_*`` are left out."""
    result = Annotations([], [])
    chosen = [file for file in files if file.name.startswith('instances')] or files
    for file in files:
        if file not in chosen:
            result.notes.note('files beside those named instances*, left out', str(file))
            continue
        with reading(file, 'COCO'):
            _read_file(file, src, images, result)
    return result


def _read_file(file: Path, src: Path, images: Images, result: Annotations) -> None:
    content = read_json(file)
    if 'categories' not in content:
        result.notes.note('files without categories, left out', str(file))
        return
    classes = {category['id']: str(category['name']) for category in content['categories']}
    result.classes += [name for name in dict.fromkeys(classes.values()) if name not in result.classes]
    split = split_of([file.stem]) or split_of(file.relative_to(src).parts[:-1] if file != src else ())
    grouped: dict = {}
    for annotation in content['annotations']:
        grouped.setdefault(annotation['image_id'], []).append(annotation)
    for image in content['images']:
        name = str(image['file_name'])
        shapes = _shapes(name, grouped.pop(image['id'], ()), classes, result.notes)
        size = (int(image['height']), int(image['width'])) if 'height' in image and 'width' in image else None
        result.items.append(images.item(name, name, near=file.parent, split=split, size=size, shapes=tuple(shapes)))
    for identity in grouped:
        result.notes.note('image ids that only annotations have', f'{file.name}: {identity}')


def _shapes(name: str, annotations: Iterable[dict], classes: dict, notes: Notes) -> Iterable[Shape]:
    for annotation in annotations:
        if annotation['category_id'] not in classes:
            reason = f'its category_id {annotation["category_id"]} is none of the categories'
            yield Shape('', partial(broken, reason=reason))
            continue
        label, drawn = classes[annotation['category_id']], annotation.get('segmentation')
        if isinstance(drawn, dict):
            yield Shape(label, partial(coco_runs, runs=drawn))
            continue
        drawn = drawn if isinstance(drawn, list) else []
        parts = [part for part in drawn if isinstance(part, list) and len(part) >= 6]
        if parts:
            yield Shape(label, partial(polygons, parts=parts))
        if len(parts) < max(len(drawn), 1):
            notes.note('boxes, and polygons of fewer than 3 corners, left out', name)
