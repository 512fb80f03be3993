"""The hook that stops a run at the first label that the model has no class for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faulty_data import random_label
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_volo.engine.guards import LabelGuardHook
from mmseg_volo.errors import DataError


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


def test_valid_labels_pass():
    hook = LabelGuardHook(max_unlabelled=2)
    for _ in range(5):
        hook.before_train_iter(runner(), 0, batch(random_label(0), np.full((4, 4), 255)))
        hook.before_val_iter(runner(), 0, batch(np.full((4, 4), 255)))
        hook.before_test_iter(runner(), 0, batch(random_label(1)))
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
def test_message_names_file_value_and_pixels(stage, ids, ignore, told):
    before = getattr(LabelGuardHook(), f'before_{stage}_iter')
    with pytest.raises(DataError, match=rf'^1/labels/a\.png: label value {told}'):
        before(runner(ignore=ignore), 0, batch([[0]], ids))


def test_wrapped_models_cascades_and_views_are_checked():
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


def test_batches_without_labels_are_counted():
    hook, empty = LabelGuardHook(max_unlabelled=3), batch(np.full((4, 4), 255))
    for good in (empty, empty, batch([[0]]), empty, empty):
        hook.before_train_iter(runner(), 0, good)
    with pytest.raises(DataError, match=r'^0/labels/a\.png: the labels of 3 training batches in a row'):
        hook.before_train_iter(runner(), 0, empty)
