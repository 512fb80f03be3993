"""A checkpoint is resumed only by a run that continues it: optimizer, schedules and classes are compared first."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import LinearLR, OptimWrapper, OptimWrapperDict, PolyLR
from mmengine.runner import IterBasedTrainLoop
from mmseg.models import SegDataPreProcessor
from torch.utils.data import ConcatDataset, Subset
from toy_runs import Points, toy_run

from mmseg_volo.engine.continuity import check_continuity, note_of
from mmseg_volo.engine.loop import SeededDataset
from mmseg_volo.engine.optim import BFloat16OptimWrapper
from mmseg_volo.errors import CheckpointError

PARAMETERS = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]


def wrapper(kind='AdamW', groups=(2, 1), wrapped=OptimWrapper, **options) -> OptimWrapper:
    rest, some = list(PARAMETERS), []
    for size in groups:
        some.append(dict(params=rest[:size]))
        rest = rest[size:]
    return wrapped(getattr(torch.optim, kind)(some, lr=0.1, **options))


class Data(Points):
    def __init__(self, root='data/a', images=8, classes=('a', 'b'), zero=False):
        self.data_root, self.images, self.metainfo = root, images, dict(classes=classes)
        self.reduce_zero_label = zero

    def __len__(self):
        return self.images


def run(optimizer=None, schedules=('linear', 'poly'), data=None, end=8, **inputs) -> SimpleNamespace:
    optimizer = optimizer or wrapper()
    first = next(iter(optimizer.values())) if isinstance(optimizer, OptimWrapperDict) else optimizer
    build = dict(
        linear=lambda: LinearLR(first, start_factor=0.1, by_epoch=False, end=3),
        poly=lambda: PolyLR(first, by_epoch=False, begin=3, end=end),
    )
    return SimpleNamespace(
        _train_loop=object.__new__(IterBasedTrainLoop),
        optim_wrapper=optimizer,
        param_schedulers=[build[name]() for name in schedules] or None,
        train_dataloader=SimpleNamespace(dataset=SeededDataset(data or Data())),
        hooks=[],
        model=SimpleNamespace(data_preprocessor=SegDataPreProcessor(**dict(mean=[1, 2, 3.3], std=[1, 1, 1]) | inputs)),
        logger=logging.getLogger('test_continuity'),
    )


def saved(runner: SimpleNamespace, by_mmengine: bool = False) -> dict:
    content = dict(
        meta=dict(dataset_meta=runner.train_dataloader.dataset.metainfo, run=note_of(runner)),
        optimizer=runner.optim_wrapper.state_dict(),
    )
    if runner.param_schedulers is not None:
        content['param_schedulers'] = [schedule.state_dict() for schedule in runner.param_schedulers]
    if by_mmengine:
        del content['meta']['run']
    return content


SGD = dict(optimizer=wrapper('SGD', momentum=0.9))
REFUSED = [
    ({}, SGD, 'was trained with (AdamW|another optimizer, one with .*betas.*), and this run uses SGD'),
    (SGD, {}, 'was trained with (SGD|another optimizer, one with .*momentum.*), and this run uses AdamW'),
    ({}, dict(optimizer=wrapper(groups=(3,))), r'its AdamW has 2 parameter groups \(3 parameters\).*has 1 \(3 param'),
    (dict(optimizer=wrapper(groups=(1, 1))), {}, r'2 parameter groups \(2 parameters\).* has 2 \(3 parameters\)'),
    (dict(optimizer=OptimWrapperDict(a=wrapper(), b=wrapper())), {}, 'has states of 2 optimizers, and this run has 1'),
    ({}, dict(optimizer=OptimWrapperDict(a=wrapper())), 'optimizers'),
    ({}, dict(schedules=()), 'param_scheduler .* and .*, and this run has none'),
    (dict(schedules=()), {}, 'param_scheduler none, and this run has LinearLR and PolyLR'),
    ({}, dict(schedules=('poly',)), 'and this run has PolyLR'),
    ({}, dict(schedules=('poly', 'linear')), 'and this run has PolyLR and LinearLR'),
    ({}, dict(data=Data(classes=('a', 'c'))), "other classes than .*: 1 of 2, such as 'b' for 'c'"),
    (dict(data=Data(classes=('a',))), {}, r'was trained on 1 classes, and train_dataloader\.dataset has 2'),
]


@pytest.mark.parametrize('by_mmengine', [False, True])
@pytest.mark.parametrize(('before', 'now', 'told'), REFUSED)
def test_refused(before, now, told, by_mmengine):
    with pytest.raises(CheckpointError, match=rf'^old\.pth: .*{told}.*load_from=old\.pth instead of --resume$'):
        check_continuity(run(**now), saved(run(**before), by_mmengine), 'old.pth')


def test_optimizers_with_the_same_options_are_told_apart():
    with pytest.raises(CheckpointError, match='was trained with AdamW, and this run uses Adam'):
        check_continuity(run(wrapper('Adam')), saved(run()), 'old.pth')


@pytest.mark.parametrize('state', [7, [], {}, dict(param_groups=[]), dict(param_groups=3), dict(param_groups=[7, 8])])
def test_damaged_states(state):
    content = dict(saved(run(), by_mmengine=True), optimizer=state)
    with pytest.raises(CheckpointError, match=r'^old\.pth: '):
        check_continuity(run(), content, 'old.pth')
    content = dict(saved(run(), by_mmengine=True), param_schedulers=state)
    with pytest.raises(CheckpointError, match=r'^old\.pth: '):
        check_continuity(run(), content, 'old.pth')


@pytest.mark.parametrize(
    ('before', 'now', 'told'),
    [
        ({}, {}, ''),
        ({}, dict(data=Data('./data//a/', classes=('A', 'B'))), ''),
        ({}, dict(data=Data(images=9)), 'trained on 8 images of Data in data/a, and this run has 9 images of Data'),
        ({}, dict(data=Data('data/b')), 'in data/a, and this run has 8 images of Data in data/b'),
        ({}, dict(data=ConcatDataset([Subset(Data('c'), [0, 1]), Data()])), 'this run has 10 images of Data in c'),
        ({}, dict(optimizer=wrapper(wrapped=BFloat16OptimWrapper)), 'with OptimWrapper, and this run uses BFloat16'),
        ({}, dict(data=Data(zero=True)), 'trained with reduce_zero_label=False, and this run has True'),
        (dict(mean=[4.0, 5.0, 6.0]), {}, 'with mean=[4.0, 5.0, 6.0], and this run has [1.0, 2.0, 3.3]'),
        ({}, dict(bgr_to_rgb=True), 'trained with bgr_to_rgb=False, and this run has True'),
        ({}, dict(end=16), 'PolyLR goes on with end=8 of the checkpoint, not with 16 of the config'),
        (dict(schedules=()), dict(schedules=()), ''),
    ],
)
def test_accepted_with_a_warning_of_what_differs(before, now, told, caplog):
    for by_mmengine in (False, True):
        check_continuity(run(**now), saved(run(**before), by_mmengine), 'old.pth')
    assert told in caplog.text and bool(told) == bool(caplog.records)


def test_the_state_of_a_loss_scaler_is_no_obstacle():
    """As after a run with AmpOptimWrapper, which needs a GPU, resumed without --amp."""
    content = saved(run())
    content['optimizer']['loss_scaler'] = dict(scale=65536.0)
    check_continuity(run(), content, 'old.pth')
    now = wrapper()
    now.load_state_dict(content['optimizer'])
    now.step()


def test_training_ends_before_any_step(tmp_path):
    toy_run(tmp_path).train()
    (tmp_path / 'iter_8.pth').unlink()
    runner = toy_run(tmp_path, optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)), resume=True)
    before = [parameter.clone() for parameter in runner.model.parameters()]
    with pytest.raises(CheckpointError, match=r'iter_6\.pth: was trained with AdamW, and this run uses SGD'):
        runner.train()
    assert all(torch.equal(*pair) for pair in zip(before, runner.model.parameters(), strict=True))


def test_averaged_weights_are_not_trained_on(tmp_path):
    toy_run(tmp_path / 'a', [dict(type='EMAHook')]).train()
    for name in ('b', 'c'):
        shutil.copytree(tmp_path / 'a', tmp_path / name)
    with pytest.raises(CheckpointError, match=r'holds averaged weights, .* add --ema'):
        toy_run(tmp_path / 'b', resume=True).train()
    toy_run(tmp_path / 'c', [dict(type='VOLOEMAHook')], resume=True).train()  # either hook continues
    toy_run(tmp_path / 'd', load_from=str(tmp_path / 'a/iter_8.pth')).train()


def test_resuming_from_a_work_dir_takes_its_newest_checkpoint(tmp_path):
    toy_run(tmp_path / 'old').train()
    (tmp_path / 'old/iter_8.pth').unlink()
    runner = toy_run(tmp_path / 'new', resume=True, load_from=str(tmp_path / 'old'))
    runner.train()
    assert runner._load_from == str(tmp_path / 'old/iter_6.pth') and runner.iter == 8
    (tmp_path / 'empty').mkdir()
    with pytest.raises(CheckpointError, match=r'^--resume: no checkpoint of a training run in the folder .*empty$'):
        toy_run(tmp_path / 'new', resume=True, load_from=str(tmp_path / 'empty')).train()
    (tmp_path / 'empty/iter_4.pth').mkdir()
    with pytest.raises(CheckpointError, match=r'iter_4\.pth is a folder'):
        toy_run(tmp_path / 'new', resume=True, load_from=str(tmp_path / 'empty')).train()
