"""Training processes that are killed or stopped, or whose disk or network fails."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import tool
from small_runs import ROOT, differences, write_config

from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.errors import TrainingStopped

LONG = '\nmax_iters = 100000\ntrain_cfg = dict(max_iters=max_iters, val_interval=max_iters)\n'


class Run:
    """Run tools/train.py, or dist_train.sh for several processes, in the background, with its output in a file."""

    def __init__(self, config: Path, work: Path, *options: str, processes: int = 1, prefix: tuple = (), **env: str):
        self.work = work
        self.log = config.with_name(f'{work.name}.{time.monotonic_ns()}.log')
        train = [sys.executable, '-W', 'ignore', ROOT / 'tools/train.py', config]
        if processes > 1:
            train = ['bash', ROOT / 'tools/dist_train.sh', config, processes]
        path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PATH': path, 'PYTHONWARNINGS': 'ignore', **env}
        env.setdefault('PORT', str(random.SystemRandom().randrange(20000, 60000)))
        command = [str(part) for part in (*prefix, *train, '--work-dir', work, *options)]
        with self.log.open('wb') as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors='replace')

    def until(self, pattern: str, limit: float = 120) -> None:
        """Wait until the output matches ``pattern``."""
        deadline = time.monotonic() + limit
        while True:
            ended = self.process.poll() is not None  # checked first, so that the last output is searched too
            if re.search(pattern, self.output):
                return
            assert not ended and time.monotonic() < deadline, self.output[-5000:]
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes of the run; torchrun starts each in its own process group."""
        groups = {self.process.pid, *(os.getpgid(child) for child in self.children())}
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    def end(self, limit: float = 120) -> int:
        """Wait for the end; return the exit status."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f'no end within {limit} s: {self.output[-5000:]}') from None

    def children(self) -> list[int]:
        """The child processes: data loader workers, or the ranks of dist_train.sh."""
        out = subprocess.run(['ps', '-eo', 'pid,ppid'], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in out.splitlines()[1:]]
        return [pid for pid, parent in pairs if parent == self.process.pid]


def newest(work: Path) -> Path:
    return max(work.glob('iter_*.pth'), key=lambda path: int(path.stem[5:]))


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_all_processes_saves_and_ends(tmp_path, number):
    """Slurm and Ctrl-C send it to the data loader's workers too."""
    config = write_config(tmp_path, more=LONG)
    run = Run(config, tmp_path / 'run', '--cfg-options', 'train_dataloader.num_workers=2')
    run.until(r'Iter\(train\) \[\s*3/')
    run.kill(number)
    assert run.end() == TrainingStopped.exit_code
    step = int(re.search(rf'stopped by {number.name} after iteration (\d+), saved as .*; --resume', run.output)[1])
    assert newest(tmp_path / 'run').name == f'iter_{step}.pth'
    assert load_from_local(str(newest(tmp_path / 'run')))['meta']['iter'] == step
    assert 'Traceback' not in run.output


@pytest.mark.slow
def test_a_killed_worker_is_named(tmp_path):
    run = Run(write_config(tmp_path, more=LONG), tmp_path / 'run', '--cfg-options', 'train_dataloader.num_workers=2')
    run.until(r'Iter\(train\) \[\s*3/')
    os.kill(run.children()[0], signal.SIGKILL)
    assert run.end(60) == 1
    assert re.search(r'error: DataLoader worker .*killed.*num_workers', run.output), run.output[-3000:]
    load_from_local(str(newest(tmp_path / 'run')))


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
    """They end within a minute with an error, and the checkpoint is complete."""
    run = Run(write_config(tmp_path, more=LONG), tmp_path / 'run', processes=2)
    run.until(r'Saving checkpoint at 2 iter')
    os.kill(run.children()[-1], signal.SIGKILL)
    began = time.monotonic()
    run.until(r'error \(process 0\): ', limit=60)
    print(f'{time.monotonic() - began:.0f} s from the kill to the error')
    assert run.end(60) != 0
    load_from_local(str(newest(tmp_path / 'run')))


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, processes):
    """It names the first one and changes nothing; when the first one is killed, the folder is free at once."""
    config = write_config(tmp_path, more=LONG)
    options = ('--cfg-options', 'train_dataloader.num_workers=2')
    first = Run(config, tmp_path / 'run', *options, processes=processes)
    first.until(r'Saving checkpoint at 2 iter')
    second = Run(config, tmp_path / 'run', *options, processes=processes)
    assert second.end() == 1
    assert (
        len(re.findall(r'error.*: .*run is in use by another training run: process \d+ on', second.output)) == processes
    )
    assert 'Traceback' not in re.sub(r'torch/distributed.*', '', second.output) and first.process.poll() is None
    first.kill()
    again = Run(config, tmp_path / 'run', '--resume', *options, processes=processes)
    again.until(r'continuing from .*iter_\d+\.pth')
    again.until(r'Iter\(train\)')
    again.kill()


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """On a file system of 4 MB, saved checkpoints are complete, and training resumes when there is room."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip('needs the right to mount a file system')
    try:
        config = write_config(tmp_path)
        keep = ('--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=-1')
        run = Run(config, disk / 'run', *keep)
        assert run.end() == 1
        assert re.search(r'error: .*iter_\d\.pth: the checkpoint could not be written \(No space left', run.output)
        assert not list((disk / 'run').glob('.*part*'))
        for path in (disk / 'run').glob('iter_*.pth'):
            load_from_local(str(path))
        subprocess.run(['mount', '-o', 'remount,size=64m', disk], check=True)
        again = Run(config, disk / 'run', '--resume', *keep)
        assert again.end() == 0, again.output[-3000:]
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


@pytest.mark.slow
def test_a_frozen_rank_ends_the_others(tmp_path):
    """It neither dies nor answers, as when its host or network is down."""
    run = Run(write_config(tmp_path, more=LONG), tmp_path / 'run', processes=2)
    run.until(r'Iter\(train\) \[\s*3/')
    frozen = run.children()[-1]
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    run.until(r'error \(process 0\): .*process 1 fell silent', limit=60)
    assert time.monotonic() - began < 60
    assert run.end(60) != 0
    load_from_local(str(newest(tmp_path / 'run')))


def kill_repeatedly(tmp_path: Path, kills: int, processes: int, workers: int, iterations: int) -> None:
    """Kill and resume a run many times, then compare it with an uninterrupted run."""
    more = f'\nmax_iters = {iterations}\ntrain_cfg = dict(max_iters=max_iters, val_interval=40)\n'
    more += 'default_hooks = dict(checkpoint=dict(interval=1))\n'
    config = write_config(tmp_path, more=more)
    options = ('--cfg-options', f'train_dataloader.num_workers={workers}')
    whole = Run(config, tmp_path / 'whole', *options, processes=processes)
    assert whole.end(3600) == 0, whole.output[-5000:]
    draw = random.Random(0)
    done = at_start = 0
    while done < kills:
        run = Run(config, tmp_path / 'run', '--resume', *options, processes=processes)
        if draw.random() < 0.1:
            time.sleep(draw.uniform(0, 8))
            at_start += 1
        else:
            run.until(r'Iter\(train\) \[|Saving checkpoint')
            time.sleep(draw.uniform(0, 1.5))
        assert run.process.poll() is None, f'ended after {done} kills, make it longer: {run.output[-3000:]}'
        run.kill()
        run.process.wait()
        for child in tmp_path.glob('run/iter_*.pth'):
            load_from_local(str(child))  # files under a checkpoint's name are always complete
        done += 1
    last = Run(config, tmp_path / 'run', '--resume', *options, processes=processes)
    assert last.end(3600) == 0, last.output[-5000:]
    name = f'iter_{iterations}.pth'
    assert differences(tmp_path / 'whole' / name, tmp_path / 'run' / name) == []
    best = [[path.name for path in (tmp_path / part).glob('best_*')] for part in ('whole', 'run')]
    assert best[0] == best[1]
    print(f'{done} kills, {at_start} of them during the start; resumed at {steps(tmp_path)}')


def steps(tmp_path: Path) -> list[int]:
    """The iteration at which each run resumed."""
    logs = sorted(tmp_path.glob('run.*.log'), key=lambda path: int(path.name.split('.')[1]))
    found = [re.search(r'continuing from .*iter_(\d+)\.pth', log.read_text(errors='replace')) for log in logs]
    return [int(match[1]) if match else 0 for match in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kills', 'processes', 'workers', 'iterations'), [(40, 1, 0, 500), (10, 1, 2, 200), (6, 2, 0, 400)]
)
def test_kill_9_at_random_moments(tmp_path, kills, processes, workers, iterations):
    kill_repeatedly(tmp_path, kills, processes, workers, iterations)


@pytest.mark.slow
def test_a_sharded_run_is_resumed_exactly(tmp_path):
    """On two ranks: sharded and plain runs resume from its checkpoint, and test.py reads it."""
    config = write_config(tmp_path)
    sharded = ('--cfg-options', 'model_wrapper_cfg.type=VOLOFullyShardedDataParallel')
    whole = Run(config, tmp_path / 'whole', *sharded, 'default_hooks.checkpoint.max_keep_ckpts=-1', processes=2)
    assert whole.end() == 0, whole.output[-5000:]
    for name, options in dict(sharded=sharded, plain=()).items():
        work = tmp_path / name
        work.mkdir()
        shutil.copy(tmp_path / 'whole/iter_6.pth', work)
        again = Run(config, work, '--resume', *options, processes=2)
        assert again.end() == 0, again.output[-5000:]
    assert differences(tmp_path / 'whole/iter_8.pth', tmp_path / 'sharded/iter_8.pth') == []
    first, second = (load_from_local(str(tmp_path / name / 'iter_8.pth')) for name in ('whole', 'plain'))
    for name, value in first['state_dict'].items():
        torch.testing.assert_close(value, second['state_dict'][name], rtol=1e-4, atol=1e-5)
    output = tool('test.py', config, tmp_path / 'whole/iter_8.pth', '--work-dir', tmp_path / 'test')
    assert re.search(r'mIoU: [\d.]+', output)
