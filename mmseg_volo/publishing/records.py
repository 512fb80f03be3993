"""What a work dir knows about a checkpoint: how it was measured, and on what it was trained."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from ..checkpoints.config_text import literals
from ..checkpoints.reading import read_meta
from ..errors import CheckpointError
from ..evaluation import FOLDER, iou_of
from .settings import data_folder, is_place, last_part

_STAMP = re.compile(r'_(\d{8}_\d{6})$')
_NAMES = {'ADE20KDataset': 'ADE20K', 'CamVidDataset': 'CamVid', 'StreetSceneDataset': 'drawn street scenes'}


@dataclass
class Measurement:
    """One evaluation of the checkpoint, in percent; NaN for a class that is neither in the truth nor predicted."""

    aug_test: bool
    dataset: str  # class of the data set
    folder: str  # of the pictures, below the data set's root
    pictures: int
    date: str  # YYYY-MM-DD
    classes: list[str]
    iou: np.ndarray  # (C,)
    accuracy: np.ndarray  # (C,): pixels of the class that were found
    pixels: np.ndarray  # (C,), int64: of the truth
    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    views: str = ''  # scales and flip
    options: list[str] = field(default_factory=list)  # KEY=VALUE where it was measured otherwise than the config says
    device: str = ''


def dataset_name(kind: str) -> str:
    """How people call the data of a data set's class."""
    return _NAMES.get(kind) or kind.removesuffix('Dataset') or 'unnamed data'


def run_of(meta: Mapping) -> str:
    """The timestamp of the run that saved a checkpoint, which is its folder's name; '' where it does not say."""
    found = _STAMP.search(str(meta.get('experiment_name', '')))
    return found[1] if found else ''


def measurements(
    checkpoint: Path, work_dir: Path, meta: Mapping, config: dict, classes: Sequence[str] | None
) -> tuple[list[Measurement], list[str]]:
    """The evaluations of a checkpoint that its work dir has records of.

    Of a test it must be this file, tested after it was saved; of a validation the run that saved it, at its iteration.
    Of several with the same pictures and views the newest counts, and a test rather than a validation.

    Args:
        checkpoint: the file.
        work_dir: where its runs' timestamp folders are.
        meta: of the checkpoint.
        config: the one that will be published.
        classes: names that the model knows, None where it knows none.

    Returns:
        One for each set of pictures and views, single-scale and the most pictures first; and in words what was passed
        over.
    """
    found: dict[tuple, tuple[tuple, Measurement]] = {}
    passed_over = []
    for path in sorted(work_dir.glob(f'*/{FOLDER}/*.json')):
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            reason = _of_another(record, path, checkpoint, work_dir, meta)
            if reason is None:
                one = _measurement(record, path.parents[1], config, classes)
                key = one.aug_test, one.dataset, one.folder, one.pictures, tuple(one.options)
                rank = record['kind'] == 'test', _moment(record)
                if key not in found or rank >= found[key][0]:
                    found[key] = rank, one
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, CheckpointError) as error:
            reason = f'no record that can be read ({error})'
        if reason:
            passed_over.append(f'{path}: {reason}')
    kept = [one for _, one in found.values()]
    return sorted(kept, key=lambda one: (one.aug_test, one.options != [], -one.pictures)), passed_over


def _of_another(record: dict, path: Path, checkpoint: Path, work_dir: Path, meta: Mapping) -> str | None:
    """Why a record is not of this checkpoint; '' where it plainly is of another one, None where it is of this one."""
    if record['kind'] == 'val' and record['checkpoint'] is None:
        same_run = path.parents[1].name == run_of(meta)
        return None if same_run and record['iteration'] == meta.get('iter') is not None else ''
    named = Path(record['checkpoint'])
    if named.name != checkpoint.name:
        return ''
    tested = Path(record['dataset'].get('started_in', ''), named)
    if tested.exists() and tested.is_absolute():
        if not tested.samefile(checkpoint) and _saved(read_meta(tested)) != _saved(meta):
            return f'is of {named}'
    elif work_dir.samefile(checkpoint.parent) and named.parent.name not in ('', checkpoint.resolve().parent.name):
        return f'is of {named}, which is not there any more'
    if record['iteration'] != meta.get('iter') or _moment(record) < int(meta.get('saved_at', 0)):
        return 'is older than the checkpoint: another was tested under its name; test it again'
    return None


def _saved(meta: Mapping) -> list:
    """What tells a checkpoint from others, a copy of it not."""
    return [meta.get(key) for key in ('saved_at', 'time', 'iter', 'experiment_name')]


def _moment(record: dict) -> float:
    return datetime.fromisoformat(record['date']).timestamp()


def _measurement(record: dict, run: Path, config: dict, classes: Sequence[str] | None) -> Measurement:
    confusion = np.array(record['confusion'], np.int64)
    names = [str(name) for name in record['classes']]
    if confusion.shape != (len(names),) * 2 or confusion.min() < 0 or not confusion.sum():
        raise ValueError(f'its confusion matrix of shape {confusion.shape} is not one of {len(names)} classes')
    if classes and [name.casefold() for name in names] != [str(name).casefold() for name in classes]:
        raise ValueError("its classes are not the model's")
    truth, right = confusion.sum(1), np.diag(confusion)
    iou = iou_of(confusion) * 100
    accuracy = np.divide(right * 100.0, truth, out=np.full(len(right), np.nan), where=truth > 0)
    miou, mean_accuracy = float(np.nanmean(iou)), float(np.nanmean(accuracy))
    printed = record['metrics'].get('mIoU')
    if printed is not None and not math.isclose(printed, miou, abs_tol=0.02):
        raise ValueError(f'its mIoU of {printed} is not that of its confusion matrix, {miou:.2f}')
    data = record['dataset']
    folder = str(data.get('img_path') or '')
    root = str(data.get('data_root') or '')
    folder = folder.removeprefix(root).lstrip('/') if root else folder
    views, options = _setup(run, config, bool(record['aug_test']))
    return Measurement(
        aug_test=bool(record['aug_test']),
        dataset=str(data['type']),
        folder=last_part(folder) if is_place(folder) else folder,
        pictures=int(data['pictures']),
        date=record['date'][:10],
        classes=names,
        iou=iou,
        accuracy=accuracy,
        pixels=truth,
        miou=miou,
        pixel_accuracy=float(right.sum() / truth.sum() * 100),
        mean_accuracy=mean_accuracy,
        views=views,
        options=options,
        device=str((record.get('environment') or {}).get('device') or ''),
    )


def _setup(run: Path, config: dict, aug_test: bool) -> tuple[str, list[str]]:
    """The views of a test and, as KEY=VALUE, where its settings were not the config's, by the config that it left."""
    try:
        used = literals((run / 'vis_data/config.py').read_text(encoding='utf-8'))
    except (OSError, SyntaxError, ValueError):
        used = config
    views = _views(used.get('tta_pipeline')) if aug_test else ''
    model = used.get('model') or {}
    model = model.get('module') or model
    options = {}
    for where, now, then in (
        ('model.test_cfg', config['model'].get('test_cfg'), model.get('test_cfg')),
        ('test_dataloader.dataset', _dataset(config), _dataset(used)),
    ):
        _differences(where, now or {}, then or {}, options)
    shown = {
        key: data_folder('') if isinstance(value, str) and is_place(value) else value
        for key, value in options.items()
        if not key.endswith(('.data_root', '.metainfo', '.pipeline', '.confidence', '.allow_mismatch', '.backend_args'))
    }
    return views, [f'{key}={value}' for key, value in sorted(shown.items())]


def _dataset(config: dict) -> dict:
    return (config.get('test_dataloader') or {}).get('dataset') or {}


def _differences(where: str, now: Mapping, then: Mapping, out: dict) -> None:
    for key in now.keys() | then.keys():
        if isinstance(now.get(key), dict) and isinstance(then.get(key), dict):
            _differences(f'{where}.{key}', now[key], then[key], out)
        elif now.get(key) != then.get(key):
            out[f'{where}.{key}'] = then.get(key)


def _views(pipeline: object) -> str:
    """'scales 0.5, 1.0, with flip' of a pipeline with ``TestTimeAug``."""
    steps = pipeline if isinstance(pipeline, list) else []
    branches = [b for s in steps if s.get('type') == 'TestTimeAug' for b in s.get('transforms', [])]
    transforms = [t for branch in branches for t in branch]
    scales = [t.get('scale_factor') or t.get('scale') for t in transforms if t.get('type') == 'Resize']
    flips = any(t.get('type') == 'RandomFlip' and t.get('prob') == 1.0 for t in transforms)
    text = f'scales {", ".join(map(str, scales))}' if scales else ''
    return f'{text}{", " if text and flips else ""}{"each also mirrored" if flips else ""}'


def hardware_of(work_dir: Path, meta: Mapping) -> dict[str, str]:
    """What the log of the run that saved a checkpoint says of its machine: 'devices', 'PyTorch', as far as it does."""
    run = run_of(meta)
    try:
        with (work_dir / run / f'{run}.log').open(encoding='utf-8', errors='replace') as log:
            head = [line for _, line in zip(range(200), log, strict=False)]
    except OSError:
        return {}
    facts = dict(match.groups() for match in map(re.compile(r'\s+([\w ,]+?): (.+)\n').fullmatch, head) if match)
    out = {}
    gpus = [f'{len(key[4:].split(","))} × {name}' for key, name in facts.items() if re.fullmatch(r'GPU [\d,]+', key)]
    if gpus:
        out['devices'] = ', '.join(gpus)
    elif facts.get('CUDA available') == 'False':
        out['devices'] = 'CPU'
    if 'PyTorch' in facts:
        out['PyTorch'] = facts['PyTorch']
    return out
