"""Tables that all measurements share: rows with spreads, a CSV file, cells for people."""

import csv
from collections.abc import Callable, Sequence
from math import isinf
from pathlib import Path
from statistics import median
from typing import NamedTuple

from prettytable import PrettyTable
from torch.utils.benchmark import select_unit

EMPTY = '–'
# A column of a printed table: its heading, and the cell for a row.
Columns = dict[str, Callable[[dict], str]]


class Spread(NamedTuple):
    """Median, least and greatest of the rounds; None if nothing was measured."""

    median: float | None
    least: float | None
    greatest: float | None

    @classmethod
    def of(cls, values: Sequence[float] | None) -> 'Spread':
        return cls(median(values), min(values), max(values)) if values else cls(None, None, None)

    @classmethod
    def in_row(cls, row: dict, name: str) -> 'Spread':
        return cls(*(row[f'{name}{end}'] for end in ('', '_min', '_max')))

    def columns(self, name: str) -> dict[str, float | None]:
        return {name: self.median, f'{name}_min': self.least, f'{name}_max': self.greatest}

    def as_time(self) -> str:
        """The spread of seconds, in a unit that suits the median."""
        if self.median is None:
            return EMPTY
        unit, scale = select_unit(self.median)
        return f'{Spread(*(value / scale for value in self))} {unit.replace("us", "µs")}'

    def __str__(self) -> str:
        if self.median is None:
            return EMPTY
        if self.least == self.greatest:
            return three_digits(self.median)
        return f'{three_digits(self.median)} ({three_digits(self.least)}–{three_digits(self.greatest)})'


def times_faster(seconds: dict[str, Sequence[float]], side: str, baseline: str) -> Spread:
    """By which factor a side is faster than another, round by round; empty if one of them has no times."""
    if side not in seconds or baseline not in seconds:
        return Spread.of(None)
    return Spread.of([slow / fast for slow, fast in zip(seconds[baseline], seconds[side], strict=True)])


class Table:
    """Rows of a measurement in a CSV file, which is complete after each row: a run that is stopped leaves what it has.

    Args:
        path: of the CSV file.
        environment: columns that every row has besides its own.
    """

    def __init__(self, path: Path, environment: dict):
        self.path, self.environment, self.rows = path, environment, []

    def add(self, rows: Sequence[dict]) -> list[dict]:
        """Add rows, write the file, and return the rows with the environment."""
        added = [{**row, **self.environment} for row in rows]
        self.rows += added
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows({name: _csv_cell(value) for name, value in row.items()} for row in self.rows)
        return added


def _csv_cell(value: object) -> object:
    """What was not measured is empty; what did not fit in memory is ``inf``."""
    return f'{value:.6g}' if isinstance(value, float) else value


def print_table(columns: Columns, rows: Sequence[dict]) -> None:
    """Print the columns that have a value in some row."""
    cells = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    table = PrettyTable(align='r')
    for heading, values in cells.items():
        if set(values) != {EMPTY}:
            table.add_column(heading, values, align='r')
    print(table.get_string())


def markdown_row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(" ".join(cell.replace("|", chr(92) + "|").split()) for cell in cells)} |'


# Cells


def three_digits(value: float) -> str:
    return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'


def spread(name: str) -> Callable[[dict], str]:
    return lambda row: str(Spread.in_row(row, name))


def time(name: str) -> Callable[[dict], str]:
    return lambda row: Spread.in_row(row, name).as_time()


def text(template: str) -> Callable[[dict], str]:
    """A format of the row, such as ``'{equal_pixels:.3%}'``; empty if one of its values was not measured."""

    def cell(row: dict) -> str:
        try:
            return template.format(**row)
        except TypeError:  # None has no such format
            return EMPTY

    return cell


def size(name: str) -> Callable[[dict], str]:
    return lambda row: size_text(row[name])


def size_text(megabytes: float | None) -> str:
    """A cell for 10^6 bytes; infinite if there was not enough memory."""
    if megabytes is None:
        return EMPTY
    if isinf(megabytes):
        return 'out of memory'
    return f'{megabytes / 1e3:.3g} GB' if megabytes >= 1000 else f'{megabytes:.3g} MB'
