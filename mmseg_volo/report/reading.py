"""Read what training and testing left in a work dir, without running any of it."""

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.colors import hsv_to_rgb

from ..checkpoints.config_text import literals
from ..errors import ConfigError
from ..evaluation import FOLDER, iou_of

# What a file of JSON raises that is cut off, nested without end, or has numbers that are none or too large.
_DAMAGED = ValueError, TypeError, OverflowError, RecursionError
_STAMP = re.compile(r'\d{8}_\d{6}')
_LIMIT = 2**26  # bytes of a text file that are read
_RESUMED = re.compile(r'resumed epoch: \d+, iter: (\d+)')
_LOGGED = re.compile(r'Iter\((train|val)\)\s+\[ *(\d+)/(\d+)\]\s+(.*)')
_ENVIRONMENT = re.compile(
    r'^ {4}(Python|CUDA available|GPU [\d,]+|PyTorch|TorchVision|OpenCV|MMEngine|seed|GPU number): (.+)$', re.MULTILINE
)


@dataclass
class Evaluation:
    """One evaluation record; see :class:`~mmseg_volo.evaluation.EvaluationRecordHook`.

    Attributes:
        confusion: pixels (C, C), rows ground truth, columns prediction.
        iou, accuracy: (C,), from 0 to 1; NaN for classes without pixels.
        palette: RGB (C, 3), uint8: that of the data set, else evenly spaced hues.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: the record is damaged.
    """

    path: Path
    record: dict

    def __post_init__(self):
        self.classes = [str(name) for name in self.record['classes']]
        count = len(self.classes)
        self.confusion = np.array(self.record['confusion'], np.int64)
        if self.confusion.shape != (count, count):
            raise ValueError('the confusion matrix does not fit the classes')
        self.iou = iou_of(self.confusion)
        self.truth, self.predicted = self.confusion.sum(1), self.confusion.sum(0)
        self.right = np.diag(self.confusion)
        self.accuracy = np.divide(self.right, self.truth, out=np.full(count, np.nan), where=self.truth > 0)
        palette = [[int(value) for value in colour] for colour in self.record.get('palette') or ()]
        if len(palette) != count or any(len(colour) != 3 for colour in palette):
            steps = np.arange(count)
            hues = np.stack((steps / count, np.full(count, 0.75), 0.55 + 0.45 * (steps % 2)), axis=1)
            palette = np.rint(255 * hsv_to_rgb(hues))
        self.palette = np.clip(palette, 0, 255).astype(np.uint8)
        self.metrics = {str(k): float(v) for k, v in self._dict('metrics').items() if isinstance(v, (int, float))}
        self.dataset, self.environment = self._dict('dataset'), self._dict('environment')
        self.kind = str(self.record['kind'])
        iteration = self.record.get('iteration')
        self.iteration: int | None = iteration if isinstance(iteration, int) else None
        seconds = self.record.get('seconds_per_picture')
        self.seconds = float(seconds) if isinstance(seconds, (int, float)) and seconds > 0 else None
        self.calibration = self._dict('calibration')
        if self.calibration:
            float(self.calibration['ece'])
            for one in self.calibration['bins']:
                if one['pixels']:
                    for key in ('pixels', 'low', 'high', 'confidence', 'accuracy'):
                        float(one[key])
        self.percent = {  # shares beside the metrics: boundary IoU, quantiles of single images, calibration error
            f'{part}.{key}': 100 * float(value)
            for part in ('boundary', 'mIoU_of_pictures', 'calibration')
            for key, value in self._dict(part).items()
            if isinstance(value, (int, float))
        }
        self.aug_test = bool(self.record.get('aug_test'))
        self.date = str(self.record.get('date', ''))
        self.images = [one for one in self.record.get('pictures', ()) if isinstance(one, dict)]

    def _dict(self, key: str) -> dict:
        found = self.record.get(key)
        return found if isinstance(found, dict) else {}

    @property
    def miou(self) -> float:
        """mIoU in percent: the logged value, else computed from the confusion matrix."""
        if 'mIoU' in self.metrics:
            return float(self.metrics['mIoU'])
        return 100 * float(np.nanmean(self.iou)) if np.isfinite(self.iou).any() else math.nan

    @property
    def title(self) -> str:
        kind = 'Test' if self.kind == 'test' else 'Validation'
        at = '' if self.iteration is None else f' of iteration {self.iteration:,}'
        return f'{kind}{at}{", multi-scale and flip" if self.aug_test else ""}'


@dataclass
class Run:
    """The content of one work dir. ``train`` and ``val`` map iterations to logged scalars, in order."""

    folder: Path
    name: str
    train: dict[int, dict] = field(default_factory=dict)
    val: dict[int, dict] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    config_text: str = ''
    config: dict[str, object] = field(default_factory=dict)  # by dotted key
    checkpoints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)
    starts: int = 0  # how often training was started or resumed
    tested: dict[str, dict] = field(default_factory=dict)  # metrics of tests without a record, by timestamp

    def points(self, part: str, key: str) -> list[tuple[int, float]]:
        """Return (iteration, value) of a scalar in 'train' or 'val', NaN and infinity included.

        Of metrics that have a prefix, as in 'a/mIoU', the first counts.
        """
        rows = getattr(self, part).items()
        names = [key, *(name for _, row in rows for name in row if part == 'val' and name.endswith(f'/{key}'))]
        name = next((name for name in names if any(name in row for _, row in rows)), key)
        return [(step, row[name]) for step, row in rows if isinstance(row.get(name), (int, float))]

    @property
    def best(self) -> tuple[int, float] | None:
        """Iteration and mIoU of the best validation."""
        scores = [point for point in self.points('val', 'mIoU') if math.isfinite(point[1])]
        return max(scores, key=lambda point: point[::-1], default=None)


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read work dirs. Runs whose folders have the same name get as much of the path as makes the names different.

    Raises:
        ConfigError: a folder does not exist, or has no logs of training or testing.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    paths = [run.folder.resolve().parts for run in runs]
    for i, (run, path) in enumerate(zip(runs, paths, strict=True)):
        others = [other for j, other in enumerate(paths) if j != i]
        least = 2 if _STAMP.fullmatch(path[-1]) else 1  # a timestamp alone says little
        different = (n for n in range(least, len(path) + 1) if all(other[-n:] != path[-n:] for other in others))
        depth = next(different, None)
        run.name = '/'.join(path[-depth:]) if depth else f'{run.name} ({i + 1})'
    return runs


def read_run(folder: Path) -> Run:
    """Read one work dir, or one of the timestamp folders in it."""
    if not folder.is_dir():
        raise ConfigError(f'{folder}: {"is no folder" if folder.exists() else "does not exist"}; expected a work dir')
    run = Run(folder, folder.resolve().name)
    stamps = sorted(p for p in folder.iterdir() if _STAMP.fullmatch(p.name) and p.is_dir())
    for stamp in [folder] if _STAMP.fullmatch(run.name) else stamps:
        _read_stamp(run, stamp)
    if not (run.train or run.val or run.evaluations or run.tested):
        raise ConfigError(
            f'{folder}: has no logs of training or testing; expected a work dir of tools/train.py or tools/test.py '
            'with folders such as 20260131_235959/vis_data'
        )
    run.train, run.val = dict(sorted(run.train.items())), dict(sorted(run.val.items()))
    if not run.config_text:  # mmengine also dumps it beside the checkpoints
        dumps = sorted((p for p in folder.glob('*.py') if p.is_file()), key=lambda p: p.stat().st_mtime)
        run.config_text = _text(dumps[-1]) if dumps else ''
    run.config = flat_config(run.config_text)
    run.evaluations.sort(key=lambda one: one.date)
    names = (p.name for p in folder.glob('*.pth'))
    run.checkpoints = sorted(names, key=lambda name: ([int(n) for n in re.findall(r'\d+', name)[-1:]], name))
    return run


def _read_stamp(run: Run, stamp: Path) -> None:
    """Add the content of one timestamp folder, which is one start of a tool, to the run."""
    run.stamps.append(stamp.name)
    log = _text(stamp / f'{stamp.name}.log')
    train, val = _scalars(run, stamp)
    if not train:
        train, logged = _rows_of_log(log)
        val = {**logged, **val}
    if train:
        _drop_repeated(run, stamp.name, log, train)
    run.train.update(train)
    if run.train:
        run.val.update(val)
    elif val:
        run.tested[stamp.name] = val[max(val)]
    if not (train or val):
        with suppress(ValueError, RecursionError):
            tested = json.loads(_text(stamp / f'{stamp.name}.json'))
            if isinstance(tested, dict):
                run.tested[stamp.name] = tested
    for path in sorted((stamp / FOLDER).glob('*.json')):
        try:
            run.evaluations.append(Evaluation(path, json.loads(path.read_text(encoding='utf-8'))))
            run.tested.pop(stamp.name, None)
        except (*_DAMAGED, OSError, KeyError, AttributeError) as error:
            run.notes.append(f'{path.relative_to(run.folder)} is ignored: no evaluation record ({error}).')
    if log and (train or not run.train):
        run.environment = {name: value.strip() for name, value in _ENVIRONMENT.findall(log[:100_000])}
    text = _text(stamp / 'vis_data/config.py')
    if text and (train or not run.config_text):
        run.config_text = text


def _drop_repeated(run: Run, stamp: str, log: str, train: dict[int, dict]) -> None:
    """Drop what this start of training repeats: everything, or the part after the checkpoint that it resumed."""
    resumed = _RESUMED.search(log)
    if resumed:
        last = int(resumed[1])
    else:  # without a log, the first logged iteration must tell
        last = 0 if log else min(train) - 1
    if run.train and last == 0:
        run.notes.append(
            f'Training was started again from the beginning in this folder ({stamp}); the earlier log, up to '
            f'iteration {max(run.train):,}, is ignored.'
        )
    run.starts = run.starts + 1 if last else 1
    run.train = {step: row for step, row in run.train.items() if step <= last}
    run.val = {step: row for step, row in run.val.items() if step <= last}
    run.evaluations = [one for one in run.evaluations if one.kind == 'test' or (one.iteration or 0) <= last]


def _scalars(run: Run, stamp: Path) -> tuple[dict[int, dict], dict[int, dict]]:
    """Return the training and the validation rows of scalars.json by iteration."""
    train: dict[int, dict] = {}
    val: dict[int, dict] = {}
    epochs: dict[int, int] = {}
    broken = 0
    lines = _text(stamp / 'vis_data/scalars.json').splitlines()
    for i, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict) and isinstance(row.get('step'), int):
                for value in row.values():
                    if isinstance(value, int):
                        float(value)  # too large a number raises here
                is_train = 'iter' in row or 'lr' in row or 'base_lr' in row
                if is_train and isinstance(row.get('epoch'), (int, float)):
                    epochs[int(row['epoch'])] = row['step']
                (train if is_train else val)[row['step']] = row
        except _DAMAGED:
            broken += i + 1 < len(lines)  # a running training may have cut the last line
    if broken:
        run.notes.append(f'{stamp.name}/vis_data/scalars.json: {broken} broken lines are ignored.')
    if epochs and val and max(val) <= max(epochs) < max(train):  # the validations were logged by epoch
        val = {epochs.get(epoch, epoch): row for epoch, row in val.items()}
    return train, val


def _rows_of_log(log: str) -> tuple[dict[int, dict], dict[int, dict]]:
    """Read the rows from the text log, for runs that log scalars only to TensorBoard or Weights & Biases."""
    train: dict[int, dict] = {}
    val: dict[int, dict] = {}
    for kind, step, of, rest in _LOGGED.findall(log):
        row = {}
        for name, value in re.findall(r'([\w./]+): (\S+)', rest):
            with suppress(ValueError):
                row[name] = float(value)
        if kind == 'train':
            train[int(step)] = row
        elif step == of and train:  # the last line of a validation has its result
            val[max(train)] = row
    return train, val


def flat_config(text: str) -> dict[str, object]:
    """Return the plain values of a config that mmengine dumped, by dotted key. Code is never run, but left out."""

    def flat(prefix: str, config: dict) -> Iterator[tuple[str, object]]:
        for key, value in config.items():
            if isinstance(value, dict) and value:
                yield from flat(f'{prefix}{key}.', value)
            else:
                yield f'{prefix}{key}', value

    out: dict[str, object] = {}
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        for statement in ast.parse(text).body:
            with suppress(TypeError, ValueError):
                out.update(flat('', literals(ast.unparse(statement))))
    return out


def _text(path: Path) -> str:
    """Return the text of a file, '' if it cannot be read."""
    try:
        with path.open(encoding='utf-8', errors='replace') as file:
            return file.read(_LIMIT)
    except OSError:
        return ''
