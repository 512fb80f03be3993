"""Files that mmseg leaves out of a data set, or reads twice."""

import logging
import shutil

import pytest
from faulty_data import dataset_config
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_volo.datasets.checks import check
from mmseg_volo.datasets.checks.check import check_split, quick_check


@pytest.fixture
def log(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(check, 'print_log', lambda text, level, **_: lines.append((level, text)))
    return lines


def warnings(data, **options) -> dict[str, str]:
    """The warnings about the training split: path below it -> kind. Faults are not expected."""
    report = check_split('train', dataset_config(data, **options), workers=1)
    assert not report.faults
    return {finding.path.split('/train', 1)[1]: finding.kind for finding in report.warnings}


def test_images_of_another_suffix_are_named_and_no_label_is_given_up(data, log):
    for i, suffix in ((0, '.PNG'), (2, '.Png'), (4, '.webp')):
        with Image.open(data / f'images/train/{i}.png') as image:
            image.save(data / f'images/train/{i}{suffix}')
        (data / f'images/train/{i}.png').unlink()
    cfg = dataset_config(data)
    assert len(DATASETS.build(cfg)) == 3
    assert warnings(data) == dict.fromkeys(('/0.PNG', '/2.Png', '/4.webp'), 'left-out image')
    quick_check(cfg)
    ((level, text),) = log
    assert level == logging.WARNING and 'left-out image (1 of 3)' in text and '0.PNG: the image is not used' in text
    assert "img_suffix='.png'; rename it, or add a second data set with img_suffix='.PNG'" in text
    both = dict(type='ConcatDataset', datasets=[cfg, dataset_config(data, img_suffix='.PNG')])
    assert [f.path[-5:] for f in check_split('train', both, 1).warnings if f.kind == 'label without image'] == []


@pytest.mark.parametrize('label_suffix', ['.png', '_gt.png'])
def test_images_and_labels_in_one_folder(data, label_suffix):
    folder = data / 'images/train'
    for i in range(6):
        (folder / f'{i}.png').rename(folder / f'{i}.jpg')
        (data / f'labels/train/{i}.png').rename(folder / f'{i}{label_suffix}')
    (folder / '1.jpg').rename(folder / '1.JPEG')
    (folder / '2_depth.tif').write_bytes(b'')
    (folder / '3.json').write_bytes(b'')
    prefix = dict(img_path='images/train', seg_map_path='images/train')
    found = warnings(data, img_suffix='.jpg', seg_map_suffix=label_suffix, data_prefix=prefix)
    assert found == {'/1.JPEG': 'left-out image'}


def test_suffixes_with_more_than_an_extension(data):
    for i in range(6):
        (data / f'images/train/{i}.png').rename(data / f'images/train/{i}_leftImg8bit.png')
        shutil.copy(data / f'labels/train/{i}.png', data / f'labels/train/{i}_color.png')
        (data / f'labels/train/{i}.png').rename(data / f'labels/train/{i}_ids.png')
    suffixes = dict(img_suffix='_leftImg8bit.png', seg_map_suffix='_ids.png')
    assert warnings(data, **suffixes) == {}
    (data / 'images/train/1_leftImg8bit.png').rename(data / 'images/train/1_leftImg8bit.PNG')
    assert warnings(data, **suffixes) == {'/1_leftImg8bit.PNG': 'left-out image'}


def test_linked_folders_are_followed(data, log):
    for kind in ('images', 'labels'):
        shutil.move(data / kind / 'train', data / kind / 'elsewhere')
        (data / kind / 'train').mkdir()
        (data / kind / 'train/link').symlink_to(data / kind / 'elsewhere')
    assert check_split('train', dataset_config(data), 1).files == len(DATASETS.build(dataset_config(data))) == 6
    (data / 'images/elsewhere/0.png').rename(data / 'images/elsewhere/0.PNG')
    shutil.copy(data / 'labels/elsewhere/1.png', data / 'labels/elsewhere/spare.png')
    assert warnings(data) == {'/link/0.PNG': 'left-out image', '/link/spare.png': 'label without image'}
    for kind in ('images', 'labels'):
        (data / kind / 'train/more').symlink_to(data / kind / 'elsewhere')
    assert warnings(data)['/more'] == 'folder read twice'
    quick_check(dataset_config(data))
    assert any('remove the link' in text for _, text in log)


def test_hidden_files_are_skipped_and_hidden_folders_named(data, log):
    for kind in ('images', 'labels'):
        (data / kind / 'train/._0.png').write_bytes(b'\0\5\x16\7')
        (data / kind / 'train/._0.PNG').write_bytes(b'\0\5\x16\7')
    assert warnings(data) == {} and len(DATASETS.build(dataset_config(data))) == 6
    for kind in ('images', 'labels'):
        (data / kind / 'train/.ipynb_checkpoints').mkdir()
        shutil.copy(data / kind / 'train/0.png', data / kind / 'train/.ipynb_checkpoints/0-checkpoint.png')
    assert len(DATASETS.build(dataset_config(data))) == 7
    assert warnings(data) == {'/.ipynb_checkpoints': 'hidden folder'}
    quick_check(dataset_config(data))
    assert len(log) == 1 and 'move it out of the data set' in log[0][1]
    (data / 'labels/train/.ipynb_checkpoints/0-checkpoint.png').unlink()
    with pytest.raises(check.DataError, match=r'label is missing; .*hidden folders.*: move .*/\.ipynb_checkpoints out'):
        quick_check(dataset_config(data))
    (data / 'labels/train/1.png').unlink()  # others keep their remedy
    with pytest.raises(check.DataError, match=r'take the image .*/1\.png out'):
        quick_check(dataset_config(data))


def test_a_listed_hidden_file_is_read_before_training(data):
    (data / 'images/train/._5.png').write_bytes(b'\0\5\x16\7')
    shutil.copy(data / 'labels/train/5.png', data / 'labels/train/._5.png')
    (data / 'list.txt').write_text('0\n1\n._5\n2\n')
    with pytest.raises(check.DataError, match=r'\._5\.png: .* what macOS notes .*; take it out of the data set'):
        quick_check(dataset_config(data, ann_file='list.txt'), num_files=1)
