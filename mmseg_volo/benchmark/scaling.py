"""How the cost of a prediction grows with the picture, this package only."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .cases import Case, columns_of
from .measuring import NOT_MEASURED, timed
from .peer import build, ready, spread_classes
from .pictures import draw, prepare, view_pixels
from .prediction import label, measure_memory, predict, setting, warm_up
from .reporting import MEMORY_AXES, MEMORY_NOTES, figure, mb, memory_kind, print_table, progress, write_csv


def measure_scaling(cases: Sequence[Case], memory: bool, out: Path, environment: dict) -> None:
    """One run of each case; the table, the CSV file and the figure go to ``out``."""
    rows = []
    for case in cases:
        picture = draw(case.size)
        megapixels = picture.shape[0] * picture.shape[1] / 1e6
        seconds = _seconds(case, picture)
        progress(f'{label(columns_of(case))}: {megapixels:.3g} megapixels in {seconds:.3g} s')
        found = measure_memory(case, 'ours', picture) if memory else NOT_MEASURED
        row = dict(megapixels=megapixels, seconds=seconds, seconds_per_megapixel=seconds / megapixels)
        row.update(found.columns())
        # 8 bits a channel, and 64 bits for a class id.
        row['data_mb'] = (3 * view_pixels(case.size, case.views) + 8 * case.size[0] * case.size[1]) / 1e6
        rows.append({**columns_of(case), **row, **environment})
        write_csv(out / 'scaling.csv', rows)
    _print(rows, memory)
    _plot(rows, out / 'scaling.png')


def _seconds(case: Case, picture: np.ndarray) -> float:
    model = build(case, 'ours')
    spread_classes(model, picture)
    model = ready(model, case, 'ours')
    warm_up(model, case, 'ours', picture)
    data = prepare(picture, case.views)
    return timed(lambda: predict(model, case, 'ours', data), case.device)[0]


def sizes_of(megapixels: Sequence[float]) -> list[tuple[int, int]]:
    """(height, width) of 3:2 pictures."""
    heights = [round((amount * 1e6 / 1.5) ** 0.5) for amount in megapixels]
    return [(height, round(height * 1.5)) for height in heights]


def fit(rows: Sequence[dict]) -> tuple[float, float]:
    """Least squares of seconds against megapixels, through 0: the slope, and the largest relative deviation."""
    x, y = (np.array([row[name] for row in rows]) for name in ('megapixels', 'seconds'))
    slope = float((x * y).sum() / (x * x).sum())
    return slope, float(np.abs(slope * x / y - 1).max())


def _groups(rows: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    labels = dict.fromkeys(map(label, rows))
    return [(name, [row for row in rows if label(row) == name]) for name in labels]


def _print(rows: Sequence[dict], memory: bool) -> None:
    kind = memory_kind(rows[0])
    of_memory = ['memory (MB)', 'of it views and classes (MB)'] if memory else []
    cells = []
    for row in rows:
        numbers = [f'{row[name]:.3g}' for name in ('megapixels', 'seconds', 'seconds_per_megapixel')]
        taken = [mb(row[f'{kind}_mb']), mb(row['data_mb'])] if memory else []
        cells.append([label(row), *numbers, *taken])
    print(f'3:2 pictures, {setting(rows[0])}; one run each')
    print_table(['network', 'megapixels', 'seconds', 's / megapixel', *of_memory], cells)
    for name, group in _groups(rows):
        slope, deviation = fit(group)
        print(f'{name}: {slope:.3g} s per megapixel; the line through 0 is off by {deviation:.1%} at most')
    if memory:
        print(f'MB: {MEMORY_NOTES[kind]}')


def _plot(rows: Sequence[dict], path: Path) -> None:
    kind = memory_kind(rows[0])
    drawn, (left, right) = figure(2, rows, 4)
    for i, (name, group) in enumerate(_groups(rows)):
        x = [row['megapixels'] for row in group]
        slope, _ = fit(group)
        left.plot(x, [row['seconds'] for row in group], 'o', color=f'C{i}', label=name)
        left.plot([0, max(x)], [0, slope * max(x)], color=f'C{i}', label=f'{slope:.3g} s per megapixel')
        measured = [(row['megapixels'], row[f'{kind}_mb']) for row in group if row[f'{kind}_mb'] is not None]
        right.plot(*(zip(*measured, strict=True) if measured else ([], [])), 'o-', color=f'C{i}', label=name)
    right.plot(x, [row['data_mb'] for row in group], 'k--', label='the picture and its classes')
    left.set(xlabel='megapixels', ylabel='seconds', xlim=(0, None), ylim=(0, None))
    right.set(xlabel='megapixels', ylabel=MEMORY_AXES[kind], xlim=(0, None), ylim=(0, None))
    left.legend()
    right.legend()
    drawn.savefig(path, dpi=120)
