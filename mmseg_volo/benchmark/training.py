"""One step of training a whole segmentor: stock mmseg with timm's VOLO against this package's, same weights and batch.

Both have the heads of ``configs/``, and no stochastic depth. A step is the losses of a prepared batch, the backward
pass and AdamW.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

import torch
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import Tensor

from ..datasets.street_drawing import draw_scene
from .cases import COMPILED, SIDES, BatchCase, columns_of
from .measuring import (
    add_compiled,
    autocast,
    forget_compiled,
    in_process,
    memory_columns,
    memory_here,
    memory_of,
    take_turns,
)
from .peer import compiled, copy_weights, segmentor
from .reporting import NOT_ASKED, columns_of_sides, plot_sides, print_sides, write_csv

_DRAWN_CLASSES = 19  # of the labels


@dataclass(frozen=True)
class TrainCase(BatchCase):
    """One segmentor and its batch.

    Args:
        arch: 'd1'...'d5'.
        classes: of the heads; the labels have 19 of them.
        checkpointing: ``with_cp`` of our backbone.
        size, batch, precision, device, threads: see :class:`BatchCase`.

    Raises:
        ValueError: also for a batch of 1, or fewer classes than the labels have.
    """

    batch: int = 2
    arch: str = 'd1'
    classes: int = 150
    checkpointing: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.batch < 2:  # the pyramid pools to one pixel, whose batch norm then has a single value
            raise ValueError(f'training needs a batch of 2 or more, got {self.batch}')
        if self.classes < _DRAWN_CLASSES:
            raise ValueError(f'the labels have {_DRAWN_CLASSES} classes, got classes={self.classes}')

    def __str__(self) -> str:
        options = ['checkpointing'] if self.checkpointing else []
        parts = [f'VOLO-{self.arch.upper()}, {self.classes} classes, batch {self.batch}, {self.precision}', *options]
        return ', '.join(parts)


class Trainer:
    """A segmentor in training, with its optimizer and a batch."""

    def __init__(self, model: EncoderDecoder, case: TrainCase):
        self.model, self.case = model.to(case.device).train(), case
        # As configs/_base_/schedules/schedule_160k.py has it; the same on all sides.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01, fused=True)
        self.scaler = torch.amp.GradScaler(torch.device(case.device).type, enabled=case.precision == 'fp16')

    def prepare(self) -> None:
        """Draw the batch and put it where the model is."""
        inputs, samples = [], []
        for seed in range(self.case.batch):
            picture, label = draw_scene(seed, self.case.size)
            inputs.append(torch.from_numpy(picture).permute(2, 0, 1))
            samples.append(SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(label)[None].long())))
        self.batch = self.model.data_preprocessor(dict(inputs=inputs, data_samples=samples), True)

    def step(self) -> Tensor:
        """Train once; the loss before it."""
        with autocast(self.case.precision, self.case.device):
            losses = self.model(**self.batch, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def measure_train(
    cases: Sequence[TrainCase], rounds: int, memory: bool, out: Path, environment: dict, compile_seconds: float = inf
) -> None:
    """Measure each case; as :func:`~.backbone.measure_backbone`."""
    rows = []
    for case in cases:
        row = {**columns_of(case), **compare(case, rounds, memory, compile_seconds)}
        if memory and not in_process(case.device):
            row.update(memory_columns({side: memory_of(training_steps, case, side) for side in SIDES}))
        rows.append({**row, **environment})
        write_csv(out / 'train.csv', rows)
    labels = [str(case) for case in cases]
    print(f'{rows[0]["height"]} x {rows[0]["width"]} pixels; median (least–greatest) of {rounds}')
    print_sides(rows, labels, {'first loss, stock': '{stock_loss:.5f}', 'first loss, ours': '{ours_loss:.5f}'}, memory)
    plot_sides(rows, labels, out / 'train.png')


def compare(case: TrainCase, rounds: int, memory: bool = False, compile_seconds: float = 0) -> dict:
    forget_compiled()
    trainers = trainers_of(case)
    calls = {side: trainer.step for side, trainer in trainers.items()}
    missing: str | None = NOT_ASKED
    first = {}

    def begin(side: str) -> None:
        torch.manual_seed(0)  # the same dropout on all sides
        first[f'{side}_loss'] = calls[side]().item()
        calls[side]()  # the first one has also made the optimizer's state

    if compile_seconds:

        def peer() -> Callable[[], Tensor]:
            trainers[COMPILED] = Trainer(compiled(trainers['stock'].model), case)
            trainers[COMPILED].batch = trainers['stock'].batch
            calls[COMPILED] = trainers[COMPILED].step
            return partial(begin, COMPILED)

        _, missing = add_compiled({'stock': calls['stock']}, peer, str(case), compile_seconds)
        if missing:
            calls.pop(COMPILED, None)
    for side in SIDES:
        begin(side)
    found = {}
    if memory and in_process(case.device):
        for side, trainer in trainers.items():
            if side in calls:
                held = trainer.model, trainer.optimizer, trainer.batch['inputs']
                found[side] = memory_here(calls[side], case.device, *held)
    seconds, _ = take_turns(calls, rounds, case.device, str(case))
    first.setdefault(f'{COMPILED}_loss', None)
    return {'rounds': rounds, **columns_of_sides(seconds, missing), **first, **memory_columns(found)}


def trainers_of(case: TrainCase) -> dict[str, Trainer]:
    """Both sides with the same weights and batch."""
    models = {side: _build(case, side) for side in SIDES}
    copy_weights(models['ours'], models['stock'])
    trainers = {side: Trainer(model, case) for side, model in models.items()}
    for trainer in trainers.values():
        trainer.prepare()
    return trainers


def _build(case: TrainCase, side: str) -> EncoderDecoder:
    return segmentor(side, case.arch, case.classes, crop=case.size, checkpointing=case.checkpointing)


def training_steps(case: TrainCase, side: str) -> Iterator[None]:
    """For :func:`~mmseg_volo.benchmark.measuring.memory_of`."""
    model = _build(case, 'stock' if side == COMPILED else side)
    trainer = Trainer(compiled(model) if side == COMPILED else model, case)
    yield
    trainer.prepare()
    yield
    for _ in range(2):  # at the second, the optimizer's state is there while gradients are made
        trainer.step()
