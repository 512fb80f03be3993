"""Faults in pipelines: they load an image first and pack last."""

from collections.abc import Iterator, Mapping, Sequence

from mmengine.dataset import BaseDataset
from mmseg.datasets import BaseSegDataset

from ..datasets.loading import LOADER_CHOICES
from .lookup import UNKNOWN
from .parts import Part

_PACKAGES = 'mmcv', 'mmengine', 'mmseg', 'mmseg_volo'


def check_dataset(loader: Mapping, key: str) -> Iterator[str]:
    """The fault that the ``dataset`` of a data loader, at this key, is no data set."""
    dataset = loader.get('dataset')
    if ('dataset' in loader and dataset is None) or isinstance(dataset, str | int | float | list | tuple):
        more = "; to join several, use type='ConcatDataset' with datasets=[...]" if isinstance(dataset, list) else ''
        yield f'{key}: {dataset!r:.60} is no dict with the type of a data set{more}'


def check_form(dataset: Part) -> Iterator[str]:
    """The fault that a pipeline is no list of transforms."""
    given, key = dataset.cfg.get('pipeline', ()), f'{dataset.key}.pipeline'
    if not isinstance(given, Sequence) or isinstance(given, str):
        yield f'{key}: {type(given).__name__} is no list of transforms; write [dict(type=...), ...]'
        return
    for i, step in enumerate(given):
        if not isinstance(step, Mapping) and not callable(step):
            yield f'{key}.{i}: {step!r:.60} is no transform; write dict(type=...)'


def check_transform(step: Part) -> Iterator[str]:
    """The faults in sizes and in ways to decode, which mmcv would find at the first image."""
    if not _is_known([step]):
        return
    for name in ('scale', 'crop_size', 'size'):
        value = step.cfg.get(name)
        if value == 0 or (isinstance(value, list | tuple) and 0 in value):
            yield f'{step.key}.{name}: {value!r} has a side of 0 pixels'
    for name, known in LOADER_CHOICES.items():
        value = step.cfg.get(name)
        if isinstance(value, str) and value not in known:
            yield f'{step.key}.{name}: {value!r} is none of {", ".join(sorted(known))}'


def check_order(dataset: Part, steps: Sequence[Part]) -> Iterator[str]:
    """The faults in the order of the transforms of mmseg's data sets.

    Args:
        dataset: without wrappers.
        steps: its transforms and those of its wrappers, as they run.
    """
    if getattr(dataset.kind, 'prepare_data', None) is not BaseDataset.prepare_data or not _is_known(steps):
        return
    if not dataset.is_a(BaseSegDataset) or ('pipeline' not in dataset.cfg and dataset.get('pipeline')):
        return
    names = [step.kind.__name__ for step in steps]
    packs = [i for i, name in enumerate(names) if name.startswith('Pack')]
    key = f'{dataset.key}.pipeline'
    if not any(name.startswith(('Load', 'Inferencer')) and 'Annotation' not in name for name in names):
        yield f"{key}: loads no image; begin it with dict(type='LoadImageFromFile')"
    elif not packs:
        yield f"{key}: packs no inputs for the model; end it with dict(type='PackSegInputs')"
    elif packs[-1] < len(names) - 1 or any(name.startswith('Load') for name in names[packs[0] :]):
        yield f'{steps[packs[0]].key}: {names[packs[0]]} must be the last step, because it keeps nothing for later ones'


def _is_known(steps: Sequence[Part]) -> bool:
    kinds = [step.kind for step in steps]
    return all(isinstance(kind, type) and kind is not UNKNOWN and _package(kind) in _PACKAGES for kind in kinds)


def _package(kind: type) -> str:
    return kind.__module__.split('.')[0]
