"""Samplers and loops: what never ends is refused or replaced, and a place in the stream is a number from 0."""

import itertools
import time

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import EpochBasedTrainLoop, Runner
from small_models import build
from small_runs import small_config
from torch.utils.data import BatchSampler, DataLoader
from toy_runs import EPOCHS, Points, toy_run

from mmseg_volo.engine.loop import ResumableSampler, check_one_size
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.errors import ConfigError


@pytest.mark.parametrize('wrong', [-1, 2.0, 0.5, '3', None, np.float64(1)])
def test_skip_refuses_what_is_no_place_in_the_stream(wrong):
    with pytest.raises((ValueError, TypeError)):
        ResumableSampler(Points(), seed=0).skip(wrong)


def test_skip_equals_mmengine():
    ours, theirs = ResumableSampler(Points(), seed=5), InfiniteSampler(Points(), seed=5)
    for sampler in (ours, theirs):
        sampler.skip(np.int64(11))
    assert list(itertools.islice(ours, 20)) == list(itertools.islice(theirs, 20))


class OwnLoop(EpochBasedTrainLoop):
    pass


@pytest.mark.parametrize('sampler', ['ResumableSampler', 'InfiniteSampler', InfiniteSampler])
@pytest.mark.parametrize('loop', [dict(by_epoch=True), dict(type='EpochBasedTrainLoop'), dict(type=OwnLoop)])
def test_epochs_end_with_an_endless_sampler(tmp_path, sampler, loop):
    loader = dict(batch_size=2, dataset=Points(), sampler=dict(type=sampler, shuffle=False))
    runner = toy_run(
        tmp_path,
        checkpoint=dict(by_epoch=True, interval=1),
        **dict(EPOCHS, train_dataloader=loader, train_cfg=dict(loop, max_epochs=2)),
    )
    runner.train()
    assert (runner.epoch, runner.iter) == (2, 8)
    sampler = runner.train_dataloader.sampler
    assert type(sampler) is DefaultSampler and not sampler.shuffle
    assert {'epoch_1.pth', 'epoch_2.pth'} <= {path.name for path in tmp_path.glob('*.pth')}


@pytest.mark.parametrize('batches', [False, True])
def test_epochs_of_a_loader_that_is_built_already(tmp_path, batches):
    sampler = ResumableSampler(Points(), seed=0)
    where = dict(batch_sampler=BatchSampler(sampler, 2, False)) if batches else dict(sampler=sampler, batch_size=2)
    runner = toy_run(tmp_path, **dict(EPOCHS, train_dataloader=DataLoader(Points(), **where)))
    with pytest.raises(ConfigError, match=r'counts epochs, but ResumableSampler never ends.*DefaultSampler'):
        runner.train()


def test_epochs_with_the_runner_of_mmengine(tmp_path):
    runner = toy_run(tmp_path, [dict(type='MatchingCheckpointHook')], kind=Runner, **EPOCHS)
    with pytest.raises(ConfigError, match=r'counts epochs, but ResumableSampler never ends'):
        runner.train()


def test_iterations_with_a_sampler_that_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # mmengine waits two seconds after the last batch
    sampler = dict(type='DefaultSampler', shuffle=True)
    loader = dict(batch_size=4, dataset=Points(), sampler=sampler)  # two batches
    runner = toy_run(tmp_path, train_dataloader=loader, train_cfg=dict(type='ResumableTrainLoop', max_iters=3))
    runner.train()
    assert runner.iter == 3 and type(runner.train_dataloader.sampler) is DefaultSampler


def test_batches_of_several_sizes_are_refused_only_where_they_would_fail(tmp_path):
    images = [dict(inputs=torch.zeros(3, 32, side)) for side in (48, 48, 64)]
    stock, ours = build(type='EncoderDecoder'), build()
    for model, size, data in ((ours, 2, images), (stock, 1, images), (stock, 2, images[:2]), (Points(), 2, Points())):
        check_one_size(DataLoader(data, batch_size=size), model, 'val_dataloader')
    with pytest.raises(ConfigError, match=r'^val_dataloader.batch_size: 2, .* 32 x 48 and 32 x 64; .*Streaming'):
        check_one_size(DataLoader(images, batch_size=2), stock, 'val_dataloader')
    assert stock.training is False
    config = small_config(tmp_path, model__type='EncoderDecoder', val_dataloader__batch_size=2)
    config.val_dataloader.dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResize', scale=(64, 32), ratio_range=(1.0, 2.0)),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ]
    runner = build_runner(config, 'train')
    with pytest.raises(ConfigError, match=r'val_dataloader\.batch_size: 2'):
        runner.train()
    assert runner.iter == 0
