"""A resumed run equals an uninterrupted one, bit for bit."""

import importlib
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmseg.datasets import BaseSegDataset
from mmseg.registry import HOOKS
from small_runs import checkpoint, differences, small_config

import mmseg_volo.engine.checkpoint_hook
from mmseg_volo.checkpoints import reading
from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.cli import run_tool
from mmseg_volo.engine.guards import NonFiniteGuardHook
from mmseg_volo.engine.loop import Draw, ResumableSampler, ResumableTrainLoop, SeededDataset
from mmseg_volo.engine.resume import newest_checkpoint
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.errors import CheckpointError, ProcessLost, SaveError, TrainingDiverged, TrainingStopped


class Cut(Exception):
    """Stands for a power cut."""


@HOOKS.register_module(force=True)
class CutHook(Hook):
    """Raise Cut after an iteration, or during a validation."""

    priority = 'LOWEST'

    def __init__(self, after: int, in_validation: bool = False):
        self.after, self.in_validation = after, in_validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after and not self.in_validation:
            raise Cut

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.after and self.in_validation:
            raise Cut


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp('whole')
    build_runner(small_config(folder, 'whole')).train()
    return folder


def cut_and_resume(folder, name, *cuts, workers=0):
    for cut in cuts:
        config = small_config(folder, name, resume=cut is not cuts[0], train_dataloader__num_workers=workers)
        config.custom_hooks.append(dict(type='CutHook', **cut))
        runner = build_runner(config)
        with pytest.raises(Cut):
            runner.train()
        assert multiprocessing.active_children() == []
    runner = build_runner(small_config(folder, name, resume=True, train_dataloader__num_workers=workers))
    runner.train()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ('cuts', 'workers'),
    [
        ([dict(after=5)], 2),
        pytest.param([dict(after=4, in_validation=True)], 0, marks=pytest.mark.slow),
        pytest.param([dict(after=8, in_validation=True)], 2, marks=pytest.mark.slow),
        pytest.param([dict(after=1), dict(after=2), dict(after=6)], 0, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(whole, cuts, workers):
    name = f'cut{workers}' + ''.join(str(cut['after']) + 'v' * len(cut.keys() - {'after'}) for cut in cuts)
    cut_and_resume(whole, name, *cuts, workers=workers)
    assert differences(whole / 'whole/iter_8.pth', whole / name / 'iter_8.pth') == []
    best = [next(path.glob('best_mIoU_*')).name for path in (whole / 'whole', whole / name)]
    assert best[0] == best[1]
    assert sorted(path.name for path in (whole / name).glob('iter_*')) == ['iter_6.pth', 'iter_8.pth']


@pytest.mark.slow
def test_no_replay(whole, monkeypatch):
    """A run resumed after 6 of 8 iterations reads the images of two iterations."""
    folder = whole / 'replay'
    shutil.copytree(whole / 'whole', folder, ignore=shutil.ignore_patterns('iter_8.pth', 'best*'))
    read = []
    getitem = SeededDataset.__getitem__
    monkeypatch.setattr(SeededDataset, '__getitem__', lambda self, i: (read.append(i), getitem(self, i))[1])
    build_runner(small_config(whole, 'replay', resume=True, train_cfg__val_interval=100)).train()
    assert len([index for index in read if isinstance(index, Draw)]) == 4


def test_resuming_reads_the_checkpoint_and_lists_the_data_once(whole, monkeypatch):
    shutil.copytree(whole / 'whole', whole / 'once', ignore=shutil.ignore_patterns('iter_6.pth', 'best*'))
    config = small_config(whole, 'once', resume=True)
    for split in ('train', 'val'):
        loader = config[f'{split}_dataloader']
        folders = dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}')
        files = dict(data_root=loader.dataset.data_root, data_prefix=folders)
        loader.dataset = dict(type='CityscapesDataset', pipeline=loader.dataset.pipeline, **files)
    calls = Counter()

    def counted(function, *arguments, **options):
        calls[function.__name__] += 1
        return function(*arguments, **options)

    def count(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **options: counted(function, *arguments, **options))

    count(reading, '_parse')
    count(reading, 'seal_holds')
    count(BaseSegDataset, 'load_data_list')
    build_runner(config).train()
    assert calls == dict(_parse=1, seal_holds=1, load_data_list=2)


def test_augmentation_depends_on_the_position_in_the_stream():
    """It depends neither on the number of ranks nor on other uses of random numbers."""

    class Images(list):
        metainfo = dict(classes=('a',))

        def __getitem__(self, index):
            return int(index), random.random(), np.random.rand(), torch.rand(1).item()

    data = SeededDataset(Images(range(5)))
    sampler = ResumableSampler(data, seed=3)
    alone = [data[i] for i in itertools.islice(sampler, 12)]
    shares = []
    for rank in (0, 1):
        one = ResumableSampler(data, seed=3)
        one.rank, one.world_size = rank, 2
        torch.manual_seed(rank)
        shares.append([data[pickle.loads(pickle.dumps(i))] for i in itertools.islice(one, 6)])
    assert [sample for pair in zip(*shares, strict=True) for sample in pair] == alone
    assert len({sample[1:] for sample in alone}) == 12
    sampler.skip(7)
    state = torch.get_rng_state()
    assert [data[i] for i in itertools.islice(sampler, 5)] == alone[7:]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_a_resumed_run_keeps_its_own_config(tmp_path, monkeypatch):
    """The text in a checkpoint that names the user's own package is left out, because reading it could run code."""
    (tmp_path / 'own_package.py').write_text(
        'from mmengine.hooks import Hook\nfrom mmseg.registry import HOOKS\n'
        '@HOOKS.register_module(force=True)\nclass OwnHook(Hook):\n    pass\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module('own_package')
    for step in (1, 2):
        once = dict(train_cfg__max_iters=step, train_cfg__val_interval=9, default_hooks__checkpoint__interval=1)
        config = small_config(tmp_path, 'own', resume=step == 2, **once)
        config.custom_imports = dict(imports=['mmseg_volo', 'own_package'])
        config.custom_hooks.append(dict(type='OwnHook', priority=step))
        build_runner(config).train()
    assert 'cfg' not in load_from_local(str(tmp_path / 'own/iter_2.pth'))['meta']
    raw = torch.load(tmp_path / 'own/iter_2.pth', weights_only=False)
    for text in (raw['meta']['cfg'], raw['message_hub']['runtime_info']['cfg']):
        assert "'own_package'" in text and "dict(priority=2, type='OwnHook')" in text


@pytest.mark.parametrize(
    ('part', 'value'),
    [
        ('message_hub', []),
        ('message_hub', dict(log_scalars=3, runtime_info={}, resumed_keys={})),
        ('message_hub', dict(log_scalars={}, runtime_info=dict(keep_ckpt_ids='ab'), resumed_keys={})),
        ('optimizer', [1]),
        ('optimizer', dict(state=3, param_groups=[])),
        ('optimizer', dict(state={}, param_groups=[dict(params='x')])),
        ('param_schedulers', 'abc'),
        ('param_schedulers', [3]),
        ('meta', dict(iter='10', epoch=0)),
        ('meta', dict(iter=10, epoch=-1)),
        ('meta', dict(iter=10, epoch=0, seed=[1])),
    ],
)
def test_a_state_of_odd_types_is_no_resume_point(part, value, tmp_path):
    content = dict(checkpoint(), **{part: value})
    content['meta'].pop('sealed_by', None)
    torch.save(content, tmp_path / 'iter_10.pth')
    with pytest.raises(
        CheckpointError, match=rf'iter_10\.pth.*({part}.* is not what a training run saves|{part} missing)'
    ):
        newest_checkpoint([tmp_path], logging.getLogger('test_resume'))


def test_a_warning_if_there_is_nothing_to_resume(tmp_path):
    runner = build_runner(small_config(tmp_path, 'none', resume=True))
    runner._find_resume_point()
    assert runner._resume is False
    log = next((tmp_path / 'none').glob('*/*.log')).read_text()
    assert 'TRAINING STARTS FROM ITERATION 0' in log


def test_weights_alone_are_no_resume_point(whole):
    best = next((whole / 'whole').glob('best_mIoU_*'))
    runner = build_runner(small_config(whole, 'weights', resume=True, load_from=str(best)))
    with pytest.raises(CheckpointError, match=r'best_mIoU.*no state of a training run \(optimizer missing\)'):
        runner.train()


@HOOKS.register_module(force=True)
class PoisonHook(Hook):
    """Replace the images of some iterations by NaN."""

    def __init__(self, iterations):
        self.iterations = iterations

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 in self.iterations:
            data_batch['inputs'] = [torch.full(one.shape, float('nan')) for one in data_batch['inputs']]


def poisoned(folder, name, iterations, **options):
    config = small_config(folder, name, default_hooks__checkpoint__interval=1, **options)
    config.default_hooks.checkpoint.max_keep_ckpts = -1
    config.custom_hooks.append(dict(type='PoisonHook', iterations=iterations))
    return build_runner(config)


def test_steps_that_are_not_finite_are_skipped(whole):
    runner = poisoned(whole, 'poisoned', [3, 6])
    runner.train()
    changed = differences(whole / 'poisoned/iter_2.pth', whole / 'poisoned/iter_3.pth')
    assert changed and all(re.search('lr|param_schedulers', name) for name in changed)
    assert [
        name for name in differences(whole / 'poisoned/iter_3.pth', whole / 'poisoned/iter_4.pth') if 'weight' in name
    ]
    log = next((whole / 'poisoned').glob('*/*.log')).read_text()
    assert re.search(r'iteration 6: .*\(loss on this rank: nan\), step skipped, 1 in a row, 2 in all; .*scenes', log)
    last = load_from_local(str(whole / 'poisoned/iter_8.pth'))['state_dict']
    assert all(torch.isfinite(value).all() for value in last.values())


def test_training_ends_after_too_many_steps_that_are_not_finite(whole):
    runner = poisoned(whole, 'lost', range(3, 9))
    next(hook for hook in runner.hooks if isinstance(hook, NonFiniteGuardHook)).max_in_row = 3
    with pytest.raises(
        TrainingDiverged, match=r'iteration 5: .*3 in a row.*scenes.*Last good checkpoint: .*iter_4.pth'
    ):
        runner.train()


def test_a_folder_that_vanishes(whole, monkeypatch):
    """As when a mount is gone: one error that names the file."""
    config = small_config(whole, 'gone')
    runner = build_runner(config)
    collect = mmseg_volo.engine.checkpoint_hook.collect

    def unmount(*args):
        shutil.rmtree(whole / 'gone')
        (whole / 'gone').write_text('')
        return collect(*args)

    monkeypatch.setattr(mmseg_volo.engine.checkpoint_hook, 'collect', unmount)
    with pytest.raises(SaveError, match=r'gone/iter_2\.pth: the checkpoint could not be written'):
        runner.train()


@HOOKS.register_module(force=True)
class SignalHook(Hook):
    """Send SIGTERM to this process after an iteration, or during a validation."""

    def __init__(self, after: int, in_validation: bool = False):
        self.after, self.in_validation = after, in_validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after and not self.in_validation:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.after and self.in_validation:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(('after', 'in_validation'), [pytest.param(3, False, marks=pytest.mark.slow), (4, True)])
def test_stopped_by_a_signal_and_resumed(whole, after, in_validation):
    name = f'signal{after}'
    handler = signal.getsignal(signal.SIGTERM)
    config = small_config(whole, name)
    config.custom_hooks.append(dict(type='SignalHook', after=after, in_validation=in_validation))
    with pytest.raises(TrainingStopped, match=rf'SIGTERM after iteration {after}, saved as .*iter_{after}\.pth'):
        build_runner(config).train()
    assert signal.getsignal(signal.SIGTERM) is handler
    build_runner(small_config(whole, name, resume=True)).train()
    assert differences(whole / 'whole/iter_8.pth', whole / name / 'iter_8.pth') == []


@pytest.mark.slow
def test_an_epoch_based_run_is_stopped_and_resumed(tmp_path):
    """With mmengine's loop and sampler, resuming is not exact, but no progress is lost."""
    options = dict(
        train_dataloader__sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
        train_dataloader__drop_last=True,
        default_hooks__checkpoint__by_epoch=True,
        default_hooks__checkpoint__interval=1,
    )
    config = small_config(tmp_path, 'epochs', **options)
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)
    config.custom_hooks.append(dict(type='SignalHook', after=6))
    with pytest.raises(TrainingStopped, match=r'epochs/iter_6\.pth'):
        build_runner(config).train()
    config = small_config(tmp_path, 'epochs', resume=True, **options)
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)
    build_runner(config).train()
    assert {'epoch_1.pth', 'epoch_2.pth'} <= {path.name for path in (tmp_path / 'epochs').glob('*.pth')}


def test_a_work_dir_that_cannot_be_written(tmp_path, capsys):
    """The error is one line that names the path."""
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: build_runner(small_config(tmp_path, 'file/run')).train())
    assert str(ended.value).startswith('error: ') and str(tmp_path / 'file') in str(ended.value)


def test_a_killed_worker_is_explained(whole, monkeypatch):
    runner = build_runner(small_config(whole, 'worker'))
    killed = RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')
    monkeypatch.setattr(ResumableTrainLoop, 'run_iter', lambda self, batch: (_ for _ in ()).throw(killed))
    with pytest.raises(ProcessLost, match=r'pid 7.*out of memory.*num_workers.*--resume'):
        runner.train()
