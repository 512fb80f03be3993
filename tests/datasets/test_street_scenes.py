"""The drawn street scenes: images, folder, and how MMSegmentation reads them."""

import json

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets import CityscapesDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS

from mmseg_volo.datasets import street_scenes
from mmseg_volo.datasets.street_scenes import StreetSceneDataset, draw_scene, draw_street_scenes

SMALL = {'train': 3, 'val': 2, 'size': (64, 96)}
POLE, PERSON, CAR, IGNORE = 5, 11, 13, 255


@pytest.fixture(scope='module')
def default_root(tmp_path_factory):
    """The default data set, drawn once."""
    root = tmp_path_factory.mktemp('scenes') / 'default'
    draw_street_scenes(root)
    return root


@pytest.fixture(scope='module')
def train_labels(default_root):
    paths = sorted((default_root / 'gtFine' / 'train').rglob('*.png'))
    return np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths])


@pytest.fixture
def small_root(tmp_path):
    root = tmp_path / 'sub' / 'scenes'
    draw_street_scenes(root, **SMALL)
    return root


def contents(folder):
    """The bytes of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_scene_is_a_function_of_its_seed():
    first, again, other = draw_scene(7), draw_scene(7), draw_scene(8)
    assert [array.tobytes() for array in first] == [array.tobytes() for array in again]
    assert (first[0] != other[0]).mean() > 0.5
    assert (first[1] != other[1]).mean() > 0.05


def test_scene_leaves_the_global_random_state_alone():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    draw_scene(1)
    assert np.random.rand() == expected


@pytest.mark.parametrize('size', [(256, 512), (64, 64), (100, 333), (300, 200)])
def test_shapes_and_types(size):
    for seed in range(4):
        image, label = draw_scene(seed, size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        assert label.shape == size and label.dtype == np.uint8
        assert set(np.unique(label)) <= {*range(19), IGNORE}


def test_bad_arguments_are_refused():
    for arguments in [(-1,), (0, (32, 64)), (0, (64,))]:
        with pytest.raises(ValueError, match='need a seed'):
            draw_scene(*arguments)


def test_all_classes_occur_and_are_imbalanced(train_labels):
    assert train_labels.shape == (96, 256, 512)
    counts = np.bincount(train_labels.ravel(), minlength=256)
    assert counts[19:IGNORE].sum() == 0
    assert (counts[:19] > 0).all()
    assert counts[:19].max() > 50 * counts[:19].min()
    assert 0.01 < counts[IGNORE] / counts.sum() < 0.2


def test_poles_are_thin(train_labels):
    # Zeros at both ends of each row keep runs of different rows apart; a run starts at +1 and ends at -1.
    pole = np.pad((train_labels == POLE).reshape(-1, train_labels.shape[2]), ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(pole.ravel())
    lengths = np.flatnonzero(change == -1) - np.flatnonzero(change == 1)
    assert len(lengths) > 1000
    assert np.median(lengths) <= 4


@pytest.mark.parametrize('cls', [PERSON, CAR])
def test_there_are_small_objects(train_labels, cls):
    areas = [
        area
        for label in train_labels[:32]
        for area in cv2.connectedComponentsWithStats((label == cls).astype(np.uint8))[2][1:, cv2.CC_STAT_AREA]
    ]
    assert sum(area < 100 for area in areas) > 20
    assert max(areas) > 500


def test_classes_are_not_flat_colours(default_root, train_labels):
    paths = sorted((default_root / 'leftImg8bit' / 'train').rglob('*.png'))
    image = cv2.imread(str(paths[0]))
    for cls in (0, 2, 8):
        assert image[train_labels[0] == cls].std(axis=0).min() > 4


def test_train_and_val_share_no_image(default_root):
    images = {
        split: [path.read_bytes() for path in (default_root / 'leftImg8bit' / split).rglob('*.png')]
        for split in ('train', 'val')
    }
    assert (len(images['train']), len(images['val'])) == (96, 24)
    assert len(set(images['train'] + images['val'])) == 120
    cities = {split: {path.name for path in (default_root / 'gtFine' / split).iterdir()} for split in images}
    assert not cities['train'] & cities['val']


def test_other_seed_gives_other_scenes(small_root, tmp_path):
    draw_street_scenes(tmp_path / 'other', **SMALL, seed=1)
    assert not set(contents(small_root).values()) & set(contents(tmp_path / 'other').values())


def test_files_hold_the_drawn_scenes_in_pairs(small_root):
    images = sorted((small_root / 'leftImg8bit').rglob('*_leftImg8bit.png'))
    assert len(images) == 5
    for path in images:
        label_name = path.name.replace('_leftImg8bit.png', '_gtFine_labelTrainIds.png')
        label_path = small_root / 'gtFine' / path.parent.relative_to(small_root / 'leftImg8bit') / label_name
        assert cv2.imread(str(path)).shape == (64, 96, 3)
        assert cv2.imread(str(label_path), cv2.IMREAD_UNCHANGED).shape == (64, 96)
    image, label = draw_scene(0, SMALL['size'])
    np.testing.assert_array_equal(cv2.imread(str(images[0])), image)
    first = small_root / 'gtFine/train/elmstadt/elmstadt_000000_000019_gtFine_labelTrainIds.png'
    np.testing.assert_array_equal(cv2.imread(str(first), cv2.IMREAD_UNCHANGED), label)


@pytest.mark.parametrize(('split', 'length'), [('train', 96), ('val', 24)])
def test_dataset_reads_the_default_set(default_root, split, length):
    dataset = DATASETS.build(
        {
            'type': 'StreetSceneDataset',
            'data_root': str(default_root),
            'data_prefix': {'img_path': f'leftImg8bit/{split}', 'seg_map_path': f'gtFine/{split}'},
            'pipeline': [LoadImageFromFile(), LoadAnnotations()],
        }
    )
    assert isinstance(dataset, CityscapesDataset)
    assert len(dataset) == length
    assert dataset.metainfo['classes'] == CityscapesDataset.METAINFO['classes']
    sample = dataset[length - 1]
    assert sample['img'].shape == (256, 512, 3)
    assert set(np.unique(sample['gt_seg_map'])) <= {*range(19), IGNORE}


def test_dataset_draws_its_root(tmp_path):
    dataset = StreetSceneDataset(
        tmp_path / 'drawn',
        train=2,
        val=1,
        size=[64, 96],
        data_prefix={'img_path': 'leftImg8bit/val', 'seg_map_path': 'gtFine/val'},
    )
    assert len(dataset) == 1
    record = json.loads((tmp_path / 'drawn' / 'scenes.json').read_text())
    assert (record['train'], record['val'], record['size']) == (2, 1, [64, 96])


def test_second_call_does_nothing(small_root, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in small_root.rglob('*')}
    monkeypatch.setattr(street_scenes, 'draw_scene', None)
    draw_street_scenes(small_root, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in small_root.rglob('*')} == before


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch, error):
    calls = []

    def failing(seed, size):
        calls.append(seed)
        if len(calls) == 3:
            raise error
        return draw_scene(seed, size)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(street_scenes, 'draw_scene', failing)
        draw_street_scenes(tmp_path / 'scenes', **SMALL)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []
    draw_street_scenes(tmp_path / 'scenes', **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['scenes']


def test_failed_write_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(street_scenes.cv2, 'imwrite', lambda *_: False)
    with pytest.raises(OSError, match='cannot write'):
        draw_street_scenes(tmp_path / 'scenes', **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_used(tmp_path):
    (tmp_path / 'scenes').mkdir()
    draw_street_scenes(tmp_path / 'scenes', **SMALL)
    assert (tmp_path / 'scenes' / 'scenes.json').is_file()


def test_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'chapter1.txt').write_text('years of work')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match='not empty'):
        draw_street_scenes(tmp_path / 'thesis', **SMALL)
    with pytest.raises(FileExistsError, match='is a file'):
        draw_street_scenes(tmp_path / 'thesis' / 'chapter1.txt', **SMALL)
    assert contents(tmp_path) == before


def test_other_parameters_are_refused_untouched(small_root):
    before = contents(small_root)
    for change in ({'train': 4}, {'val': 1}, {'size': (64, 128)}, {'seed': 1}):
        with pytest.raises(ValueError, match='is asked for'):
            draw_street_scenes(small_root, **{**SMALL, **change})
    assert contents(small_root) == before


def test_incomplete_or_unreadable_set_is_refused(small_root):
    next((small_root / 'leftImg8bit').rglob('*.png')).unlink()
    with pytest.raises(ValueError, match='lacks 1 of 10'):
        draw_street_scenes(small_root, **SMALL)
    (small_root / 'scenes.json').write_text('{')
    with pytest.raises(ValueError, match='cannot be read'):
        draw_street_scenes(small_root, **SMALL)


def test_same_set_drawn_meanwhile_is_accepted(tmp_path, monkeypatch):
    root = tmp_path / 'scenes'
    state = {'raced': False}

    def racing(seed, size):
        if not state['raced']:
            state['raced'] = True
            draw_street_scenes(root, **SMALL)
        return draw_scene(seed, size)

    monkeypatch.setattr(street_scenes, 'draw_scene', racing)
    draw_street_scenes(root, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['scenes']


def test_bad_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match='scenes and a seed'):
        draw_street_scenes(tmp_path / 'scenes', train=-1)
    with pytest.raises(ValueError, match='scenes and a seed'):
        draw_street_scenes(tmp_path / 'scenes', seed=-1)
    assert list(tmp_path.iterdir()) == []
