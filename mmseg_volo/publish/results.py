"""Find the evaluations of a checkpoint in its work dir, and the hardware that it was trained on."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

import numpy as np

from ..checkpoints.config_text import literals, strings
from ..checkpoints.reading import read_meta
from ..errors import CheckpointError
from ..evaluation import FOLDER, iou_of
from .shareable_config import data_folder, is_place, last_part

_TIMESTAMP = re.compile(r'_(\d{8}_\d{6})$')
# What a record raises that cannot be read, or that holds other values than the tools write.
_DAMAGED = OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError
_NAMES = {'ADE20KDataset': 'ADE20K', 'CamVidDataset': 'CamVid', 'StreetSceneDataset': 'drawn street scenes'}
# Data set options that say where the data is, or that the weights do not depend on.
_NOT_SHOWN = {'data_root', 'metainfo', 'pipeline', 'confidence', 'return_logits', 'allow_mismatch', 'backend_args'}


@dataclass
class Result:
    """One evaluation of the checkpoint. Figures are in percent; C is the number of classes."""

    aug_test: bool
    dataset: str  # 'CamVid'
    folder: str  # of the images, below the data set's root
    data: str  # 'CamVid val'
    images: int
    date: str  # YYYY-MM-DD
    classes: list[str]
    iou: np.ndarray  # (C,); NaN: the class is neither in the ground truth nor predicted
    pixels: np.ndarray  # (C,), int64: pixels of the ground truth
    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    missed: list[str]  # classes of which no pixel was found
    views: str  # scales and flip of a multi-scale test
    options: list[str]  # KEY=VALUE where the evaluation's config differed from the published one
    how: str  # 'single-scale, precision=bf16'
    device: str


def dataset_name(kind: str) -> str:
    """The usual name of a data set, from the name of its class."""
    return _NAMES.get(kind) or kind.removesuffix('Dataset') or 'unnamed data'


def run_of(meta: Mapping) -> str:
    """Timestamp of the run that saved a checkpoint, which names the run's folder; '' where ``meta`` has none."""
    found = _TIMESTAMP.search(str(meta.get('experiment_name', '')))
    return found[1] if found else ''


def find_results(
    checkpoint: Path, work_dir: Path, meta: Mapping, config: dict, classes: Sequence[str] | None
) -> tuple[list[Result], list[str]]:
    """Read the evaluation records of a checkpoint from its work dir.

    A test record counts if it is of this file and newer than it. A validation record counts if it is of the run that
    saved the file, at its iteration. Of several with the same images and views the newest counts, tests before
    validations.

    Args:
        checkpoint: the file.
        work_dir: folder with the timestamp folders of its runs.
        meta: ``meta`` of the checkpoint.
        config: the config that will be published.
        classes: class names of the model; None where they are unknown.

    Returns:
        One result for each set of images and views, single-scale and most images first; and a line for each record
        that was skipped, with the reason.
    """
    found: dict[tuple, tuple[tuple, Result]] = {}
    skipped = []
    for path in sorted(work_dir.glob(f'*/{FOLDER}/*.json')):
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            reason = _reason_to_skip(record, path, checkpoint, work_dir, meta)
            if reason is None:
                one = _result(record, path.parents[1], config, classes)
                key = one.aug_test, one.dataset, one.folder, one.images, tuple(one.options)
                rank = record['kind'] == 'test', _seconds(record)
                if key not in found or rank >= found[key][0]:
                    found[key] = rank, one
        except (CheckpointError, *_DAMAGED) as error:
            reason = f'no record that can be read ({error})'
        if reason:
            skipped.append(f'{path}: {reason}')
    results = [one for _, one in found.values()]
    return sorted(results, key=lambda one: (one.aug_test, one.options != [], -one.images)), skipped


def _reason_to_skip(record: dict, path: Path, checkpoint: Path, work_dir: Path, meta: Mapping) -> str | None:
    """None for a record of this checkpoint; '' for one that is clearly of another and needs no message."""
    if record['kind'] == 'val' and record['checkpoint'] is None:
        same_run = path.parents[1].name == run_of(meta)
        return None if same_run and record['iteration'] == meta.get('iter') is not None else ''
    if record['checkpoint'] is None:  # a test of an exported file, or of random weights
        return ''
    named = Path(record['checkpoint'])
    if named.name != checkpoint.name:
        return ''
    tested = Path(record['dataset'].get('started_in', ''), named)
    if tested.exists() and tested.is_absolute():
        if not tested.samefile(checkpoint) and _identity(read_meta(tested)) != _identity(meta):
            return f'is of {named}'
    elif work_dir.samefile(checkpoint.parent) and named.parent.name not in ('', checkpoint.resolve().parent.name):
        return f'is of {named}, which is not there any more'
    if record['iteration'] != meta.get('iter') or _seconds(record) < int(meta.get('saved_at', 0)):
        return 'is older than the checkpoint: another was tested under its name; test it again'
    return None


def _identity(meta: Mapping) -> list:
    """Equal for a checkpoint and its copies, different for any other checkpoint."""
    return [meta.get(key) for key in ('saved_at', 'time', 'iter', 'experiment_name')]


def _seconds(record: dict) -> float:
    return datetime.fromisoformat(record['date']).timestamp()


def _result(record: dict, run: Path, config: dict, classes: Sequence[str] | None) -> Result:
    confusion = np.array(record['confusion'], np.int64)  # rows: ground truth, columns: prediction
    names = [str(name) for name in record['classes']]
    if confusion.shape != (len(names),) * 2 or confusion.min() < 0 or not confusion.sum():
        raise ValueError(f'its confusion matrix of shape {confusion.shape} is not one of {len(names)} classes')
    if classes and [name.casefold() for name in names] != [str(name).casefold() for name in classes]:
        raise ValueError("its classes are not the model's")
    pixels, correct = confusion.sum(1), np.diag(confusion)
    iou = iou_of(confusion) * 100
    accuracy = np.divide(correct * 100.0, pixels, out=np.full(len(correct), np.nan), where=pixels > 0)
    miou = float(np.nanmean(iou))
    logged = record['metrics'].get('mIoU')
    if logged is not None and not math.isclose(logged, miou, abs_tol=0.02):
        raise ValueError(f'its mIoU of {logged} is not that of its confusion matrix, {miou:.2f}')
    data, aug_test = record['dataset'], bool(record['aug_test'])
    folder, root = str(data.get('img_path') or ''), str(data.get('data_root') or '')
    folder = folder.removeprefix(root).lstrip('/') if root else folder
    folder = (last_part(folder) if is_place(folder) else folder).rstrip('/')
    dataset = dataset_name(str(data['type']))
    views, options = _settings(run, config, aug_test)
    return Result(
        aug_test=aug_test,
        dataset=dataset,
        folder=folder,
        data=f'{dataset} {PurePosixPath(folder).name}'.strip(),
        images=int(data['pictures']),
        date=record['date'][:10],
        classes=names,
        iou=iou,
        pixels=pixels,
        miou=miou,
        pixel_accuracy=float(correct.sum() / pixels.sum() * 100),
        mean_accuracy=float(np.nanmean(accuracy)),
        missed=[name for name, value in zip(names, accuracy, strict=True) if value == 0],
        views=views,
        options=options,
        how=', '.join(['multi-scale' if aug_test else 'single-scale', *(o.rpartition('.')[2] for o in options)]),
        device=str((record.get('environment') or {}).get('device') or ''),
    )


def _settings(run: Path, config: dict, aug_test: bool) -> tuple[str, list[str]]:
    """Views of a test and the KEY=VALUE by which it differed from ``config``, from the config text that it left."""
    try:
        used = literals((run / 'vis_data/config.py').read_text(encoding='utf-8'))
    except (OSError, SyntaxError, ValueError):
        used = config
    model = used.get('model') or {}
    model = model.get('module') or model
    now, then = (
        _flat(dict(model=dict(test_cfg=test_cfg or {}), test_dataloader=dict(dataset=dataset or {})))
        for test_cfg, dataset in (
            (config['model'].get('test_cfg'), (config.get('test_dataloader') or {}).get('dataset')),
            (model.get('test_cfg'), (used.get('test_dataloader') or {}).get('dataset')),
        )
    )
    options = []
    for key in sorted(now.keys() | then.keys()):
        value = then.get(key)
        if now.get(key) != value and not _NOT_SHOWN.intersection(key.split('.')):
            private = any(is_place(text) for _, text in strings(value))
            options.append(f'{key}={data_folder("") if private else value}')
    return _views(used.get('tta_pipeline')) if aug_test else '', options


def _flat(value: object, where: str = '') -> dict:
    """Nested dicts, and lists of dicts such as the ``datasets`` of a ``ConcatDataset``, as one with dotted keys."""
    if isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        value = {str(i): inner for i, inner in enumerate(value)}
    if not isinstance(value, Mapping):
        return {where: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f'{where}.{key}'.lstrip('.')).items()}


def _views(pipeline: object) -> str:
    """'scales 0.5, 1.0, each also flipped' of a pipeline with ``TestTimeAug``."""
    steps = pipeline if isinstance(pipeline, list) else []
    branches = [b for s in steps if s.get('type') == 'TestTimeAug' for b in s.get('transforms', [])]
    transforms = [t for branch in branches for t in branch]
    scales = [str(t.get('scale_factor') or t.get('scale')) for t in transforms if t.get('type') == 'Resize']
    flips = any(t.get('type') == 'RandomFlip' and t.get('prob') == 1.0 for t in transforms)
    views = [f'scales {", ".join(scales)}'] if scales else []
    return ', '.join(views + ['each also flipped'] * flips)


def hardware_of(work_dir: Path, meta: Mapping) -> dict[str, str]:
    """'devices' and 'PyTorch' as the log of the run that saved a checkpoint names them; empty without that log."""
    run = run_of(meta)
    try:
        with (work_dir / run / f'{run}.log').open(encoding='utf-8', errors='replace') as log:
            head = [line for _, line in zip(range(200), log, strict=False)]
    except OSError:
        return {}
    facts = dict(match.groups() for match in map(re.compile(r'\s+([\w ,]+?): (.+)\n').fullmatch, head) if match)
    gpus = [f'{len(key[4:].split(","))} × {name}' for key, name in facts.items() if re.fullmatch(r'GPU [\d,]+', key)]
    if not gpus and facts.get('CUDA available') == 'False':
        gpus = ['CPU']
    out = dict(devices=', '.join(gpus), PyTorch=facts.get('PyTorch'))
    return {key: value for key, value in out.items() if value}
