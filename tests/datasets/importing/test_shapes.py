"""Masks of shapes against pycocotools, an outline's definition, and Pillow's ellipses; damaged data."""

import numpy as np
import pytest
from drawn_polygons import HEIGHT, WIDTH, polygons_of
from PIL import Image, ImageDraw

from mmseg_volo.datasets.importing.shapes import (
    Patch,
    ShapeError,
    brush,
    clip,
    coco_runs,
    cvat_runs,
    ellipse,
    png_mask,
    polygons,
    rectangle,
)

coco = pytest.importorskip('pycocotools.mask', reason='needs pycocotools: pip install -e ".[import]"')
SIZE = (HEIGHT, WIDTH)


def whole(patch: Patch, size: tuple[int, int] = SIZE) -> np.ndarray:
    top, left, mask = patch
    canvas = np.zeros(size, bool)
    canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return canvas


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize('shift', [(0, 0), (-170.3, 40), (300.5, 99.25), (20, -260)], ids=str)
def test_polygons_equal_those_of_pycocotools_on_the_whole_canvas(shift):
    for seed in range(8):
        parts = [(polygon.corners + shift).ravel().tolist() for polygon in polygons_of(seed)]
        expected = coco.decode(coco.merge(coco.frPyObjects(parts, *SIZE))).astype(bool)
        # A corner in the middle of a fifth of a pixel may be rounded to either side.
        assert (whole(polygons(SIZE, parts)) != expected).mean() < 1e-4


def test_polygons_hold_the_pixels_whose_centre_is_inside():
    for polygon in polygons_of(1):
        assert iou(whole(polygons(SIZE, [polygon.flat])), polygon.mask) > 0.995
    square = whole(polygons((50, 50), [[10, 20, 40, 20, 40, 30, 10, 30]]), (50, 50))
    assert square[20:30, 10:40].all() and square.sum() == 300
    half = whole(polygons((50, 50), [[0.1, 0.2, 0.4, 0.2, 0.4, 0.6, 0.1, 0.6]], relative=1), (50, 50))
    assert half[10:30, 5:20].all() and half.sum() == 300


def test_rectangles_and_ellipses_turn_clockwise():
    assert rectangle(1, 2, 4, 6) == [1, 2, 5, 2, 5, 8, 1, 8]
    np.testing.assert_allclose(rectangle(0, 0, 4, 2, 90), [3, -1, 3, 3, 1, 3, 1, -1], atol=1e-9)
    np.testing.assert_allclose(rectangle(5, 5, 4, 2, 90, 'corner'), [5, 5, 5, 9, 3, 9, 3, 5], atol=1e-9)
    drawn = Image.new('1', (8 * WIDTH, 8 * HEIGHT))  # Pillow fills the outline too, which matters less when magnified
    ImageDraw.Draw(drawn).ellipse([8 * 60, 8 * 80, 8 * 260, 8 * 200], fill=1)
    expected = np.array(drawn)[4::8, 4::8]
    assert iou(whole(polygons(SIZE, [ellipse(160, 140, 100, 60)])), expected) > 0.998
    assert iou(whole(polygons(SIZE, [ellipse(160, 140, 60, 100, 90)])), expected) > 0.998


@pytest.mark.parametrize('density', [0, 0.02, 0.5, 1])
def test_coco_runs_are_those_of_pycocotools(density):
    random = np.random.default_rng(0)
    for size in ((1, 1), (7, 90), (HEIGHT, WIDTH)):
        mask = random.random(size) < density
        packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        flat = mask.T.ravel()
        changes = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *([0] if flat[0] else []), *changes, len(flat)]).tolist()
        for runs in (packed['counts'].decode(), counts):
            np.testing.assert_array_equal(coco_runs(size, dict(size=list(size), counts=runs)).mask, mask)


@pytest.mark.parametrize(
    'draw',
    [
        lambda: coco_runs((4, 5), dict(size=[5, 4], counts=[20])),
        lambda: coco_runs((4, 5), dict(size=[4, 5], counts=[3, 4])),
        lambda: coco_runs((4, 5), dict(size=[4, 5], counts=[25, -5])),
        lambda: coco_runs((4, 5), dict(size=[4, 5], counts=None)),
        lambda: coco_runs((4, 5), dict(size=[4, 5], counts='0oR')),
        lambda: coco_runs((4, 5), dict(size=[4, 5], counts='\x7f€')),
        lambda: coco_runs((4, 5), {}),
        lambda: coco_runs((4, 5), dict(size=4, counts=[20])),
        lambda: cvat_runs((4, 5), [10**18], 0, 0, 10**9, 10**9),
        lambda: cvat_runs((4, 5), [6], 0, 0, -2, -3),
        lambda: cvat_runs((4, 5), [1, 2], 0, 0, 2, 2),
        lambda: polygons((4, 5), [[0, 0, 1, 1]]),
        lambda: polygons((4, 5), [[0, 0, 1, 1, 2]]),
        lambda: polygons((4, 5), [[0, 0, 1, float('nan'), 2, 2]]),
        lambda: polygons((4, 5), [[0, 0, 1e9, 0, 2, 2]]),
        lambda: polygons((4, 5), [['a', 'b', 'c', 'd', 'e', 'f']]),
        lambda: png_mask((4, 5), 'no png', 0, 0),
        lambda: brush((4, 5), [0, 0, 0, 80, 57, 36]),
        lambda: brush((4, 5), [300]),
        lambda: brush((9, 9), [0, 0, 0, 80, 57, 36]),
    ],
)
def test_damaged_shapes_are_named(draw):
    with pytest.raises(ShapeError):
        draw()


def test_what_is_outside_of_the_image_is_cut_off():
    patch = clip((4, 5), Patch(-1, 3, np.ones((3, 9), bool)))
    assert whole(patch, (4, 5)).sum() == 4 and whole(patch, (4, 5))[:2, 3:].all()
    assert not whole(clip((4, 5), Patch(7, 0, np.ones((2, 2), bool))), (4, 5)).any()
    assert polygons((4, 5), [[9, 9, 12, 9, 12, 12]]).mask.size == 0
