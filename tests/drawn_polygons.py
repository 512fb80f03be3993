"""Drawn polygons of three classes, their exact masks, and writers of the formats that labelling tools export.

The writers are text, or the format's own library; none uses the importer's code.
"""

import base64
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.path import Path as Outline
from PIL import Image

CLASSES = ('soil', 'crop', 'weed')
PALETTE = ((120, 90, 60), (40, 160, 60), (220, 60, 40))
WIDTH, HEIGHT = 400, 300
COUNT = 5


class Polygon(NamedTuple):
    """A polygon (N, 2) in pixels, (0, 0) being the corner of the first pixel, and its pixels (H, W), bool."""

    label: str
    corners: np.ndarray
    mask: np.ndarray

    @property
    def flat(self) -> list[float]:
        return self.corners.ravel().tolist()


def inside(corners: np.ndarray) -> np.ndarray:
    """Pixels whose centre is inside, (H, W), bool."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return Outline(corners).contains_points(np.c_[columns.ravel(), rows.ravel()]).reshape(HEIGHT, WIDTH)


@cache
def polygons_of(seed: int) -> tuple[Polygon, ...]:
    """Three polygons in drawing order; the later ones cover parts of the earlier ones."""
    random = np.random.default_rng(seed)
    found = []
    for label, (x, y), radius, corners in (
        ('soil', (190, 160), 130, 23),
        ('crop', (250, 150), 80, 9),
        ('weed', (150, 120), 60, 40),
    ):
        angles = np.sort(random.uniform(0, 2 * np.pi, corners)) + random.uniform()
        angles[::7] = np.linspace(0, 2 * np.pi, len(angles[::7]), endpoint=False)
        angles = np.sort(angles % (2 * np.pi))
        lengths = radius * random.uniform(0.75, 1.05, corners)
        points = np.stack([x + lengths * np.cos(angles), y + lengths * np.sin(angles)], axis=1).round(2)
        found.append(Polygon(label, points, inside(points)))
    return tuple(found)


def truth(polygons: tuple[Polygon, ...], ids: dict[str, int], uncovered: int = 0) -> np.ndarray:
    label = np.full((HEIGHT, WIDTH), uncovered, np.uint8)
    for polygon in polygons:
        label[polygon.mask] = ids[polygon.label]
    return label


def picture(path: Path, seed: int, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3), np.uint8)
    Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR).save(path, **options)
    return path


def pictures(folder: Path, suffix: str = '.jpg', count: int = COUNT) -> list[str]:
    return [picture(folder / f'{index}{suffix}', index).name for index in range(count)]


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def coco_content(names: list[str], segmentation: Callable[[Polygon], object] = lambda polygon: [polygon.flat]) -> dict:
    images, annotations = [], []
    for index, name in enumerate(names):
        images.append(dict(id=index + 7, file_name=name, width=WIDTH, height=HEIGHT))
        for polygon in polygons_of(index):
            category = 10 * (CLASSES.index(polygon.label) + 1)
            more = dict(iscrowd=0, area=0.0, bbox=[0, 0, 1, 1])
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 7,
                    category_id=category,
                    segmentation=segmentation(polygon),
                    **more,
                )
            )
    categories = [dict(id=10 * (index + 1), name=name, supercategory='') for index, name in enumerate(CLASSES)]
    return dict(info={}, licenses=[], images=images, annotations=annotations, categories=categories)


def write_coco(root: Path, segmentation: Callable[[Polygon], object] = lambda polygon: [polygon.flat]) -> Path:
    names = pictures(root / 'images')
    write_text(root / 'annotations/instances_default.json', json.dumps(coco_content(names, segmentation)))
    return root


def labelme_shape(polygon: Polygon, kind: str) -> dict:
    shape = dict(label=polygon.label, group_id=None, description='', flags={}, mask=None)
    if kind == 'polygon':
        return dict(shape, shape_type='polygon', points=polygon.corners.tolist())
    mask = polygon.mask
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]].tolist() for axis in (1, 0))
    buffer = io.BytesIO()
    Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(buffer, 'PNG')
    text = base64.b64encode(buffer.getvalue()).decode()
    return dict(shape, shape_type='mask', points=[[left, top], [right, bottom]], mask=text)


def write_labelme(root: Path, kind: str = 'polygon') -> Path:
    for index, name in enumerate(pictures(root)):
        content = dict(
            version='5.5.0',
            flags={},
            shapes=[labelme_shape(polygon, kind) for polygon in polygons_of(index)],
            imagePath=name,
            imageData=None,
            imageHeight=HEIGHT,
            imageWidth=WIDTH,
        )
        write_text((root / name).with_suffix('.json'), json.dumps(content, indent=2))
    return root


def write_voc(root: Path, palette_file: bool = False) -> Path:
    """Colour masks, as RGB or with a palette, and a labelmap.txt as CVAT writes it."""
    ids = {name: index + 1 for index, name in enumerate(CLASSES)}
    colours = np.array([(0, 0, 0), *PALETTE], np.uint8)
    for index, name in enumerate(pictures(root / 'JPEGImages')):
        label = truth(polygons_of(index), ids)
        if palette_file:
            mask = Image.fromarray(label, 'P')
            mask.putpalette(colours.ravel().tolist())
        else:
            mask = Image.fromarray(colours[label])
        path = root / 'SegmentationClass' / name
        path.parent.mkdir(exist_ok=True)
        mask.save(path.with_suffix('.png'))
    lines = [f'{name}:{",".join(map(str, colour))}::' for name, colour in zip(CLASSES, PALETTE, strict=True)]
    write_text(root / 'labelmap.txt', '\n'.join(['# label:color_rgb:parts:actions', 'background:0,0,0::', *lines]))
    write_text(root / 'ImageSets/Segmentation/train.txt', '0\n1\n2\n')
    write_text(root / 'ImageSets/Segmentation/val.txt', '3\n4\n')
    return root


def write_yolo(root: Path) -> Path:
    for split, indices in (('train', (0, 1, 2)), ('val', (3, 4))):
        for index in indices:
            picture(root / f'images/{split}/{index}.jpg', index)
            lines = []
            for polygon in polygons_of(index):
                values = (polygon.corners / (WIDTH, HEIGHT)).ravel()
                lines.append(f'{CLASSES.index(polygon.label)} ' + ' '.join(f'{value:.6f}' for value in values))
            write_text(root / f'labels/{split}/{index}.txt', '\n'.join(lines) + '\n')
    names = '\n'.join(f'  {index}: {name}' for index, name in enumerate(CLASSES))
    write_text(root / 'data.yaml', f'path: /somewhere/else\ntrain: images/train\nval: images/val\n\nnames:\n{names}\n')
    return root


def cvat_mask(polygon: Polygon) -> str:
    """A <mask> element: run lengths, row by row, in the box around the mask."""
    mask = polygon.mask
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    flat = mask[top : bottom + 1, left : right + 1].ravel()
    runs, value, length = [], False, 0
    for pixel in flat:
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    runs.append(length)
    box = f'left="{left}" top="{top}" width="{right - left + 1}" height="{bottom - top + 1}"'
    return f'<mask label="{polygon.label}" occluded="0" rle="{", ".join(map(str, runs))}" {box}'


def cvat_polygon(polygon: Polygon) -> str:
    points = ';'.join(f'{x},{y}' for x, y in polygon.corners)
    return f'<polygon label="{polygon.label}" occluded="0" points="{points}"'


def write_cvat(root: Path, shape: Callable[[Polygon], str] = cvat_polygon) -> Path:
    """The shapes are written in the wrong order, with the right one in z_order."""
    labels = ''.join(
        f'<label><name>{name}</name><color>#{bytes(colour).hex()}</color><type>any</type><attributes/></label>'
        for name, colour in zip(CLASSES, PALETTE, strict=True)
    )
    images = []
    for index, name in enumerate(pictures(root / 'images')):
        drawn = [f'{shape(polygon)} z_order="{order}"/>' for order, polygon in enumerate(polygons_of(index))]
        drawn = [text.replace('/>', f'></{text[1:].split()[0]}>') for text in reversed(drawn)]
        images.append(f'<image id="{index}" name="{name}" width="{WIDTH}" height="{HEIGHT}">{"".join(drawn)}</image>')
    meta = f'<meta><task><labels>{labels}</labels></task></meta>'
    content = f'<annotations><version>1.1</version>{meta}{"".join(images)}</annotations>'
    write_text(root / 'annotations.xml', f'<?xml version="1.0" encoding="utf-8"?>\n{content}')
    return root


def studio_polygon(polygon: Polygon) -> dict:
    percent = polygon.corners / (WIDTH, HEIGHT) * 100
    return dict(type='polygonlabels', value=dict(points=percent.tolist(), polygonlabels=[polygon.label]))


def write_label_studio(root: Path, region: Callable[[Polygon], dict] = studio_polygon, count: int = COUNT) -> Path:
    tasks = []
    for index, name in enumerate(pictures(root / 'images', count=count)):
        regions = []
        for number, polygon in enumerate(polygons_of(index)):
            place = dict(id=f'r{number}', from_name='label', to_name='image')
            size = dict(original_width=WIDTH, original_height=HEIGHT, image_rotation=0)
            regions.append({**place, **size, **region(polygon)})
        annotations = [dict(id=index, completed_by=1, result=regions, was_cancelled=False)]
        tasks.append(dict(id=index, annotations=annotations, data=dict(image=f'/data/upload/1/0a1b2c3d-{name}')))
    write_text(root / 'project-1.json', json.dumps(tasks))
    return root
