"""Outlook attention alone: each implementation against the definition in plain PyTorch.

On a GPU the calls are timed as CUDA graphs: launching one takes longer than the smaller kernels run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.volo import ARCHS, OUTLOOK, PATCH
from ..models.windows import PRECISIONS
from ..ops import outlook_attention
from . import plots, tables
from .comparison import Comparison, Settings, compare
from .machine import on_gpu
from .memory import NOT_MEASURED
from .tables import Columns, Spread, text, times_faster
from .timing import calls_per_round, seconds_of

REFERENCE = 'reference'
COMPILED = 'reference-compiled'  # the definition through torch.compile
IMPLEMENTATIONS = 'slices', 'fused', 'auto'
MODES = 'forward', 'full'
# All input sets together, in bytes: more than the caches of a GPU hold, so that none is still there for the next call.
_ROTATED = 2e8
_COPIED = dict(cpu=2**28, cuda=2**30)  # bytes of the tensor whose copy is timed
_ERRORS = 'max_error', 'max_error_v_grad', 'max_error_logits_grad'


class Inputs(NamedTuple):
    """One set of inputs: values, logits, and the gradient of the result."""

    v: Tensor
    logits: Tensor
    gradient: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def image(self, i: int) -> 'Inputs':
        """One image of the batch, in float64."""
        return Inputs(*(t.detach()[i : i + 1].double().requires_grad_(t.requires_grad) for t in self))


@dataclass(frozen=True, kw_only=True)
class OpCase(Comparison):
    """Outlook attention as the first stage of a VOLO calls it.

    Args:
        sides: the definition, the definition through ``torch.compile``, and :data:`IMPLEMENTATIONS`.
        arch: 'd1'...'d5', for channels and heads.
        image: side of the square image in pixels; the grid has one token for 8 x 8 of them.
        batch: images.
        precision: dtype of both inputs, 'fp32', 'bf16' or 'fp16'.
        mode: 'forward', or 'full' for forward and backward with the gradients of both inputs.
        others: see :class:`Comparison`.

    Raises:
        ValueError: an unknown arch, or a side that makes no grid.
    """

    sides: tuple[str, ...] = (REFERENCE, 'fused')
    arch: str = 'd1'
    image: int = 512
    batch: int = 1
    precision: str = 'fp32'
    mode: str = 'forward'

    NAME = 'op'
    BASELINE, COMPILED = REFERENCE, COMPILED
    SHORT_CALLS = True
    NOTES = (
        'GB/s: of the bytes that must move; error: against float64, of the result and in full mode of the gradients',
    )

    def __post_init__(self):
        super().__post_init__()
        if self.arch not in ARCHS:
            raise ValueError(f'arch must be one of {", ".join(ARCHS)}, got {self.arch}')
        if self.image < 4 * PATCH or self.image % PATCH:
            raise ValueError(f'image side must be a multiple of {PATCH}, {4 * PATCH} or more, got {self.image}')

    @staticmethod
    def label(row: dict) -> str:
        return f'{row["arch"]}@{row["image"]}, batch {row["batch"]}, {row["precision"]}, {row["mode"]}'

    @staticmethod
    def title(row: dict) -> str:
        return f'median (least–greatest) of {row["rounds"]}; a copy moves {row["copy_gb_per_s"]:.3g} GB/s'

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

    @property
    def cuda_graph(self) -> bool:
        return on_gpu(self.device)

    def case_columns(self) -> dict:
        return {**super().case_columns(), 'grid': self.grid, 'channels': self.channels, 'heads': self.heads}

    # Implementations

    def build(self) -> dict[str, Callable]:
        return {side: self.build_alone(side) for side in self.sides if side != COMPILED}

    def build_alone(self, side: str) -> Callable[..., Tensor]:
        return partial(outlook_attention, impl=side) if side != COMPILED else _compiled_definition()

    def build_compiled(self, models: dict[str, Callable]) -> Callable[..., Tensor]:
        return _compiled_definition()

    def inputs(self, model: Any = None) -> list[Inputs]:
        """On a GPU many sets, which the calls take in turn."""
        first = self.draw(0)
        others = 0 if torch.device(self.device).type == 'cpu' else int(_ROTATED // first.nbytes)
        return [first, *(self.draw(seed) for seed in range(1, others + 1))]

    def draw(self, seed: int) -> Inputs:
        """Random inputs of deviation 1, the logits after the scale."""
        generator = torch.Generator(self.device).manual_seed(seed)
        window = OUTLOOK['kernel_size'] ** 2
        windows = (self.grid + 2 * OUTLOOK['padding'] - OUTLOOK['kernel_size']) // OUTLOOK['stride'] + 1
        values = self.batch, self.grid, self.grid, self.channels
        shapes = values, (self.batch, windows, windows, self.heads, window, window), values
        v, logits, gradient = (torch.randn(shape, generator=generator, device=self.device) for shape in shapes)
        dtype, full = PRECISIONS[self.precision], self.mode == 'full'
        logits = (logits / self.scale).to(dtype)
        return Inputs(v.to(dtype).requires_grad_(full), logits.requires_grad_(full), gradient.to(dtype))

    def results(self, attend: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
        """The result, and in full mode the gradients of v and logits.

        Raises:
            ValueError: this implementation cannot run here.
        """
        full = self.mode == 'full'
        with torch.set_grad_enabled(full):
            out = attend(inputs.v, inputs.logits, scale=self.scale, **OUTLOOK)
        if not full:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, (inputs.v, inputs.logits), inputs.gradient)

    def run(self, model: Callable[..., Tensor], side: str, data: list[Inputs]) -> None:
        data.append(data.pop(0))  # the next set
        self.results(model, data[0])

    def calls_in_graph(self, data: list[Inputs]) -> int:
        return len(data)

    def may_be_missing(self, side: str, error: Exception) -> bool:
        return side == COMPILED or (side != REFERENCE and isinstance(error, ValueError))

    def moved_bytes(self, inputs: Inputs) -> int:
        """What must at least be read and written, each tensor once in either direction."""
        v, logits = inputs.v.nbytes, inputs.logits.nbytes
        forward = v + logits + v
        # Backward reads the gradient of the result, v and logits, and writes the gradients of v and logits.
        return forward + (3 * v + 2 * logits if self.mode == 'full' else 0)

    def errors(self, model: Callable[..., Tensor], inputs: Inputs) -> dict[str, float | None]:
        """Largest absolute differences from the definition in float64: of the result, and of the gradients."""
        results = self.results(model, inputs)
        largest = [0.0] * len(results)
        for i in range(self.batch):  # one image at a time, since float64 takes much memory
            exact = self.results(partial(outlook_attention, impl=REFERENCE), inputs.image(i))
            for j, (result, wanted) in enumerate(zip(results, exact, strict=True)):
                largest[j] = max(largest[j], (result[i : i + 1].double() - wanted).abs().max().item())
        return dict.fromkeys(_ERRORS) | dict(zip(_ERRORS, largest, strict=False))

    # Table

    def rows(self, settings: Settings) -> list[dict]:
        """A row for each implementation that runs here, the definition first."""
        found = compare(self, replace(settings, memory=on_gpu(self.device)))
        copied, moved = copy_gb_per_s(self.device), self.moved_bytes(found.data[0])
        rows = []
        for impl, seconds in found.seconds.items():
            speed = moved / median(seconds) / 1e9
            memory, reference = (found.memory.get(side, NOT_MEASURED).growth for side in (impl, REFERENCE))
            rows.append(
                dict(
                    **self.case_columns(), impl=impl, rounds=settings.rounds, calls=found.calls[impl],
                    **Spread.of(seconds).columns('seconds'),
                    **times_faster(found.seconds, impl, REFERENCE).columns('times_faster'),
                    **times_faster(found.seconds, impl, COMPILED).columns('times_faster_than_compiled'),
                    moved_mb=moved / 1e6, gb_per_s=speed, copy_gb_per_s=copied, share_of_copy=speed / copied,
                    **self.errors(found.models[impl], found.data[0]),
                    call_mb=memory, memory_ratio=memory and memory / reference,
                )
            )  # fmt: skip
        return rows

    def columns(self) -> Columns:
        return {
            'case': self.label,
            'implementation': text('{impl}'),
            'time': tables.time('seconds'),
            'times faster': tables.spread('times_faster'),
            'than compiled': tables.spread('times_faster_than_compiled'),
            'GB/s': text('{gb_per_s:.3g}'),
            'of a copy': text('{share_of_copy:.1%}'),
            'memory': tables.size('call_mb'),
            'of the definition': text('{memory_ratio:.2f}'),
            'largest error': lambda row: f'{max(row[name] or 0 for name in _ERRORS):.2g}',
        }

    def plot(self, rows: Sequence[dict], path: Path) -> None:
        labels = list(dict.fromkeys(map(self.label, rows)))
        at = {(self.label(row), row['impl']): row for row in rows}

        def of_each(name: str) -> dict[str, list[float | None]]:
            impls = dict.fromkeys(row['impl'] for row in rows)
            return {impl: [at.get((label, impl), {}).get(name) for label in labels] for impl in impls}

        panels = {f'times faster than {REFERENCE}': of_each('times_faster')}
        panels['GB/s of what must move'] = of_each('gb_per_s')
        plots.bars(path, rows, labels, panels, ('copy of a large tensor', rows[0]['copy_gb_per_s']))


@cache
def _compiled_definition() -> Callable[..., Tensor]:
    def attend(v: Tensor, logits: Tensor, **options: float) -> Tensor:
        return outlook_attention(v, logits, impl=REFERENCE, **options)

    return torch.compile(attend, dynamic=False)


@cache
def copy_gb_per_s(device: str, rounds: int = 5) -> float:
    """Bandwidth of copying a large tensor, in 10^9 bytes read and written a second: the median of the rounds."""
    size = _COPIED.get(torch.device(device).type, _COPIED['cuda'])
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    calls = calls_per_round(lambda: target.copy_(source))
    return 2 * size / median(seconds_of(lambda: target.copy_(source), calls) for _ in range(rounds)) / 1e9
