"""A resumed run stops early where mmengine's EarlyStoppingHook stops an uninterrupted one."""

import pytest
from mmengine.hooks import EarlyStoppingHook
from toy_runs import EPOCHS, Cut, CutHook, toy_run

from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.errors import CheckpointError

# Improves at 4 by enough, at 6 by too little (which is a new best checkpoint all the same), then no more.
SCORES = {2: 0.5, 4: 0.7, 6: 0.71, 8: 0.6, 10: 0.65, 12: 0.9}


def stopping() -> EarlyStoppingHook:
    return EarlyStoppingHook(monitor='score', rule='greater', min_delta=0.05, patience=3)


def run(folder, *hooks, interval=2, **options):
    hook = stopping()
    options.setdefault('train_cfg', dict(type='ResumableTrainLoop', max_iters=12, val_interval=2))
    runner = toy_run(folder, [hook, *hooks], dict(interval=interval), SCORES.get, **options)
    try:
        runner.train()
    except Cut:
        return None
    return runner.iter, hook.best_score, hook.wait_count


EVERYWHERE = [('after_train_iter', at) for at in range(1, 11)]
EVERYWHERE += [(stage, at) for stage in ('after_val_iter', 'after_val') for at in range(2, 11, 2)]


@pytest.mark.parametrize(
    ('interval', 'cuts'),
    [
        (2, [('after_train_iter', 9), ('after_val_iter', 6), ('after_val', 6)]),
        *(pytest.param(interval, EVERYWHERE, marks=pytest.mark.slow) for interval in (1, 2, 3)),
    ],
)
def test_resumed_run_stops_as_the_uninterrupted_one(tmp_path, interval, cuts):
    whole = run(tmp_path / 'whole', interval=interval)
    assert whole == (10, 0.7, 3)
    for stage, at in cuts:
        folder = tmp_path / f'{stage}{at}'
        assert run(folder, CutHook(stage, at), interval=interval) is None
        assert run(folder, interval=interval, resume=True) == whole, folder.name
    # A run that has stopped has ended: resuming it trains no further.
    assert run(tmp_path / 'whole', interval=interval, resume=True) == whole


def test_more_patience_continues_a_stopped_run(tmp_path):
    run(tmp_path / 'run')
    hook = EarlyStoppingHook(monitor='score', rule='greater', min_delta=0.05, patience=4)
    runner = toy_run(
        tmp_path / 'run',
        [hook],
        score=SCORES.get,
        train_cfg=dict(type='ResumableTrainLoop', max_iters=12, val_interval=2),
        resume=True,
    )
    runner.train()
    assert (runner.iter, hook.wait_count) == (12, 0)


def test_epochs(tmp_path):
    scores = {4: 0.5, 8: 0.51, 12: 0.52, 16: 0.9}

    def run(folder, *hooks, resume=False):
        hook = EarlyStoppingHook(monitor='score', rule='greater', min_delta=0.05, patience=2)
        options = dict(EPOCHS, score=scores.get, resume=resume)
        runner = toy_run(folder, [hook, *hooks], dict(by_epoch=True, interval=1), **options)
        try:
            runner.train()
        except Cut:
            return None
        return runner.epoch, runner.iter, hook.best_score, hook.wait_count

    whole = run(tmp_path / 'whole')
    assert whole == (3, 12, 0.5, 2)
    for stage, at in (('after_val_iter', 8), ('after_train_iter', 10)):
        folder = tmp_path / f'{stage}{at}'
        assert run(folder, CutHook(stage, at)) is None
        assert run(folder, resume=True) == whole, folder.name


def test_state_is_plain_data(tmp_path):
    run(tmp_path / 'run')
    info = load_from_local(str(tmp_path / 'run/iter_10.pth'))['message_hub']['runtime_info']
    assert info['early_stopping'] == {'score': (0.7, 2)}


@pytest.mark.parametrize('state', [7, 'ab', (1.0,), (None, 2)])
def test_a_damaged_state(tmp_path, state):
    runner = toy_run(tmp_path, [stopping()])
    runner.message_hub.update_info('early_stopping', dict(score=state))
    with pytest.raises(CheckpointError, match='no state of early stopping by score'):
        runner.train()
