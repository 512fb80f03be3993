"""Stock mmseg against this package: time, memory and predictions of a picture."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from .cases import COMPILED, SIDES, Case, columns_of
from .measuring import (
    NOT_MEASURED,
    Memory,
    add_compiled,
    in_process,
    larger,
    memory_columns,
    memory_here,
    take_turns,
)
from .peer import build_both, compiled
from .pictures import draw, prepare
from .prediction import label, measure_memory, predict, setting, warm_up
from .reporting import NOT_ASKED, columns_of_sides, plot_sides, print_sides, write_csv


def measure_inference(
    cases: Sequence[Case], rounds: int, memory: bool, out: Path, environment: dict, compile_seconds: float = inf
) -> None:
    """Measure each case; as :func:`~.backbone.measure_backbone`.

    Memory is that of the picture, and besides that of the same picture in one view.
    """
    rows = []
    for case in cases:
        picture = draw(case.size)
        row = {**columns_of(case), **compare(case, picture, rounds, memory, compile_seconds)}
        if memory and not in_process(case.device):
            found = {side: measure_memory(case, side, picture) for side in SIDES}
            one = replace(case, views=1)
            one_view = found if case == one else {side: measure_memory(one, side, picture) for side in SIDES}
            row.update({**memory_columns(found), **_one_view_columns(one_view)})
        rows.append({**row, **environment})
        write_csv(out / 'inference.csv', rows)  # after each case: a run that is stopped leaves what it has
    first, labels = rows[0], [label(row) for row in rows]
    runs = ('', '_1_view') if first['views'] > 1 else ('',)
    print(
        f'{first["height"]} x {first["width"]} pixels, {setting(first)}; median (least–greatest) of {first["rounds"]}'
    )
    print_sides(rows, labels, {'equal pixels': '{equal_pixels:.3%}'}, memory, runs)
    plot_sides(rows, labels, out / 'inference.png')


def _one_view_columns(found: dict[str, Memory]) -> dict[str, float | None]:
    columns = {}
    for side in SIDES:
        columns.update(found.get(side, NOT_MEASURED).columns(f'{side}_1_view'))
    return columns


def compare(case: Case, picture: np.ndarray, rounds: int, memory: bool = False, compile_seconds: float = 0) -> dict:
    """Time the sides in turns, and compare what they predict; on a GPU also measure their memory."""
    models, data = build_both(case, picture), prepare(picture, case.views)
    here = memory and in_process(case.device)
    found: dict[str, Memory] = {}
    calls = {}
    for side in SIDES:
        calls[side] = partial(predict, models[side], case, side, data)
        first = partial(warm_up, models[side], case, side, picture)
        if here:  # ours from the first call on: a CUDA graph takes its memory when it is captured
            found[side] = memory_here(first, case.device, models[side])
            found[side] = larger(found[side], memory_here(calls[side], case.device, models[side]))
        else:
            first()
    missing: str | None = NOT_ASKED
    if compile_seconds:

        def peer() -> Callable[[], Tensor]:
            models[COMPILED] = compiled(models['stock'])
            warm_up(models[COMPILED], case, COMPILED, picture)
            return partial(predict, models[COMPILED], case, COMPILED, data)

        calls, missing = add_compiled(calls, peer, label(columns_of(case)), compile_seconds)
    if here and COMPILED in calls:
        found[COMPILED] = memory_here(calls[COMPILED], case.device, models[COMPILED])
    seconds, maps = take_turns(calls, rounds, case.device, label(columns_of(case)))
    equal = (maps['stock'] == maps['ours']).double().mean().item()
    one_view = _memory_of_one_view(models, case, picture) if here and case.views > 1 else found
    columns = {**columns_of_sides(seconds, missing), 'equal_pixels': equal}
    return {'rounds': rounds, **columns, **memory_columns(found), **_one_view_columns(one_view)}


def _memory_of_one_view(models: dict[str, nn.Module], case: Case, picture: np.ndarray) -> dict[str, Memory]:
    one, data = replace(case, views=1), prepare(picture, 1)
    calls = {side: partial(predict, models[side].module, one, side, data) for side in SIDES}
    return {side: memory_here(call, case.device, models[side]) for side, call in calls.items()}
