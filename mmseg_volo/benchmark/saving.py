"""How long saving a checkpoint holds training up, and the memory that it takes: mmengine's way against this package's.

A checkpoint of the segmentor in training and of AdamW's state, as a run of ``configs/`` saves it. mmengine's way copies
all tensors to the CPU and the whole file into memory, then writes it in place. Ours holds training up for the writing
only; syncing, reading back and renaming go on beside the next steps.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmengine.runner import save_checkpoint
from mmengine.runner.checkpoint import weights_to_cpu
from mmengine.utils import apply_to

from ..checkpoints.writing import finish, write
from .cases import SIDES, columns_of
from .measuring import NOT_MEASURED, memory_of, take_turns, timed
from .peer import segmentor
from .reporting import Spread, columns_of_sides, mb, memory_kind, print_table, write_csv
from .training import TrainCase, Trainer


@dataclass(frozen=True)
class SaveCase(TrainCase):
    """One segmentor in training, saved every ``interval`` iterations, in ``folder``."""

    interval: int = 16000
    folder: str = '.'


def measure_saving(cases: Sequence[SaveCase], rounds: int, memory: bool, out: Path, environment: dict) -> None:
    """Measure each case; the table and the CSV file go to ``out``."""
    rows = []
    for case in cases:
        row = {**columns_of(case), **compare(case, rounds)}
        for side in SIDES:
            found = memory_of(saving_steps, case, side) if memory else NOT_MEASURED
            row.update(found.columns(side))
        rows.append({**row, **environment})
        write_csv(out / 'saving.csv', rows)
    kind = memory_kind(rows[0])
    print(f'median (least–greatest) of {rounds}; share of time when saving every {rows[0]["interval"]} iterations')
    print_table(
        ['network', 'file (MB)', 'step (s)', 'stock (s)', 'ours (s)', 'beside training (s)', 'share of time, ours',
         *(f'{side} (MB)' for side in SIDES)],
        [
            [
                str(case), f'{row["file_mb"]:.0f}', f'{row["step_s"]:.3g}',
                *(str(Spread.in_row(row, name)) for name in ('stock_s', 'ours_s', 'beside_s')),
                f'{row["share"]:.2e}', *(mb(row[f'{side}_{kind}_mb']) for side in SIDES),
            ]
            for case, row in zip(cases, rows, strict=True)
        ],
    )  # fmt: skip
    if memory:
        print('MB: peak memory of saving, above model and optimizer; what the system caches of files is not in it')


def compare(case: SaveCase, rounds: int) -> dict:
    trainer = _trainer(case)
    trainer.prepare()
    for _ in range(2):
        trainer.step()
    step, _ = timed(trainer.step, case.device)
    with tempfile.TemporaryDirectory(dir=case.folder) as folder:
        path = Path(folder, 'iter_1.pth')
        calls = {side: partial(_CALLS[side], trainer, path) for side in SIDES}
        seconds, _ = take_turns(calls, rounds, case.device, str(case))
        beside = []
        for _ in range(rounds):
            part = _write(trainer, path)
            spent, _ = timed(partial(finish, part, path), 'cpu')
            beside.append(spent)
        size = path.stat().st_size / 1e6
    held_up = Spread.of(seconds['ours']).median
    return {
        'rounds': rounds,
        'file_mb': size,
        'step_s': step,
        **columns_of_sides(seconds),
        **Spread.of(beside).columns('beside_s'),
        'share': held_up / (case.interval * step + held_up),
    }


def _trainer(case: SaveCase) -> Trainer:
    return Trainer(segmentor('ours', case.arch, case.classes, crop=case.size), case)


def _content(trainer: Trainer) -> dict:
    return dict(state_dict=trainer.model.state_dict(), optimizer=trainer.optimizer.state_dict(), meta={})


def _write(trainer: Trainer, path: Path) -> Path:
    return write(_content(trainer), path)


def _stock(trainer: Trainer, path: Path) -> None:
    """As :meth:`mmengine.runner.Runner.save_checkpoint`."""
    content = _content(trainer)
    content['state_dict'] = weights_to_cpu(content['state_dict'])
    content['optimizer'] = apply_to(content['optimizer'], lambda x: hasattr(x, 'cpu'), lambda x: x.cpu())
    save_checkpoint(content, str(path))


_CALLS = {'stock': _stock, 'ours': _write}


def saving_steps(case: SaveCase, side: str) -> Iterator[None]:
    """For :func:`~mmseg_volo.benchmark.measuring.memory_of`."""
    trainer = _trainer(case)
    trainer.prepare()
    for _ in range(2):  # makes the optimizer's state
        trainer.step()
    yield
    yield
    with tempfile.TemporaryDirectory(dir=case.folder) as folder:
        _CALLS[side](trainer, Path(folder, 'iter_1.pth'))
