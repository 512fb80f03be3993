"""Comparing configs over seeds: the choice of the learning rate sees no validation image, and intervals are Welch's."""

import json

import numpy as np
import pytest
from commands import tool
from scipy.stats import t
from small_runs import write_config

from mmseg_volo.benchmark.ablation import _held_out, table


def test_held_out_images_are_training_images_that_are_not_trained_on(tmp_path):
    config = _held_out(write_config(tmp_path), 3)
    train, val = (config[f'{split}_dataloader'].dataset for split in ('train', 'val'))
    assert (val.indices, train.indices) == ([5, 6], [0, 1, 2, 3, 4])
    assert [step['type'] for step in val.pipeline][-1] == 'PackSegInputs' and val.pipeline != train.pipeline
    assert {key: val[key] for key in val if key not in ('pipeline', 'indices')} == {
        key: train[key] for key in train if key not in ('pipeline', 'indices')
    }


def test_intervals_are_those_of_welch():
    a, b = np.array([30.0, 31.5, 30.5]), np.array([33.0, 32.0, 35.5])
    lines = table({'a': list(a), 'b': list(b)}, {'a': 1e-3, 'b': None}).splitlines()
    cells = [cell.strip() for cell in lines[4].split('|')[1:-1]]
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 3
    half = t.ppf(0.975, (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)) * (va + vb) ** 0.5
    difference = b.mean() - a.mean()
    wanted = [f'{difference:+.2f}', f'{difference - half:+.2f} to {difference + half:+.2f}']
    assert cells == ['b', 'its own', f'{b.mean():.2f}', '32.00', '35.50', *wanted]


@pytest.mark.slow
def test_the_tool_trains_each_run_once(tmp_path):
    first = write_config(tmp_path)
    second = first.rename(tmp_path / 'first.py').with_name('second.py')
    second.write_text((tmp_path / 'first.py').read_text() + "model['backbone']['mixer'] = 'convolution'\n")
    command = ['ablate.py', str(tmp_path / 'first.py'), str(second), '--seeds', '0', '1', '--rates', '1e-3', '1e-2']
    command += ['--work-dir', str(tmp_path / 'runs')]
    whole = tool(*command)
    runs = {path: json.loads(path.read_text()) for path in tmp_path.glob('runs/*/*/ablation.json')}
    assert len(runs) == 8 and all(0 <= run['mIoU'] <= 100 for run in runs.values())
    again = tool(*command)
    assert again.splitlines()[-6:] == whole.splitlines()[-6:] and 'seed0' not in again
