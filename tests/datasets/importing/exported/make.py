"""Export the drawn polygons of two images by the libraries of the formats; run by hand, in an environment of its own.

    pip install datumaro==1.13.12 label-studio-converter==0.0.59 matplotlib
    PYTHONPATH=tests python tests/datasets/importing/exported/make.py

Images are left out: the tests draw them again.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from datumaro import Dataset, DatasetItem
from datumaro.components.annotation import AnnotationType, LabelCategories, Mask, MaskCategories, Polygon
from datumaro.components.media import Image
from drawn_polygons import CLASSES, PALETTE, picture, polygons_of, write_label_studio
from drawn_polygons import Polygon as Drawn
from label_studio_converter.brush import encode_rle

HERE = Path(__file__).parent
SPLITS = ('train', 'val')


def brush(polygon: Drawn) -> dict:
    rgba = np.repeat((polygon.mask * 255).astype(np.uint8).ravel(), 4)
    rle = [int(value) for value in encode_rle(rgba)]
    return dict(type='brushlabels', value=dict(format='rle', rle=rle, brushlabels=[polygon.label]))


def annotation(polygon: Drawn, names: list[str], order: int, as_mask: bool):
    place = dict(label=names.index(polygon.label), z_order=order, id=order + 1, group=order + 1)
    return Mask(polygon.mask, **place) if as_mask else Polygon(polygon.flat, **place)


def export(folder: Path, kind: str, names: list[str], as_mask: bool, **options) -> Path:
    items = []
    for index, split in enumerate(SPLITS):
        media = Image.from_file(path=str(picture(folder / f'source/{index}.jpg', index)))
        shapes = [annotation(polygon, names, order, as_mask) for order, polygon in enumerate(polygons_of(index))]
        items.append(DatasetItem(id=str(index), subset=split, media=media, annotations=shapes))
    categories = {AnnotationType.label: LabelCategories.from_iterable(names)}
    categories[AnnotationType.mask] = MaskCategories(dict(enumerate([(0, 0, 0), *PALETTE][-len(names) :])))
    data = Dataset.from_iterable(items, categories=categories, media_type=Image)
    data.export(str(folder / kind), kind, save_media=False, **options)
    return folder / kind


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as name:
        for as_mask in (False, True):
            folder = Path(name, 'masks' if as_mask else 'polygons')
            for kind in ('coco_instances', 'cvat'):
                target = HERE / f'{kind}_{folder.name}'
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(export(folder, kind, list(CLASSES), as_mask), target)
        voc = export(Path(name), 'voc_segmentation', ['background', *CLASSES], True, label_map='source')
        shutil.rmtree(HERE / 'voc', ignore_errors=True)
        shutil.copytree(voc, HERE / 'voc', ignore=shutil.ignore_patterns('SegmentationObject'))
        studio = write_label_studio(Path(name, 'studio'), brush, count=2)
        shutil.rmtree(HERE / 'label_studio', ignore_errors=True)
        shutil.copytree(studio, HERE / 'label_studio', ignore=shutil.ignore_patterns('*.jpg', 'images'))
