"""Our VOLO against timm's with the same weights: the stage maps of a batch, without head."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.volo import VOLO
from .cases import COMPILED, SIDES, BatchCase, columns_of
from .measuring import (
    add_compiled,
    as_graph,
    autocast,
    forget_compiled,
    in_process,
    memory_columns,
    memory_here,
    memory_of,
    repeats_for,
    take_turns,
)
from .peer import TimmVOLO, compiled
from .pictures import noise
from .reporting import NOT_ASKED, columns_of_sides, plot_sides, print_sides, write_csv


@dataclass(frozen=True)
class BackboneCase(BatchCase):
    """One backbone and its input.

    Args:
        arch: 'd1'...'d5'.
        compile: our side through ``torch.compile``.
        channels_last: our weights in that memory format.
        cuda_graph: every side as a CUDA graph, without the time that launching takes on the host.
        size, batch, precision, device, threads: see :class:`BatchCase`.
    """

    arch: str = 'd1'
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.cuda_graph and torch.device(self.device).type != 'cuda':
            raise ValueError(f'CUDA graphs need a GPU, got device {self.device}')

    def __str__(self) -> str:
        options = [name for name in ('compile', 'channels_last', 'cuda_graph') if getattr(self, name)]
        return ', '.join([f'VOLO-{self.arch.upper()}, batch {self.batch}, {self.precision}', *options])


def measure_backbone(
    cases: Sequence[BackboneCase], rounds: int, memory: bool, out: Path, environment: dict, compile_seconds: float = inf
) -> None:
    """Measure each case; the table, the CSV file and the figure go to ``out``.

    Args:
        cases: what is measured.
        rounds: how often each side is timed.
        memory: whether it is measured: on a CPU in a process for each side, without the compiled one.
        out: folder.
        environment: of :func:`~mmseg_volo.benchmark.measuring.environment`.
        compile_seconds: beside stock, stock through ``torch.compile`` is measured, unless compiling takes longer; 0
            leaves it out.
    """
    rows = []
    for case in cases:
        row = {**columns_of(case), **compare(case, rounds, memory, compile_seconds)}
        if memory and not in_process(case.device):
            row.update(memory_columns({side: memory_of(forward_steps, case, side) for side in SIDES}))
        rows.append({**row, **environment})
        write_csv(out / 'backbone.csv', rows)
    labels = [str(case) for case in cases]
    print(f'{rows[0]["height"]} x {rows[0]["width"]} pixels; median (least–greatest) of {rounds}')
    print_sides(rows, labels, {'largest difference': '{largest_difference:.2g}'}, memory)
    print('largest difference: of the four maps, relative to the largest value of a map')
    plot_sides(rows, labels, out / 'backbone.png')


def compare(case: BackboneCase, rounds: int, memory: bool = False, compile_seconds: float = 0) -> dict:
    forget_compiled()
    models, x = build_backbones(case), noise(case)
    calls = {side: partial(run, model, case, x) for side, model in models.items()}
    missing: str | None = NOT_ASKED
    if compile_seconds:

        def peer() -> Callable[[], tuple[Tensor, ...]]:
            models[COMPILED] = compiled(models['stock'])
            return partial(run, models[COMPILED], case, x)

        calls, missing = add_compiled(calls, peer, str(case), compile_seconds)
    found = {}
    if memory and in_process(case.device):
        for call in calls.values():
            call()
        found = {side: memory_here(call, case.device, models[side], x) for side, call in calls.items()}
    if case.cuda_graph:
        calls = {side: as_graph(call, case.device) for side, call in calls.items()}
    repeats = {side: repeats_for(call, case.device) for side, call in calls.items()}
    seconds, maps = take_turns(calls, rounds, case.device, str(case), repeats)
    pairs = zip(maps['stock'], maps['ours'], strict=True)
    differences = [((own - stock).abs().max() / stock.abs().max()).item() for stock, own in pairs]
    differing = {'largest_difference': max(differences)}
    return {'rounds': rounds, **columns_of_sides(seconds, missing), **differing, **memory_columns(found)}


def build_backbones(case: BackboneCase) -> dict[str, nn.Module]:
    """Both sides with the same weights, on the case's device, in eval mode."""
    models = {side: _build(case, side) for side in SIDES}
    models['stock'].load_backbone(models['ours'].state_dict())
    return {side: _ready(model, case, side) for side, model in models.items()}


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
def run(model: nn.Module, case: BackboneCase, x: Tensor) -> tuple[Tensor, ...]:
    with autocast(case.precision, case.device):
        return model(x)


def forward_steps(case: BackboneCase, side: str) -> Iterator[None]:
    """For :func:`~mmseg_volo.benchmark.measuring.memory_of`."""
    model = _ready(_build(case, 'stock' if side == COMPILED else side), case, side)
    if side == COMPILED:
        model = compiled(model)
    yield
    x = noise(case)
    yield
    run(model, case, x)
