"""From a data set's config to its files: wrappers, lists, and data sets that the check cannot read."""

import shutil

import numpy as np
import pytest
from faulty_data import CLASSES, LABEL, dataset_config, random_image, write
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_volo.datasets.checks.check import check_split, quick_check
from mmseg_volo.errors import DataError


def test_wrappers_and_lists(data):
    both = dict(
        type='ConcatDataset',
        datasets=[
            dataset_config(data),
            dict(type='RepeatDataset', times=3, dataset=dataset_config(data, 'val')),
        ],
    )
    report = check_split('train', both, workers=1)
    assert report.files == 9 and not report.findings
    quick_check(both)
    (data / 'labels/val/1.png').unlink()
    with pytest.raises(DataError, match=r'labels/val/1\.png: the label is missing; restore it'):
        quick_check(both)
    (data / 'list.txt').write_text('0\n2\n')
    report = check_split('val', dataset_config(data, 'val', ann_file='list.txt'), workers=1)
    assert report.files == 2 and not report.findings


def test_reduced_and_chosen_classes(data):
    reduced = dataset_config(data, reduce_zero_label=True, metainfo=dict(classes=CLASSES[:3]))
    report = check_split('train', reduced, 1)
    raw = np.stack([np.array(Image.open(path)) for path in (data / 'labels/train').iterdir()])
    assert not report.faults and report.pixels.tolist() == [(raw == value).sum() for value in (1, 2, 3)]

    @DATASETS.register_module(force=True)
    class Four(BaseSegDataset):
        METAINFO = dict(classes=CLASSES, palette=[[i] * 3 for i in range(4)])

    report = check_split('train', dataset_config(data, type='Four', metainfo=dict(classes=('car', 'sky'))), 1)
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
def test_unknown_data_set_passes_and_the_log_says_why(data, change, reason, monkeypatch):
    lines = []
    monkeypatch.setattr('mmseg_volo.datasets.checks.check.print_log', lambda text, **_: lines.append(text))
    shutil.rmtree(data / 'labels')
    quick_check(dataset_config(data, **change))
    assert len(lines) == 1 and reason in lines[0]


def test_content_is_not_checked_where_unknown_transforms_read_it(data):
    write(data / LABEL, random_image(3))  # an own transform may translate colours
    quick_check(dataset_config(data, pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadColours')]))
    report = check_split('train', dataset_config(data, pipeline=[]), 1)
    assert not report.faults and len(report.left_out) == 2
    (data / LABEL).unlink()
    with pytest.raises(DataError, match='missing'):
        quick_check(dataset_config(data, pipeline=[]))
