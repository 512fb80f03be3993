"""One training step of a whole segmentor: stock mmseg with timm's VOLO against this package's, same weights and batch.

Both have the heads of ``configs/``, and no stochastic depth. A step is the losses of a prepared batch, the backward
pass and AdamW.
"""

from dataclasses import dataclass

import torch
from mmseg.models import EncoderDecoder
from torch import Tensor

from .comparison import COMPILED, BatchComparison, Found, Settings, tensors_of
from .inputs import training_batch
from .stock import compiled, copy_weights, segmentor
from .tables import text
from .timing import autocast


class Trainer:
    """A segmentor in training, with its optimizer. ``first_loss`` is that of the first step."""

    def __init__(self, model: EncoderDecoder, device: str, precision: str):
        self.model, self.device, self.precision = model.to(device).train(), device, precision
        # As configs/_base_/schedule_160k.py has it; the same on all sides.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01, fused=True)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=precision == 'fp16')
        self.first_loss: float | None = None

    def step(self, batch: dict) -> Tensor:
        """Train on a prepared batch; returns the loss before the step."""
        with autocast(self.precision, self.device):
            losses = self.model(**batch, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


@dataclass(frozen=True, kw_only=True)
class TrainCase(BatchComparison):
    """One segmentor and its batch.

    Args:
        arch: 'd1'...'d5'.
        classes: of the heads and the labels.
        checkpointing: ``with_cp`` of our backbone.
        others: see :class:`BatchComparison`.

    Raises:
        ValueError: also for a batch of 1.
    """

    batch: int = 2
    arch: str = 'd1'
    classes: int = 150
    checkpointing: bool = False

    NAME = 'train'
    EXTRA_COLUMNS = {'first loss, stock': text('{stock_loss:.5f}'), 'first loss, here': text('{ours_loss:.5f}')}

    def __post_init__(self):
        super().__post_init__()
        if self.batch < 2:  # UPerHead pools to one pixel, and batch norm cannot train on a single value
            raise ValueError(f'training needs a batch of 2 or more, got {self.batch}')
        if self.classes < 2:
            raise ValueError(f'classes must be 2 or more, got {self.classes}')

    @staticmethod
    def label(row: dict) -> str:
        options = ['checkpointing'] if row['checkpointing'] else []
        parts = f'VOLO-{row["arch"].upper()}, {row["classes"]} classes, batch {row["batch"]}, {row["precision"]}'
        return ', '.join([parts, *options])

    def build(self) -> dict[str, Trainer]:
        models = {side: self._segmentor(side) for side in ('ours', 'stock') if side in self.sides}
        if 'stock' in models:
            copy_weights(models['ours'], models['stock'])
        return {side: self._trainer(model) for side, model in models.items()}

    def build_alone(self, side: str) -> Trainer:
        model = self._segmentor(side)
        return self._trainer(compiled(model) if side == COMPILED else model)

    def build_compiled(self, models: dict[str, Trainer]) -> Trainer:
        return self._trainer(compiled(models['stock'].model))

    def _segmentor(self, side: str) -> EncoderDecoder:
        return segmentor(side, self.arch, self.classes, crop=self.size, checkpointing=self.checkpointing)

    def _trainer(self, model: EncoderDecoder) -> Trainer:
        return Trainer(model, self.device, self.precision)

    def inputs(self, model: Trainer) -> dict:
        return model.model.data_preprocessor(training_batch(self.batch, self.size, self.classes), True)

    def run(self, model: Trainer, side: str, data: dict) -> Tensor:
        return model.step(data)

    def warm_up(self, model: Trainer, side: str, data: dict) -> None:
        torch.manual_seed(0)  # the same dropout on all sides
        model.first_loss = model.step(data).item()
        model.step(data)  # the first step has also made the optimizer's state

    def peak_call(self, model: Trainer, side: str, data: dict) -> None:
        for _ in range(2):  # in the second step the optimizer's state exists while gradients are made
            model.step(data)

    def held(self, model: Trainer, data: dict) -> list[Tensor]:
        states = [value for state in model.optimizer.state.values() for value in state.values()]
        return [*tensors_of(model.model), *filter(torch.is_tensor, states), data['inputs']]

    def extra(self, found: Found, settings: Settings) -> dict:
        trainers = {side: found.models.get(side) for side in ('stock', 'ours', COMPILED)}
        return {f'{side}_loss': trainer and trainer.first_loss for side, trainer in trainers.items()}
