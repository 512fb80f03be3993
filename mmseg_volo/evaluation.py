"""The record of an evaluation: what a validation or a test found, in one JSON file that reports are made of."""

import heapq
import json
import math
import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from numbers import Real
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dist import all_gather_object, get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .models.segmentors import StreamingEncoderDecoder, StreamingTTAModel

FOLDER = 'evaluation'
_LEVELS = 10_000  # of confidence: whole numbers of pixels add up to the same on any number of processes
_BINS = 20
_PACKAGES = dict(
    torch='torch', mmengine='onedl-mmengine', mmcv='onedl-mmcv', mmseg='onedl-mmsegmentation', mmseg_volo='mmseg_volo'
)


class NoRecord(Exception):
    """Why an evaluation leaves no record; never seen outside this module."""


@dataclass
class _Tally:
    """What one process has counted, small enough to be sent to the others."""

    confusion: np.ndarray  # (C, C), int64, rows truth, columns prediction
    pictures: dict[int, dict] = field(default_factory=dict)  # by place in the data set's order
    levels: np.ndarray | None = None  # (_LEVELS + 1, 2), int64: wrong and right pixels by confidence
    seconds: float = 0.0
    timed: int = 0
    refused: str | None = None


@HOOKS.register_module()
class EvaluationRecordHook(Hook):
    """Writes what each validation and test found to ``WORK_DIR/TIMESTAMP/evaluation/``, for ``tools/report.py``.

    ``test.json`` or ``val_iter_N.json`` hold the confusion matrix, mIoU and accuracy of each picture, and the
    calibration of the confidence where predictions carry ``seg_confidence``; ``pictures/`` beside it has the
    predictions and the truth of the worst and best pictures as index PNGs. In memory there are never more pictures
    than these. Of a run's validations the newest and the best keep theirs.

    An evaluation without truth, or of a model with other outputs, leaves no record and a line in the log; so does one
    that cannot be written.

    Args:
        keep: pictures to keep at either end, worst and best by their mIoU.
        confidence: switch on the confidence in tests of this package's segmentors.
    """

    def __init__(self, keep: int = 6, confidence: bool = True):
        if keep < 0:
            raise ValueError(f'keep must be 0 or more, got {keep}')
        self.keep, self.confidence = keep, confidence
        self._tally: _Tally | None = None
        self._loaded_iter: int | None = None
        self._asked: nn.Module | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note the iteration that the checkpoint is of."""
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        self._loaded_iter = meta.get('iter') if isinstance(meta, dict) else None

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin to count."""
        self._begin(runner.val_loop)

    def before_test_epoch(self, runner: Runner) -> None:
        """Begin to count; ask the segmentor for its confidence."""
        self._begin(runner.test_loop)
        segmentor = _segmentor(runner.model)
        if self.confidence and segmentor is not None and not segmentor.test_cfg.get('confidence'):
            segmentor.test_cfg['confidence'] = True
            self._asked = segmentor

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Look at the clock."""
        self._since = time.perf_counter()

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Look at the clock."""
        self._since = time.perf_counter()

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count what was predicted."""
        self._count(batch_idx, outputs)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count what was predicted."""
        self._count(batch_idx, outputs)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write the record."""
        self._end(runner, 'val', metrics or {})

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write the record; the segmentor is as it was."""
        if self._asked is not None:
            self._asked.test_cfg.pop('confidence')
            self._asked = None
        self._end(runner, 'test', metrics or {})

    def _begin(self, loop) -> None:
        self._rank, self._world = get_dist_info()
        self._dataset = loop.dataloader.dataset
        self._place = 0  # pictures that this process has seen
        self._worst: list = []  # heaps of (order, place, encoded prediction and truth), the least wanted first
        self._best: list = []
        self._since, self._first = time.perf_counter(), 0.0
        names = (getattr(self._dataset, 'metainfo', None) or {}).get('classes')
        self._tally = _Tally(np.zeros((len(names or ()), len(names or ())), np.int64))
        if not names:
            self._tally.refused = 'the data set names no classes'
        given = [getattr(metric, 'ignore_index', None) for metric in getattr(loop.evaluator, 'metrics', ())]
        given = [*filter(lambda one: one is not None, given), getattr(self._dataset, 'ignore_index', 255)]
        self._ignore = int(given[0])

    def _count(self, batch_idx: int, outputs) -> None:
        tally = self._tally
        if tally is None or tally.refused:
            return
        seconds = time.perf_counter() - self._since
        try:
            if not isinstance(outputs, (list, tuple)):
                raise NoRecord('the model gives no list of predictions')
            if batch_idx:  # the first batch has compilation and the like in it
                tally.seconds, tally.timed = tally.seconds + seconds, tally.timed + len(outputs)
            else:
                self._first = seconds / max(len(outputs), 1)
            for sample in outputs:
                place = self._place * self._world + self._rank
                self._place += 1
                # Samplers repeat pictures until all processes have equally many.
                if place < len(self._dataset):
                    self._add(place, sample)
        except Exception as error:  # whatever is odd about this data or model, its test goes on
            tally.refused = str(error) if isinstance(error, NoRecord) else f'{type(error).__name__}: {error}'

    def _add(self, place: int, sample: SegDataSample) -> None:
        if 'gt_sem_seg' not in sample:
            raise NoRecord('the data has no truth')
        if 'pred_sem_seg' not in sample:
            raise NoRecord('the model predicts no pred_sem_seg')
        predicted = sample.pred_sem_seg.data.squeeze(0).long()  # (H, W)
        truth = sample.gt_sem_seg.data.squeeze(0).to(predicted)
        if predicted.shape != truth.shape or predicted.dim() != 2:
            raise NoRecord(f'prediction {tuple(predicted.shape)} and truth {tuple(truth.shape)} have different sizes')
        confusion, counted = confusion_of(predicted, truth, len(self._tally.confusion), self._ignore)
        self._tally.confusion += confusion
        if 'seg_confidence' in sample:
            if self._tally.levels is None:
                self._tally.levels = np.zeros((_LEVELS + 1, 2), np.int64)
            confidence = sample.seg_confidence.data.squeeze(0)
            self._tally.levels += _levels(confidence[counted], (predicted == truth)[counted])
        pixels = int(confusion.sum())
        iou = round(float(iou_of(confusion)[confusion.sum(1) > 0].mean()), 6) if pixels else None
        self._tally.pictures[place] = dict(
            path=_text(sample.get('img_path')),
            truth=_text(sample.get('seg_map_path')),
            mIoU=iou,
            accuracy=round(int(confusion.trace()) / pixels, 6) if pixels else None,
            pixels=pixels,
        )
        if pixels and self.keep:
            self._keep(iou, place, predicted, truth)

    def _keep(self, iou: float, place: int, predicted: Tensor, truth: Tensor) -> None:
        encoded = None
        # Of equal ones the first counts as worse, here and in _ends.
        for heap, order in ((self._worst, (-iou, -place)), (self._best, (iou, place))):
            if len(heap) < self.keep or order > heap[0][0]:
                encoded = encoded or (_png(predicted), _png(truth))
                (heapq.heappush if len(heap) < self.keep else heapq.heapreplace)(heap, (order, place, encoded))

    def _end(self, runner: Runner, kind: str, metrics: dict) -> None:
        tally, self._tally = self._tally, None
        if tally is None:
            return
        if not tally.timed:
            tally.seconds, tally.timed = self._first, 1
        tallies = all_gather_object(tally)
        refused = next((one.refused for one in tallies if one.refused), None)
        pictures = {place: picture for one in tallies for place, picture in one.pictures.items()}
        if not refused and not any(picture['pixels'] for picture in pictures.values()):
            refused = 'no picture has a labelled pixel'
        if refused:
            runner.logger.info(f'{kind}: no evaluation record ({refused})')
            return
        wanted = _ends(pictures, self.keep)
        encoded: dict[int, tuple[bytes, bytes]] = {}
        for mine in all_gather_object({place: png for _, place, png in self._worst + self._best if place in wanted}):
            encoded.update(mine)
        self._worst, self._best = [], []
        if not is_main_process():
            return
        record = self._record(runner, kind, metrics, tallies, pictures)
        name = kind if kind == 'test' or record['iteration'] is None else f'val_iter_{record["iteration"]}'
        try:
            _write(Path(runner.log_dir, FOLDER), name, record, pictures, encoded)
        except OSError as error:
            runner.logger.warning(f'{kind}: the evaluation record could not be written ({error})')

    def _record(
        self, runner: Runner, kind: str, metrics: dict, tallies: list[_Tally], pictures: dict[int, dict]
    ) -> dict:
        training = runner._train_loop is not None and not isinstance(runner._train_loop, dict)
        levels = [one.levels for one in tallies if one.levels is not None]
        model, dataset = _unwrapped(runner.model), getattr(self._dataset, 'dataset', self._dataset)
        info = self._dataset.metainfo
        seconds = [one.seconds / one.timed for one in tallies]
        return dict(
            kind=kind,
            iteration=runner.iter if training else self._loaded_iter,
            checkpoint=None if kind == 'val' and training else _text(runner._load_from),
            aug_test=isinstance(model, BaseTTAModel),
            date=datetime.now().astimezone().isoformat(timespec='seconds'),
            dataset=dict(
                type=type(dataset).__name__,
                data_root=_text(getattr(dataset, 'data_root', None)) or '',
                img_path=_text((getattr(dataset, 'data_prefix', None) or {}).get('img_path')) or '',
                pictures=len(pictures),
                started_in=os.getcwd(),  # where relative paths begin
            ),
            classes=[str(name) for name in info['classes']],
            palette=[[int(value) for value in colour] for colour in info.get('palette') or ()],
            ignore_index=self._ignore,
            confusion=sum(one.confusion for one in tallies).tolist(),
            metrics={
                name: round(float(value), 4) if math.isfinite(value) else None
                for name, value in metrics.items()
                if isinstance(value, Real) and not isinstance(value, bool)
            },
            pictures=[pictures[place] for place in sorted(pictures)],
            calibration=_calibration(sum(levels)) if levels else None,
            seconds_per_picture=float(f'{sum(seconds) / len(seconds) / len(seconds):.4g}'),
            environment=_environment(model),
        )


def confusion_of(predicted: Tensor, truth: Tensor, classes: int, ignore: int = 255) -> tuple[np.ndarray, Tensor]:
    """Count the pixels of each true class that were predicted as each class.

    Args:
        predicted, truth: class ids (H, W), int64.
        classes: their number, C.
        ignore: truth that does not count; other values that are no class do not count either.

    Returns:
        (C, C), int64, rows truth, columns prediction; and which pixels counted, (H, W).

    Raises:
        NoRecord: a prediction that is no class.
    """
    counted = (truth >= 0) & (truth < classes) & (truth != ignore)
    predicted, truth = predicted[counted], truth[counted]
    if predicted.numel() and not 0 <= int(predicted.min()) <= int(predicted.max()) < classes:
        raise NoRecord(f'predictions of {int(predicted.max())}, and the data set has {classes} classes')
    counts = torch.bincount(truth * classes + predicted, minlength=classes**2)
    return counts.view(classes, classes).cpu().numpy(), counted


def iou_of(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class (C,), float64, from a confusion matrix; NaN where it is neither in truth nor predicted."""
    right = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def _levels(confidence: Tensor, right: Tensor) -> np.ndarray:
    level = (confidence.float() * _LEVELS).round().clamp(0, _LEVELS).long()
    return torch.bincount(level * 2 + right.long(), minlength=2 * (_LEVELS + 1)).view(-1, 2).cpu().numpy()


def _calibration(levels: np.ndarray) -> dict:
    """Reliability in bins of equal width, and the expected calibration error (Guo et al., 2017), from 0 to 1."""
    of_bin = np.minimum(np.arange(_LEVELS + 1) * _BINS // _LEVELS, _BINS - 1)
    bins, off = [], 0.0
    for k in range(_BINS):
        inside = levels[of_bin == k]
        pixels, values = int(inside.sum()), np.arange(_LEVELS + 1)[of_bin == k] / _LEVELS
        confidence = float(inside.sum(1) @ values) / pixels if pixels else None
        accuracy = int(inside[:, 1].sum()) / pixels if pixels else None
        off += abs(confidence - accuracy) * pixels if pixels else 0
        bins.append(
            dict(
                low=k / _BINS,
                high=(k + 1) / _BINS,
                pixels=pixels,
                confidence=confidence and round(confidence, 6),
                accuracy=accuracy if accuracy is None else round(accuracy, 6),
            )
        )
    return dict(bins=bins, ece=round(off / max(int(levels.sum()), 1), 6))


def _ends(pictures: dict[int, dict], keep: int) -> set[int]:
    """The places of the worst and the best pictures."""
    order = sorted((p['mIoU'], place) for place, p in pictures.items() if p['mIoU'] is not None)
    return {place for _, place in [*order[:keep], *(order[-keep:] if keep else [])]}


def _write(folder: Path, name: str, record: dict, pictures: dict[int, dict], encoded: dict) -> None:
    """Pictures first, then the file that names them; what was there before under this name goes."""
    below, part = folder / 'pictures' / name, folder / f'.{name}.json.part'
    try:
        if below.exists():
            shutil.rmtree(below)
        below.mkdir(parents=True)
        for place, pngs in sorted(encoded.items()):
            for what, png in zip(('prediction', 'truth_map'), pngs, strict=True):
                path = below / f'{place:06d}_{what}.png'
                path.write_bytes(png)
                pictures[place][what] = path.relative_to(folder).as_posix()
        part.write_text(json.dumps(record, allow_nan=False), encoding='utf-8')
        os.replace(part, folder / f'{name}.json')
    except OSError:
        shutil.rmtree(below, ignore_errors=True)
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    if record['kind'] == 'val':
        _drop_pictures(folder, name)


def _drop_pictures(folder: Path, newest: str) -> None:
    """Remove the pictures of validations that are neither the newest nor the best of this run."""
    scores = {}
    for path in folder.glob('val*.json'):
        if (folder / 'pictures' / path.stem).is_dir():
            with suppress(OSError, ValueError):
                scores[path.stem] = json.loads(path.read_text(encoding='utf-8'))['metrics'].get('mIoU') or 0.0
    best = max(scores, key=scores.get, default=None)
    for name in scores.keys() - {newest, best}:
        shutil.rmtree(folder / 'pictures' / name, ignore_errors=True)


def _png(labels: Tensor) -> bytes:
    labels = labels.cpu().numpy()
    return cv2.imencode('.png', labels.astype(np.uint8 if labels.max() < 256 else np.uint16))[1].tobytes()


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _segmentor(model: nn.Module) -> StreamingEncoderDecoder | None:
    """This package's segmentor in a model that gives its confidence."""
    model = _unwrapped(model)
    if isinstance(model, StreamingTTAModel):
        model = model.module
        return model if hasattr(model, 'test_cfg') and model.test_cfg is not None else None
    return model if isinstance(model, StreamingEncoderDecoder) else None


def _environment(model: nn.Module) -> dict:
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device('cpu')
    versions = dict(python=platform.python_version())
    for name, package in _PACKAGES.items():
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(package)
    segmentor = _segmentor(model)
    precision = segmentor.test_cfg.get('precision') if segmentor is not None else None
    return dict(
        **versions,
        precision=precision or 'fp32',
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        processes=get_dist_info()[1],
        threads=torch.get_num_threads(),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
