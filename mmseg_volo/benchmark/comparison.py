"""How everything is measured: the sides of a case are built, take turns, and become rows of a table.

A measurement is a subclass of :class:`Comparison`. It says which sides there are, how they are built with the same
weights, what one call does, and what the table and the figure show. :func:`compare` takes times and memory of one case,
:func:`measure` is a whole command of ``tools/benchmark.py``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.volo import STRIDE
from . import plots, tables
from .machine import check_device, on_gpu
from .memory import NOT_MEASURED, Memory, larger, memory_alone, memory_here, memory_kind
from .tables import EMPTY, Columns, Spread, Table, print_table, times_faster
from .timing import as_graph, calls_per_round, progress, reason_of, seconds_of, take_turns, time_limit

SIDES = 'stock', 'ours'
SHOWN = dict(stock='stock', ours='here')  # in tables for people
COMPILED = 'compiled'  # stock through torch.compile; a side only if it is asked for
NOT_ASKED = 'not asked for'  # the reason in that case
MIN_SIDE = 64  # of an image; the smallest of its views then has the 32 pixels that VOLO needs
MEMORY_NOTES = dict(
    growth='peak resident memory above what the process with the built model takes',
    peak="peak of PyTorch's memory on the device, the model included",
)


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Args:
        rounds: how often each side is timed.
        memory: measure it too.
        compile_seconds: that compiling one peer may take; without it the peer is left out.
    """

    rounds: int
    memory: bool = True
    compile_seconds: float = inf


@dataclass
class Found:
    """What :func:`compare` found, by side: seconds of rounds, memory, the last results, and why sides are missing."""

    models: dict[str, Any]
    data: Any = None
    seconds: dict[str, Sequence[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # that made one timed round
    memory: dict[str, Memory] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case of a measurement.

    Args:
        sides: names of what takes turns.
        device: 'cpu', 'cuda', 'cuda:1', ...
        threads: of PyTorch on a CPU; None leaves them.

    Raises:
        ValueError: a device that PyTorch cannot use.
    """

    sides: tuple[str, ...] = SIDES
    device: str = 'cpu'
    threads: int | None = None

    NAME = ''  # of the command, the CSV file and the figure
    BASELINE, COMPILED = 'stock', COMPILED
    SHORT_CALLS = False  # a timed round repeats the call until it is long enough
    FROM_FIRST_CALL = ()  # sides whose memory on a GPU counts from the first call on, which captures CUDA graphs
    MEMORY_ALONE = False  # on a GPU too, memory is taken in a process for each side
    cuda_graph = False  # every side is captured as a CUDA graph

    def __post_init__(self):
        check_device(self.device)

    # What subclasses define

    def build(self) -> dict[str, Any]:
        """All sides but the compiled peer, with the same weights, on the device."""
        raise NotImplementedError

    def build_alone(self, side: str) -> Any:
        """One side, for memory and profiles; its weights may be others."""
        raise NotImplementedError

    def build_compiled(self, models: dict[str, Any]) -> Any:
        """The peer through ``torch.compile``."""
        raise NotImplementedError

    def inputs(self, model: Any) -> Any:
        """The input of all sides, made for one of them."""
        raise NotImplementedError

    def run(self, model: Any, side: str, data: Any) -> Any:
        """One call, which is timed."""
        raise NotImplementedError

    def warm_up(self, model: Any, side: str, data: Any) -> Any:
        """What has to happen before times are taken."""
        return self.run(model, side, data)

    def peak_call(self, model: Any, side: str, data: Any) -> None:
        """The call whose memory is taken in a process of its own."""
        self.run(model, side, data)

    def held(self, model: Any, data: Any) -> Iterable[Tensor]:
        """What a side keeps on a GPU between calls."""
        return tensors_of(model) if isinstance(model, nn.Module) else ()

    def calls_in_graph(self, data: Any) -> int:
        """How many calls one CUDA graph makes."""
        return 1

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        """Time a round of so many calls, and return the seconds of one."""
        return seconds_of(call, calls)

    def may_be_missing(self, side: str, error: Exception) -> bool:
        """Whether a side that fails in this way is left out; a compiler that is missing or fails stops no table."""
        return side == self.COMPILED

    def sides_alone(self, sides: Sequence[str]) -> list[str]:
        """Sides whose memory is taken in processes of their own: compiling there would take as long again."""
        return [side for side in sides if side != self.COMPILED]

    def take_memory(self, found: Found, settings: Settings) -> None:
        """Take the memory that needs processes of its own, after the models in this process are freed."""
        if settings.memory and (self.MEMORY_ALONE or not on_gpu(self.device)):
            found.models, found.data, found.results = {}, None, {}
            found.memory = {side: memory_alone(self, side) for side in self.sides_alone(list(found.seconds))}

    def extra(self, found: Found, settings: Settings) -> dict:
        """Columns of this measurement besides times and memory."""
        return {}

    @staticmethod
    def label(row: dict) -> str:
        """What a row is about."""
        raise NotImplementedError

    @staticmethod
    def title(row: dict) -> str:
        """What all rows have in common."""
        return f'{row["height"]} x {row["width"]} pixels; median (least–greatest) of {row["rounds"]}'

    EXTRA_COLUMNS = {}  # of the printed table
    NOTES = ()  # lines below it

    # What most of them share: stock, compiled and ours in one row

    def __str__(self) -> str:
        return self.label(self.case_columns())

    def case_columns(self) -> dict:
        """Columns for the case, without its machine."""
        columns = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == 'size':
                columns.update(height=value[0], width=value[1])
            elif item.name not in ('sides', 'device', 'threads'):
                columns[item.name] = value
        return columns

    def rows(self, settings: Settings) -> list[dict]:
        """Measure the case."""
        found = compare(self, settings)
        extra = self.extra(found, settings)
        self.take_memory(found, settings)
        row = {**self.case_columns(), 'rounds': settings.rounds, 'compiled_missing': found.missing.get(COMPILED)}
        if COMPILED not in self.sides:
            row['compiled_missing'] = NOT_ASKED
        for side in (*SIDES, COMPILED):
            row.update(Spread.of(found.seconds.get(side)).columns(f'{side}_s'))
        for side in dict.fromkeys((*SIDES, COMPILED, *found.memory)):
            row.update(found.memory.get(side, NOT_MEASURED).columns(side))
        row.update(times_faster(found.seconds, 'ours', 'stock').columns('times_faster'))
        row.update(times_faster(found.seconds, 'ours', COMPILED).columns('times_faster_than_compiled'))
        return [{**row, **extra}]

    def columns(self) -> Columns:
        """Of the printed table."""
        kind = memory_kind(self.device)
        return {
            'network': self.label,
            'stock': tables.time('stock_s'),
            'compiled': tables.time('compiled_s'),
            'here': tables.time('ours_s'),
            'times faster': tables.spread('times_faster'),
            'times faster than compiled': tables.spread('times_faster_than_compiled'),
            'memory, stock': tables.size(f'stock_{kind}_mb'),
            'memory, compiled': tables.size(f'compiled_{kind}_mb'),
            'memory, here': tables.size(f'ours_{kind}_mb'),
            'share of memory': lambda row: EMPTY if memory_ratio(row) is None else f'{memory_ratio(row):.2f}',
            **self.EXTRA_COLUMNS,
        }

    def notes(self, rows: Sequence[dict]) -> list[str]:
        """Lines below the table."""
        kind = memory_kind(self.device)
        measured = any(row.get(f'ours_{kind}_mb') is not None for row in rows)
        missing = {self.label(row): row.get('compiled_missing') for row in rows}
        return [
            *self.NOTES,
            *[f'memory: {MEMORY_NOTES[kind]}'] * measured,
            *[f'{label}: no compiled peer: {why}' for label, why in missing.items() if why not in (None, NOT_ASKED)],
        ]

    def plot(self, rows: Sequence[dict], path: Path) -> None:
        """Bars of all sides: seconds, and memory if it was measured."""
        kind = memory_kind(self.device)
        panels = {'seconds': 's', f'peak memory (MB): {MEMORY_NOTES[kind]}': f'{kind}_mb'}
        sides = ('stock', COMPILED, 'ours')
        series = {
            title: {side: [row[f'{side}_{name}'] for row in rows] for side in sides} for title, name in panels.items()
        }
        plots.bars(path, rows, [self.label(row) for row in rows], series)


@dataclass(frozen=True, kw_only=True)
class BatchComparison(Comparison):
    """A batch of images, which goes through a network at once.

    Args:
        size: (height, width) of the images.
        batch: how many.
        precision: 'fp32', 'bf16' or 'fp16'.

    Raises:
        ValueError: a size that timm's VOLO would cut off.
    """

    size: tuple[int, int] = (512, 512)
    batch: int = 1
    precision: str = 'fp32'

    def __post_init__(self):
        super().__post_init__()
        check_size(self.size)
        if any(side % STRIDE for side in self.size):
            raise ValueError(f'size must be multiples of {STRIDE}, got {self.size[0]} x {self.size[1]}')


def check_size(size: tuple[int, int]) -> None:
    if min(size) < MIN_SIDE:
        raise ValueError(f'images need at least {MIN_SIDE} pixels a side, got {size[0]} x {size[1]}')


def compare(case: Comparison, settings: Settings, models: dict[str, Any] | None = None) -> Found:
    """Take times of the sides of a case, and on a GPU their memory.

    Args:
        case: what is measured.
        settings: how.
        models: networks that are already built, by side; by default all are built here.
    """
    found = Found(case.build() if models is None else models)
    if case.COMPILED not in found.models:
        torch.compiler.reset()  # code of earlier cases counts towards a limit, beyond which PyTorch compiles no more

    def attempt(side: str, step: Callable[[], Any]) -> Any:
        try:
            with time_limit(settings.compile_seconds if side == case.COMPILED else inf):
                return step()
        except Exception as error:
            if not case.may_be_missing(side, error):
                raise
            found.missing[side] = reason_of(error)
            progress(f'{case}: {side} does not run here: {found.missing[side]}')

    if case.COMPILED in case.sides and case.COMPILED not in found.models:
        built = attempt(case.COMPILED, partial(case.build_compiled, found.models))
        if built is not None:
            found.models[case.COMPILED] = built
    sides = [side for side in case.sides if side not in found.missing]
    found.data = case.inputs(found.models[sides[0]])
    memory_in_process = settings.memory and on_gpu(case.device) and not case.MEMORY_ALONE
    in_graph = case.calls_in_graph(found.data) if case.cuda_graph else 1
    calls = {}
    for side in sides:
        model = found.models[side]
        first = partial(case.warm_up, model, side, found.data)
        call = partial(case.run, model, side, found.data)
        if memory_in_process and side in case.FROM_FIRST_CALL:
            first = partial(memory_here, first, case.device, case.held(model, found.data))
        result = attempt(side, first)
        if side in found.missing:
            continue
        if memory_in_process:
            memory = memory_here(call, case.device, case.held(model, found.data))
            found.memory[side] = larger(result, memory) if isinstance(result, Memory) else memory
        if case.cuda_graph:
            call = as_graph(partial(repeat, call, in_graph), case.device)
        calls[side] = partial(_keep, call, found.results, side)
    found.calls = {side: calls_per_round(call) if case.SHORT_CALLS else 1 for side, call in calls.items()}
    timers = {side: partial(case.seconds, call, found.calls[side]) for side, call in calls.items()}
    measurements = take_turns(timers, settings.rounds, str(case))
    found.seconds = {side: [time / in_graph for time in measured.times] for side, measured in measurements.items()}
    return found


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def repeat(call: Callable[[], Any], times: int) -> Any:
    """The result of the last of so many calls."""
    for _ in range(times - 1):
        call()
    return call()


def _keep(call: Callable[[], Any], results: dict[str, Any], side: str) -> Any:
    results[side] = call()
    return results[side]


def memory_ratio(row: dict) -> float | None:
    """Our memory as a share of stock's; None if one of them is not known."""
    kind = memory_kind(row['device'])
    ours, stock = row[f'ours_{kind}_mb'], row[f'stock_{kind}_mb']
    return ours / stock if ours and stock and isfinite(ours) and isfinite(stock) else None


def measure(cases: Sequence[Comparison], settings: Settings, out: Path, environment: dict) -> None:
    """Measure cases of one kind; the table is printed, and goes to ``out`` as a CSV file and a figure."""
    first = cases[0]
    table = Table(out / f'{first.NAME}.csv', environment)
    for case in cases:
        table.add(case.rows(settings))
    print(first.title(table.rows[0]))
    print_table(first.columns(), table.rows)
    for note in first.notes(table.rows):
        print(note)
    first.plot(table.rows, out / f'{first.NAME}.png')
