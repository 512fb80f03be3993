"""Our VOLO against timm's with the same weights: the stage maps of a batch, without head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..volo import VOLO
from .cases import SIDES, BatchCase, columns_of
from .measuring import NOT_MEASURED, autocast, memory_of, repeats_for, take_turns
from .peer import TimmVOLO
from .pictures import noise
from .reporting import columns_of_sides, plot_sides, print_sides, write_csv


@dataclass(frozen=True)
class BackboneCase(BatchCase):
    """One backbone and its input.

    Args:
        arch: 'd1'...'d5'.
        compile: our side through ``torch.compile``.
        channels_last: our weights in that memory format.
        size, batch, precision, device, threads: see :class:`BatchCase`.
    """

    arch: str = 'd1'
    compile: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        options = [name for name in ('compile', 'channels_last') if getattr(self, name)]
        return ', '.join([f'VOLO-{self.arch.upper()}, batch {self.batch}, {self.precision}', *options])


def measure_backbone(cases: Sequence[BackboneCase], rounds: int, memory: bool, out: Path, environment: dict) -> None:
    """Measure each case; the table, the CSV file and the figure go to ``out``."""
    rows = []
    for case in cases:
        row = {**columns_of(case), **_compare(case, rounds)}
        for side in SIDES:
            found = memory_of(forward_steps, case, side) if memory else NOT_MEASURED
            row.update(found.columns(side))
        rows.append({**row, **environment})
        write_csv(out / 'backbone.csv', rows)
    labels = [str(case) for case in cases]
    print(f'{rows[0]["height"]} x {rows[0]["width"]} pixels; median (least–greatest) of {rounds}')
    print_sides(rows, labels, {'largest difference': '{largest_difference:.2g}'}, memory)
    print('largest difference: of the four maps, relative to the largest value of a map')
    plot_sides(rows, labels, out / 'backbone.png')


def _compare(case: BackboneCase, rounds: int) -> dict:
    models, x = {side: _build(case, side) for side in SIDES}, noise(case)
    models['stock'].load_backbone(models['ours'].state_dict())
    calls = {side: partial(_maps, _ready(model, case, side), case, x) for side, model in models.items()}
    repeats = {side: repeats_for(call, case.device) for side, call in calls.items()}
    seconds, maps = take_turns(calls, rounds, case.device, str(case), repeats)
    pairs = zip(maps['stock'], maps['ours'], strict=True)
    differences = [((own - stock).abs().max() / stock.abs().max()).item() for stock, own in pairs]
    return {'rounds': rounds, **columns_of_sides(seconds), 'largest_difference': max(differences)}


def _build(case: BackboneCase, side: str) -> VOLO | TimmVOLO:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (VOLO if side == 'ours' else TimmVOLO)(case.arch, img_size=case.size, out_norm=False)
        nn.init.trunc_normal_(model.pos_embed, std=0.02)
    return model.eval()


def _ready(model: nn.Module, case: BackboneCase, side: str) -> nn.Module:
    model = model.to(case.device)
    if side == 'ours' and case.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return torch.compile(model) if side == 'ours' and case.compile else model


@torch.no_grad()
def _maps(model: nn.Module, case: BackboneCase, x: Tensor) -> tuple[Tensor, ...]:
    with autocast(case.precision, case.device):
        return model(x)


def forward_steps(case: BackboneCase, side: str) -> Iterator[None]:
    """For :func:`~mmseg_volo.benchmark.measuring.memory_of`."""
    model = _ready(_build(case, side), case, side)
    yield
    x = noise(case)
    yield
    _maps(model, case, x)
