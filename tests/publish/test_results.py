"""Which evaluation records count for a checkpoint, and what is read from them."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.evaluation import IoUMetric

from mmseg_volo.checkpoints.writing import save
from mmseg_volo.publish.results import find_results, hardware_of

STAMP = '20260101_000000'
META = dict(iter=2, time='20260101_000000', saved_at=1767225600.0, experiment_name=f'tiny_{STAMP}')
CLASSES = ['road', 'car', 'train', 'pole']
CONFUSION = [[50, 3, 0, 1], [4, 20, 0, 0], [0, 0, 0, 0], [7, 0, 0, 0]]  # no train at all, no pole found
CONFIG = dict(
    model=dict(test_cfg=dict(mode='whole')),
    test_dataloader=dict(
        dataset=dict(type='CamVidDataset', data_root='data/camvid', data_prefix=dict(img_path='images/val'))
    ),
)
TTA = [
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=0.5), dict(type='Resize', scale_factor=1.0)],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
        ],
    )
]


@pytest.fixture
def work(tmp_path):
    """A work dir with one checkpoint, without records."""
    save(dict(meta=META, state_dict=dict(weight=torch.ones(1))), tmp_path / 'run/iter_2.pth')
    return tmp_path / 'run'


def write(work, stamp, config=None, **changes):
    record = dict(
        kind='test',
        iteration=2,
        checkpoint='run/iter_2.pth',
        aug_test=False,
        date='2026-02-01T00:00:00+00:00',
        dataset=dict(
            type='CamVidDataset', data_root='/secret/camvid', img_path='/secret/camvid/images/val', pictures=3
        ),
        classes=CLASSES,
        confusion=CONFUSION,
        metrics={},
        environment=dict(device='cpu'),
    )
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    folder = work / stamp
    (folder / 'evaluation').mkdir(parents=True)
    (folder / 'evaluation' / f'{record["kind"]}.json').write_text(json.dumps(record))
    if config is not None:
        (folder / 'vis_data').mkdir()
        Config(config).dump(folder / 'vis_data/config.py')


def find(work, **options):
    return find_results(work / 'iter_2.pth', work, META, CONFIG, CLASSES, **options)


def test_figures_are_those_of_mmseg(work):
    write(work, '1')
    ((one,), notes) = find(work)
    table = torch.tensor(CONFUSION).float()
    correct, predicted, truth = table.diag(), table.sum(0), table.sum(1)
    expected = IoUMetric.total_area_to_metrics(correct, predicted + truth - correct, predicted, truth)
    assert one.iou == pytest.approx(expected['IoU'] * 100, nan_ok=True)
    assert one.miou == pytest.approx(np.nanmean(expected['IoU']) * 100)
    assert one.pixel_accuracy == pytest.approx(float(expected['aAcc']) * 100)
    assert one.mean_accuracy == pytest.approx(np.nanmean(expected['Acc']) * 100)
    assert one.missed == ['pole'] and one.pixels.tolist() == [54, 24, 0, 7] and not notes
    assert (one.data, one.folder, one.images) == ('CamVid val', 'images/val', 3)
    assert (one.date, one.device) == ('2026-02-01', 'cpu')
    assert (one.how, one.views, one.options) == ('single-scale', '', [])


def test_the_newest_test_counts_and_single_scale_comes_first(work):
    write(work, '1', aug_test=True)
    write(work, '2', date='2026-02-02T00:00:00+00:00')
    write(work, '3')
    write(work, '4', dataset=dict(pictures=9))
    write(work, STAMP, kind='val', checkpoint=None, date='2026-02-09T00:00:00+00:00')
    results, notes = find(work)
    assert [(one.how, one.images, one.date) for one in results] == [
        ('single-scale', 9, '2026-02-01'),
        ('single-scale', 3, '2026-02-02'),
        ('multi-scale', 3, '2026-02-01'),
    ]
    assert not notes


def test_settings_that_differ_are_named_without_places(work):
    dataset = dict(
        CONFIG['test_dataloader']['dataset'], data_root='/secret', ann_file='/secret/a.txt', indices=['/secret/b', 1]
    )
    dataset['data_prefix'] = dict(img_path='images/test')
    used = dict(
        model=dict(type='TTA', module=dict(test_cfg=dict(mode='slide', crop_size=(64, 64), allow_mismatch=True))),
        test_dataloader=dict(dataset=dataset),
        tta_pipeline=TTA,
    )
    write(work, '1', used, aug_test=True)
    ((one,), _) = find(work)
    assert one.options == [
        'model.test_cfg.crop_size=(64, 64)',
        'model.test_cfg.mode=slide',
        'test_dataloader.dataset.ann_file=data/images',
        'test_dataloader.dataset.data_prefix.img_path=images/test',
        'test_dataloader.dataset.indices=data/images',
    ]
    assert one.views == 'scales 0.5, 1.0, each also flipped' and one.how.startswith('multi-scale, crop_size=(64, 64), ')


@pytest.mark.parametrize(
    'changes, reason',
    [
        (dict(date='2001-01-01T00:00:00+00:00'), 'older than the checkpoint'),
        (dict(iteration=7), 'older than the checkpoint'),
        (dict(checkpoint='other_run/iter_2.pth'), 'is of other_run/iter_2.pth, which is not there any more'),
        (dict(metrics=dict(mIoU=99.0)), 'is not that of its confusion matrix'),
        (dict(classes=['cat', 'dog']), 'not one of 2 classes'),
        (dict(classes=['road', 'car', 'train', 'cat']), "its classes are not the model's"),
        (dict(confusion='many'), 'no record that can be read'),
        (dict(confusion=[[2**70] * 4] * 4), 'no record that can be read'),
        (dict(metrics=dict(mIoU=10**400)), 'no record that can be read'),
        (dict(iteration=[[]]), 'older than the checkpoint'),
        (dict(date='yesterday'), 'no record that can be read'),
        (dict(confusion=np.zeros((4, 4)).tolist()), 'is not one of 4 classes'),
        (dict(checkpoint='run/iter_4.pth'), None),
        (dict(kind='val', checkpoint=None), None),  # of another run: its folder has another timestamp
    ],
)
def test_other_records_do_not_count(work, changes, reason):
    write(work, '1', **changes)
    results, notes = find(work)
    assert not results and (len(notes) == 1 and reason in notes[0] if reason else not notes)


def test_a_file_that_stands_where_the_record_says_decides(work, tmp_path):
    """A copy of the checkpoint counts, another checkpoint of the same name does not."""
    save(dict(meta=META, state_dict=dict(weight=torch.ones(1))), tmp_path / 'copy/iter_2.pth')
    save(dict(meta=dict(META, saved_at=1.0), state_dict=dict(weight=torch.ones(1))), tmp_path / 'other/iter_2.pth')
    write(work, '1', checkpoint='copy/iter_2.pth', dataset=dict(started_in=str(tmp_path)))
    write(work, '2', checkpoint='other/iter_2.pth', dataset=dict(started_in=str(tmp_path)))
    results, notes = find(work)
    assert len(results) == 1 and len(notes) == 1 and notes[0].endswith('is of other/iter_2.pth')


@pytest.mark.parametrize(
    'lines, expected',
    [
        ('CUDA available: True\n    GPU 0,1: NVIDIA H100\n    GPU 2: NVIDIA L4\n    PyTorch: 2.6.0',
         dict(devices='2 × NVIDIA H100, 1 × NVIDIA L4', PyTorch='2.6.0')),
        ('CUDA available: False\n    PyTorch: 2.6.0', dict(devices='CPU', PyTorch='2.6.0')),
        ('sys.platform: linux', {}),
    ],
)  # fmt: skip
def test_hardware_comes_from_the_log_of_the_run(work, lines, expected):
    assert hardware_of(work, META) == {}
    (work / STAMP).mkdir()
    (work / STAMP / f'{STAMP}.log').write_text(
        f'2026/01/01 00:00:00 - mmengine - INFO - \nSystem environment:\n    {lines}\n'
    )
    assert hardware_of(work, META) == expected
