"""What training and testing left in a work dir, read without running any of it."""

import ast
import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from ..evaluation import FOLDER, iou_of

_STAMP = re.compile(r'\d{8}_\d{6}')
_LOG_LIMIT = 2**26  # bytes of a log that are looked at
_RESUMED = re.compile(r'resumed epoch: \d+, iter: (\d+)')
_LOGGED = re.compile(r'Iter\((train|val)\)\s+\[ *(\d+)/(\d+)\]\s+(.*)')
_ENVIRONMENT = re.compile(
    r'^ {4}(Python|CUDA available|GPU [\d,]+|PyTorch|TorchVision|OpenCV|MMEngine|seed|GPU number): (.+)$', re.MULTILINE
)


@dataclass
class Evaluation:
    """One evaluation record; see :class:`~mmseg_volo.evaluation.EvaluationRecordHook`."""

    path: Path
    record: dict

    def __post_init__(self):
        self.classes = [str(name) for name in self.record['classes']]
        self.confusion = np.array(self.record['confusion'], np.int64)
        if self.confusion.shape != (len(self.classes), len(self.classes)):
            raise ValueError('the confusion matrix does not fit the classes')
        self.iou = iou_of(self.confusion)  # (C,), NaN for a class that is neither in truth nor predicted
        self.truth, self.predicted = self.confusion.sum(1), self.confusion.sum(0)
        self.right = np.diag(self.confusion)
        self.accuracy = np.divide(self.right, self.truth, out=np.full(len(self.iou), np.nan), where=self.truth > 0)
        palette = [[int(value) for value in colour] for colour in self.record.get('palette') or ()]
        fits = len(palette) == len(self.classes) and all(len(colour) == 3 for colour in palette)
        self.palette = palette if fits else []
        self.metrics = {str(k): v for k, v in self._dict('metrics').items() if isinstance(v, (int, float))}
        self.dataset, self.environment = self._dict('dataset'), self._dict('environment')
        self.kind = str(self.record['kind'])
        iteration = self.record.get('iteration')
        self.iteration: int | None = iteration if isinstance(iteration, int) else None
        seconds = self.record.get('seconds_per_picture')
        self.seconds = seconds if isinstance(seconds, (int, float)) and seconds > 0 else None
        self.calibration = self._dict('calibration')
        if self.calibration:
            float(self.calibration['ece'])
            for one in self.calibration['bins']:
                if one['pixels']:
                    for key in ('low', 'high', 'confidence', 'accuracy'):
                        float(one[key])
        self.aug_test = bool(self.record.get('aug_test'))
        self.date = str(self.record.get('date', ''))
        self.pictures = [one for one in self.record.get('pictures', ()) if isinstance(one, dict)]

    def _dict(self, key: str) -> dict:
        found = self.record.get(key)
        return found if isinstance(found, dict) else {}

    @property
    def miou(self) -> float:
        """In percent, as it was printed; of the confusion matrix where the record does not say."""
        value = self.metrics.get('mIoU')
        if value is not None:
            return float(value)
        return 100 * float(np.nanmean(self.iou)) if np.isfinite(self.iou).any() else math.nan

    @property
    def title(self) -> str:
        what = 'Test' if self.kind == 'test' else 'Validation'
        at = '' if self.iteration is None else f' of iteration {self.iteration:,}'
        return f'{what}{at}{", multi-scale and flip" if self.aug_test else ""}'


@dataclass
class Run:
    """What one work dir holds. ``train`` and ``val`` are rows of scalars by iteration, in order."""

    folder: Path
    name: str
    train: dict[int, dict] = field(default_factory=dict)
    val: dict[int, dict] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    config_text: str = ''
    config: dict[str, str] = field(default_factory=dict)  # by dotted key
    checkpoints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)
    starts: int = 0  # how often training was started or resumed
    tested: dict[str, dict] = field(default_factory=dict)  # metrics of tests without a record, by timestamp

    @property
    def best(self) -> tuple[int, dict] | None:
        """Iteration and row of the validation with the highest mIoU."""
        scored = [(row['mIoU'], step) for step, row in self.val.items() if _finite(row.get('mIoU'))]
        step = max(scored)[1] if scored else None
        return None if step is None else (step, self.val[step])


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read work dirs.

    Raises:
        ConfigError: what is no folder, or has nothing that training or testing leaves.
    """
    folders = [Path(folder) for folder in folders]
    runs = [read_run(folder) for folder in folders]
    for i, run in enumerate(runs):  # where names are equal, as much of the path as tells them apart
        others = [other for j, other in enumerate(runs) if j != i and other.folder.name == folders[i].name]
        parts = run.folder.resolve().parts
        for depth in range(1, len(parts) + 1):
            run.name = '/'.join(parts[-depth:])
            if not any(other.folder.resolve().parts[-depth:] == parts[-depth:] for other in others):
                break
        else:
            run.name = f'{run.folder.resolve().name} ({i + 1})'
    return runs


def read_run(folder: Path) -> Run:
    """Read one work dir, or one of the timestamp folders in it."""
    if not folder.is_dir():
        raise ConfigError(f'{folder}: {"is no folder" if folder.exists() else "does not exist"}; expected a work dir')
    run = Run(folder, folder.resolve().name)
    if _STAMP.fullmatch(run.name):
        stamps = [folder]
        run.name = folder.resolve().parent.name + '/' + run.name
    else:
        stamps = sorted(p for p in folder.iterdir() if _STAMP.fullmatch(p.name) and p.is_dir())
    for stamp in stamps:
        _read_stamp(run, stamp)
    if not (run.train or run.val or run.evaluations or run.tested):
        raise ConfigError(
            f'{folder}: no logs of training or testing in it; expected a work dir with folders such as '
            '20260131_235959/vis_data/scalars.json, as tools/train.py and tools/test.py leave them'
        )
    run.train, run.val = dict(sorted(run.train.items())), dict(sorted(run.val.items()))
    if not run.config_text:  # as mmengine dumps it beside the checkpoints
        newest = sorted((p for p in folder.glob('*.py') if p.is_file()), key=lambda p: p.stat().st_mtime)
        run.config_text = _text(newest[-1]) or '' if newest else ''
        run.config = flat_config(run.config_text)
    run.evaluations.sort(key=lambda one: one.date)
    run.checkpoints = sorted((p.name for p in folder.glob('*.pth')), key=lambda name: (_number(name), name))
    return run


def _read_stamp(run: Run, stamp: Path) -> None:
    run.stamps.append(stamp.name)
    log = _log(stamp)
    train, val = _scalars(run, stamp)
    if not train:
        train, logged = _rows_of_log(log)
        val = {**logged, **val}
    if train:
        _continue(run, stamp.name, log, train)
    run.train.update(train)
    if train or run.train:
        run.val.update(val)
    elif val:
        run.tested[stamp.name] = val[max(val)]
    if not (train or val) and (tested := _json(stamp / f'{stamp.name}.json')) is not None:
        run.tested[stamp.name] = tested
    for path in sorted((stamp / FOLDER).glob('*.json')):
        try:
            run.evaluations.append(Evaluation(path, json.loads(path.read_text(encoding='utf-8'))))
            run.tested.pop(stamp.name, None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            run.notes.append(f'{path.relative_to(run.folder)} is left out: no evaluation record ({error}).')
    if log:
        found = {name: value.strip() for name, value in _ENVIRONMENT.findall(log[:100_000])}
        if train or not run.train:
            run.environment = found
    text = _text(stamp / 'vis_data/config.py')
    if text and (train or not run.config_text):
        run.config_text, run.config = text, flat_config(text)


def _continue(run: Run, stamp: str, log: str, train: dict[int, dict]) -> None:
    """Take away what a start of training runs again: all of it, or what comes after the checkpoint that it resumed."""
    resumed = _RESUMED.search(log)
    if resumed:
        cut = int(resumed[1])
    else:  # without a log it shows in the first iteration only
        cut = 0 if log else min(train) - 1
    if run.train and cut == 0:
        run.notes.append(
            f'Training was started anew in this folder ({stamp}); what was logged before, up to iteration '
            f'{max(run.train):,}, is left out.'
        )
    run.starts = run.starts + 1 if cut else 1
    run.train = {step: row for step, row in run.train.items() if step <= cut}
    run.val = {step: row for step, row in run.val.items() if step <= cut}
    run.evaluations = [one for one in run.evaluations if one.kind == 'test' or (one.iteration or 0) <= cut]


def _scalars(run: Run, stamp: Path) -> tuple[dict[int, dict], dict[int, dict]]:
    """Rows of training and of validation by iteration."""
    train: dict[int, dict] = {}
    val: dict[int, dict] = {}
    broken = 0
    lines = (_text(stamp / 'vis_data/scalars.json') or '').splitlines()
    for i, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row, broken = None, broken + (i + 1 < len(lines))  # a running training is cut off in its last line
        if isinstance(row, dict) and isinstance(row.get('step'), int):
            is_train = 'iter' in row or 'lr' in row or 'base_lr' in row
            (train if is_train else val)[row['step']] = row
    if broken:
        run.notes.append(f'{stamp.name}/vis_data/scalars.json: {broken} broken lines are left out.')
    epochs = {int(row['epoch']): row['step'] for row in train.values() if isinstance(row.get('epoch'), (int, float))}
    if epochs and val and max(val) <= max(epochs) < max(train):  # validations were logged by epoch
        val = {epochs.get(epoch, epoch): row for epoch, row in val.items()}
    return train, val


def _rows_of_log(log: str) -> tuple[dict[int, dict], dict[int, dict]]:
    """What the text log says, for runs whose visualizer writes to other places (TensorBoard, Weights & Biases)."""
    train: dict[int, dict] = {}
    val: dict[int, dict] = {}
    for kind, step, of, rest in _LOGGED.findall(log):
        row = {}
        for name, value in re.findall(r'([\w./]+): (\S+)', rest):
            with suppress(ValueError):
                row[name] = float(value)
        if kind == 'train':
            train[int(step)] = row
        elif step == of and train:  # a validation's last line has its result
            val[max(train)] = row
    return train, val


def flat_config(text: str) -> dict[str, str]:
    """A config of plain data, as mmengine dumps it, by dotted key; nothing of it is run, and code in it is left out."""
    out: dict[str, str] = {}

    def walk(name: str, node: ast.expr) -> None:
        if isinstance(node, ast.Call) and not node.args and all(one.arg for one in node.keywords) and node.keywords:
            for one in node.keywords:
                walk(f'{name}.{one.arg}', one.value)
        elif isinstance(node, ast.Dict) and node.keys and all(isinstance(key, ast.Constant) for key in node.keys):
            for key, value in zip(node.keys, node.values, strict=True):
                walk(f'{name}.{key.value}', value)
        else:
            out[name] = ast.unparse(node)

    try:
        body = ast.parse(text).body
        for statement in body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                walk(statement.targets[0].id, statement.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return out


def setting(run: Run, key: str) -> object:
    """A plain value of the config, None where it is not there."""
    try:
        return ast.literal_eval(run.config[key])
    except (KeyError, ValueError, SyntaxError):
        return None


def _text(path: Path) -> str | None:
    try:
        with path.open(encoding='utf-8', errors='replace') as file:
            return file.read(_LOG_LIMIT)
    except OSError:
        return None


def _log(stamp: Path) -> str:
    return _text(stamp / f'{stamp.name}.log') or ''


def _json(path: Path) -> dict | None:
    try:
        found = json.loads(_text(path) or '')
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _number(name: str) -> int:
    found = re.findall(r'\d+', name)
    return int(found[-1]) if found else -1


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
