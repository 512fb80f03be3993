"""Save the drawn polygons of two images by labelme's own code; run by hand, in an environment of its own.

    pip install labelme==6.3.1 matplotlib
    PYTHONPATH=tests QT_QPA_PLATFORM=offscreen python tests/datasets/importing/exported/make_labelme.py

Images are left out: the tests draw them again. The first image has polygons, the second one masks.
"""

from pathlib import Path

import numpy as np
from drawn_polygons import HEIGHT, WIDTH, Polygon, polygons_of
from labelme import utils
from labelme._label_file import write_label_file

FOLDER = Path(__file__).parent / 'labelme'


def shape(polygon: Polygon, as_mask: bool) -> dict:
    common = dict(label=polygon.label, description='', group_id=None, flags={})
    if not as_mask:
        return dict(common, shape_type='polygon', points=polygon.corners.tolist(), mask=None)
    mask = polygon.mask
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]].tolist() for axis in (1, 0))
    inside = mask[top : bottom + 1, left : right + 1].astype(np.uint8)
    text = utils.img_arr_to_b64(inside)
    return dict(common, shape_type='mask', points=[[left, top], [right, bottom]], mask=text)


if __name__ == '__main__':
    FOLDER.mkdir(exist_ok=True)
    for index in range(2):
        shapes = [shape(polygon, as_mask=index == 1) for polygon in polygons_of(index)]
        size = dict(image_height=HEIGHT, image_width=WIDTH)
        write_label_file(str(FOLDER / f'{index}.json'), shapes=shapes, image_path=f'{index}.jpg', **size)
