"""Checkpoints are written in a thread during training, and resuming finds the newest complete one."""

import copy
import datetime
import errno
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from small_runs import checkpoint
from toy_runs import EPOCHS, Cut, CutHook, Points, Toy, toy_run

import mmseg_volo.engine.saving
from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.checkpoints.writing import replace_text, save
from mmseg_volo.engine.resume import newest_checkpoint
from mmseg_volo.engine.runner import VOLORunner
from mmseg_volo.engine.saving import Writer, readable_part
from mmseg_volo.errors import CheckpointError, ConfigError, SaveError, TrainingStopped

LOGGER = logging.getLogger('test_checkpoint_hook')


def test_writer_raises_its_error_once(tmp_path, monkeypatch):
    writer = Writer()
    settled = []
    writer.save(checkpoint(), tmp_path / 'a.pth', lambda: settled.append('a'))
    writer.wait()
    assert settled == ['a'] and not writer.failed
    monkeypatch.setattr(os, 'fsync', lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, 'gone')))
    writer.save(checkpoint(), tmp_path / 'b.pth', lambda: settled.append('b'))
    with pytest.raises(SaveError, match=r'b\.pth'):
        writer.wait()
    monkeypatch.undo()
    writer.wait()
    assert settled == ['a'] and os.listdir(tmp_path) == ['a.pth']


def test_an_error_after_the_save_is_a_save_error(tmp_path):
    """As when the disk is gone while last_checkpoint is written or older checkpoints are removed."""
    writer = Writer()
    writer.save(checkpoint(), tmp_path / 'a.pth', lambda: replace_text(tmp_path / 'gone/last_checkpoint', 'a'))
    with pytest.raises(SaveError, match=r'gone/.*last_checkpoint.*No such file'):
        writer.wait()


def test_newest_is_decided_by_the_content_of_the_files(tmp_path, caplog):
    work = tmp_path / 'work'
    work.mkdir()
    assert newest_checkpoint([work], LOGGER) is None
    for step in (2, 10, 4):
        save(checkpoint(step), work / f'iter_{step}.pth')
        os.utime(work / f'iter_{step}.pth', (0, 1000 - step))
    save(checkpoint(99), work / 'best_mIoU_iter_99.pth')
    (work / 'last_checkpoint').write_text('/nowhere/iter_4.pth')
    moved = tmp_path / 'moved'
    work.rename(moved)
    assert newest_checkpoint([moved], LOGGER)[0] == str(moved / 'iter_10.pth')

    (moved / 'iter_12.pth').write_bytes(b'')
    (moved / 'iter_11.pth').write_bytes((moved / 'iter_10.pth').read_bytes()[:-3000])
    shutil.copy(moved / 'iter_2.pth', moved / 'iter_500.pth')
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint([moved], LOGGER)[0] == str(moved / 'iter_10.pth')
    assert all(f'iter_{step}.pth' in caplog.text for step in (11, 12))
    os.mkfifo(moved / 'iter_700.pth')  # opening it would wait for ever
    (moved / 'iter_600.pth').symlink_to(tmp_path / 'gone.pth')
    assert newest_checkpoint([moved], LOGGER)[0] == str(moved / 'iter_10.pth')
    for step in (10, 4, 2, 600, 700):
        (moved / f'iter_{step}.pth').unlink()
    with pytest.raises(CheckpointError, match=r'none of 3 .*iter_500.pth: was saved at iter 2, but its name says 500'):
        newest_checkpoint([moved], LOGGER)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob('*.pth'))


def test_same_files_and_content_as_mmengine(tmp_path):
    """Every argument of mmengine's CheckpointHook has the same effect."""
    for number, arguments in enumerate(
        [
            dict(interval=3, max_keep_ckpts=1, save_best=None, save_last=False, filename_tmpl='step{}.pth'),
            dict(interval=2, save_begin=4, save_best=['score', 'other'], rule=['less', 'greater'], max_keep_ckpts=2),
            dict(
                save_optimizer=False,
                save_param_scheduler=False,
                save_best='auto',
                published_keys=['state_dict', 'meta'],
                out_dir=str(tmp_path / 'OUT'),
            ),
            dict(
                by_epoch=True,
                interval=1,
                save_best=['score', 'other'],
                rule=None,
                greater_keys=['other'],
                less_keys='score',
                backend_args=dict(backend='local'),
            ),
        ]
    ):
        found = []
        for kind in ('CheckpointHook', 'AtomicCheckpointHook'):
            folder = tmp_path / f'{kind}{number}'
            own = {key: value.replace('OUT', kind) if key == 'out_dir' else value for key, value in arguments.items()}
            options = EPOCHS if arguments.get('by_epoch') else {}
            scores = {2: 0.4, 4: 0.6, 6: 0.3, 8: 0.5, 12: 0.7, 16: 0.2}
            toy_run(folder, [], dict(type=kind, **own), scores.get, **options).train()
            files = folder if 'out_dir' not in own else Path(own['out_dir'], folder.name)
            content = torch.load(files / names(files)[-1], weights_only=False)
            info = {
                key: str(value).replace(kind, '')
                for key, value in content.get('message_hub', {}).get('runtime_info', {}).items()
                if 'ckpt' in key or 'best' in key
            }
            last = (folder / 'last_checkpoint').read_text().replace(kind, '')
            stripped = [re.sub(r'-[0-9a-f]{8}\.pth', '-SHA.pth', name) for name in names(files)]
            found.append((stripped, last, content.keys(), info))
        assert found[0] == found[1], arguments


@pytest.mark.parametrize('replace', ['subclass', 'attribute'])
def test_a_runner_with_its_own_save_checkpoint_saves_itself(tmp_path, replace):
    calls = []

    class Own(VOLORunner):
        def save_checkpoint(self, out_dir, filename, *args, note=None, **kwargs):
            calls.append((filename, note, kwargs['save_optimizer'], kwargs['by_epoch']))
            super().save_checkpoint(out_dir, filename, *args, **kwargs)

    kept = dict(max_keep_ckpts=1, save_best=None)
    if replace == 'subclass':
        toy_run(tmp_path, [], dict(kept, note='kept'), kind=Own).train()
        assert calls == [(f'iter_{step}.pth', 'kept', True, False) for step in (2, 4, 6, 8)]
        assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_8.pth')
    else:
        runner = toy_run(tmp_path, [], kept)
        runner.save_checkpoint = lambda out_dir, filename, *_, **__: (Path(out_dir) / filename).write_text('own')
        runner.train()
        assert (tmp_path / 'iter_8.pth').read_text() == 'own'
    assert names(tmp_path) == ['iter_8.pth']


def test_an_unknown_argument_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r'default_hooks\.checkpoint: AtomicCheckpointHook does not know intervall'):
        toy_run(tmp_path, [], dict(intervall=3)).train()


@pytest.mark.parametrize('stage', ['after_train_iter', 'after_train_epoch'])
def test_a_later_hook_finds_the_file_that_last_ckpt_names(tmp_path, stage, monkeypatch):
    finish = mmseg_volo.engine.saving.finish
    monkeypatch.setattr(mmseg_volo.engine.saving, 'finish', lambda *args: (time.sleep(0.05), finish(*args)))
    seen = []

    def look(runner):
        path = runner.message_hub.get_info('last_ckpt')
        seen.append(load_from_local(path)['meta']['iter'])
        assert (tmp_path / 'last_checkpoint').read_text() == path

    by_epoch = stage == 'after_train_epoch'
    hook = CutHook(stage, 4, look)
    toy_run(
        tmp_path, [hook], dict(by_epoch=by_epoch, interval=1 if by_epoch else 4), **(EPOCHS if by_epoch else {})
    ).train()
    assert seen == [4]


def test_without_a_later_hook_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    finish, begun = mmseg_volo.engine.saving.finish, []

    def slow(*args):
        begun.append(runner.iter)
        while runner.iter < 4:  # goes on only because training does
            time.sleep(0.01)
        finish(*args)

    monkeypatch.setattr(mmseg_volo.engine.saving, 'finish', slow)
    no_validation = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
    runner = toy_run(tmp_path, [], dict(interval=3, save_last=False, save_best=None), **no_validation)
    runner.train()
    assert begun[0] == 2 and names(tmp_path) == ['iter_3.pth', 'iter_6.pth']


def test_resuming_finds_checkpoints_by_their_template(tmp_path):
    template = dict(filename_tmpl='step-{}.pth', save_best=None, interval=4)
    with pytest.raises(Cut):
        toy_run(tmp_path, [CutHook('after_train_iter', 6)], template).train()
    runner = toy_run(tmp_path, [], template, resume=True)
    runner._find_resume_point()
    assert runner._load_from == str(tmp_path / 'step-4.pth')


@pytest.mark.parametrize('interval', [2, 3])
def test_accumulated_clipped_and_averaged_steps_resume_exactly(tmp_path, interval):
    """Between two optimizer steps a checkpoint lacks the accumulated gradients, and the log says so."""
    optim = dict(optimizer=dict(type='AdamW', lr=0.1), accumulative_counts=2, clip_grad=dict(max_norm=0.5))

    def run(name: str, hooks: tuple = (), **options) -> VOLORunner:
        hooks = [dict(type='VOLOEMAHook'), *hooks]
        return toy_run(tmp_path / name, hooks, dict(interval=interval), optim_wrapper=copy.deepcopy(optim), **options)

    run('whole').train()
    with pytest.raises(Cut):
        run('cut', [CutHook('after_train_iter', 5)]).train()
    run('cut', resume=True).train()
    one, two = (load_from_local(str(tmp_path / name / 'iter_8.pth')) for name in ('whole', 'cut'))
    same = all(
        torch.equal(value, two[part][name])
        for part in ('state_dict', 'ema_state_dict')
        for name, value in one[part].items()
    )
    logs = ''.join(path.read_text() for path in tmp_path.glob('whole/*/*.log'))
    assert same == (interval == 2) and same == ('iter_3.pth is saved between two optimizer steps' not in logs)


def test_a_signal_in_a_validation_of_averaged_weights(tmp_path):
    """EMAHook has swapped the weights then; the checkpoint must hold those that are trained."""
    stop = CutHook('after_val_iter', 4, lambda runner: os.kill(os.getpid(), signal.SIGTERM), 'NORMAL')
    toy_run(tmp_path / 'whole', [dict(type='EMAHook')]).train()
    with pytest.raises(TrainingStopped):
        toy_run(tmp_path / 'cut', [dict(type='EMAHook'), stop], dict(interval=3)).train()
    toy_run(tmp_path / 'cut', [dict(type='EMAHook')], resume=True).train()
    one, two = (load_from_local(str(tmp_path / name / 'iter_8.pth')) for name in ('whole', 'cut'))
    for part in ('state_dict', 'ema_state_dict'):
        for name, value in one[part].items():
            assert torch.equal(value, two[part][name]), (part, name)


def test_a_validation_alone_saves_nothing_and_needs_no_training_data(tmp_path):
    missing = dict(dataset=dict(type='BaseSegDataset', data_root=str(tmp_path / 'none')), sampler=dict(type='None'))
    toy_run(tmp_path, train_dataloader=missing).val()
    toy_run(tmp_path, train_dataloader=None, train_cfg=None, optim_wrapper=None, param_scheduler=None).val()
    loader = dict(dataset=Points(), sampler=dict(type='DefaultSampler', shuffle=False), batch_size=2)
    options = dict(test_dataloader=loader, test_cfg=dict(), test_evaluator=[])
    toy_run(tmp_path, train_dataloader=missing, **options).test()
    assert names(tmp_path) == []
    # Not even if the config says resume.
    torch.save(dict(state_dict=Toy().state_dict()), tmp_path / 'weights.pth')
    options.update(resume=True, load_from=str(tmp_path / 'weights.pth'))
    toy_run(tmp_path, train_dataloader=missing, **options).test()
    toy_run(tmp_path, train_dataloader=missing, **options).val()


def test_resuming_a_schedule_that_has_a_function(tmp_path):
    """The state of OneCycleLR has one; in the file, it would be code."""
    schedule = [dict(type='OneCycleLR', by_epoch=False, eta_max=0.2, total_steps=20)]
    toy_run(tmp_path / 'whole', param_scheduler=schedule).train()
    with pytest.raises(Cut):
        toy_run(tmp_path / 'cut', [CutHook('after_train_iter', 5)], param_scheduler=schedule).train()
    toy_run(tmp_path / 'cut', param_scheduler=schedule, resume=True).train()
    one, two = (load_from_local(str(tmp_path / name / 'iter_8.pth'))['state_dict'] for name in ('whole', 'cut'))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_warning_if_a_checkpoint_cannot_be_read_back(tmp_path):
    class Odd(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            checkpoint['odd'] = LOGGER

    toy_run(tmp_path, [Odd()], dict(interval=8, save_best=None)).train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert re.search(r'WARNING - .*iter_8\.pth: refused.*So no run can resume from it', log)


def test_notes_of_a_data_set_that_no_checkpoint_can_hold_are_left_out(tmp_path, caplog):
    date, info = datetime.date(2020, 1, 1), ConfigDict(source=[dict(name='x')])
    notes = dict(classes=('a',), palette=[np.array([1, 2, 3])], info=info, day=date, made=dict(day=date), places={1, 2})
    MMLogger.get_current_instance().addHandler(caplog.handler)
    try:
        kept = readable_part(notes)
    finally:
        MMLogger.get_current_instance().removeHandler(caplog.handler)
    assert kept.keys() == {'classes', 'palette', 'info', 'places'}
    assert sorted(re.findall(r'metainfo\.(\w+) is left out', caplog.text)) == ['day', 'made']
    save(dict(checkpoint(), meta=dict(dataset_meta=kept)), tmp_path / 'ours.pth')
    torch.save(dict(checkpoint(), meta=dict(dataset_meta=kept)), tmp_path / 'stock.pth')  # as mmengine does
    for name in ('ours', 'stock'):
        read = load_from_local(str(tmp_path / f'{name}.pth'))['meta']['dataset_meta']['info']
        assert (
            read == info.to_dict()
            and not isinstance(read, ConfigDict)
            and not isinstance(read['source'][0], ConfigDict)
        )


def test_a_run_on_a_data_set_with_such_notes_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(Points, 'metainfo', dict(Points.metainfo, day=datetime.date(2020, 1, 1)))
    toy_run(tmp_path).train()
    content = newest_checkpoint([tmp_path], LOGGER)[1]
    assert (
        content['meta']['dataset_meta']
        == dict(classes=('a', 'b'))
        == content['message_hub']['runtime_info']['dataset_meta']
    )
