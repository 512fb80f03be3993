"""Outlook attention alone: each implementation against the definition in plain PyTorch.

On a GPU the calls are timed as CUDA graphs: launching one takes longer than the smaller kernels run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.volo import ARCHS, OUTLOOK, PATCH
from ..models.windows import PRECISIONS
from ..ops import outlook_attention
from .cases import check_device
from .measuring import as_graph, forget_compiled, repeats_for, take_turns, time_limit, why_not_compiled
from .reporting import NO_SPREAD, Spread, figure, mb, print_table, progress, times_faster, write_csv

BASELINE = 'reference'
COMPILED = 'reference-compiled'  # the definition through torch.compile
IMPLEMENTATIONS = 'slices', 'fused', 'auto'
MODES = 'forward', 'full'
# All input sets together, in bytes: more than the caches of a GPU hold, so that none serves the next call.
_ROTATED = 2e8
_COPIED = dict(cpu=2**28, cuda=2**30)  # bytes of the tensor whose copy is timed


@dataclass(frozen=True)
class OpCase:
    """Outlook attention as the first stage of a VOLO calls it.

    Args:
        arch: 'd1'...'d5', for channels and heads.
        image: side of the square picture in pixels; the grid has one token for 8 x 8 of them.
        batch: pictures.
        precision: dtype of both inputs, 'fp32', 'bf16' or 'fp16'.
        mode: 'forward', or 'full' for forward and backward with the gradients of both inputs.
        device: 'cpu', 'cuda', 'cuda:1', ...

    Raises:
        ValueError: an unknown arch, a side that makes no grid, or a device that is not there.
    """

    arch: str = 'd1'
    image: int = 512
    batch: int = 1
    precision: str = 'fp32'
    mode: str = 'forward'
    device: str = 'cpu'

    def __post_init__(self):
        check_device(self.device)
        if self.arch not in ARCHS:
            raise ValueError(f'arch must be one of {", ".join(ARCHS)}, got {self.arch}')
        if self.image < 4 * PATCH or self.image % PATCH:
            raise ValueError(f'image side must be a multiple of {PATCH}, {4 * PATCH} or more, got {self.image}')

    @property
    def grid(self) -> int:
        return self.image // PATCH

    @property
    def channels(self) -> int:
        return ARCHS[self.arch]['dims'][0]

    @property
    def heads(self) -> int:
        return ARCHS[self.arch]['heads'][0]

    @property
    def scale(self) -> float:
        return (self.channels // self.heads) ** -0.5

    def columns(self) -> dict:
        """Of a table, as :func:`~mmseg_volo.benchmark.cases.columns_of` gives them for other cases."""
        names = 'arch', 'image', 'grid', 'channels', 'heads', 'batch', 'precision', 'mode'
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return _label(self.columns())


class Inputs(NamedTuple):
    """One set of inputs: values, logits, and the gradient of the result."""

    v: Tensor
    logits: Tensor
    gradient: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def picture(self, i: int) -> 'Inputs':
        """One picture of the batch, in float64."""
        return Inputs(*(t.detach()[i : i + 1].double().requires_grad_(t.requires_grad) for t in self))


def draw_inputs(case: OpCase, seed: int) -> Inputs:
    """Random inputs of deviation 1, the logits after the scale."""
    generator = torch.Generator(case.device).manual_seed(seed)
    window = OUTLOOK['kernel_size'] ** 2
    windows = (case.grid + 2 * OUTLOOK['padding'] - OUTLOOK['kernel_size']) // OUTLOOK['stride'] + 1
    of_values = case.batch, case.grid, case.grid, case.channels
    shapes = of_values, (case.batch, windows, windows, case.heads, window, window), of_values
    v, logits, gradient = (torch.randn(shape, generator=generator, device=case.device) for shape in shapes)
    dtype, full = PRECISIONS[case.precision], case.mode == 'full'
    logits = (logits / case.scale).to(dtype)
    return Inputs(v.to(dtype).requires_grad_(full), logits.requires_grad_(full), gradient.to(dtype))


def run(case: OpCase, impl: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """The result, and in full mode the gradients of v and logits.

    Raises:
        ValueError: this implementation cannot run here.
    """
    full = case.mode == 'full'
    attend = partial(outlook_attention, impl=impl) if impl != COMPILED else _compiled_definition()
    with torch.set_grad_enabled(full):
        out = attend(inputs.v, inputs.logits, scale=case.scale, **OUTLOOK)
    if not full:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, (inputs.v, inputs.logits), inputs.gradient)


@cache
def _compiled_definition() -> Callable[..., Tensor]:
    def attend(v: Tensor, logits: Tensor, **options: float) -> Tensor:
        return outlook_attention(v, logits, impl=BASELINE, **options)

    return torch.compile(attend, dynamic=False)


def moved_bytes(case: OpCase, inputs: Inputs) -> int:
    """What must at least be read and written, each tensor once in either direction."""
    v, logits = inputs.v.nbytes, inputs.logits.nbytes
    forward = v + logits + v
    # Backward reads the gradient of the result, v and logits, and writes the gradients of v and logits.
    return forward + (3 * v + 2 * logits if case.mode == 'full' else 0)


def errors(case: OpCase, impl: str, inputs: Inputs) -> dict[str, float | None]:
    """Largest absolute differences from the definition in float64: of the result, and of the gradients."""
    results = run(case, impl, inputs)
    largest = [0.0] * len(results)
    for i in range(case.batch):  # one by one, for float64 takes room
        exact = run(case, BASELINE, inputs.picture(i))
        for j, (result, wanted) in enumerate(zip(results, exact, strict=True)):
            largest[j] = max(largest[j], (result[i : i + 1].double() - wanted).abs().max().item())
    names = 'max_error', 'max_error_v_grad', 'max_error_logits_grad'
    return {name: largest[j] if j < len(largest) else None for j, name in enumerate(names)}


def copy_gb_per_s(device: str, rounds: int) -> float:
    """Bandwidth of copying a large tensor, in 10^9 bytes read and written a second: the median of the rounds."""
    size = _COPIED.get(torch.device(device).type, _COPIED['cuda'])
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    repeats = {'copy': repeats_for(copy, device)}
    seconds, _ = take_turns({'copy': copy}, rounds, device, 'bandwidth', repeats)
    return 2 * size / Spread.of(seconds['copy']).median / 1e9


def measure_op(
    cases: Sequence[OpCase],
    implementations: Sequence[str],
    rounds: int,
    out: Path,
    environment: dict,
    with_compiled: bool = True,
) -> None:
    """Time, bandwidth and error of each implementation in each case; what cannot run is reported and left out.

    The definition is always among them, and with ``with_compiled`` the definition through ``torch.compile``.
    """
    implementations = [BASELINE, *[COMPILED] * with_compiled, *implementations]
    copied = copy_gb_per_s(environment['device'], rounds)
    rows = []
    for case in cases:
        rows += [{**row, **environment} for row in compare(case, implementations, rounds, copied)]
        write_csv(out / 'op.csv', rows)
    _print(rows)
    _plot(rows, out / 'op.png')


def compare(
    case: OpCase, implementations: Sequence[str], rounds: int, copied: float, compile_seconds: float = inf
) -> list[dict]:
    """A row for each implementation that runs here, the first of which is :data:`BASELINE`."""
    sets = [draw_inputs(case, 0)]
    if torch.device(case.device).type != 'cpu':
        sets += [draw_inputs(case, seed) for seed in range(1, int(_ROTATED // sets[0].nbytes) + 1)]
    calls = {}
    forget_compiled()
    for impl in dict.fromkeys(implementations):
        try:
            with time_limit(compile_seconds if impl == COMPILED else inf):
                run(case, impl, sets[0])
        except Exception as error:
            if impl != COMPILED and (impl == BASELINE or not isinstance(error, ValueError)):
                raise
            why = why_not_compiled(error) if impl == COMPILED else str(error).splitlines()[0]
            progress(f'{case}: {impl} does not run here: {why}')
        else:
            calls[impl] = _rotating(case, impl, sets)
    repeats = {impl: repeats_for(call, case.device) for impl, call in calls.items()}
    seconds, _ = take_turns(calls, rounds, case.device, str(case), repeats)
    if torch.device(case.device).type == 'cuda':
        seconds = {impl: [spent / len(sets) for spent in of_impl] for impl, of_impl in seconds.items()}
    moved = moved_bytes(case, sets[0])
    rows = []
    for impl, of_impl in seconds.items():
        row = dict(**case.columns(), impl=impl, rounds=rounds, calls=repeats[impl])
        row.update(Spread.of(of_impl).columns('seconds'))
        row.update(times_faster(seconds, impl, BASELINE).columns('times_faster'))
        compiled = times_faster(seconds, impl, COMPILED) if COMPILED in seconds else NO_SPREAD
        row.update(compiled.columns('times_faster_than_compiled'))
        speed = moved / row['seconds'] / 1e9
        row.update(moved_mb=moved / 1e6, gb_per_s=speed, copy_gb_per_s=copied, share_of_copy=speed / copied)
        rows.append({**row, **errors(case, impl, sets[0]), 'call_mb': _call_mb(case, impl, sets[0])})
    for row in rows:
        row['memory_ratio'] = row['call_mb'] / rows[0]['call_mb'] if row['call_mb'] is not None else None
    return rows


def _rotating(case: OpCase, impl: str, sets: Sequence[Inputs]) -> Callable[[], None]:
    """A call on the next set; on a GPU calls on all of them, as one CUDA graph."""
    following = cycle(sets)

    def call() -> None:
        run(case, impl, next(following))

    def call_all() -> None:
        for _ in sets:
            call()

    return as_graph(call_all, case.device) if torch.device(case.device).type == 'cuda' else call


def _call_mb(case: OpCase, impl: str, inputs: Inputs) -> float | None:
    """Peak of what a call takes above its inputs, on a GPU."""
    if torch.device(case.device).type != 'cuda':
        return None
    before = torch.cuda.memory_allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    run(case, impl, inputs)
    return (torch.cuda.max_memory_allocated(case.device) - before) / 1e6


def _label(row: dict) -> str:
    return f'{row["arch"]}@{row["image"]}, batch {row["batch"]}, {row["precision"]}, {row["mode"]}'


def _print(rows: Sequence[dict]) -> None:
    memory = any(row['call_mb'] is not None for row in rows)
    with_compiled = any(row['impl'] == COMPILED for row in rows)
    cells = []
    for row in rows:
        milliseconds = Spread(*(1e3 * value for value in Spread.in_row(row, 'seconds')))
        found = [value for name, value in row.items() if name.startswith('max_error') and value is not None]
        cells.append([_label(row), row['impl'], str(milliseconds), str(Spread.in_row(row, 'times_faster'))])
        cells[-1] += [str(Spread.in_row(row, 'times_faster_than_compiled'))] * with_compiled
        cells[-1] += [f'{row["gb_per_s"]:.3g}', f'{row["share_of_copy"]:.1%}', f'{max(found):.2g}']
        cells[-1] += [mb(row['call_mb'])] if memory else []
    fields = [
        'case',
        'impl',
        'ms',
        'times faster',
        *['than compiled'] * with_compiled,
        'GB/s',
        'of a copy',
        'largest error',
        *['MB'] * memory,
    ]
    print(f'median (least–greatest) of {rows[0]["rounds"]}; a copy moves {rows[0]["copy_gb_per_s"]:.3g} GB/s')
    print_table(fields, cells)
    print('GB/s: of the bytes that must move; error: against float64, of the result and in full mode of the gradients')


def _plot(rows: Sequence[dict], path: Path) -> None:
    drawn, (left, right) = figure(2, rows, 1.6 + 0.3 * len(rows))
    labels = [f'{_label(row)}: {row["impl"]}' for row in rows]
    implementations = list(dict.fromkeys(row['impl'] for row in rows))
    colours = [f'C{implementations.index(row["impl"])}' for row in rows]
    places = np.arange(len(rows))
    left.barh(places, [row['times_faster'] for row in rows], color=colours)
    left.set(xlabel=f'times faster than {BASELINE}', yticks=places, yticklabels=labels)
    right.barh(places, [row['gb_per_s'] for row in rows], color=colours)
    right.axvline(rows[0]['copy_gb_per_s'], color='k', linestyle='--', label='copy of a large tensor')
    right.set(xlabel='GB/s of what must move', yticks=[])
    right.legend()
    for axis in (left, right):
        axis.invert_yaxis()
    drawn.savefig(path, dpi=120)
