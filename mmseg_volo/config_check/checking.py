"""Look at a config before anything is built from it, and name each fault with its key and its remedy."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Literal

from mmengine.logging import print_log
from torch import nn

from ..errors import ConfigError
from .building import source_of
from .channels import check_channels
from .classes import check_counts, check_names, check_same, class_list
from .ignored import check_ignored
from .keys import check_loader, check_paramwise, check_part, check_text, check_top_level
from .losses import check_losses, check_outputs
from .parts import Part, Parts, heads, leaves
from .pipelines import check_dataset, check_form, check_order, check_transform
from .runs import check_best, check_complete, check_evaluator, check_measured, check_schedule
from .sizes import check_crop, check_preprocessor, check_windows

Task = Literal['train', 'test', 'data']
_SPLITS = 'train', 'val', 'test'


def settle(config: Mapping) -> None:
    """Drop settings that cannot hold beside others, and say so in the log.

    Without workers, a data loader has no ``persistent_workers`` and no ``prefetch_factor``. Without a data loader,
    there is no validation and no test.
    """
    for split in _SPLITS:
        key = f'{split}_dataloader'
        loader = config.get(key)
        if isinstance(loader, Mapping) and not loader.get('num_workers'):
            for name in ('persistent_workers', 'prefetch_factor'):
                if loader.get(name):
                    loader.pop(name)
                    _log(f'{key}.{name} is left out, because num_workers is 0')
        rest = [f'{split}_cfg', f'{split}_evaluator']
        if split != 'train' and loader is None and any(config.get(name) is not None for name in rest):
            for name in rest:
                config[name] = None
            _log(f'{key} is not set: there will be no {"validation" if split == "val" else "test"}')


def check_config(config: Mapping, task: Task | None = None) -> None:
    """Raise ConfigError with all faults of a config, one in each line.

    Args:
        config: after all overrides; it is not changed.
        task: 'train' checks what training uses, and logs the faults of the test split as warnings; 'test' checks what a
            test uses; 'data' checks the data sets and the model. Default: all that the config has.

    Raises:
        ConfigError: one line for each fault, with the key and the remedy.
    """
    parts = Parts(config, scope='mmseg' if task == 'data' else 'mmengine')
    same = all(
        repr(config.get(f'test_{name}')) == repr(config.get(f'val_{name}')) for name in ('dataloader', 'evaluator')
    )
    splits = {'train': ('train', 'val'), 'test': ('test',)}.get(task, ('train', 'val') if same else _SPLITS)
    _raise(config, list(_faults(parts, splits, task)))
    if task == 'train' and not same:
        for fault in _split_faults(parts, ('test',), 'test'):
            _log(f'{fault} (tools/test.py refuses this)', logging.WARNING)
    if task == 'test':
        for fault in _ignored_faults(parts, splits):
            _log(fault, logging.WARNING)


def check_model(config: Mapping, any_classes: bool = False) -> None:
    """Raise ConfigError with all faults of a config's model, for prediction and export.

    Args:
        config: after all overrides; it is not changed.
        any_classes: accept another number of classes than the test data set has.

    Raises:
        ConfigError: one line for each fault, with the key and the remedy.
    """
    parts = Parts(config, scope='mmseg')
    tested = leaves(parts.datasets('test'))
    datasets = [] if any_classes else tested
    faults = chain(
        _data_faults(parts, 'test'),
        chain.from_iterable(check_channels(parts.model(), parts.transforms(one)) for one in tested),
        _model_faults(parts, datasets, training=False, predicts=True, guarded=False),
    )
    _raise(config, list(_missing(config)) or list(faults))


def check_tta_pipeline(config: Mapping) -> None:
    """Raise ConfigError with all faults of a config's ``tta_pipeline``, one in each line."""
    key, dataset = 'test_dataloader.dataset', dict(type='BaseSegDataset', pipeline=config['tta_pipeline'])
    whole = {**config, 'test_dataloader': dict(dataset=dataset)}
    faults = _data_faults(Parts(whole, scope='mmseg'), 'test')
    _raise(config, [fault.replace(f'{key}.pipeline', 'tta_pipeline') for fault in faults])


def _raise(config: Mapping, faults: Sequence[str]) -> None:
    faults = list(dict.fromkeys(faults))
    if len(faults) == 1:
        raise ConfigError(source_of(config) + faults[0])
    if faults:
        lines = ''.join(f'\n  {fault}' for fault in faults)
        raise ConfigError(f'{source_of(config)}{len(faults)} faults in the config:{lines}')


def _faults(parts: Parts, splits: Sequence[str], task: Task | None) -> Iterator[str]:
    config = parts.config
    missing = list(_missing(config)) if task != 'data' else []
    yield from missing
    if missing:
        return
    if task != 'data':
        yield from check_complete(config, task)
        yield from check_top_level(config, task)
        for key, value in config.items():
            yield from check_text(key, value)
        yield from check_preprocessor(parts.model())
        for part in parts.surroundings():
            yield from check_part(part)
    hooks = [getattr(hook.kind, '__name__', '') for hook in parts.surroundings()]
    datasets = [one for split in splits for one in leaves(parts.datasets(split))]
    if task != 'test':
        trained = leaves(parts.datasets('train'))
        yield from check_same(trained, [one for one in datasets if not one.key.startswith('train_')])
    predicts = any(config.get(f'{split}_dataloader') is not None for split in splits if split != 'train')
    yield from _model_faults(parts, datasets, task != 'test', predicts and task != 'data', 'LabelGuardHook' in hooks)
    yield from _split_faults(parts, splits, task)
    if task != 'test':
        yield from _ignored_faults(parts, splits)


def _model_faults(
    parts: Parts, datasets: Sequence[Part], training: bool, predicts: bool, guarded: bool
) -> Iterator[str]:
    model = parts.model()
    for part in model:
        yield from check_part(part)
        if part.key.rpartition('.')[2] in ('model', 'module'):
            yield from check_windows(part, predicts)
    # Predictions need neither auxiliary heads nor losses.
    used = [head for head in heads(model) if training or 'auxiliary_head' not in head.key.split('.')]
    yield from check_counts(used, datasets, guarded)
    counts = {len(names) for one in datasets if (names := class_list(one))}
    for head in used:
        yield from check_outputs(head)
        if training:
            yield from check_losses(head, model, counts)


def _split_faults(parts: Parts, splits: Sequence[str], task: Task | None) -> Iterator[str]:
    """The faults in data loaders, data sets, transforms, loops, metrics and optimization."""
    for split in splits:
        loader = parts.config.get(f'{split}_dataloader')
        if not isinstance(loader, Mapping):
            continue
        if task != 'data' and parts.config.get('runner_type') in (None, 'Runner', 'VOLORunner'):
            yield from check_loader(f'{split}_dataloader', loader)
        datasets = parts.datasets(split)
        transforms = {one.key: parts.transforms(one) for one in datasets}
        yield from _data_faults(parts, split, task != 'data')
        found = [*datasets]
        if task != 'data':
            found += [*parts.samplers(split), *parts.loop(split), *parts.metrics(split)]
            yield from check_evaluator(parts.config, f'{split}_evaluator')
        if task != 'data' and split == 'train':
            found += parts.optimization()
            yield from check_paramwise(parts.config)
            yield from check_schedule(parts.config, parts.loop(split), parts.optimization())
        for part in found:
            yield from check_part(part)
        for dataset in leaves(datasets):
            yield from check_names(dataset)
            if split == 'train':
                yield from check_crop(parts.model(), _steps(parts, dataset, datasets))
            yield from check_channels(parts.model(), _steps(parts, dataset, datasets))
        if split != 'train' and task != 'data':
            yield from check_measured(leaves(datasets), parts.metrics(split), transforms)
        if split == 'val' and task != 'data':
            yield from check_best(parts.surroundings(), parts.metrics(split))


def _data_faults(parts: Parts, split: str, packs: bool = True) -> Iterator[str]:
    """The faults in the form and the transforms of a split's pipelines, which have to pack inputs if ``packs``."""
    datasets, loader = parts.datasets(split), parts.config.get(f'{split}_dataloader')
    if isinstance(loader, Mapping):
        yield from check_dataset(loader, f'{split}_dataloader.dataset')
    for dataset in datasets:
        form = list(check_form(dataset))
        yield from form
        packs = packs and not form
        for part in parts.transforms(dataset):
            yield from check_part(part)
            yield from check_transform(part)
    for dataset in leaves(datasets) if packs else ():
        yield from check_order(dataset, _steps(parts, dataset, datasets))


def _steps(parts: Parts, dataset: Part, datasets: Sequence[Part]) -> list[Part]:
    """All transforms of a data set; wrappers such as MultiImageMixDataset have their own, which come later."""
    outer = [one for one in datasets if dataset.key.startswith(f'{one.key}.')]
    return list(chain.from_iterable(parts.transforms(one) for one in (dataset, *reversed(outer))))


def _missing(config: Mapping) -> Iterator[str]:
    model = config.get('model')
    if model is None:
        yield 'model: not set'
    elif not isinstance(model, Mapping | nn.Module):
        yield f'model: {model!r:.60} is no dict'


def _ignored_faults(parts: Parts, splits: Sequence[str]) -> Iterator[str]:
    model = parts.model()
    trained = parts.datasets('train') if 'train' in splits else []
    return check_ignored(
        heads(model),
        model,
        [one for split in splits for one in leaves(parts.datasets(split))],
        [metric for split in splits for metric in parts.metrics(split)],
        [step for one in trained for step in parts.transforms(one)],
        [one for one in leaves(trained) if one.get('reduce_zero_label') is True or _is_part(one)],
    )


def _is_part(dataset: Part) -> bool:
    """Whether a config takes some of a data set's classes, so that mmseg turns the labels of the others into 255."""
    own = getattr(dataset.kind, 'METAINFO', {}).get('classes')
    names = class_list(dataset)
    return bool(own and names and set(names) < set(own))


def _log(message: str, level: int = logging.INFO) -> None:
    print_log(f'Config: {message}', logger='current', level=level)
