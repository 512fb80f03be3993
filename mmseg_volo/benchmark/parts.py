"""The parts of the suite: what is measured, how large, and the goals beside the figures.

The goals are for bfloat16 on an H100 or better at the sizes here. On a CPU the same code runs on tiny sizes, and no
goal is judged.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from . import models, op
from .backbone import BackboneCase
from .camvid import camvid
from .comparison import COMPILED, NOT_ASKED, SIDES, Comparison, Settings, memory_ratio
from .correctness import correctness
from .inference import InferenceCase
from .machine import environment, on_gpu
from .models import ModelsCase
from .op import OpCase
from .profiling import profile_call
from .saving import SaveCase
from .suite import Part, Plan, Task
from .tables import EMPTY, Table
from .training import TrainCase

_COMPILING = 0.5  # of the time left, at most
_ROUNDS, _FEW = 5, 2
Goals = Callable[[Task, Comparison, dict], list[str]]


# Cases


def _sides(plan: Plan) -> tuple[str, ...]:
    return SIDES[0], *[COMPILED] * plan.compiled, SIDES[1]


def _op_cases(plan: Plan) -> list[OpCase]:
    sides = op.REFERENCE, *[op.COMPILED] * plan.compiled, 'fused'
    shapes = [('d1', 64, 1, 'fp32')] if plan.tiny else [('d4', 1024, 4, 'bf16'), ('d1', 512, 1, 'bf16')]
    return [
        OpCase(sides=sides, arch=arch, image=image, batch=batch, precision=precision, mode=mode, device=plan.device)
        for arch, image, batch, precision in shapes
        for mode in op.MODES
    ]


def _backbone_cases(plan: Plan) -> list[BackboneCase]:
    shared = dict(sides=_sides(plan), device=plan.device, threads=plan.threads)
    if plan.tiny:
        return [BackboneCase(size=(64, 64), **shared)]
    # As CUDA graphs, as prediction runs them: without graphs a slow host would dominate the times of every side.
    shared.update(precision='bf16', cuda_graph=True)
    small = BackboneCase(arch='d1', size=(512, 512), batch=16, **shared)
    large = BackboneCase(arch='d4', size=(1024, 1024), batch=1, **shared)
    return [small, large, *[replace(small, compile=True)] * plan.compiled]


def _train_cases(plan: Plan) -> list[TrainCase]:
    shared = dict(sides=_sides(plan), device=plan.device, threads=plan.threads)
    if plan.tiny:
        return [TrainCase(size=(64, 64), classes=19, **shared)]
    return [TrainCase(size=(512, 512), batch=16, classes=150, precision='bf16', **shared)]


def _large_train_cases(plan: Plan) -> list[TrainCase]:
    shared = dict(sides=('ours',), device=plan.device, threads=plan.threads, checkpointing=True)
    if plan.tiny:
        return [TrainCase(size=(64, 64), classes=19, **shared)]
    return [TrainCase(arch='d5', size=(1024, 1024), classes=150, precision='bf16', **shared)]


def _inference_cases(plan: Plan) -> list[InferenceCase]:
    shared = dict(sides=_sides(plan), classes=19, device=plan.device, threads=plan.threads)
    if plan.tiny:
        return [InferenceCase(size=(64, 64), window=64, stride=43, views=1, **shared)]
    shared.update(size=(1024, 2048), window=1024, stride=768, precision='bf16')
    return [InferenceCase(**shared), InferenceCase(views=1, **shared), InferenceCase(arch='d4', **shared)]


def _models_cases(plan: Plan) -> list[ModelsCase]:
    peers = models.OURS, models.STOCK, *[models.COMPILED] * plan.compiled
    runs = dict(network=(models.OURS,), predict=peers, logits=peers if plan.tiny else (*peers, 'swin-t', 'mit-b5'))
    size, precision = ((64, 64), 'fp32') if plan.tiny else ((512, 512), 'bf16')
    shared = dict(size=size, precision=precision, device=plan.device, threads=plan.threads)
    return [
        ModelsCase(sides=sides, run_as=run, batch=batch, **shared)
        for batch in ((1,) if plan.tiny else (1, 16))
        for run, sides in runs.items()
    ]


# Goals


def goal(task: Task, value: float | None, text: str, least: float | None = None, most: float | None = None) -> str:
    """A goal, and whether a value meets it."""
    said = f'≥ {least:g} {text}' if least is not None else f'≤ {most:g} {text}'
    if task.plan.tiny or value is None:
        return f'{said}: not judged'
    met = value >= least if least is not None else value <= most
    return f'{said}: {"met" if met else "**not met**"}'


def _op_goals(task: Task, case: OpCase, row: dict) -> list[str]:
    if row['impl'] != 'fused' or case.image == 512:
        return []
    times, copy = (8, 0.7) if case.mode == 'forward' else (6, 0.5)
    goals = [goal(task, row['times_faster'], '× unfold/fold', least=times)]
    goals.append(goal(task, row['share_of_copy'], 'of a copy', least=copy))
    return [*goals, *[goal(task, row['memory_ratio'], 'of the memory', most=0.35)] * (case.mode == 'full')]


def _backbone_goals(task: Task, case: BackboneCase, row: dict) -> list[str]:
    goals = [goal(task, row['times_faster'], '× stock', least=1.5)]
    return [*goals, goal(task, row['times_faster_than_compiled'], '× compiled', least=1.3)]


def _train_goals(task: Task, case: TrainCase, row: dict) -> list[str]:
    goals = [goal(task, row['times_faster'], '× stock', least=1.5)]
    goals.append(goal(task, row['times_faster_than_compiled'], '× compiled', least=1.25))
    return [*goals, goal(task, memory_ratio(row), 'of the memory', most=0.6)]


def _large_train_goals(task: Task, case: TrainCase, row: dict) -> list[str]:
    peak = row['ours_peak_mb']
    return [goal(task, None if peak is None else peak / 1e3, 'GB', most=40)]


def _inference_goals(task: Task, case: InferenceCase, row: dict) -> list[str]:
    if case.views == 1:
        return [goal(task, 1e3 * row['ours_s'], 'ms on an H100', most=26)]
    faster = goal(task, row['times_faster'], '× stock', least=2.5)
    return [faster, goal(task, memory_ratio(row), 'of the memory', most=0.5)]


def _models_goals(task: Task, case: ModelsCase, row: dict) -> list[str]:
    if (row['model'], case.run_as, case.batch) != (models.OURS, 'network', 1):
        return []
    return [goal(task, row['images_per_s'], 'images/s on an H100', least=570)]


def _no_goals(task: Task, case: Comparison, row: dict) -> list[str]:
    return []


# Speed and memory


def _measure(
    task: Task,
    cases: Sequence[Comparison],
    goals: Goals = _no_goals,
    seconds: Callable[[Comparison], float] = lambda case: 0,
    rounds: Callable[[Comparison], int] = lambda case: _ROUNDS,
    name: str | None = None,
    memory: bool = True,
    **options,
) -> None:
    """Measure cases of one kind; a row for each as soon as it is there.

    Args:
        task, cases: what is measured.
        goals: beside each row.
        seconds: that a case takes on a GPU at least; with less time left it is skipped.
        rounds: of a case, if there is enough time.
        name: of the CSV file; by default that of the cases.
        memory: measure it on a GPU.
        options: of their ``rows``.
    """
    first, plan = cases[0], task.plan
    columns = first.columns()
    if 'network' in columns and not isinstance(first, ModelsCase):
        columns['network'] = partial(_what, first)
    table = Table(plan.out / f'{name or first.NAME}.csv', environment(plan.device, plan.threads))
    task.write('Median (least–greatest).')
    task.table(*columns, 'goals')
    for i, case in enumerate(cases):
        what = _what(case, case.case_columns())
        if task.left() <= (0 if plan.tiny else seconds(case)):
            task.row(what, 'no time left')
            continue
        few = plan.tiny or task.left() < 20
        # Compiling leaves time for the cases that are still to come.
        compiling = _COMPILING * max(task.left(), 0) / (len(cases) - i)
        with _row(task, what):
            settings = Settings(min(rounds(case), _FEW if few else _ROUNDS), memory and on_gpu(plan.device), compiling)
            for row in table.add(case.rows(settings, **options)):
                task.row(*(cell(row) for cell in columns.values()), '; '.join(goals(task, case, row)) or EMPTY)
    missing = {row.get('compiled_missing') for row in table.rows} - {None, NOT_ASKED}
    if missing:
        task.write('', f'No compiled peer in some rows: {"; ".join(sorted(missing))}.')


def _what(case: Comparison, row: dict) -> str:
    """The label of a row with the size, which differs from row to row, and the views."""
    size = [f'{row["height"]} x {row["width"]}'] if 'height' in row else []
    views = [f'{row["views"]} view{"s" * (row["views"] > 1)}'] if 'views' in row else []
    return ', '.join([case.label(row), *size, *views])


@contextmanager
def _row(task: Task, what: str) -> Iterator[None]:
    """One row of a table: what fails is a row that says so, and the next one goes on."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        task.row(what, 'out of memory')
        torch.cuda.empty_cache()
    except Exception as error:
        task.fine = False
        task.row(what, f'failed: {type(error).__name__}: {str(error)[:150]}')
        traceback.print_exc()


def operation(task: Task) -> None:
    task.write(f'Outlook attention alone; a copy moves {op.copy_gb_per_s(task.plan.device):,.0f} GB/s.')
    _measure(task, _op_cases(task.plan), _op_goals)


def backbones(task: Task) -> None:
    _measure(task, _backbone_cases(task.plan), _backbone_goals, lambda case: 8)


def training_step(task: Task) -> None:
    _measure(task, _train_cases(task.plan), _train_goals)


def whole_images(task: Task) -> None:
    def is_large(case: InferenceCase) -> bool:
        return case.arch != 'd1'

    needs, rounds = (lambda case: 25 if is_large(case) else 8), (lambda case: 2 if is_large(case) else 3)
    _measure(task, _inference_cases(task.plan), _inference_goals, needs, rounds)


def other_networks(task: Task) -> None:
    task.write(
        f'With UPerHead and {models.CLASSES} classes, random weights. Runs: network, windows through the network as '
        'prediction runs them; predict, prepared images to class ids; logits, a forward pass to logits in full size, '
        'eager.'
    )
    _measure(task, _models_cases(task.plan), _models_goals, lambda case: 3, models={})


def large_training(task: Task) -> None:
    task.write('With activation checkpointing, batch 2, the least that the batch norm of UPerHead can train on.')
    _measure(task, _large_train_cases(task.plan), _large_train_goals, rounds=lambda case: _FEW, name='memory')


def checkpoints(task: Task) -> None:
    plan = task.plan
    size, classes = ((64, 64), 19) if plan.tiny else ((256, 256), 150)
    case = SaveCase(size=size, classes=classes, device=plan.device, threads=plan.threads, folder=str(task.folder))
    task.write("A checkpoint of VOLO-D1 in training: how long training waits, mmengine's way and here.")
    _measure(task, [case], rounds=lambda case: _FEW, memory=False)


# Profiles


def profiles(task: Task) -> None:
    cases = {'Backbone': _backbone_cases, 'Training step': _train_cases, 'Prediction': _inference_cases}
    for name, make in cases.items():
        if task.left() <= (0 if task.plan.tiny else 6):
            task.write('', f'{name}: no time left.')
            continue
        _profile(task, name, make(task.plan)[0])
        if not task.plan.tiny:
            torch.cuda.empty_cache()


def _profile(task: Task, name: str, case: Comparison) -> None:
    model = case.build_alone('ours')
    found = profile_call(partial(case.run, model, 'ours', case.inputs(model)), case.device)
    parts, gpu = [f'{1e3 * found.seconds:.2f} ms a call'], found.busy is not None
    if gpu:
        waits = ', '.join(f'{name} {count}' for name, count in found.waits.items()) or 'none'
        parts += [f'device busy {1e3 * found.busy:.2f} ms ({found.busy / found.seconds:.0%})']
        parts += [f'{found.launches} launches', f'{found.graphs} CUDA graphs', f'waits for the device: {waits}']
    task.write('', f'{name}, {_what(case, case.case_columns())}: {", ".join(parts)}.')
    task.table('kernel' if gpu else 'operator', 'share', 'ms', 'times')
    for line in found.lines:
        shown = line.name if len(line.name) <= 90 else f'{line.name[:87]}...'
        task.row(f'`{shown}`', f'{line.share:.1%}', f'{1e3 * line.seconds:.3f}', str(line.count))


# What is compiled ahead


def _compile(cases: Callable[[Plan], Sequence[Comparison]], which: slice, task: Task) -> None:
    """Run what later parts compile, so that PyTorch's cache on the disk has it."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 2  # several of these and the checks share the cores
    for case in cases(task.plan)[which]:
        side = 'ours' if getattr(case, 'compile', False) else case.COMPILED
        model = case.build_alone(side)
        case.peak_call(model, side, case.inputs(model))


def _ahead(name: str, cases: Callable[[Plan], Sequence[Comparison]], which: slice = slice(None)):
    return f'compile_{name}', partial(_compile, cases, which)


_BACKBONES = tuple(_ahead(f'backbone_{i}', _backbone_cases, slice(i, i + 1)) for i in range(3))
_IMAGES = _ahead('inference_d1', _inference_cases, slice(2)), _ahead('inference_d4', _inference_cases, slice(2, 3))
PARTS = (
    Part('correctness', 'Results on the device', correctness, 25),
    Part('op', 'Outlook attention', operation, 7, (_ahead('op', _op_cases),)),
    Part('backbone', 'Backbone', backbones, 11, _BACKBONES),
    Part('train', 'Training step', training_step, 10, (_ahead('train', _train_cases),)),
    Part('inference', 'Whole images', whole_images, 22, _IMAGES),
    # Of each batch the last case, whose graphs the others run too.
    Part('models', 'Beside other networks', other_networks, 10, (_ahead('models', _models_cases, slice(2, None, 3)),)),
    Part('profile', 'Profiles', profiles, 8),
    Part('memory', 'Memory of training VOLO-D5', large_training, 5),
    Part('saving', 'Saving a checkpoint', checkpoints, 3),
    Part('camvid', 'CamVid-11 from random weights', camvid, 12),
)
