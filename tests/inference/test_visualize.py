"""Panels of image, ground truth and prediction, with titles and a legend."""

import numpy as np
import pytest

from mmseg_volo.inference.visualize import GAP, TITLE_HEIGHT, entries_of, side_by_side

PALETTE = [[128, 64, 32], [1, 2, 3], [250, 170, 30]]
HEIGHT, WIDTH = 40, 120


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    truth = rng.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
    prediction = rng.integers(0, 3, (HEIGHT, WIDTH))
    truth[:5] = 255
    return image, truth, prediction


def panel(panels, index):
    left = index * (WIDTH + GAP)
    return panels[TITLE_HEIGHT : TITLE_HEIGHT + HEIGHT, left : left + WIDTH]


def expected(labels):
    """Colours by definition: the RGB of the palette reversed, black for 255."""
    table = {**{index: rgb[::-1] for index, rgb in enumerate(PALETTE)}, 255: [0, 0, 0]}
    return np.array([[table[int(label)] for label in row] for row in labels], np.uint8)


def test_panels_hold_image_and_palette_colours(inputs):
    image, truth, prediction = inputs
    panels = side_by_side(image, truth, prediction, PALETTE, ['one', 'two', 'three'])
    assert panels.dtype == np.uint8
    assert panels.shape[1:] == (3 * WIDTH + 2 * GAP, 3)
    assert panels.shape[0] > TITLE_HEIGHT + HEIGHT
    np.testing.assert_array_equal(panel(panels, 0), image)
    np.testing.assert_array_equal(panel(panels, 1), expected(truth))
    np.testing.assert_array_equal(panel(panels, 2), expected(prediction))
    assert (panel(panels, 1)[:5] == 0).all()


def test_titles_and_legend_are_written(inputs):
    image, truth, prediction = inputs
    panels = side_by_side(image, truth, prediction, PALETTE)
    for index in range(3):
        title = panels[:TITLE_HEIGHT, index * (WIDTH + GAP) : index * (WIDTH + GAP) + WIDTH]
        assert (title.min(axis=2) < 100).any(), f'no title above panel {index}'
    legend = panels[TITLE_HEIGHT + HEIGHT :].reshape(-1, 3)
    for red, green, blue in PALETTE:
        assert (legend == (blue, green, red)).all(axis=1).sum() > 100


def test_class_names_may_be_numbers():
    assert entries_of((7, 8), PALETTE, np.ones((2, 2), np.uint8)) == [('8', PALETTE[1])]


def test_legend_names_only_classes_that_occur(inputs):
    image, truth, _ = inputs
    truth[:] = 1
    panels = side_by_side(image, truth, truth, PALETTE)
    legend = panels[TITLE_HEIGHT + HEIGHT :].reshape(-1, 3)
    assert (legend == (3, 2, 1)).all(axis=1).any()
    assert not (legend == (32, 64, 128)).all(axis=1).any()


@pytest.mark.parametrize('width', [1, 8, 30])
def test_narrow_images_and_ignored_labels(width):
    image = np.zeros((6, width, 3), np.uint8)
    labels = np.full((6, width), 255, np.uint8)
    panels = side_by_side(image, labels, labels, PALETTE)
    assert panels.shape[1] == 3 * width + 2 * GAP


def test_inputs_are_not_changed(inputs):
    copies = [array.copy() for array in inputs]
    side_by_side(*inputs, PALETTE)
    for array, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_errors(inputs):
    image, truth, prediction = inputs
    with pytest.raises(ValueError, match='image must be'):
        side_by_side(image[..., 0], truth, prediction, PALETTE)
    with pytest.raises(ValueError, match='image must be'):
        side_by_side(image.astype(np.float32), truth, prediction, PALETTE)
    with pytest.raises(ValueError, match='truth must be'):
        side_by_side(image, truth[1:], prediction, PALETTE)
    with pytest.raises(ValueError, match='prediction must be'):
        side_by_side(image, truth, prediction.astype(np.float32), PALETTE)
    with pytest.raises(ValueError, match='prediction must be'):
        side_by_side(image, truth, prediction[None], PALETTE)
    with pytest.raises(ValueError, match=r'truth has labels \[2\]'):
        side_by_side(image, truth, prediction, PALETTE[:2])
    with pytest.raises(ValueError, match=r'prediction has labels \[-1\]'):
        side_by_side(image, truth, np.where(prediction == 0, -1, prediction), PALETTE)
    with pytest.raises(ValueError, match='prediction has labels'):
        side_by_side(image, truth, prediction + 256, PALETTE)
    with pytest.raises(ValueError, match='palette must be'):
        side_by_side(image, truth, prediction, [[1, 2]])
    with pytest.raises(ValueError, match='0 to 255'):
        side_by_side(image, truth, prediction, [[1, 2, 256]] * 3)
    with pytest.raises(ValueError, match='2 class names for 3'):
        side_by_side(image, truth, prediction, PALETTE, ['a', 'b'])
