"""Faults in what a run needs: data loader, loop and metric of each split, and labels to measure with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.optim import _ParamScheduler
from mmengine.runner import IterBasedTrainLoop
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ..datasets.loading import loads_labels
from .classes import class_list
from .lookup import NOTHING, UNKNOWN, accepted, nearest
from .parts import Part

_NEEDED = dict(
    train=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    val=('val_dataloader', 'val_cfg', 'val_evaluator'),
    test=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
# What mmseg's IoUMetric computes for each of its iou_metrics.
_RESULTS = dict(mIoU=('mIoU', 'mAcc'), mDice=('mDice', 'mAcc'), mFscore=('mFscore', 'mPrecision', 'mRecall'))
_PACKAGES = 'mmcv', 'mmseg', 'mmseg_volo'


def check_complete(config: Mapping, task: str | None) -> Iterator[str]:
    """The splits of which only a part is set, and those that the task needs and that are not set."""
    for split, keys in _NEEDED.items():
        absent = [key for key in keys if config.get(key) is None]
        needed = split == task
        if absent and (needed or len(absent) < len(keys)):
            there = [key for key in keys if key not in absent]
            if there:
                state, remedy = f'not set, but {" and ".join(there)}', f'set all of {", ".join(keys)}, or none'
                yield f'{" and ".join(absent)}: {state}; {remedy}'
            else:
                what = 'training' if task == 'train' else 'a test'
                yield f'{absent[0]}: not set; {what} needs {", ".join(keys)}'
    if config.get('param_scheduler') is not None and config.get('optim_wrapper') is None:
        yield 'param_scheduler: set without optim_wrapper; remove it'
    loop = config.get('train_cfg')
    if task != 'test' and isinstance(loop, Mapping) and ('type' in loop) == ('by_epoch' in loop):
        problem = 'has both type and by_epoch' if 'type' in loop else 'has neither type nor by_epoch'
        yield f"train_cfg: {problem}; set type='IterBasedTrainLoop' or another loop"


def check_schedule(config: Mapping, loops: Sequence[Part], schedulers: Sequence[Part]) -> Iterator[str]:
    """The faults between the training loop, its schedules and its gradient clipping."""
    for loop in loops:
        interval = loop.get('val_interval')
        if isinstance(interval, int) and interval < 1 and config.get('val_cfg') is not None:
            yield f'{loop.key}.val_interval: {interval} is less than 1; for a run without validation, set val_cfg=None'
        for one in schedulers if loop.is_a(IterBasedTrainLoop) else ():
            if one.is_a(_ParamScheduler) and one.get('by_epoch') and not one.cfg.get('convert_to_iter_based'):
                yield (
                    f'{one.key}.by_epoch: True (the default), but {loop.key} counts iterations, so the schedule would '
                    'never step; set by_epoch=False, with begin and end in iterations'
                )
    wrapper = config.get('optim_wrapper')
    clipping = wrapper.get('clip_grad') if isinstance(wrapper, Mapping) else None
    if isinstance(clipping, Mapping):
        function = clip_grad_value_ if clipping.get('type') == 'value' else clip_grad_norm_
        known = {*accepted(function)[0], 'type'} - {'parameters'}
        for name in clipping:
            if name not in known:
                hint = nearest(name, known) or '; remove it'
                yield f'optim_wrapper.clip_grad.{name}: {function.__name__} has no such argument{hint}'


def check_evaluator(config: Mapping, key: str) -> Iterator[str]:
    """The fault that an evaluator in a list is no dict."""
    given = config.get(key)
    for i, one in enumerate(given if isinstance(given, list | tuple) else ()):
        if isinstance(one, str):
            yield f'{key}.{i}: {one!r} is no dict; write dict(type={one!r})'


def check_measured(datasets: Sequence[Part], metrics: Sequence[Part], transforms: Mapping[str, list]) -> Iterator[str]:
    """The faults that end an evaluation with an error after its first predictions.

    Args:
        datasets: of one split, without wrappers.
        metrics: of the same split.
        transforms: of each data set by its key.
    """
    metrics = [metric for metric in metrics if metric.is_a(IoUMetric)]
    for metric in metrics:
        if metric.get('format_only') is True and not metric.get('output_dir'):
            yield f'{metric.key}.output_dir: not set, but format_only saves the predictions there; set a folder'
        unknown = [name for name in _listed(metric.get('iou_metrics')) if name not in _RESULTS]
        if unknown:
            yield f'{metric.key}.iou_metrics: {unknown[0]!r} is none of {", ".join(_RESULTS)}'
    measuring = [metric for metric in metrics if metric.get('format_only') is not True]
    if not measuring:
        return
    for dataset in datasets:
        # A data set that lists its files in its own way may find classes and labels there.
        if getattr(dataset.kind, 'load_data_list', None) is not BaseSegDataset.load_data_list:
            continue
        given = dataset.cfg.get('metainfo')
        if class_list(dataset) is None and not (isinstance(given, Mapping) and given.get('classes')):
            yield (
                f'{dataset.key}: names no classes, which {measuring[0].key} needs; set '
                "metainfo=dict(classes=('road', 'sky'))"
            )
        if _without_labels(dataset, transforms[dataset.key]):
            yield (
                f'{dataset.key}: has no labels, but {measuring[0].key} measures with them; set '
                f'{dataset.key}.data_prefix.seg_map_path, or {measuring[0].key}.format_only=True and output_dir to '
                'save predictions only, or use tools/predict.py'
            )


def check_best(hooks: Sequence[Part], metrics: Sequence[Part]) -> Iterator[str]:
    """The fault that a hook compares by a figure that the validation does not have."""
    if not metrics or not all(metric.is_a(IoUMetric) and metric.get('prefix') is None for metric in metrics):
        return
    known = {
        'aAcc',
        *(name for one in metrics for key in _listed(one.get('iou_metrics')) for name in _RESULTS.get(key, ())),
    }
    for hook in hooks:
        option = 'monitor' if hook.is_a(EarlyStoppingHook) else 'save_best' if hook.is_a(CheckpointHook) else ''
        for name in _listed(hook.cfg.get(option)):
            if name not in known and (name, option) != ('auto', 'save_best') and not name.startswith('val/'):
                hint = nearest(name, known) or f'; it has {", ".join(sorted(known))}'
                yield f'{hook.key}.{option}: the validation has no {name!r}{hint}'


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, str)]


def _without_labels(dataset: Part, transforms: Sequence[Part]) -> bool:
    prefix = dataset.get('data_prefix')
    if isinstance(prefix, Mapping) and prefix.get('seg_map_path') is None:
        return True
    pipeline = dataset.cfg.get('pipeline')
    if not pipeline or pipeline is NOTHING or not transforms:
        return False
    plain = all(
        one.kind is not UNKNOWN and getattr(one.kind, '__module__', '').split('.')[0] in _PACKAGES for one in transforms
    )
    return plain and not any(loads_labels(one.kind) for one in transforms)
