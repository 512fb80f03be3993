"""Data that cannot be silently wrong: the check of all files, the one before training, the transforms and the hook."""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import PixelData
from mmseg.apis.mmseg_inferencer import MMSegInferencer
from mmseg.apis.utils import _preprare_data
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

from mmseg_volo.datasets.checks.check import check_config, check_not_empty, check_split, quick_check
from mmseg_volo.datasets.checks.headers import Header, read_header
from mmseg_volo.datasets.checks.labels import label_table
from mmseg_volo.engine.guards import LabelGuardHook
from mmseg_volo.errors import DataError
from mmseg_volo.inference.predictor import _for_arrays

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ('road', 'sky', 'tree', 'car')
HEIGHT, WIDTH = 24, 40
PIPELINE = [dict(type='LoadCheckedImage'), dict(type='LoadCheckedAnnotations'), dict(type='PackSegInputs')]


def picture(seed: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def label(seed: int, low: int = 0, high: int = len(CLASSES), shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(low, high, shape).astype(np.uint8)
    ids[:2] = 255
    return ids


def write(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Six pictures with labels for training, three for validation; all whole."""
    for split, count, first in (('train', 6, 0), ('val', 3, 100)):
        for i in range(count):
            write(tmp_path / f'images/{split}/{i}.png', picture(first + i))
            write(tmp_path / f'labels/{split}/{i}.png', label(first + i))
    return tmp_path


def dataset(root: Path, split: str = 'train', **options) -> dict:
    prefix = dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}')
    cfg = dict(type='BaseSegDataset', data_root=str(root), data_prefix=prefix, img_suffix='.png', pipeline=PIPELINE)
    return {**cfg, 'metainfo': dict(classes=CLASSES), **options}


def config(root: Path, **options) -> Config:
    loaders = {
        f'{split}_dataloader': dict(dataset={**dataset(root, split), **options.get(split, {})})
        for split in ('train', 'val')
    }
    return Config(dict(**loaders, test_dataloader=loaders['val_dataloader']))


def faults(root: Path, **options) -> list:
    return [finding for report in check_config(config(root, **options), workers=1) for finding in report.faults]


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(at: int):
    def change(content: bytes) -> bytes:
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]

    return change


def to_jpeg(path: Path, kind: str) -> None:
    """Store the images of a split as JPEG, whatever the suffix says."""
    for file in (path / kind).iterdir():
        with Image.open(file) as image:
            image.load()
        image.save(file, 'JPEG')


# Each fault: a name, what it does to a good data set, overrides of the data set, the file or folder that the report
# has to name, the kind it has to say, and whether the quick check before training finds it too.
IMAGE, LABEL = 'images/train/3.png', 'labels/train/3.png'
FAULTS = {}


def fault(name: str, path: str, kind: str, quick: bool = True, **options):
    def register(make):
        FAULTS[name] = make, path, kind, quick, options
        return make

    return register


for percent in (1, 25, 50, 90, 99):
    for where, what in ((IMAGE, 'unreadable image'), (LABEL, 'unreadable label')):
        fault(f'{what} cut off at {percent} %', where, what)(
            lambda root, where=where, percent=percent: rewrite(
                root / where, lambda content: content[: max(9, len(content) * percent // 100)]
            )
        )
    fault(f'JPEG cut off at {percent} %', IMAGE, 'unreadable image')(
        lambda root, percent=percent: (
            to_jpeg(root, 'images/train'),
            rewrite(root / IMAGE, lambda content: content[: max(9, len(content) * percent // 100)]),
        )
    )
for at in (18, 60, 200, -6):
    fault(f'PNG image with a flipped bit at {at}', IMAGE, 'unreadable image')(
        lambda root, at=at: rewrite(root / IMAGE, lambda content: flip(at % len(content))(content))
    )
    fault(f'PNG label with a flipped bit at {at}', LABEL, 'unreadable label')(
        lambda root, at=at: rewrite(root / LABEL, lambda content: flip(at % len(content))(content))
    )


@fault('JPEG with a damaged header', IMAGE, 'unreadable image')
def _(root):
    to_jpeg(root, 'images/train')
    rewrite(root / IMAGE, lambda content: content.replace(b'\xff\xc0\x00\x11', b'\xff\xc0\x00\x10', 1))


@fault('empty image file', IMAGE, 'unreadable image')
def _(root):
    (root / IMAGE).write_bytes(b'')


@fault('empty label file', LABEL, 'unreadable label')
def _(root):
    (root / LABEL).write_bytes(b'')


@fault('text in place of an image', IMAGE, 'unreadable image')
def _(root):
    (root / IMAGE).write_text('<html>404 not found</html>')


@fault('text in place of a label', LABEL, 'unreadable label')
def _(root):
    (root / LABEL).write_text('version https://git-lfs.github.com/spec/v1')


@fault('label of colours', LABEL, 'channels of a label')
def _(root):
    write(root / LABEL, picture(9))


@fault('label of three equal channels', LABEL, 'channels of a label')
def _(root):
    write(root / LABEL, np.repeat(label(3)[..., None], 3, axis=2))


@fault('label with alpha', LABEL, 'channels of a label')
def _(root):
    write(root / LABEL, np.stack([label(3), label(4)], axis=2))


@fault('16-bit label', LABEL, 'depth of a label')
def _(root):
    write(root / LABEL, label(3).astype(np.uint16) * 1000)


@fault('JPEG label', LABEL, 'lossy label')
def _(root):
    write(root / LABEL, label(3), format='JPEG')


@fault('sizes swapped', LABEL, 'size')
def _(root):
    write(root / LABEL, label(3, shape=(WIDTH, HEIGHT)))


@fault('label one pixel too small', LABEL, 'size')
def _(root):
    write(root / LABEL, label(3, shape=(HEIGHT - 1, WIDTH)))


@fault('image turned by EXIF', LABEL, 'size')
def _(root):
    to_jpeg(root, 'images/train')
    exif = Image.Exif()
    exif[0x0112] = 6
    write(root / IMAGE, picture(3), format='JPEG', exif=exif)


@fault('class beyond the last', LABEL, 'label value')
def _(root):
    write(root / LABEL, label(3, high=len(CLASSES) + 1))


@fault('label ids instead of train ids', 'labels/train/0.png', 'label value')
def _(root):
    for i in range(6):
        write(root / f'labels/train/{i}.png', label(i, low=4, high=34))


@fault('reduce_zero_label missing', 'labels/train/0.png', 'label value')
def _(root):
    for i in range(6):
        write(root / f'labels/train/{i}.png', label(i, high=len(CLASSES) + 1))


@fault('reduce_zero_label extra', 'labels/train/0.png', 'reduce_zero_label', quick=False, reduce_zero_label=True)
def _(root):
    pass


def masks(root: Path, on: int) -> None:
    for i in range(6):
        write(root / f'labels/train/{i}.png', label(i, high=2) * np.uint8(on))


BINARY = dict(metainfo=dict(classes=('background', 'object')))


@fault('mask of 0 and 255', 'labels/train/0.png', 'mask', **BINARY)
def _(root):
    for i in range(6):
        write(root / f'labels/train/{i}.png', np.uint8(label(i, high=2) > 0) * np.uint8(255))


@fault('mask of 0 and 254', 'labels/train/0.png', 'label value', **BINARY)
def _(root):
    for i in range(6):
        write(root / f'labels/train/{i}.png', np.uint8(label(i, high=2) > 0) * np.uint8(254))


@fault('all ignored', 'labels/train/0.png', 'no labelled pixel')
def _(root):
    for i in range(6):
        write(root / f'labels/train/{i}.png', np.full((HEIGHT, WIDTH), 255, np.uint8))


@fault('all ignored by reduce_zero_label', 'labels/train/0.png', 'no labelled pixel', reduce_zero_label=True)
def _(root):
    for i in range(6):
        write(root / f'labels/train/{i}.png', np.zeros((HEIGHT, WIDTH), np.uint8))


@fault('missing label', LABEL, 'missing label')
def _(root):
    (root / LABEL).unlink()


@fault('folder in place of a label', LABEL, 'missing label')
def _(root):
    (root / LABEL).unlink()
    (root / LABEL).mkdir()


@fault('broken link in place of a label', LABEL, 'missing label')
def _(root):
    (root / LABEL).unlink()
    (root / LABEL).symlink_to(root / 'gone.png')


@fault('broken link in place of an image', IMAGE, 'missing image', quick=False)
def _(root):
    (root / IMAGE).unlink()
    (root / IMAGE).symlink_to(root / 'gone.png')


@fault('folder in place of an image', IMAGE, 'missing image', quick=False)
def _(root):
    (root / IMAGE).unlink()
    (root / IMAGE).mkdir()


@fault('listed image that is not there', 'images/train/9.png', 'missing image', ann_file='list.txt')
def _(root):
    (root / 'list.txt').write_text('1\n2\n9\n')
    write(root / 'labels/train/9.png', label(9))


@fault('list that is not there', 'list.txt', 'empty', ann_file='list.txt')
def _(root):
    pass


@fault('empty list', 'images/train', 'empty', ann_file='list.txt')
def _(root):
    (root / 'list.txt').write_text('')


@fault('wrong suffix of labels', 'labels/train', 'missing label', seg_map_suffix='_gt.png')
def _(root):
    pass


@fault('wrong suffix of images', 'images/train', 'empty', img_suffix='.jpg')
def _(root):
    pass


@fault('empty folder of images', 'images/train', 'empty')
def _(root):
    shutil.rmtree(root / 'images/train')
    (root / 'images/train').mkdir()


@fault('no folder of images', 'images/train', 'empty')
def _(root):
    shutil.rmtree(root / 'images/train')


@fault('no folder of labels', 'labels/train', 'missing label')
def _(root):
    shutil.rmtree(root / 'labels/train')


@fault('a file in place of the folder of images', 'images/train', 'empty')
def _(root):
    shutil.rmtree(root / 'images/train')
    (root / 'images/train').write_text('')


@fault('labels not in the config', 'images/train', 'missing label', data_prefix=dict(img_path='images/train'))
def _(root):
    pass


@fault('training picture in val', 'images/val/1.png', 'duplicate', quick=False)
def _(root):
    shutil.copy(root / 'images/train/4.png', root / 'images/val/1.png')


@fault('val is train', 'images/val/0.png', 'duplicate', quick=False)
def _(root):
    for kind in ('images', 'labels'):
        shutil.rmtree(root / kind / 'val')
        (root / kind / 'val').symlink_to(root / kind / 'train')


@fault('unreadable for permissions', LABEL, 'unreadable label')
def _(root):
    if os.geteuid() == 0:
        pytest.skip('root reads every file')
    (root / LABEL).chmod(0)


def check_fault(data: Path, name: str) -> None:
    make, path, kind, quick, options = FAULTS[name]
    make(data)
    found = [finding for finding in faults(data, train=options) if finding.path == str(data / path)]
    assert kind in {finding.kind for finding in found}
    cfg = dataset(data, **options)
    if quick:
        with pytest.raises(DataError) as caught:
            quick_check(cfg)
        assert str(data / path) in str(caught.value)
    else:
        quick_check(cfg)


# One of each kind; all of them are a slow test.
KINDS = {kind: name for name, (_, _, kind, _, _) in FAULTS.items() if name != 'unreadable for permissions'}


@pytest.mark.parametrize('name', KINDS.values())
def test_each_kind_of_fault_is_found_with_its_file(data, name):
    check_fault(data, name)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAULTS)
def test_every_faulty_data_set_is_caught_with_the_file_named(data, name):
    check_fault(data, name)


def test_there_are_more_than_forty_faulty_data_sets():
    assert len(FAULTS) > 40 and len(KINDS) >= 14


def test_a_clean_data_set_has_no_findings(data):
    reports = check_config(config(data), workers=2)
    assert [report.split for report in reports] == ['train', 'val']  # test is val
    assert not [finding for report in reports for finding in report.findings]
    for split, report in zip(('train', 'val'), reports, strict=True):
        labels = [np.array(Image.open(path)) for path in (data / 'labels' / split).iterdir()]
        assert report.files == report.labels == len(labels) and report.classes == CLASSES
        assert report.pixels.tolist() == [sum((ids == c).sum() for ids in labels) for c in range(4)]
        assert report.images.tolist() == [len(labels)] * 4
        assert report.ignored == sum((ids == 255).sum() for ids in labels)
        quick_check(dataset(data, split))
        check_not_empty(dataset(data, split))


def test_the_remedies_say_what_to_do(data):
    assert 'it holds 6 .png); correct data_root, data_prefix and img_suffix' in str(
        faults(data, train=dict(img_suffix='.jpg'))[0]
    )
    masks(data, 100)
    assert 'looks like a mask in grey values' in str(faults(data, train=BINARY)[0])
    for i in range(6):
        write(data / f'labels/train/{i}.png', label(i, high=5))
    assert 'label value 4 (' in str(faults(data)[0]) and 'set reduce_zero_label=True' in str(faults(data)[0])
    names = tuple(map(str, range(19)))
    for i in range(6):
        write(data / f'labels/train/{i}.png', label(i, high=34))
    found = str(faults(data, train=dict(metainfo=dict(classes=names)))[0])
    assert 'Cityscapes label ids' in found and '0 to 18 in the file' in found


def test_many_faults_are_counted_and_the_first_named(data):
    for i in range(6):
        write(data / f'labels/train/{i}.png', picture(i))
    with pytest.raises(DataError, match=r'^6 files are missing or wrong \(tools/check_data.py') as caught:
        quick_check(dataset(data))
    assert str(caught.value).count('colours instead of class ids') == 5 and str(caught.value).endswith('and 1 more')


def test_what_is_unusual_but_right_is_no_fault(data):
    palette = Image.fromarray(label(0)).convert('P')
    palette.putpalette(list(range(256)) * 3)
    palette.save(data / 'labels/train/0.png')
    write(data / 'labels/train/1.png', label(1).astype(np.uint16))  # 16 bits, but no value needs them
    write(data / 'labels/train/2.png', label(2, high=2) % 2 > 0)  # 1 bit
    Image.fromarray(label(3)).save(data / 'labels/train/3.png', compress_level=0)
    write(data / 'labels/train/4.png', np.full((HEIGHT, WIDTH), 255, np.uint8))
    write(data / 'labels/train/spare.png', label(7))
    to_jpeg(data, 'images/val')
    quick_check(dataset(data))
    train, val = check_config(config(data), workers=2)
    assert not train.faults and not val.findings
    assert {(Path(f.path).name, f.kind) for f in train.warnings} == {
        ('4.png', 'no labelled pixel'),
        ('spare.png', 'label without image'),
    }


def test_a_class_that_never_occurs_and_damaged_pictures_are_warnings(data):
    for i in range(6):
        write(data / f'labels/train/{i}.png', label(i, high=3))
    to_jpeg(data, 'images/train')
    # Within the scan, the decoder loses its place and finds bytes left when the picture is full.
    rewrite(data / IMAGE, lambda content: content[:-2] + b'\x12' * 400 + content[-2:])
    exif = Image.Exif()
    exif[0x0112] = 3
    write(data / 'images/train/1.png', picture(1), format='JPEG', exif=exif)
    report = check_config(config(data), ['train'], workers=1)[0]
    assert not report.faults
    assert {(f.path, f.kind) for f in report.warnings} == {
        ('car', 'absent class'),
        (str(data / IMAGE), 'damaged image'),
        (str(data / 'images/train/1.png'), 'turned image'),
    }
    quick_check(dataset(data))


def test_wrappers_and_lists(data):
    both = dict(
        type='ConcatDataset',
        datasets=[dataset(data), dict(type='RepeatDataset', times=3, dataset=dataset(data, 'val'))],
    )
    report = check_split('train', both, workers=1)
    assert report.files == 9 and not report.findings
    quick_check(both)
    (data / 'labels/val/1.png').unlink()
    with pytest.raises(DataError, match=r'labels/val/1\.png: the label is missing; restore'):
        quick_check(both)
    (data / 'list.txt').write_text('0\n2\n')
    report = check_split('val', dict(dataset(data, 'val'), ann_file='list.txt'), workers=1)
    assert report.files == 2 and not report.findings
    assert check_split('train', dict(dataset(data), indices=2), workers=1).files == 2
    with pytest.raises(DataError, match='no image is listed'):
        check_not_empty(dict(dataset(data), indices=0))


def test_reduced_and_chosen_classes_are_understood(data):
    report = check_split('train', dataset(data, reduce_zero_label=True, metainfo=dict(classes=CLASSES[:3])), 1)
    raw = np.stack([np.array(Image.open(path)) for path in (data / 'labels/train').iterdir()])
    assert not report.faults and report.pixels.tolist() == [(raw == value).sum() for value in (1, 2, 3)]

    @DATASETS.register_module(force=True)
    class Four(BaseSegDataset):
        METAINFO = dict(classes=CLASSES, palette=[[i] * 3 for i in range(4)])

    report = check_split('train', dict(dataset(data), type='Four', metainfo=dict(classes=('car', 'sky'))), 1)
    assert not report.faults and report.pixels.tolist() == [(raw == value).sum() for value in (3, 1)]


@DATASETS.register_module(force=True)
class OwnKeys(BaseSegDataset):
    def load_data_list(self):
        return [dict(file='a', reduce_zero_label=False)]


@DATASETS.register_module(force=True)
class OwnInit(BaseSegDataset):
    def __init__(self, pipeline, data_root, data_prefix, img_suffix, metainfo):
        super().__init__(lazy_init=True)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (dict(type='OwnKeys'), 'no img_path'),
        (dict(type='OwnInit'), 'cannot be listed'),
        (dict(type='Nobody'), 'not registered'),
        (dict(backend_args=dict(backend='petrel')), 'another backend'),
        (dict(pipeline=[dict(type='LoadImageFromFile', backend_args=dict(backend='lmdb'))]), 'another backend'),
        (dict(data_root='s3://bucket/data'), 'on a server'),
        (dict(type='StreetSceneDataset'), 'draws and checks its files itself'),
    ],
)
def test_what_is_not_understood_passes_with_a_line_in_the_log(data, change, reason, monkeypatch):
    said = []
    monkeypatch.setattr('mmseg_volo.datasets.checks.check.print_log', lambda text, **_: said.append(text))
    shutil.rmtree(data / 'labels')
    quick_check(dataset(data, **change))
    assert len(said) == 1 and reason in said[0]


def test_own_transforms_leave_content_alone(data):
    write(data / LABEL, picture(3))  # an own transform may well translate colours
    quick_check({**dataset(data), 'pipeline': [dict(type='LoadImageFromFile'), dict(type='LoadColours')]})
    report = check_split('train', {**dataset(data), 'pipeline': []}, 1)
    assert not report.faults and len(report.left_out) == 2
    (data / LABEL).unlink()
    with pytest.raises(DataError, match='missing'):
        quick_check({**dataset(data), 'pipeline': []})


def test_an_unlucky_sample_is_looked_behind(data):
    for i in range(5):
        write(data / f'labels/train/{i}.png', np.full((HEIGHT, WIDTH), 255, np.uint8))
    quick_check(dataset(data), num_files=1)
    write(data / 'labels/train/5.png', np.full((HEIGHT, WIDTH), 255, np.uint8))
    with pytest.raises(DataError, match='and of all others in'):
        quick_check(dataset(data), num_files=1)


def test_headers():
    image = picture(0)
    assert read_header(cv2.imencode('.png', image)[1].tobytes()) == Header('png', (HEIGHT, WIDTH))
    content = cv2.imencode('.jpg', image)[1].tobytes()
    assert read_header(content) == Header('jpeg', (HEIGHT, WIDTH))
    assert read_header(content + b'a phone appends a film') == Header('jpeg', (HEIGHT, WIDTH))
    assert read_header(cv2.imencode('.bmp', image)[1].tobytes()) == Header('other')
    progressive = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert read_header(progressive).shape == (HEIGHT, WIDTH)
    for end in range(2, len(content)):
        with pytest.raises(ValueError, match='it is cut off'):
            read_header(content[:end])
    with pytest.raises(ValueError, match='it is empty'):
        read_header(b'')


@pytest.mark.parametrize('reduced', [False, True])
@pytest.mark.parametrize('label_map', [None, {0: 255, 1: 0, 2: 1, 3: 255}, {0: 1, 1: 0}])
def test_labels_are_those_of_mmseg(data, reduced, label_map):
    every = np.arange(256, dtype=np.uint8).reshape(8, 32)
    path = write(data / 'every.png', every)
    info = dict(seg_map_path=str(path), label_map=label_map, reduce_zero_label=reduced)
    theirs = LoadAnnotations().transform(dict(info, seg_fields=[]))
    ours = TRANSFORMS.build(dict(type='LoadCheckedAnnotations')).transform(dict(info, seg_fields=[], ori_shape=(8, 32)))
    assert ours['seg_fields'] == ['gt_seg_map'] and ours['gt_seg_map'].dtype == np.uint8
    assert (ours['gt_seg_map'] == theirs['gt_seg_map']).all()
    assert (label_table(reduced, label_map) == theirs['gt_seg_map'].ravel()).all()


LOADING = [
    name
    for name, (_, path, kind, *_) in FAULTS.items()
    if path in (IMAGE, LABEL) and kind.split()[0] in ('unreadable', 'channels', 'depth', 'lossy', 'size')
]


@pytest.mark.parametrize('name', [name for name in LOADING if 'permissions' not in name])
def test_loading_names_the_file(data, name, capfd):
    if 'PNG image' in name:
        pytest.skip('what of a damaged PNG is an error depends on the release of libpng')
    FAULTS[name][0](data)
    items = DATASETS.build(dataset(data))
    with pytest.raises(DataError) as caught:
        items[3]
    message = str(caught.value)
    assert str(data / FAULTS[name][1]) in message and '\n' not in message and '; ' in message


def test_an_error_in_a_worker_of_the_loader_is_one_sentence(data):
    write(data / LABEL, picture(3))
    loader = torch.utils.data.DataLoader(DATASETS.build(dataset(data)), num_workers=1, collate_fn=pseudo_collate)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f'{data / LABEL}: the label has 3 channels') and '\n' not in str(caught.value)


def test_stale_arguments_of_the_transform(data):
    pipeline = [dict(type='LoadCheckedImage'), dict(type='LoadCheckedAnnotations', reduce_zero_label=True)]
    with pytest.raises(DataError, match='set it in the data set only'):
        DATASETS.build({**dataset(data), 'pipeline': pipeline})[0]


@pytest.mark.parametrize('name', ['volo_d1_camvid', 'volo_d1_ade20k', 'volo_d1_cityscapes', 'volo_d1_quickstart'])
def test_pipelines_run_without_labels(data, name):
    """As ``inference_model`` and ``MMSegInferencer`` take them: the first by file and array, the second by file."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    path = str(data / IMAGE)
    for source in (path, cv2.imread(path)):
        prepared, _ = _preprare_data(source, SimpleNamespace(cfg=cfg.copy()))
        assert 'gt_sem_seg' not in prepared['data_samples'][0]
    inferencer = SimpleNamespace(_get_transform_idx=lambda *args: MMSegInferencer._get_transform_idx(None, *args))
    pipeline = MMSegInferencer._init_pipeline(inferencer, cfg.copy())
    assert pipeline(path)['inputs'].shape == prepared['inputs'][0].shape
    assert 'Annotations' not in str(_for_arrays(cfg.tta_pipeline)) + str(_for_arrays(cfg.test_pipeline))
    tta = TRANSFORMS.build(cfg.tta_pipeline[1]) if cfg.tta_pipeline[1]['type'] == 'TestTimeAug' else None
    views = tta(TRANSFORMS.build(cfg.tta_pipeline[0])(dict(img_path=path)))
    assert len(views['inputs']) >= 2
    assert "type='LoadImageFromFile'" in cfg.pretty_text.split('test_pipeline')[1]


# The hook


def batch(*labels, path: str = 'labels/a.png', **meta) -> dict:
    samples = []
    for i, ids in enumerate(labels):
        sample = SegDataSample(metainfo=dict(seg_map_path=f'{i}/{path}', **meta))
        sample.gt_sem_seg = PixelData(data=torch.as_tensor(np.asarray(ids, np.int64))[None])
        samples.append(sample)
    return dict(inputs=[], data_samples=samples)


def runner(classes: int = 4, ignore: int = 255) -> SimpleNamespace:
    model = nn.Module()
    model.decode_head = nn.Module()
    model.decode_head.num_classes, model.decode_head.ignore_index = classes, ignore
    return SimpleNamespace(model=model)


def test_the_hook_lets_good_labels_pass():
    hook = LabelGuardHook(max_unlabelled=2)
    for _ in range(5):
        hook.before_train_iter(runner(), 0, batch(label(0), np.full((4, 4), 255)))
        hook.before_val_iter(runner(), 0, batch(np.full((4, 4), 255)))
        hook.before_test_iter(runner(), 0, batch(label(1)))
    hook.before_train_iter(runner(ignore=9), 0, batch([[0, 9, 3]]))
    hook.before_train_iter(runner(ignore=-100), 0, batch([[0, -100, 3]]))
    hook.before_val_iter(runner(), 0, dict(inputs=[], data_samples=[SegDataSample()]))
    hook.before_val_iter(SimpleNamespace(model=nn.Linear(1, 1)), 0, batch([[99]]))


@pytest.mark.parametrize('stage', ['train', 'val', 'test'])
@pytest.mark.parametrize(
    ('ids', 'ignore', 'told'),
    [
        (
            [[0, 4, 4, 255]],
            255,
            r'4 \(2 pixels\) is none of the model.s 4 classes \(0 to 3, 255 is ignored\); set reduce',
        ),
        ([[0, 254, 255]], 255, r'254 \(1 pixels\)'),
        ([[0, 300]], 255, r'300 \(1 pixels\)'),
        ([[0, -1]], 255, r'-1 \(1 pixels\)'),
        ([[0, 255, 9]], 9, r'255 \(1 pixels\)'),
        ([[0, 7, 9]], 9, r'7 \(1 pixels\)'),
    ],
)
def test_the_hook_names_the_file_the_value_and_the_pixels(stage, ids, ignore, told):
    before = getattr(LabelGuardHook(), f'before_{stage}_iter')
    with pytest.raises(DataError, match=rf'^1/labels/a\.png: label value {told}'):
        before(runner(ignore=ignore), 0, batch([[0]], ids))


def test_the_hook_sees_through_wrappers_and_views():
    wrapped = runner()
    for _ in range(2):
        outer = nn.Module()
        outer.module = wrapped.model
        wrapped = SimpleNamespace(model=outer)
    views = batch([[4]])
    views['data_samples'] = [views['data_samples'], views['data_samples']]
    with pytest.raises(DataError, match='0/labels'):
        LabelGuardHook().before_test_iter(wrapped, 0, views)
    cascade = runner(classes=9)
    cascade.model.decode_head = nn.ModuleList([nn.Module(), runner().model.decode_head])
    with pytest.raises(DataError, match='after reduce_zero_label is none'):
        LabelGuardHook().before_train_iter(cascade, 0, batch([[4]], reduce_zero_label=True))


def test_the_hook_counts_batches_without_labels():
    hook, empty = LabelGuardHook(max_unlabelled=3), batch(np.full((4, 4), 255))
    for good in (empty, empty, batch([[0]]), empty, empty):
        hook.before_train_iter(runner(), 0, good)
    with pytest.raises(DataError, match=r'^0/labels/a\.png: the labels of 3 training batches in a row'):
        hook.before_train_iter(runner(), 0, empty)


def test_every_config_has_the_hook_and_the_transforms():
    paths = sorted((ROOT / 'configs').glob('*.py'))
    assert len(paths) > 5
    for path in paths:
        cfg = Config.fromfile(path)
        assert dict(type='LabelGuardHook') in cfg.custom_hooks
        for split, image in (('train', 'LoadCheckedImage'), ('val', 'LoadImageFromFile')):
            steps = [step['type'] for step in cfg[f'{split}_dataloader'].dataset.pipeline]
            assert steps[0] == image and 'LoadCheckedAnnotations' in steps
        assert 'LoadCheckedAnnotations' in str(cfg.tta_pipeline)


# The command


@pytest.fixture
def tool(capsys, monkeypatch):
    """Run the command in this process: its status and what it printed."""
    main = runpy.run_path(str(ROOT / 'tools/check_data.py'))['main']

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr('sys.argv', ['check_data.py', *map(str, arguments)])
        return main(), capsys.readouterr().out

    return run


def test_the_command_reports_plots_and_ends_with_a_status(data, tool):
    path = data / 'own.py'
    path.write_text(f'default_scope = "mmseg"\n{config(data).pretty_text}\nwork_dir = "{data}/work"\n')
    status, output = tool(path)
    assert status == 0 and '0 faults, 0 warnings' in output
    assert 'train: 6 images, 6 labels read' in output and '| road ' in output
    plot = cv2.imread(str(data / 'work/check_data_train_val.png'))
    assert plot.shape[0] > 100 and len(np.unique(plot)) > 10

    for i in range(4):
        write(data / f'labels/train/{i}.png', picture(i))
    (data / 'labels/val/0.png').unlink()
    status, output = tool(path, '--fix-report', data / 'fix.csv', '--plot', data / 'p.png', '--workers', '2')
    assert status == 1 and '5 faults, 0 warnings' in output and (data / 'p.png').is_file()
    assert 'fault: train: channels of a label (4)' in output and '... and 1 more' in output
    assert f'{data}/labels/train/2.png: the label has 3 channels' in output
    with (data / 'fix.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and rows[-1]['path'] == f'{data}/labels/val/0.png' and rows[-1]['fault'] == 'True'
    assert not list(data.glob('.*.part*'))
    tool(path, '--fix-report', data / 'fix.jsonl', '--split', 'val')
    assert [json.loads(line)['kind'] for line in (data / 'fix.jsonl').read_text().splitlines()] == ['missing label']
    status, output = tool(path, '--split', 'test', '--cfg-options', f'test_dataloader.dataset.data_root={data}/gone')
    assert status == 1 and f'{data}/gone/images/val: there is no such file or folder' in output
    with pytest.raises(SystemExit):
        tool(path, '--workers', '0')


def test_the_command_ends_with_status_1_on_a_fault(data):
    (data / LABEL).unlink()
    path = data / 'own.py'
    path.write_text(f'{config(data).pretty_text}\n')
    command = [sys.executable, '-W', 'ignore', ROOT / 'tools/check_data.py', path, '--plot', data / 'p.png']
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 1 and f'{data / LABEL}: the label is missing' in done.stdout
    assert 'Traceback' not in done.stderr


def test_drawn_scenes_are_clean(data, tool):
    options = [
        f'{part}_dataloader.dataset.{option}'
        for part in ('train', 'val', 'test')
        for option in (f'data_root={data}/scenes', 'train=4', 'val=2', 'size=(64,128)')
    ]
    status, output = tool(ROOT / 'configs/volo_d1_quickstart.py', '--plot', data / 'p.png', '--cfg-options', *options)
    assert status == 0 and ' 0 faults' in f' {output.splitlines()[-1]}' and 'val: 2 images, 2 labels' in output


def test_camvid_is_clean(camvid, tmp_path, tool):
    options = [f'{part}_dataloader.dataset.data_root={camvid}' for part in ('train', 'val', 'test')]
    path = ROOT / 'configs/volo_d1_camvid.py'
    status, output = tool(path, '--plot', tmp_path / 'p.png', '--cfg-options', *options)
    assert status == 0 and '0 faults, 0 warnings' in output
    assert 'train: 367 images, 367 labels read' in output and 'val: 101 images, 101 labels read' in output
