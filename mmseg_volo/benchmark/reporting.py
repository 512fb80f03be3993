"""What is said of measurements: header, tables, CSV files and figures."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from prettytable import PrettyTable

from .cases import COMPILED, SIDES

MEMORY_NOTES = dict(
    growth='peak resident memory above what the process with the built model takes',
    peak="peak of PyTorch's memory on the device, the model included",
)
MEMORY_AXES = dict(growth='peak memory above the built model (MB)', peak='peak memory on the device (MB)')


class Spread(NamedTuple):
    """Median, least and greatest of the rounds; None where nothing was measured."""

    median: float | None
    least: float | None
    greatest: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        return cls(median(values), min(values), max(values))

    @classmethod
    def in_row(cls, row: dict, name: str) -> 'Spread':
        return cls(*(row[f'{name}{end}'] for end in ('', '_min', '_max')))

    def columns(self, name: str) -> dict[str, float]:
        return {name: self.median, f'{name}_min': self.least, f'{name}_max': self.greatest}

    def __str__(self) -> str:
        if self.median is None:
            return '–'
        if self.least == self.greatest:
            return _three_digits(self.median)
        return f'{_three_digits(self.median)} ({_three_digits(self.least)}–{_three_digits(self.greatest)})'


def _three_digits(value: float) -> str:
    return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'


NO_SPREAD = Spread(None, None, None)
NOT_ASKED = 'not asked for'


def times_faster(seconds: dict[str, list[float]], side: str, baseline: str) -> Spread:
    """By which factor a side is faster than another, round by round."""
    return Spread.of([slow / fast for slow, fast in zip(seconds[baseline], seconds[side], strict=True)])


def columns_of_sides(seconds: dict[str, list[float]], missing: str | None = None) -> dict[str, float | str | None]:
    """Columns for the times of stock and ours, and of the compiled peer or why it is missing."""
    row = {}
    for side in SIDES:
        row.update(Spread.of(seconds[side]).columns(f'{side}_s'))
    row.update(times_faster(seconds, 'ours', 'stock').columns('times_faster'))
    there = COMPILED in seconds
    of_peer = Spread.of(seconds[COMPILED]) if there else NO_SPREAD
    faster = times_faster(seconds, 'ours', COMPILED) if there else NO_SPREAD
    row.update(**of_peer.columns(f'{COMPILED}_s'), **faster.columns('times_faster_than_compiled'))
    return {**row, 'compiled_missing': missing}


def ratio_of_memory(row: dict) -> float | None:
    """Ours as a share of stock's."""
    kind = memory_kind(row)
    ours, stock = row[f'ours_{kind}_mb'], row[f'stock_{kind}_mb']
    return None if ours is None or not stock else ours / stock


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # so that stdout can be piped


def print_header(environment: dict, command: str) -> None:
    """The command and what its figures depend on."""
    names = ('torch', 'mmseg', 'timm', 'triton', 'numba', 'mmseg_volo')
    versions = [f'{name} {environment[name]}' for name in names if environment[name] is not None]
    print(f'$ {command}')
    # What else runs on the machine can slow either side down many times.
    load = '' if environment['load'] is None else f', load average {environment["load"]} before the start'
    print(f'{environment["device_name"]} ({environment["device"]}), threads: {environment["threads"]}{load}')
    print(f'{", ".join(versions)}; {environment["date"]}', flush=True)


def print_table(fields: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = PrettyTable(fields, align='r')
    table.add_rows(rows)
    print(table.get_string())


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """One row for each configuration; what was not measured is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {name: f'{value:.6g}' if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )


def mb(value: float | None) -> str:
    """A cell for megabytes, 10^6 bytes; None where the process was killed."""
    if value is None:
        return 'out of memory'
    return f'{value:,.0f}' if value >= 10 else f'{value:.2g}'


def memory_kind(row: dict) -> str:
    """GPUs are asked for by their peak, resident memory by what a call adds."""
    return 'peak' if torch.device(row['device']).type == 'cuda' else 'growth'


def figure(panels: int, rows: Sequence[dict], height: float):
    """A figure and its axes, side by side."""
    from matplotlib.figure import Figure  # slow to import

    drawn = Figure((5 * panels, height), layout='constrained')
    drawn.suptitle(f'{rows[0]["device_name"]}, PyTorch {rows[0]["torch"]}', fontsize=9)
    return drawn, drawn.subplots(1, panels, squeeze=False)[0]


def print_sides(
    rows: Sequence[dict], labels: Sequence[str], fields: dict[str, str], memory: bool, runs: Sequence[str] = ('',)
) -> None:
    """A table of stock and ours.

    Args:
        rows, labels: of the table.
        fields: columns beside time and memory: heading, and the format of a row's cell.
        memory: whether it was measured.
        runs: what was measured of it, as in the names of the columns: ``stock{run}_peak_mb``.
    """
    kind = memory_kind(rows[0])
    with_peer = compiled_in(rows)
    columns = {'stock_s': 'stock (s)', 'ours_s': 'ours (s)', 'times_faster': 'times faster'}
    if with_peer:
        columns.update(compiled_s='compiled (s)', times_faster_than_compiled='times faster than compiled')
    taken = [f'{side}{run}' for run in runs for side in SIDES] if memory else []
    if any(row['compiled_peak_mb'] for row in rows):
        taken.append(COMPILED)
    cells = []
    for row, label in zip(rows, labels, strict=True):
        times = [str(Spread.in_row(row, name)) for name in columns]
        others = [cell.format(**row) for cell in fields.values()]
        cells.append([label, *times, *others, *(mb(row[f'{name}_{kind}_mb']) for name in taken)])
    headings = [f'{name.replace("_", " ")} (MB)' for name in taken]
    print_table(['network', *columns.values(), *fields, *headings], cells)
    if memory:
        print(f'MB: {MEMORY_NOTES[kind]}')
    print_missing(rows, labels)


def compiled_in(rows: Sequence[dict]) -> bool:
    """Whether the compiled peer was asked for."""
    return any(row['compiled_missing'] != NOT_ASKED for row in rows)


def print_missing(rows: Sequence[dict], labels: Sequence[str]) -> None:
    """Why there is no compiled peer, where it was asked for."""
    for row, label in zip(rows, labels, strict=True):
        if row['compiled_missing'] not in (None, NOT_ASKED):
            print(f'{label}: no compiled peer: {row["compiled_missing"]}')


def plot_sides(rows: Sequence[dict], labels: Sequence[str], path: Path) -> None:
    """Bars of stock and ours: seconds, and memory where it was measured."""
    kind = memory_kind(rows[0])
    panels = {'seconds': '{}_s'}
    if any(row[f'ours_{kind}_mb'] is not None for row in rows):
        panels[MEMORY_AXES[kind]] = f'{{}}_{kind}_mb'
    drawn, axes = figure(len(panels), rows, 1.6 + 0.6 * len(rows))
    places = np.arange(len(rows))
    sides = ('stock', COMPILED, 'ours') if any(row['compiled_s'] for row in rows) else SIDES
    height = 0.8 / len(sides)
    for axis, (title, name) in zip(axes, panels.items(), strict=True):
        for i, side in enumerate(sides):
            lengths = [row.get(name.format(side)) or 0 for row in rows]
            axis.barh(places + height * (i - (len(sides) - 1) / 2), lengths, height, label=side)
        axis.set(xlabel=title, yticks=places, yticklabels=labels)
        axis.invert_yaxis()
    axes[0].legend()
    drawn.savefig(path, dpi=120)
