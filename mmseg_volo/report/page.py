"""The page: what it says of one run or of several, and the HTML file."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import ConfigError
from ..utils.files import atomic_write
from ..version import __version__
from .figures import Figure, Series, confusions, curves, heat_map, number, reliability
from .pictures import colours, shown_pictures
from .reading import Evaluation, Run, read_runs, setting

_NOISE = ('work_dir', 'launcher')  # differ between any two runs
_DIFFERENCES = 200


def write_report(work_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page about runs, one file that needs nothing else.

    Args:
        work_dirs: folders that training or testing wrote to.
        out: the file; by default ``report.html`` in the first of them.

    Returns:
        The file.

    Raises:
        ConfigError: a folder that is none, or has no logs; ``out`` is a folder.
        OSError: ``out`` cannot be written.
    """
    runs = read_runs(work_dirs)
    out = Path(out) if out else Path(work_dirs[0]) / 'report.html'
    if out.is_dir():
        raise ConfigError(f'{out} is a folder; --out is the file to write, such as {out / "report.html"}')
    try:
        with atomic_write(out) as part:
            part.touch()  # an error shows before the work
            part.write_text(render(runs), encoding='utf-8')
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f'the report cannot be written ({reason}); give another --out', str(out)) from error
    return out


def render(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters['number'] = number
    environment.globals['is_text'] = _is_text
    chosen = _chosen(runs)
    return environment.get_template('page.html').render(
        title='Report: ' + ', '.join(run.name for run in runs),
        version=__version__,
        date=datetime.now().astimezone().strftime('%Y-%m-%d %H:%M'),
        runs=runs,
        summary=_summary(runs, chosen),
        curves=_curves(runs),
        evaluations=_evaluations(runs),
        classes=_per_class(runs, chosen) if any(chosen) else None,
        details=[_details(run, one) for run, one in zip(runs, chosen, strict=True)],
        speed=_speed(runs, chosen),
        differences=_differences(runs),
        versions=_versions(runs, chosen),
    )


def _chosen(runs: Sequence[Run]) -> list[Evaluation | None]:
    """The evaluation of each run that is shown: its newest test, of one kind where all have that; else validation."""
    for aug_test in (True, False):
        newest = [_last(e for e in run.evaluations if e.kind == 'test' and e.aug_test == aug_test) for run in runs]
        if len(runs) > 1 and all(newest):
            return newest
    return [_last(e for e in run.evaluations if e.kind == 'test') or _last(iter(run.evaluations)) for run in runs]


def _last(items) -> Evaluation | None:
    return next(reversed(list(items)), None)


class Table:
    """Rows of a name and a value for each run; the best value is marked where there are several."""

    def __init__(self):
        self.rows: list[tuple[str, list[str], set[int]]] = []

    def add(self, name: str, values: Sequence, form: Callable | None = None, best: Callable | None = None) -> None:
        """A row; left out where no run has a value. ``best`` is max or min."""
        if all(value in (None, '') for value in values):
            return
        marked: set[int] = set()
        there = [value for value in values if isinstance(value, (int, float)) and np.isfinite(value)]
        if best and len(there) > 1 and min(there) != max(there):
            marked = {i for i, value in enumerate(values) if value == best(there)}
        cells = ['–' if value in (None, '') else (form or str)(value) for value in values]
        self.rows.append((name, cells, marked))


def _summary(runs: Sequence[Run], chosen: Sequence[Evaluation | None]) -> Table:
    table = Table()
    for name, pick, form, best in (
        ('mIoU of the evaluation shown (%)', lambda run, e: e and e.miou, _two, max),
        ('Pixel accuracy (%)', lambda run, e: e and e.metrics.get('aAcc'), _two, max),
        ('Mean class accuracy (%)', lambda run, e: e and e.metrics.get('mAcc'), _two, max),
        ('Evaluation shown', lambda run, e: e and e.title, None, None),
        ('Checkpoint', lambda run, e: e and e.record.get('checkpoint'), None, None),
        ('Best validation mIoU (%)', lambda run, e: run.best and run.best[1]['mIoU'], _two, max),
        ('… at iteration', lambda run, e: run.best and run.best[0], _whole, None),
        ('Last validation mIoU (%)', lambda run, e: _last_miou(run), _two, max),
        ('Iterations logged', lambda run, e: max(run.train, default=None), _whole, None),
        ('Iterations planned', lambda run, e: setting(run, 'train_cfg.max_iters'), _whole, None),
        ('Model', lambda run, e: _model(run), None, None),
        ('Data set', lambda run, e: _data(run, e), None, None),
        ('Pictures evaluated', lambda run, e: e and e.dataset.get('pictures'), _whole, None),
        ('Date', lambda run, e: _date(run), None, None),
        ('Training starts', lambda run, e: run.starts if run.starts > 1 else None, _whole, None),
        ('Checkpoints in the folder', lambda run, e: _checkpoints(run), None, None),
        ('Folder', lambda run, e: str(run.folder), None, None),
    ):
        table.add(name, [pick(run, e) for run, e in zip(runs, chosen, strict=True)], form, best)
    return table


def _curves(runs: Sequence[Run]) -> list[Figure]:
    figures = []
    losses = [key for run in runs for row in run.train.values() for key in row if key.startswith('loss')]
    for title, unit, rows, key, best in (
        ('Training loss', 'loss', 'train', 'loss' if 'loss' in losses else next(iter(losses), 'loss'), 'least'),
        ('Validation mIoU', 'mIoU (%)', 'val', 'mIoU', 'greatest'),
        ('Validation pixel accuracy', 'aAcc (%)', 'val', 'aAcc', 'greatest'),
        ('Validation mean class accuracy', 'mAcc (%)', 'val', 'mAcc', 'greatest'),
        ('Learning rate', 'learning rate', 'train', 'lr', 'greatest'),
        ('Gradient norm', 'gradient norm', 'train', 'grad_norm', 'greatest'),
    ):
        series = []
        for run in runs:
            points = [(x, row[key]) for x, row in getattr(run, rows).items() if isinstance(row.get(key), (int, float))]
            series.append(Series(run.name, [x for x, _ in points], [y for _, y in points]))
        log = key.startswith('loss') or key == 'grad_norm'
        figures.append(curves(title, unit, series, best, log))
    figures.insert(1, _head_losses(runs))
    return [figure for figure in figures if figure is not None]


def _head_losses(runs: Sequence[Run]) -> Figure | None:
    """Training and validation loss of the decode head, of the runs whose validations measured it."""
    series = []
    for run in runs:
        train = [
            (x, [value for key, value in row.items() if key.startswith('decode.') and 'loss' in key])
            for x, row in run.train.items()
        ]
        train = [(x, sum(values)) for x, values in train if values]
        val = [(x, row['val/loss']) for x, row in run.val.items() if isinstance(row.get('val/loss'), (int, float))]
        for what, points in (('training', train), ('validation', val)) if val else ():
            name = f'{run.name}, {what}' if len(runs) > 1 else what
            series.append(Series(name, [x for x, _ in points], [y for _, y in points]))
    return curves('Loss of the decode head', 'loss', series, 'least', True)


def _evaluations(runs: Sequence[Run]) -> list[list[str]]:
    rows = []
    for run in runs:
        name = [run.name] if len(runs) > 1 else []
        for e in run.evaluations:
            cells = [e.title, *(_two(e.metrics.get(key)) for key in ('mIoU', 'aAcc', 'mAcc'))]
            pictures = e.dataset.get('pictures')
            checkpoint = Path(str(e.record.get('checkpoint') or '–')).name
            rows.append([*name, *cells, _whole(pictures), checkpoint, e.date[:16].replace('T', ' ')])
        for stamp, row in sorted(run.tested.items()):
            cells = [_two(row.get(key)) for key in ('mIoU', 'aAcc', 'mAcc')]
            rows.append([*name, 'Test without a record', *cells, '–', '–', _stamp_date(stamp)])
    return rows


def _per_class(runs: Sequence[Run], chosen: Sequence[Evaluation | None]) -> dict:
    """Rows by class: IoU of each run, and where there is one run, what is behind it."""
    names = list(dict.fromkeys(name for e in chosen if e for name in e.classes))
    rows = []
    for name in names:
        found = [(e, e.classes.index(name)) if e and name in e.classes else None for e in chosen]
        ious = [100 * float(e.iou[k]) if e is not None else None for e, k in (f or (None, 0) for f in found)]
        finite = [iou for iou in ious if iou is not None and np.isfinite(iou)]
        best = {i for i, iou in enumerate(ious) if len(finite) > 1 and min(finite) < max(finite) and iou == max(finite)}
        first = next(f for f in found if f)
        row = dict(
            name=name,
            colour='#{:02x}{:02x}{:02x}'.format(*colours(first[0])[first[1]]),
            ious=[None if iou is None or not np.isfinite(iou) else round(iou, 2) for iou in ious],
            best=best,
            counts=[],
        )
        if len(runs) == 1:
            e, k = first
            accuracy = 100 * float(e.accuracy[k])
            row['accuracy'] = _two(accuracy) if np.isfinite(accuracy) else '–'
            row['counts'] = [f'{int(values[k]):,}' for values in (e.truth, e.predicted, e.right)]
        rows.append(row)
    return dict(rows=rows, absent=any(iou is None for row in rows for iou in row['ious']))


def _details(run: Run, evaluation: Evaluation | None) -> dict:
    """What is shown of each run by itself."""
    if evaluation is None:
        return dict(run=run, evaluation=None)
    confused = confusions(evaluation.classes, evaluation.confusion, 100)
    worst, best = shown_pictures(evaluation)
    never = [
        name for name, truth, right in zip(evaluation.classes, evaluation.truth, evaluation.right, strict=True)
        if truth and not right
    ]  # fmt: skip
    return dict(
        run=run,
        evaluation=evaluation,
        heat_map=heat_map(run.name, evaluation.classes, evaluation.confusion, confused),
        confused=confused[:10],
        never=never,
        worst=worst,
        best=best,
        reliability=reliability(run.name, evaluation.calibration) if evaluation.calibration else None,
    )


def _speed(runs: Sequence[Run], chosen: Sequence[Evaluation | None]) -> Table:
    table = Table()
    times = [_typical(run, 'time') for run in runs]
    batches = [_batch(run) for run in runs]
    rates = [batch / time if batch and time else None for batch, time in zip(batches, times, strict=True)]
    waits = [_typical(run, 'data_time') for run in runs]
    hours = [time * max(run.train) / 3600 if time else None for run, time in zip(runs, times, strict=True)]
    memory = [
        max((row['memory'] for row in run.train.values() if isinstance(row.get('memory'), (int, float))), default=None)
        for run in runs
    ]
    tests = [e.seconds if e else None for e in chosen]
    table.add('Training, pictures a second', rates, number, max)
    table.add('Training, seconds an iteration (median)', times, number, min)
    table.add('… of which waiting for data', waits, number, min)
    table.add('Pictures in a batch, all processes', batches, _whole)
    table.add('Training time, hours (about)', hours, number)
    table.add('Peak GPU memory in training (MB)', memory, _whole, min)
    table.add('Evaluation, pictures a second', [1 / t if t else None for t in tests], number, max)
    table.add('Evaluation, seconds a picture', tests, number, min)
    return table


def _versions(runs: Sequence[Run], chosen: Sequence[Evaluation | None]) -> Table:
    table = Table()
    found = [{f'Training: {key}': value for key, value in run.environment.items()} for run in runs]
    for one, e in zip(found, chosen, strict=True):
        one.update({f'Evaluation: {k}': str(v) for k, v in e.environment.items()} if e else {})
    for key in dict.fromkeys(key for one in found for key in one):
        table.add(key, [one.get(key) for one in found])
    return table


def _differences(runs: Sequence[Run]) -> dict:
    """Settings that are not the same in all runs."""
    if len(runs) < 2:
        return dict(rows=[], more=0)
    keys = dict.fromkeys(key for run in runs for key in run.config if key.split('.')[0] not in _NOISE)
    rows = [[key, *(run.config.get(key, '–') for run in runs)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return dict(rows=rows[:_DIFFERENCES], more=max(len(rows) - _DIFFERENCES, 0))


def _is_text(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column of a table has words, which are read from the left."""
    return any(cells[column][:1].isalpha() for cells in rows)


def _typical(run: Run, key: str) -> float | None:
    """Median over what was logged after the first time, which has the start in it."""
    values = [
        row[key] for row in run.train.values() if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])
    ]
    return median(values[1:] or values) if values else None


def _batch(run: Run) -> int | None:
    size = setting(run, 'train_dataloader.batch_size')
    processes = run.environment.get('GPU number', '1')
    return size * int(processes) if isinstance(size, int) and processes.isdigit() else None


def _last_miou(run: Run) -> float | None:
    scored = [row['mIoU'] for row in run.val.values() if isinstance(row.get('mIoU'), (int, float))]
    return scored[-1] if scored else None


def _model(run: Run) -> str | None:
    for root in ('model', 'model.module'):  # the latter with test-time augmentation
        backbone, head = (setting(run, f'{root}.{part}.type') for part in ('backbone', 'decode_head'))
        if backbone:
            arch = setting(run, f'{root}.backbone.arch')
            return ' '.join(str(part) for part in (backbone, arch if isinstance(arch, str) else None, head) if part)
    return None


def _data(run: Run, evaluation: Evaluation | None) -> str | None:
    if evaluation and evaluation.dataset:
        given = evaluation.dataset
        return f'{given.get("type")}, {given.get("img_path") or given.get("data_root")}'
    return setting(run, 'train_dataloader.dataset.type')


def _date(run: Run) -> str:
    first, last = _stamp_date(run.stamps[0]), _stamp_date(run.stamps[-1])
    return first if first == last else f'{first} to {last}'


def _stamp_date(stamp: str) -> str:
    return f'{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]}'


def _checkpoints(run: Run) -> str | None:
    names = run.checkpoints
    return ', '.join(names if len(names) <= 5 else [*names[:2], f'… {len(names) - 4} more …', *names[-2:]]) or None


def _two(value: float | None) -> str:
    return '–' if value is None or not np.isfinite(value) else f'{value:.2f}'


def _whole(value: object) -> str:
    return f'{value:,.0f}' if isinstance(value, (int, float)) else '–'
