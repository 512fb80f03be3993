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

from .cases import SIDES

MEMORY_NOTES = dict(
    growth='peak resident memory above what the process with the built model takes',
    peak="peak of PyTorch's memory on the device, the model included",
)
MEMORY_AXES = dict(growth='peak memory above the built model (MB)', peak='peak memory on the device (MB)')


class Spread(NamedTuple):
    """Median, least and greatest of the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        return cls(median(values), min(values), max(values))

    @classmethod
    def in_row(cls, row: dict, name: str) -> 'Spread':
        return cls(*(row[f'{name}{end}'] for end in ('', '_min', '_max')))

    def columns(self, name: str) -> dict[str, float]:
        return {name: self.median, f'{name}_min': self.least, f'{name}_max': self.greatest}

    def __str__(self) -> str:
        if self.least == self.greatest:
            return f'{self.median:.3g}'
        return f'{self.median:.3g} ({self.least:.3g}–{self.greatest:.3g})'


def times_faster(seconds: dict[str, list[float]], side: str, baseline: str) -> Spread:
    """By which factor a side is faster than another, round by round."""
    return Spread.of([slow / fast for slow, fast in zip(seconds[baseline], seconds[side], strict=True)])


def columns_of_sides(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Columns for the times of stock and ours."""
    row = {}
    for side in SIDES:
        row.update(Spread.of(seconds[side]).columns(f'{side}_s'))
    return {**row, **times_faster(seconds, 'ours', 'stock').columns('times_faster')}


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
    taken = [f'{side}{run}' for run in runs for side in SIDES] if memory else []
    cells = []
    for row, label in zip(rows, labels, strict=True):
        times = [str(Spread.in_row(row, name)) for name in ('stock_s', 'ours_s', 'times_faster')]
        others = [cell.format(**row) for cell in fields.values()]
        cells.append([label, *times, *others, *(mb(row[f'{name}_{kind}_mb']) for name in taken)])
    headings = [f'{name.replace("_", " ")} (MB)' for name in taken]
    print_table(['network', 'stock (s)', 'ours (s)', 'times faster', *fields, *headings], cells)
    if memory:
        print(f'MB: {MEMORY_NOTES[kind]}')


def plot_sides(rows: Sequence[dict], labels: Sequence[str], path: Path) -> None:
    """Bars of stock and ours: seconds, and memory where it was measured."""
    kind = memory_kind(rows[0])
    panels = {'seconds': '{}_s'}
    if any(row[f'ours_{kind}_mb'] is not None for row in rows):
        panels[MEMORY_AXES[kind]] = f'{{}}_{kind}_mb'
    drawn, axes = figure(len(panels), rows, 1.6 + 0.6 * len(rows))
    places = np.arange(len(rows))
    for axis, (title, name) in zip(axes, panels.items(), strict=True):
        for i, side in enumerate(SIDES):
            axis.barh(places + 0.4 * i - 0.2, [row[name.format(side)] or 0 for row in rows], 0.4, label=side)
        axis.set(xlabel=title, yticks=places, yticklabels=labels)
        axis.invert_yaxis()
    axes[0].legend()
    drawn.savefig(path, dpi=120)
