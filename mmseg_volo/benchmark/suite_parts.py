"""The parts of the suite: what is measured, how large, and the goals beside the figures.

The goals are for bfloat16 on an H100 or better at the sizes here. On a CPU the same code runs on tiny sizes, where no
goal is judged.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from ..engine.runner import build_runner
from ..utils.config import load_config
from . import backbone, inference, models, op, saving, training
from .backbone import BackboneCase
from .cases import COMPILED, Case, columns_of
from .device_checks import CONFIGS, Finding, run_checks
from .measuring import environment, memory_here, timed
from .models import ModelCase
from .op import OpCase
from .peer import build, build_both, compiled, ready, segmentor
from .pictures import draw, noise, prepare
from .prediction import predict
from .profiling import Profile, profile_call
from .reporting import NOT_ASKED, Spread, ratio_of_memory, write_csv
from .saving import SaveCase
from .suite import Part, Plan, Task
from .training import TrainCase, Trainer

_COMPILING = 0.5  # of the time left, at most
_ROUNDS, _FEW = 5, 2


# Tables


def _goal(task: Task, value: float | None, text: str, least: float | None = None, most: float | None = None) -> str:
    """A goal, and whether a value meets it."""
    bound = f'≥ {least:g}' if least is not None else f'≤ {most:g}'
    said = f'{bound} {text}'
    if task.plan.tiny or value is None:
        return f'{said}: not judged'
    met = value >= least if least is not None else value <= most
    return f'{said}: {"met" if met else "**not met**"}'


def _ms(row: dict, name: str) -> str:
    spread = Spread.in_row(row, name)
    return str(spread if spread.median is None else Spread(*(1e3 * value for value in spread)))


def _gb(megabytes: float | None) -> str:
    return '–' if megabytes is None else f'{megabytes / 1e3:.2f}'


def _share(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


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


def _rounds(task: Task) -> int:
    return _FEW if task.plan.tiny or task.left() < 20 else _ROUNDS


def _compile_seconds(task: Task, cases: int = 1) -> float:
    """For compiling the peer of one of the cases that are still to come, so that all of them are measured."""
    return _COMPILING * max(task.left(), 0) / cases if task.plan.compiled else 0


def _has_time(task: Task, what: str, seconds: float = 0) -> bool:
    """Whether there is time for what takes about so many seconds on a GPU; else a row says so."""
    if task.left() > (0 if task.plan.tiny else seconds):
        return True
    task.row(what, 'no time left')
    return False


def _sides_table(task: Task) -> None:
    task.write("ms, median (least–greatest). Peak memory on a GPU: PyTorch's, model and optimizer included.")
    task.table(
        'what', 'stock', 'compiled', 'here', 'times faster', 'than compiled',
        'peak GB, stock', 'compiled', 'here', 'share', 'goals',
    )  # fmt: skip


def _sides_row(task: Task, what: str, row: dict, goals: Sequence[str]) -> None:
    task.row(
        what,
        *(_ms(row, f'{side}_s') for side in ('stock', COMPILED, 'ours')),
        str(Spread.in_row(row, 'times_faster')),
        str(Spread.in_row(row, 'times_faster_than_compiled')),
        *(_gb(row[f'{side}_peak_mb']) for side in ('stock', COMPILED, 'ours')),
        _share(ratio_of_memory(row)),
        '; '.join(goals) or '–',
    )


def _missing(rows: Sequence[dict], task: Task) -> None:
    """Why there is no compiled peer, where there is none."""
    reasons = {row['compiled_missing'] for row in rows} - {None, NOT_ASKED}
    if reasons:
        task.write('', f'No compiled peer in some rows: {"; ".join(sorted(reasons))}.')


# Correctness


def correctness(task: Task) -> None:
    task.write("Each result against float64, timm's VOLO or stock mmseg; TF32 off.")
    task.table('check', '', 'found', 's')

    def report(finding: Finding) -> None:
        verdict = f'**{finding.verdict}**' if finding.verdict == 'BAD' else finding.verdict
        task.row(finding.name, verdict, finding.what, f'{finding.seconds:.1f}')

    findings = run_checks(task.plan.device, report, task.left)
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ('ok', 'BAD', 'skipped')}
    task.write('', ', '.join(f'{count} {verdict}' for verdict, count in counts.items()) + '.')
    task.fine = not counts['BAD']


# Speed


def _op_cases(plan: Plan) -> list[OpCase]:
    shapes = [('d1', 64, 1, 'fp32')] if plan.tiny else [('d4', 1024, 4, 'bf16'), ('d1', 512, 1, 'bf16')]
    return [OpCase(*shape, mode, plan.device) for shape in shapes for mode in op.MODES]


def operation(task: Task) -> None:
    plan = task.plan
    found, rows = environment(plan.device, plan.threads), []
    copied = op.copy_gb_per_s(plan.device, 2)
    task.write(f'Outlook attention alone; a copy moves {copied:,.0f} GB/s. ms, median (least–greatest).')
    task.table('what', 'implementation', 'ms', 'times unfold/fold', 'times compiled', 'of a copy', 'memory', 'goals')
    implementations = [op.BASELINE, *[op.COMPILED] * plan.compiled, 'fused']
    todo = _op_cases(plan)
    for i, case in enumerate(todo):
        if not _has_time(task, str(case)):
            continue
        with _row(task, str(case)):
            of_case = op.compare(case, implementations, _rounds(task), copied, _compile_seconds(task, len(todo) - i))
            rows += [{**row, **found} for row in of_case]
            write_csv(plan.out / 'op.csv', rows)
            for row in of_case:
                goals = []
                if row['impl'] == 'fused' and case.image != 512:
                    times, copy, memory = (8, 0.7, None) if case.mode == 'forward' else (6, 0.5, 0.35)
                    goals = [_goal(task, row['times_faster'], '× unfold/fold', least=times)]
                    goals.append(_goal(task, row['share_of_copy'], 'of a copy', least=copy))
                    if memory:
                        goals.append(_goal(task, row['memory_ratio'], 'of the memory', most=memory))
                task.row(
                    str(case), row['impl'], _ms(row, 'seconds'), str(Spread.in_row(row, 'times_faster')),
                    str(Spread.in_row(row, 'times_faster_than_compiled')), f'{row["share_of_copy"]:.0%}',
                    _share(row['memory_ratio']), '; '.join(goals) or '–',
                )  # fmt: skip


def _backbone_cases(plan: Plan) -> list[BackboneCase]:
    if plan.tiny:
        return [BackboneCase(size=(64, 64), device=plan.device, threads=plan.threads)]
    # As graphs, as prediction runs them: launched one by one, the kernels wait for a slow host on every side.
    shared = dict(precision='bf16', device=plan.device, cuda_graph=True)
    small = dict(arch='d1', size=(512, 512), batch=16, **shared)
    cases = [BackboneCase(**small), BackboneCase(arch='d4', size=(1024, 1024), batch=1, **shared)]
    return [*cases, *[BackboneCase(**small, compile=True)] * plan.compiled]


def backbones(task: Task) -> None:
    found, rows = environment(task.plan.device, task.plan.threads), []
    _sides_table(task)
    todo = _backbone_cases(task.plan)
    for i, case in enumerate(todo):
        what = f'{case}, {case.size[0]} x {case.size[1]}'
        if not _has_time(task, what, 8):
            continue
        with _row(task, what):
            result = backbone.compare(case, _rounds(task), True, _compile_seconds(task, len(todo) - i))
            rows.append({**columns_of(case), **result, **found})
            write_csv(task.plan.out / 'backbone.csv', rows)
            goals = [_goal(task, rows[-1]['times_faster'], '× stock', least=1.5)]
            goals.append(_goal(task, rows[-1]['times_faster_than_compiled'], '× compiled', least=1.3))
            _sides_row(task, what, rows[-1], goals)
    _missing(rows, task)


def _train_case(plan: Plan) -> TrainCase:
    if plan.tiny:
        return TrainCase(size=(64, 64), classes=19, device=plan.device, threads=plan.threads)
    return TrainCase(size=(512, 512), batch=16, classes=150, precision='bf16', device=plan.device)


def training_step(task: Task) -> None:
    case = _train_case(task.plan)
    _sides_table(task)
    what = f'{case}, {case.size[0]} x {case.size[1]}'
    with _row(task, what):
        result = training.compare(case, _rounds(task), True, _compile_seconds(task))
        row = {**columns_of(case), **result, **environment(task.plan.device, task.plan.threads)}
        write_csv(task.plan.out / 'train.csv', [row])
        goals = [
            _goal(task, row['times_faster'], '× stock', least=1.5),
            _goal(task, row['times_faster_than_compiled'], '× compiled', least=1.25),
            _goal(task, ratio_of_memory(row), 'of the memory', most=0.6),
        ]
        _sides_row(task, what, row, goals)
        _missing([row], task)
        losses = ', '.join(f'{side} {row[f"{side}_loss"]:.4f}' for side in ('stock', 'ours'))
        task.write('', f'First loss: {losses}.')


def _inference_cases(plan: Plan) -> list[Case]:
    if plan.tiny:
        shared = dict(size=(64, 64), window=64, stride=43, classes=19, device=plan.device, threads=plan.threads)
        return [Case(views=1, **shared)]
    shared = dict(size=(1024, 2048), window=1024, stride=768, classes=19, precision='bf16', device=plan.device)
    return [Case(arch='d1', **shared), Case(arch='d1', views=1, **shared), Case(arch='d4', **shared)]


def whole_pictures(task: Task) -> None:
    found, rows, equal = environment(task.plan.device, task.plan.threads), [], []
    _sides_table(task)
    todo = _inference_cases(task.plan)
    for i, case in enumerate(todo):
        views = 'one view' if case.views == 1 else f'{case.views} views'
        what = f'VOLO-{case.arch.upper()}, {case.size[0]} x {case.size[1]}, {views}, {case.precision}'
        large = case.arch != 'd1'
        if not _has_time(task, what, 25 if large else 8):
            continue
        with _row(task, what):
            rounds = min(_rounds(task), 2 if large else 3)
            seconds = _compile_seconds(task, len(todo) - i)
            result = inference.compare(case, draw(case.size), rounds, True, seconds)
            row = {**columns_of(case), **result, **found}
            rows.append(row)
            write_csv(task.plan.out / 'inference.csv', rows)
            if case.views == 1:
                goals = [_goal(task, 1e3 * row['ours_s'], 'ms on an H100', most=26)]
            else:
                goals = [_goal(task, row['times_faster'], '× stock', least=2.5)]
                goals.append(_goal(task, ratio_of_memory(row), 'of the memory', most=0.5))
            _sides_row(task, what, row, goals)
            equal.append(f'{row["equal_pixels"]:.3%}')
    _missing(rows, task)
    if equal:
        task.write('', f'Pixels with the same class as stock: {", ".join(equal)}.')


def other_networks(task: Task) -> None:
    plan = task.plan
    batches = (1,) if plan.tiny else (1, 16)
    peers = ['volo-d1', 'volo-d1-timm', *[models.COMPILED] * plan.compiled]
    runs = {
        'network': ['volo-d1'],
        'predict': peers,
        'logits': [*peers, *([] if plan.tiny else ['swin-t', 'mit-b5'])],
    }
    said = {
        'network': 'windows through the network, as prediction runs them',
        'predict': 'prepared pictures to class ids',
        'logits': 'forward pass to logits in full size, eager',
    }
    size, precision = ((64, 64), 'fp32') if plan.tiny else ((512, 512), 'bf16')
    found, rows, built = environment(plan.device, plan.threads), [], {}
    task.write(f'With UPerHead and {models.CLASSES} classes, {size[0]} x {size[1]}, random weights.')
    task.table('network', 'run', 'batch', 'images/s', 'times faster than volo-d1', 'peak GB', 'goal')
    for batch, (run, names) in ((batch, item) for batch in batches for item in runs.items()):
        if not _has_time(task, f'{run}, batch {batch}', 3):
            continue
        with _row(task, f'{run}, batch {batch}'):
            shared = dict(size=size, batch=batch, precision=precision, device=plan.device, threads=plan.threads)
            cases = [ModelCase(model=name, run=run, **shared) for name in names]
            for row, _ in models.compare(cases, _rounds(task), True, _compile_seconds(task) or 1e-3, built):
                rows.append({**row, **found})
                write_csv(plan.out / 'models.csv', rows)
                goal = '–'
                if (row['model'], run, batch) == ('volo-d1', 'network', 1):
                    goal = _goal(task, row['images_per_s'], 'images/s on an H100', least=570)
                speeds = [str(Spread.in_row(row, name)) for name in ('images_per_s', 'times_faster')]
                task.row(row['model'], said[run], str(batch), *speeds, _gb(row['peak_mb']), goal)


def checkpoints(task: Task) -> None:
    plan = task.plan
    size = (64, 64) if plan.tiny else (256, 256)
    case = SaveCase(size=size, classes=19 if plan.tiny else 150, device=plan.device, folder=str(task.folder))
    task.write("A checkpoint of VOLO-D1 in training: how long training waits, mmengine's way and here.")
    task.table('file (MB)', 'stock (s)', 'here (s)', 'beside training (s)', 'share of time, every 16,000 iterations')
    with _row(task, str(case)):
        row = {**columns_of(case), **saving.compare(case, _FEW), **environment(plan.device, plan.threads)}
        write_csv(plan.out / 'saving.csv', [row])
        spreads = [str(Spread.in_row(row, name)) for name in ('stock_s', 'ours_s', 'beside_s')]
        task.row(f'{row["file_mb"]:.0f}', *spreads, f'{row["share"]:.1e}')


def large_training(task: Task) -> None:
    """Two pictures: the head's pyramid pools to one pixel, whose batch norm cannot train on a single value."""
    plan = task.plan
    shared = dict(device=plan.device, checkpointing=True)
    case = TrainCase(arch='d1', size=(64, 64), classes=19, threads=plan.threads, **shared)
    if not plan.tiny:
        case = TrainCase(arch='d5', size=(1024, 1024), classes=150, precision='bf16', **shared)
    task.write(
        'Training with activation checkpointing, batch 2, the least that the batch norm of UPerHead can train on.'
    )
    task.table('what', 'ms', 'peak GB', 'goal')
    what = f'{case}, {case.size[0]} x {case.size[1]}'
    with _row(task, what):
        trainer = Trainer(segmentor('ours', case.arch, case.classes, crop=case.size, checkpointing=True), case)
        trainer.prepare()
        trainer.step()
        peak = None
        if not plan.tiny:
            held = trainer.model, trainer.optimizer, trainer.batch['inputs']
            peak = memory_here(trainer.step, case.device, *held).peak
        seconds = median(timed(trainer.step, case.device)[0] for _ in range(_FEW))
        goal = _goal(task, None if peak is None else peak / 1e3, 'GB', most=40)
        task.row(what, f'{1e3 * seconds:.3g}', _gb(peak), goal)


# Profiles


def profiles(task: Task) -> None:
    calls = {'backbone': _backbone_call, 'training step': _training_call, 'prediction': _prediction_call}
    for name, make in calls.items():
        if task.left() <= (0 if task.plan.tiny else 6):
            task.write('', f'{name}: no time left.')
            continue
        what, call = make(task.plan)
        _write_profile(task, what, profile_call(call, task.plan.device))
        del call
        if not task.plan.tiny:
            torch.cuda.empty_cache()


def _backbone_call(plan: Plan) -> tuple[str, Callable[[], object]]:
    case = _backbone_cases(plan)[0]
    model = backbone.build_backbones(case)['ours']
    return f'Backbone, {case}', partial(backbone.run, model, case, noise(case))


def _training_call(plan: Plan) -> tuple[str, Callable[[], object]]:
    case = _train_case(plan)
    trainer = Trainer(segmentor('ours', case.arch, case.classes, crop=case.size), case)
    trainer.prepare()
    return f'Training step, {case}', trainer.step


def _prediction_call(plan: Plan) -> tuple[str, Callable[[], object]]:
    case = _inference_cases(plan)[0]
    model, data = ready(build(case, 'ours'), case, 'ours'), prepare(draw(case.size), case.views)
    what = f'Prediction, VOLO-{case.arch.upper()}, {case.size[0]} x {case.size[1]}, views: {case.views}'
    return what, partial(predict, model, case, 'ours', data)


def _write_profile(task: Task, what: str, found: Profile) -> None:
    parts = [f'{1e3 * found.seconds:.2f} ms a call']
    if found.busy is not None:
        busy = found.busy / found.seconds
        parts += [f'device busy {1e3 * found.busy:.2f} ms ({busy:.0%})', f'{found.launches} launches']
        parts += [f'{found.graphs} CUDA graphs', _waits(found.waits)]
    task.write('', f'{what}: {", ".join(parts)}.')
    task.table('kernel' if found.busy is not None else 'operator', 'share', 'ms', 'times')
    for line in found.lines:
        name = line.name if len(line.name) <= 90 else f'{line.name[:87]}...'
        task.row(f'`{name}`', f'{line.share:.1%}', f'{1e3 * line.seconds:.3f}', str(line.count))


def _waits(waits: dict[str, int]) -> str:
    return 'waits for the device: ' + (', '.join(f'{name} {count}' for name, count in waits.items()) or 'none')


# Training on real pictures


@HOOKS.register_module()
class ClockHook(Hook):
    """Times the iterations, and ends training when its time is over.

    Args:
        seconds: until the end, from the first iteration.
        skip: iterations at the beginning that are not timed.
    """

    def __init__(self, seconds: float, skip: int = 10):
        self.seconds, self.skip = seconds, skip
        self.timed, self._start, self._begun, self._last = 0, 0.0, 0.0, 0.0

    def before_train(self, runner) -> None:
        self._begun = time.monotonic()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        now = time.monotonic()
        if runner.iter == self.skip:
            self._start = now
        elif runner.iter > self.skip:
            self.timed, self._last = self.timed + 1, now
        if now - self._begun > self.seconds:
            runner.train_loop.stop_training = True

    @property
    def seconds_each(self) -> float | None:
        """Of an iteration, its loading included."""
        return (self._last - self._start) / self.timed if self.timed else None


def camvid(task: Task) -> None:
    """VOLO-D1 on CamVid-11 from random weights while there is time, then on all validation pictures (on a CPU two)."""
    plan, folder = task.plan, task.plan.camvid
    path = CONFIGS / 'volo_d1_camvid.py'
    if folder is None or not (folder / 'labels/val').is_dir():
        task.write('Skipped: needs CamVid-11 in data/camvid or --camvid DIR, as tools/prepare_data.py lays it out.')
        return
    if not path.is_file():
        task.write('Skipped: needs configs/ of a clone of the repository.')
        return
    step, crop, batch = _camvid_step(plan)
    seconds = 0.75 * task.left() - 10 if not plan.tiny else 60
    iterations = max(int(seconds / (1.3 * step)), 2) if not plan.tiny else 2
    if seconds < 5 and not plan.tiny:
        task.write('No time left.')
        return
    config = load_config(str(path), None, str(task.folder / 'camvid'))
    suffix = next((folder / 'images/val').iterdir()).suffix
    workers = 0 if plan.tiny else max(min(torch.multiprocessing.cpu_count() - 2, 14), 0)
    data = {'dataset.data_root': f'{folder}/', 'dataset.img_suffix': suffix}
    changes = {
        'model.data_preprocessor.size': crop,
        'model.backbone.img_size': crop,
        'model.backbone.init_cfg': None,
        'model.backbone.drop_path_rate': 0.0,
        'train_dataloader.batch_size': batch,
        'train_dataloader.dataset.pipeline.3.crop_size': crop,
        'train_cfg.max_iters': iterations,
        'train_cfg.val_interval': iterations + 1,
        'optim_wrapper.type': 'BFloat16OptimWrapper',
        'optim_wrapper.optimizer.lr': 1e-3,
        'optim_wrapper.optimizer.weight_decay': 0.05,
        'optim_wrapper.clip_grad': dict(max_norm=1.0),
        'param_scheduler.0.end': iterations // 20 + 1,
        'param_scheduler.1.begin': iterations // 20 + 1,
        'param_scheduler.1.end': iterations,
        'default_hooks.checkpoint.interval': iterations + 1,
        'default_hooks.checkpoint.save_last': False,
        'default_hooks.checkpoint.save_best': None,
        'default_hooks.logger.interval': max(iterations // 10, 1),
        'randomness.seed': 0,
    }
    for loader, count in (('train_dataloader', workers), ('val_dataloader', min(workers, 4))):
        changes.update({f'{loader}.{key}': value for key, value in data.items()})
        changes.update({f'{loader}.num_workers': count, f'{loader}.persistent_workers': count > 0})
    if plan.tiny:
        changes['val_dataloader.dataset.indices'] = 2  # a CPU takes a second for each
    config.merge_from_dict(changes)
    config.custom_hooks.append(dict(type='ClockHook', seconds=seconds, skip=0 if plan.tiny else 10))
    runner = build_runner(config)
    runner.train()
    clock = next(hook for hook in runner.hooks if isinstance(hook, ClockHook))
    peak = None if plan.tiny else torch.cuda.max_memory_allocated(plan.device) / 1e6
    done, pictures = runner.iter, len(runner.train_dataloader.dataset)
    metrics = runner.val()
    each = clock.seconds_each
    task.write(
        f'VOLO-D1 + UPerHead, random weights, crop {crop[0]} x {crop[1]}, batch {batch}, bfloat16, AdamW 1e-3, '
        f'{pictures} training and {len(runner.val_dataloader.dataset)} validation pictures.'
    )
    task.table('iterations', 's', 'images/s, loading included', 'peak GB', 'mIoU (%)', 'pixel accuracy (%)')
    speed = '–' if not each else f'{batch / each:.0f}'
    spent = '–' if not each else f'{each * clock.timed:.0f}'
    task.row(str(done), spent, speed, _gb(peak), f'{metrics["mIoU"]:.1f}', f'{metrics["aAcc"]:.1f}')


def _camvid_step(plan: Plan) -> tuple[float, tuple[int, int], int]:
    """Seconds of a step on a prepared batch, the crop and the batch size."""
    crop, batch, times = ((64, 64), 2, 1) if plan.tiny else ((352, 480), 16, 5)
    precision = 'fp32' if plan.tiny else 'bf16'
    case = TrainCase(size=crop, batch=batch, classes=19, precision=precision, device=plan.device)
    trainer = Trainer(segmentor('ours', 'd1', case.classes, crop=crop), case)
    trainer.prepare()
    for _ in range(times):
        trainer.step()
    return median(timed(trainer.step, plan.device)[0] for _ in range(times)), crop, batch


# What is compiled ahead


def compile_operation(plan: Plan) -> None:
    for case in _op_cases(plan):
        op.run(case, op.COMPILED, op.draw_inputs(case, 0))


def compile_small_backbone(plan: Plan) -> None:
    _exhaust(backbone.forward_steps(_backbone_cases(plan)[0], COMPILED))


def compile_large_backbone(plan: Plan) -> None:
    _exhaust(backbone.forward_steps(_backbone_cases(plan)[1], COMPILED))


def compile_our_backbone(plan: Plan) -> None:
    _exhaust(backbone.forward_steps(_backbone_cases(plan)[-1], 'ours'))


def compile_training(plan: Plan) -> None:
    _exhaust(training.training_steps(_train_case(plan), COMPILED))


def compile_small_prediction(plan: Plan) -> None:
    _compile_predictions([case for case in _inference_cases(plan) if case.arch == 'd1'])


def compile_large_prediction(plan: Plan) -> None:
    _compile_predictions([case for case in _inference_cases(plan) if case.arch != 'd1'])


def compile_networks(plan: Plan) -> None:
    for batch in (1, 16):
        case = ModelCase(model=models.COMPILED, size=(512, 512), batch=batch, precision='bf16', device=plan.device)
        _exhaust(models.forward_steps(case))


def _compile_predictions(cases: Sequence[Case]) -> None:
    for case in cases:
        model = compiled(build_both(case, draw(case.size))['stock'])
        predict(model, case, COMPILED, prepare(draw(case.size), case.views))


def _exhaust(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


PARTS = (
    Part('correctness', 'Results on the device', correctness, 25),
    Part('op', 'Outlook attention', operation, 7, (compile_operation,)),
    Part('backbone', 'Backbone', backbones, 11, (compile_small_backbone, compile_large_backbone, compile_our_backbone)),
    Part('train', 'Training step', training_step, 10, (compile_training,)),
    Part('inference', 'Whole pictures', whole_pictures, 22, (compile_small_prediction, compile_large_prediction)),
    Part('models', 'Beside other networks', other_networks, 10, (compile_networks,)),
    Part('profile', 'Profiles', profiles, 8),
    Part('memory', 'Memory of training VOLO-D5', large_training, 5),
    Part('saving', 'Saving a checkpoint', checkpoints, 3),
    Part('camvid', 'CamVid-11 from random weights', camvid, 12),
)


def find_camvid(given: str | None) -> Path | None:
    """The folder that was named, or data/camvid where it is."""
    if given:
        return Path(given)
    here = Path('data/camvid')
    return here if (here / 'labels/val').is_dir() else None
