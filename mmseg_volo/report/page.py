"""Collect what the report says about the runs, and write the HTML file from the template ``page.html``."""

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
from .images import hex_colours, shown_images
from .reading import Evaluation, Run, read_runs


def write_report(work_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one self-contained HTML file about runs.

    Args:
        work_dirs: work dirs of training or testing.
        out: the file; default: ``report.html`` in the first work dir.

    Returns:
        The path of the file.

    Raises:
        ConfigError: a work dir does not exist or has no logs, or ``out`` is a folder.
        OSError: ``out`` cannot be written.
    """
    runs = read_runs(work_dirs)
    out = Path(out) if out else Path(work_dirs[0]) / 'report.html'
    if out.is_dir():
        raise ConfigError(f'{out} is a folder; --out is the file to write, such as {out / "report.html"}')
    try:
        with atomic_write(out) as part:
            part.touch()  # report an unwritable file before the work
            part.write_text(render(runs), encoding='utf-8')
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f'the report cannot be written ({reason}); give another --out', str(out)) from error
    return out


def render(runs: Sequence[Run]) -> str:
    """Return the HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals['is_text'] = _is_text
    chosen = _chosen(runs)
    return environment.get_template('page.html').render(
        title='Report: ' + ', '.join(run.name for run in runs),
        version=__version__,
        date=datetime.now().astimezone().strftime('%Y-%m-%d %H:%M'),
        runs=runs,
        summary=_rows(runs, chosen, _SUMMARY),
        curves=_curves(runs),
        evaluations=_evaluations(runs),
        classes=_per_class(runs, chosen) if any(chosen) else [],
        details=[_details(run, one) for run, one in zip(runs, chosen, strict=True)],
        speed=_rows(runs, chosen, _SPEED),
        differences=_differences(runs),
        versions=_rows(runs, chosen, _versions(runs, chosen)),
    )


def _chosen(runs: Sequence[Run]) -> list[Evaluation | None]:
    """Choose the evaluation to show of each run: its newest test, of one kind if all runs have it; else validation."""
    for aug_test in (True, False):
        newest = [_last(e for e in run.evaluations if e.kind == 'test' and e.aug_test == aug_test) for run in runs]
        if len(runs) > 1 and all(newest):
            return newest
    return [_last(e for e in run.evaluations if e.kind == 'test') or _last(run.evaluations) for run in runs]


def _last(items) -> Evaluation | None:
    return next(reversed(list(items)), None)


Line = tuple[str, Callable[[Run, Evaluation | None], object], Callable | None, Callable | None]


def _rows(runs: Sequence[Run], chosen: Sequence[Evaluation | None], lines: Sequence[Line]) -> list[tuple]:
    """Return the rows of a table: name, one cell per run, and the indices of the best cells.

    Args:
        runs, chosen: the runs, and the evaluation of each.
        lines: (name, function of run and evaluation that returns a value, function that formats it, min or max for the
            best one). Lines without any value are left out.
    """
    rows = []
    for name, pick, form, best in lines:
        values = [pick(run, e) for run, e in zip(runs, chosen, strict=True)]
        if any(value not in (None, '') for value in values):
            cells = ['–' if value in (None, '') else (form or str)(value) for value in values]
            rows.append((name, cells, _best(values, best) if best else set()))
    return rows


def _best(values: Sequence, best: Callable) -> set[int]:
    """Return the indices of the best values, if there are different ones."""
    known = {value for value in values if isinstance(value, (int, float)) and np.isfinite(value)}
    return {i for i, value in enumerate(values) if value == best(known)} if len(known) > 1 else set()


def _two(value: float | None) -> str:
    return '–' if value is None or not np.isfinite(value) else f'{value:.2f}'


def _whole(value: object) -> str:
    return f'{value:,.0f}' if isinstance(value, (int, float)) else '–'


def _model(run: Run, _) -> str | None:
    for root in ('model', 'model.module'):  # the latter with test-time augmentation
        parts = [run.config.get(f'{root}.{key}') for key in ('backbone.type', 'backbone.arch', 'decode_head.type')]
        if parts[0]:
            return ' '.join(part for part in parts if isinstance(part, str))
    return None


def _data(run: Run, evaluation: Evaluation | None) -> object:
    if evaluation and (dataset := evaluation.dataset):
        return f'{dataset.get("type")}, {dataset.get("img_path") or dataset.get("data_root")}'
    return run.config.get('train_dataloader.dataset.type')


def _date(run: Run, _) -> str:
    return ' to '.join(dict.fromkeys(_date_of(stamp) for stamp in (run.stamps[0], run.stamps[-1])))


def _date_of(stamp: str) -> str:
    return f'{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]}'


def _checkpoints(run: Run, _) -> str:
    names = run.checkpoints
    return ', '.join(names if len(names) <= 5 else [*names[:2], f'… {len(names) - 4} more …', *names[-2:]])


_SUMMARY: Sequence[Line] = (
    ('mIoU of the evaluation shown (%)', lambda run, e: e and e.miou, _two, max),
    ('Pixel accuracy (%)', lambda run, e: e and e.metrics.get('aAcc'), _two, max),
    ('Mean class accuracy (%)', lambda run, e: e and e.metrics.get('mAcc'), _two, max),
    ('Boundary mIoU (%)', lambda run, e: e and e.percent.get('boundary.mIoU'), _two, max),
    ('mIoU of single images (%), 5 % are below', lambda run, e: e and e.percent.get('mIoU_of_pictures.5%'), _two, max),
    ('… half are below', lambda run, e: e and e.percent.get('mIoU_of_pictures.50%'), _two, max),
    ('… 5 % are above', lambda run, e: e and e.percent.get('mIoU_of_pictures.95%'), _two, max),
    ('Calibration error (%)', lambda run, e: e and e.percent.get('calibration.ece'), _two, min),
    ('Evaluation shown', lambda run, e: e and e.title, None, None),
    ('Checkpoint', lambda run, e: e and e.record.get('checkpoint'), None, None),
    ('Best validation mIoU (%)', lambda run, e: run.best and run.best[1], _two, max),
    ('… at iteration', lambda run, e: run.best and run.best[0], _whole, None),
    ('Last validation mIoU (%)', lambda run, e: next((y for _, y in run.points('val', 'mIoU')[::-1]), None), _two, max),
    ('Iterations logged', lambda run, e: max(run.train, default=None), _whole, None),
    ('Iterations planned', lambda run, e: run.config.get('train_cfg.max_iters'), _whole, None),
    ('Model', _model, None, None),
    ('Data set', _data, None, None),
    ('Images evaluated', lambda run, e: e and e.dataset.get('pictures'), _whole, None),
    ('Date', _date, None, None),
    ('Starts of training', lambda run, e: run.starts if run.starts > 1 else None, _whole, None),
    ('Checkpoints in the folder', _checkpoints, None, None),
    ('Folder', lambda run, e: run.folder, None, None),
)


def _typical(run: Run, key: str) -> float | None:
    """Return the median of a logged duration without the first value, which includes the start."""
    values = [value for _, value in run.points('train', key) if np.isfinite(value)]
    return median(values[1:] or values) if values else None


def _batch(run: Run, _) -> int | None:
    size = run.config.get('train_dataloader.batch_size')
    processes = run.environment.get('GPU number', '1')
    return size * int(processes) if isinstance(size, int) and processes.isdigit() else None


def _rate(run: Run, _) -> float | None:
    batch, time = _batch(run, _), _typical(run, 'time')
    return batch / time if batch and time else None


def _hours(run: Run, _) -> float | None:
    time = _typical(run, 'time')
    return time * max(run.train) / 3600 if time else None


_SPEED: Sequence[Line] = (
    ('Training, images per second', _rate, number, max),
    ('Training, seconds per iteration (median)', lambda run, e: _typical(run, 'time'), number, min),
    ('… of which waiting for data', lambda run, e: _typical(run, 'data_time'), number, min),
    ('Images per batch, all processes', _batch, _whole, None),
    ('Training time in hours (estimate)', _hours, number, None),
    (
        'Peak GPU memory in training (MB)',
        lambda run, e: max((y for _, y in run.points('train', 'memory')), default=None),
        _whole,
        min,
    ),
    ('Evaluation, images per second', lambda run, e: 1 / e.seconds if e and e.seconds else None, number, max),
    ('Evaluation, seconds per image', lambda run, e: e and e.seconds, number, min),
)


def _versions(runs: Sequence[Run], chosen: Sequence[Evaluation | None]) -> list[Line]:
    """Return a line for each version, seed and device of training and evaluation."""
    lines = []
    for key in dict.fromkeys(key for run in runs for key in run.environment):
        lines.append((f'Training: {key}', lambda run, e, key=key: run.environment.get(key), None, None))
    for key in dict.fromkeys(key for e in chosen if e for key in e.environment):
        lines.append((f'Evaluation: {key}', lambda run, e, key=key: e and e.environment.get(key), None, None))
    return lines


def _curves(runs: Sequence[Run]) -> list[Figure]:
    losses = [key for run in runs for row in run.train.values() for key in row if key.startswith('loss')]
    loss = 'loss' if 'loss' in losses else next(iter(losses), 'loss')
    figures = []
    for title, unit, part, key, best in (
        ('Training loss', 'loss', 'train', loss, 'least'),
        ('Validation mIoU', 'mIoU (%)', 'val', 'mIoU', 'greatest'),
        ('Validation pixel accuracy', 'aAcc (%)', 'val', 'aAcc', 'greatest'),
        ('Validation mean class accuracy', 'mAcc (%)', 'val', 'mAcc', 'greatest'),
        ('Learning rate', 'learning rate', 'train', 'lr', 'greatest'),
        ('Gradient norm', 'gradient norm', 'train', 'grad_norm', 'greatest'),
    ):
        series = [Series(run.name, run.points(part, key)) for run in runs]
        figures.append(curves(title, unit, series, best, log=key in (loss, 'grad_norm')))
    figures.insert(1, _head_losses(runs))
    return [figure for figure in figures if figure is not None]


def _head_losses(runs: Sequence[Run]) -> Figure | None:
    """Draw training and validation loss of the decode head, for the runs whose validations measured it."""
    series = []
    for run in runs:
        if val := run.points('val', 'val/loss'):
            keys = {key for row in run.train.values() for key in row if key.startswith('decode.') and 'loss' in key}
            train = [(x, sum(row.get(key, 0) for key in keys)) for x, row in run.train.items() if keys & row.keys()]
            for name, points in (('training', train), ('validation', val)):
                series.append(Series(f'{run.name}, {name}' if len(runs) > 1 else name, points))
    return curves('Loss of the decode head', 'loss', series, 'least', log=True)


def _evaluations(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows of the table of all evaluations."""
    rows = []
    for run in runs:
        name = [run.name] if len(runs) > 1 else []
        for e in run.evaluations:
            scores = [_two(e.metrics.get(key)) for key in ('mIoU', 'aAcc', 'mAcc')]
            images = _whole(e.dataset.get('pictures'))
            checkpoint = Path(str(e.record.get('checkpoint') or '–')).name
            rows.append([*name, e.title, *scores, images, checkpoint, e.date[:16].replace('T', ' ')])
        for stamp, row in sorted(run.tested.items()):
            scores = [_two(row.get(key)) for key in ('mIoU', 'aAcc', 'mAcc')]
            rows.append([*name, 'Test without a record', *scores, '–', '–', _date_of(stamp)])
    return rows


def _per_class(runs: Sequence[Run], chosen: Sequence[Evaluation | None]) -> list[dict]:
    """Return a row per class: IoU of each run, and for a single run the accuracy and the pixel counts."""
    rows = []
    for name in dict.fromkeys(name for e in chosen if e for name in e.classes):
        found = [(e, e.classes.index(name)) if e and name in e.classes else None for e in chosen]
        ious = [round(100 * float(f[0].iou[f[1]]), 2) if f and np.isfinite(f[0].iou[f[1]]) else None for f in found]
        e, k = next(filter(None, found))
        row = dict(name=name, colour=hex_colours(e)[k], ious=ious, best=_best(ious, max), cells=[])
        if len(runs) == 1:
            counts = [f'{int(values[k]):,}' for values in (e.truth, e.predicted, e.right)]
            row['cells'] = [_two(100 * float(e.accuracy[k])), *counts]
        rows.append(row)
    return rows


def _details(run: Run, evaluation: Evaluation | None) -> dict:
    """Return what is shown of each run by itself."""
    if evaluation is None:
        return dict(run=run, evaluation=None)
    confused = confusions(evaluation.classes, evaluation.confusion, 100)
    worst, best = shown_images(evaluation)
    never = np.flatnonzero((evaluation.truth > 0) & (evaluation.right == 0))
    return dict(
        run=run,
        evaluation=evaluation,
        heat_map=heat_map(run.name, evaluation.classes, evaluation.confusion, confused),
        confused=confused[:10],
        never=[evaluation.classes[k] for k in never],
        worst=worst,
        best=best,
        reliability=reliability(run.name, evaluation.calibration) if evaluation.calibration else None,
    )


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Return the settings that differ between the runs, each with its value in every run."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in ('work_dir', 'launcher'))
    rows = [[key, *(repr(run.config[key]) if key in run.config else '–' for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _is_text(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Return whether a column of a table has words, which are aligned left."""
    return any(cells[column][:1].isalpha() for cells in rows)
