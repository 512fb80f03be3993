"""Stock mmseg against this package: time, memory and predictions of a picture."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from .cases import SIDES, Case, columns_of
from .measuring import NOT_MEASURED, take_turns
from .peer import build_both
from .pictures import draw, prepare
from .prediction import label, measure_memory, predict, setting, warm_up
from .reporting import columns_of_sides, plot_sides, print_sides, write_csv


def measure_inference(cases: Sequence[Case], rounds: int, memory: bool, out: Path, environment: dict) -> None:
    """Measure each case; the table, the CSV file and the figure go to ``out``."""
    rows = []
    for case in cases:
        picture = draw(case.size)
        row = {**columns_of(case), **compare(case, picture, rounds)}
        for side in SIDES:
            found = measure_memory(case, side, picture) if memory else NOT_MEASURED
            one = measure_memory(replace(case, views=1), side, picture) if memory and case.views > 1 else found
            row.update({**found.columns(side), **one.columns(f'{side}_1_view')})
        rows.append({**row, **environment})
        write_csv(out / 'inference.csv', rows)  # after each case: a run that is stopped leaves what it has
    first, labels = rows[0], [label(row) for row in rows]
    runs = ('', '_1_view') if first['views'] > 1 else ('',)
    print(
        f'{first["height"]} x {first["width"]} pixels, {setting(first)}; median (least–greatest) of {first["rounds"]}'
    )
    print_sides(rows, labels, {'equal pixels': '{equal_pixels:.3%}'}, memory, runs)
    plot_sides(rows, labels, out / 'inference.png')


def compare(case: Case, picture: np.ndarray, rounds: int) -> dict:
    """Time both sides in turns, and compare what they predict."""
    models, data = build_both(case, picture), prepare(picture, case.views)
    for side in SIDES:
        warm_up(models[side], case, side, picture)
    calls = {side: partial(predict, models[side], case, side, data) for side in SIDES}
    seconds, maps = take_turns(calls, rounds, case.device, label(columns_of(case)))
    equal = (maps['stock'] == maps['ours']).double().mean().item()
    return {'rounds': rounds, **columns_of_sides(seconds), 'equal_pixels': equal}
