"""How long saving a checkpoint holds training up, and the memory that it takes: mmengine's way against this package's.

A checkpoint of the segmentor in training and of AdamW's state, as a run of ``configs/`` saves it. mmengine's way copies
all tensors to the CPU and the whole file into memory, then writes it in place. Ours holds training up for the writing
only; syncing, reading back and renaming go on beside the next steps.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmengine.runner import save_checkpoint
from mmengine.runner.checkpoint import weights_to_cpu
from mmengine.utils import apply_to

from ..checkpoints.writing import finish, write
from . import tables
from .comparison import Found, Settings
from .tables import Spread, text
from .timing import seconds_of
from .training import TrainCase, Trainer


class _Training(NamedTuple):
    """A trainer that has made its optimizer's state, its batch, and a folder that is removed with it."""

    trainer: Trainer
    batch: dict
    folder: tempfile.TemporaryDirectory

    @property
    def path(self) -> Path:
        return Path(self.folder.name, 'iter_1.pth')

    def content(self) -> dict:
        model, optimizer = self.trainer.model, self.trainer.optimizer
        return dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict(), meta={})


@dataclass(frozen=True, kw_only=True)
class SaveCase(TrainCase):
    """One segmentor in training, saved every ``interval`` iterations in ``folder``."""

    interval: int = 16000
    folder: str = '.'

    NAME = 'saving'
    MEMORY_ALONE = True
    EXTRA_COLUMNS = {
        'file': tables.size('file_mb'),
        'step': text('{step_s:.3g} s'),
        'beside training': tables.time('beside_s'),
        'share of time, here': text('{share:.2e}'),
    }
    NOTES = ('memory is that of saving, above model and optimizer; what the system caches of files is not in it',)

    def build(self) -> dict[str, _Training]:
        training = self.build_alone('ours')
        return dict(stock=training, ours=training)

    def build_alone(self, side: str) -> _Training:
        trainer = super().build_alone('ours')
        batch = super().inputs(trainer)
        for _ in range(2):
            trainer.step(batch)
        return _Training(trainer, batch, tempfile.TemporaryDirectory(dir=self.folder))

    def inputs(self, model: _Training) -> None:
        return None

    def run(self, model: _Training, side: str, data: None) -> Path | None:
        content = model.content()
        if side == 'ours':
            return write(content, model.path)
        # As mmengine.runner.Runner.save_checkpoint does it.
        content['state_dict'] = weights_to_cpu(content['state_dict'])
        content['optimizer'] = apply_to(content['optimizer'], lambda x: hasattr(x, 'cpu'), lambda x: x.cpu())
        save_checkpoint(content, str(model.path))

    def warm_up(self, model: _Training, side: str, data: None) -> None:
        """Nothing: the first checkpoint counts too."""

    def peak_call(self, model: _Training, side: str, data: None) -> None:
        self.run(model, side, data)

    def extra(self, found: Found, settings: Settings) -> dict:
        model, beside = found.models['ours'], []
        for _ in range(settings.rounds):
            part = self.run(model, 'ours', None)
            beside.append(seconds_of(lambda part=part: finish(part, model.path)))
        step = seconds_of(lambda: model.trainer.step(model.batch))
        held_up = Spread.of(found.seconds['ours']).median
        columns = dict(file_mb=model.path.stat().st_size / 1e6, step_s=step, **Spread.of(beside).columns('beside_s'))
        return dict(columns, share=held_up / (self.interval * step + held_up))

    @staticmethod
    def title(row: dict) -> str:
        share = f'share of time: saving every {row["interval"]} iterations'
        return f'median (least–greatest) of {row["rounds"]}; {share}'
