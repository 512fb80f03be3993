"""Train several configs alike, with several seeds, and compare their mIoU.

The learning rate of each config is the best of the same few, by one run on a part of the training images and validated
on the rest, so that nothing is chosen on the images that the result is reported on.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from prettytable import PrettyTable
from scipy.stats import ttest_ind

from ..errors import ConfigError
from ..utils.config import load_config
from ..utils.files import atomic_write
from .machine import ROOT


@dataclass(frozen=True)
class Plan:
    """What all configs share.

    Args:
        folder: of the runs' work dirs; a run that has ended there is not repeated.
        seeds: of the runs that are reported.
        rates: learning rates to choose from; empty for that of each config.
        hold_out: the last 1 / ``hold_out`` of the training images validate the choice. In a video they are other places
            than the first ones, which neighbours of training frames would not be.
        on_held_out: report the runs on the held-out images too, to choose between the configs.
        options: further arguments of ``tools/train.py``.
    """

    folder: Path
    seeds: Sequence[int] = (0, 1, 2)
    rates: Sequence[float] = ()
    hold_out: int = 5
    on_held_out: bool = False
    options: Sequence[str] = ()


def compare(configs: Sequence[Path], plan: Plan) -> str:
    """Train all configs and return the table; see :func:`table`.

    Raises:
        ConfigError: a config cannot be trained, or two have the same name.
    """
    names = [path.stem for path in configs]
    if len(set(names)) < len(names):
        raise ConfigError(f'two configs have the same name: {", ".join(names)}')
    scores, rates = {}, {}
    for path in configs:
        rates[path.stem] = _best_rate(path, plan)
        rate, name = rates[path.stem], 'held_out_seed' if plan.on_held_out else 'seed'
        scores[path.stem] = [_train(path, plan, f'{name}{s}', s, rate, plan.on_held_out) for s in plan.seeds]
    return table(scores, rates)


def table(scores: dict[str, list[float]], rates: dict[str, float | None]) -> str:
    """mIoU of each config over its seeds, and the difference from the first with its 95 % interval (Welch's t-test)."""
    out = PrettyTable(['config', 'learning rate', 'mIoU (%)', 'least', 'greatest', 'difference', '95 % interval'])
    first = next(iter(scores.values()))
    for name, found in scores.items():
        row = [name, 'its own' if rates[name] is None else f'{rates[name]:g}']
        row += [f'{value:.2f}' for value in (mean(found), min(found), max(found))]
        if found is first or len(found) < 2:
            row += ['', '']
        else:
            low, high = ttest_ind(found, first, equal_var=False).confidence_interval()
            row += [f'{mean(found) - mean(first):+.2f}', f'{low:+.2f} to {high:+.2f}']
        out.add_row(row)
    return out.get_string()


def _best_rate(path: Path, plan: Plan) -> float | None:
    if len(plan.rates) < 2:
        return next(iter(plan.rates), None)
    found = {rate: _train(path, plan, f'rate{rate:g}', plan.seeds[0], rate, held_out=True) for rate in plan.rates}
    print(f'{path.stem}: held-out mIoU by learning rate: {found}', flush=True)
    return max(found, key=found.get)


def _train(path: Path, plan: Plan, name: str, seed: int, rate: float | None, held_out: bool = False) -> float:
    """Train once; return the mIoU of the last validation."""
    folder = plan.folder / path.stem / name
    result = folder / 'ablation.json'
    if result.is_file():
        return json.loads(result.read_text(encoding='utf-8'))['mIoU']
    options = [f'randomness.seed={seed}', *([] if rate is None else [f'optim_wrapper.optimizer.lr={rate}'])]
    config = path
    if held_out:
        config = folder / f'{path.stem}_held_out.py'
        folder.mkdir(parents=True, exist_ok=True)
        _held_out(path, plan.hold_out).dump(config)
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(config), '--work-dir', str(folder), *plan.options]
    print(f'{path.stem}: {name}', flush=True)
    done = subprocess.run([*command, '--cfg-options', *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f'{path}: {name} ended with status {done.returncode}:\n{done.stderr[-2000:]}')
    miou = _last_miou(folder)
    with atomic_write(result) as part:
        part.write_text(json.dumps(dict(mIoU=miou, seed=seed, rate=rate, options=options)), encoding='utf-8')
    return miou


def _held_out(path: Path, every: int) -> Config:
    """The config with the last part of its training images for validation."""
    config = load_config(str(path))
    dataset = config.train_dataloader.dataset
    if 'dataset' in dataset or 'datasets' in dataset:
        raise ConfigError(f'{path}: train_dataloader.dataset is a wrapper; images can be held out of a plain one only')
    init_default_scope(config.get('default_scope') or 'mmseg')
    count = len(DATASETS.build(dataset))
    first = count - count // every
    pipeline = config.val_dataloader.dataset.pipeline
    config.val_dataloader.dataset = dict(dataset, pipeline=pipeline, indices=list(range(first, count)))
    dataset.indices = list(range(first))
    return config


def _last_miou(folder: Path) -> float:
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in logs[-1].read_text(encoding='utf-8').splitlines()] if logs else []
    found = [line['mIoU'] for line in lines if 'mIoU' in line]
    if not found:
        raise ConfigError(f'{folder}: the run has no validation with mIoU; set train_cfg.val_interval to its length')
    return found[-1]
