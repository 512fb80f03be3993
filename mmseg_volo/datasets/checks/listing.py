"""List the files of a data set from its config, and how they are read; find missing files."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from mmseg.registry import DATASETS
from torch.utils.data import Dataset

Pair = tuple[str, str | None]  # an image and its label


@dataclass(frozen=True)
class Finding:
    """A fault in the file or folder ``path``, or with ``fault=False`` a warning about it."""

    split: str
    kind: str
    path: str
    problem: str
    remedy: str
    fault: bool = True

    def __str__(self) -> str:
        return f'{self.path}: {self.problem}; {self.remedy}'


@dataclass(frozen=True)
class Rules:
    """How a data set's files are decoded, and what its label values mean.

    ``image`` and ``label`` are (flag, backend) for ``mmcv.imfrombytes``. They are None, and the content is not checked,
    if the pipeline does not use ``LoadImageFromFile`` and ``LoadAnnotations``.
    """

    split: str
    classes: int | None
    ignore_index: int
    reduce_zero_label: bool
    label_map: Mapping[int, int] | None
    image: tuple[str, str] | None
    label: tuple[str, str] | None


@dataclass
class Source:
    """A data set without its wrappers: its (image, label or None) pairs and their folders."""

    rules: Rules
    names: tuple[str, ...] = ()
    pairs: list[Pair] = field(default_factory=list)
    image_dir: str = ''
    label_dir: str = ''
    image_suffix: str = ''
    label_suffix: str = ''
    listed: bool = False  # by a file or by indices, so other files in the folders are no mistake
    findings: list[Finding] = field(default_factory=list)


class LeftOut(Exception):
    """The check does not support this data set; the message says why."""


def find_sources(
    cfg: Mapping, split: str, left_out: Callable[[str], None], draw: bool = False, built: Dataset | None = None
) -> list[Source]:
    """List the data sets inside all wrappers.

    Args:
        cfg: config of a data set.
        split: name of the split in findings.
        left_out: called with the reason for each data set that the check does not support.
        draw: draw missing scenes of a ``StreetSceneDataset``.
        built: the data set, if it is built already: its files are not listed again.
    """
    inner = cfg.get('datasets') or cfg.get('dataset')
    if inner:
        cfgs = inner if isinstance(inner, Sequence) else [inner]
        if all(isinstance(each, Mapping) for each in cfgs):
            datasets = getattr(built, 'datasets', None) or [getattr(built, 'dataset', None)] * len(cfgs)
            found = [find_sources(one, split, left_out, draw, data) for one, data in zip(cfgs, datasets, strict=True)]
            return list(chain.from_iterable(found))
    try:
        return [_open(cfg, split, draw, built)]
    except LeftOut as reason:
        left_out(f'{cfg.get("type")} is not checked: {reason}')
        return []


def _open(cfg: Mapping, split: str, draw: bool, built: Dataset | None) -> Source:
    """List a data set's files, or raise LeftOut. If a folder or list is missing, that is the only finding."""
    kind = cfg.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if not isinstance(kind, type):
        raise LeftOut('it is not registered')
    if getattr(kind, 'draws_itself', False) and not draw:
        raise LeftOut('it draws and checks its files itself')
    steps = list(_steps(cfg.get('pipeline') or []))
    folders = [os.path.join(cfg.get('data_root') or '', folder) for folder in _prefixes(cfg)]
    backends = [part.get(key) or {} for part in [cfg, *steps] for key in ('backend_args', 'file_client_args')]
    if any(backend.get('backend', 'local') not in ('local', 'disk') for backend in backends):
        raise LeftOut('its files come from another backend than the local disk')
    if any('://' in folder for folder in folders):
        raise LeftOut('its files are on a server')
    rules = Rules(
        split=split,
        classes=None,
        ignore_index=cfg.get('ignore_index', 255),
        reduce_zero_label=False,
        label_map=None,
        image=_reader(steps, ('LoadImageFromFile', 'LoadCheckedImage'), 'color', 'cv2'),
        label=_reader(steps, ('LoadAnnotations', 'LoadCheckedAnnotations'), 'unchanged', 'pillow'),
    )
    try:
        dataset = DATASETS.build(dict(cfg, lazy_init=True, pipeline=[])) if built is None else built
        indices = getattr(dataset, '_indices', None)
        if built is not None:
            infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        else:
            dataset.data_list = dataset.load_data_list()
            dataset.data_list = dataset.filter_data()
            infos = dataset.data_list if indices is None else dataset._get_unserialized_subset(indices)
    except Exception as error:
        needed = [folder for folder in folders if not os.path.isdir(folder)]
        if listing := cfg.get('ann_file'):
            listing = os.path.join(cfg.get('data_root') or '', listing)
            needed += [] if os.path.exists(listing) else [listing]
        if not needed or not isinstance(error, OSError | AssertionError):
            # The runner builds the data set too, and its error says what is wrong.
            raise LeftOut(f'its files cannot be listed ({error!r})') from error
        remedy = 'correct data_root, data_prefix and ann_file in the config, or put the data there'
        found = [Finding(split, 'empty', path, 'there is no such file or folder', remedy) for path in needed]
        return Source(rules, findings=found)

    if not all(isinstance(info, Mapping) and 'img_path' in info for info in infos):
        raise LeftOut('its samples have no img_path')
    if infos and 'reduce_zero_label' not in infos[0]:
        raise LeftOut('its samples are not those of BaseSegDataset')
    names = tuple(dataset.metainfo.get('classes') or ())
    if infos:
        labels = dict(reduce_zero_label=bool(infos[0]['reduce_zero_label']), label_map=infos[0].get('label_map'))
        rules = replace(rules, classes=len(names) or None, **labels)
    prefix = getattr(dataset, 'data_prefix', {})
    source = Source(
        rules=rules,
        names=names,
        pairs=list(dict.fromkeys((info['img_path'], info.get('seg_map_path')) for info in infos)),
        image_dir=prefix.get('img_path') or '',
        label_dir=prefix.get('seg_map_path') or '',
        image_suffix=getattr(dataset, 'img_suffix', ''),
        label_suffix=getattr(dataset, 'seg_map_suffix', ''),
        listed=bool(getattr(dataset, 'ann_file', '')) or indices is not None,
    )
    if not infos:
        source.findings.append(_empty(source))
    return source


def _prefixes(cfg: Mapping) -> list[str]:
    return [folder for folder in (cfg.get('data_prefix') or {}).values() if isinstance(folder, str)]


def _steps(pipeline: Iterable) -> Iterator[Mapping]:
    """Yield all transforms of a pipeline, also nested ones."""
    for step in pipeline:
        if isinstance(step, Mapping):
            yield step
            yield from _steps(step.get('transforms') or [])
        elif isinstance(step, list | tuple):
            yield from _steps(step)


def _reader(steps: Sequence[Mapping], names: Sequence[str], flag: str, backend: str) -> tuple[str, str] | None:
    """Flag and backend with which the transform of one of these names decodes a file, or None if there is none."""
    for step in steps:
        kind = step.get('type')
        name = kind.__name__ if isinstance(kind, type) else str(kind).rsplit('.', 1)[-1]
        if name in names:
            return step.get('color_type', flag), step.get('imdecode_backend', backend)
    return None


def _empty(source: Source) -> Finding:
    held = _holdings(source.image_dir)
    if source.listed:
        problem, remedy = 'no image is listed for this folder', 'correct ann_file and indices in the config'
    else:
        problem = f'no image whose name ends in {source.image_suffix!r} ({held})'
        remedy = 'correct data_root, data_prefix and img_suffix in the config'
    return Finding(source.rules.split, 'empty', source.image_dir, problem, remedy)


def _holdings(folder: str) -> str:
    """Describe the files in a folder, most frequent suffixes first: 'it holds 12 .png, 1 .txt'."""
    if not os.path.isdir(folder):
        return 'no such folder'
    names = chain.from_iterable(files for _, _, files in os.walk(folder))
    suffixes = Counter(Path(name).suffix or 'without a suffix' for name in names)
    return 'it holds ' + (', '.join(f'{count} {suffix}' for suffix, count in suffixes.most_common(3)) or 'no files')


def missing_files(source: Source) -> list[Finding]:
    """Find missing images and labels. If all labels are missing, that is one finding."""
    split, labels = source.rules.split, [label for _, label in source.pairs if label is not None]
    paths = [path for pair in source.pairs for path in pair if path is not None]
    absent = set(paths) - present_files(paths)
    if not source.pairs or (not labels and (source.rules.label is None or split == 'test')):
        unlabelled = []
    elif not labels:
        remedy = "give data_prefix['seg_map_path'] in the config"
        where = source.image_dir or source.pairs[0][0]
        unlabelled = [Finding(split, 'missing label', where, 'it has no folder of labels', remedy)]
    elif absent.issuperset(labels):
        folder = source.label_dir or str(Path(labels[0]).parent)
        problem = f'none of the {len(labels)} labels exists ({_holdings(folder)}; the first expected is {labels[0]})'
        remedy = 'correct seg_map_suffix and data_prefix in the config'
        unlabelled = [Finding(split, 'missing label', folder, problem, remedy)]
    else:
        remedy = 'restore the label or remove the image {}'
        unlabelled = [
            Finding(split, 'missing label', label, _absence(label, 'label'), remedy.format(image))
            for image, label in source.pairs
            if label in absent
        ]
    return unlabelled + [
        Finding(split, 'missing image', image, _absence(image, 'image'), 'restore it, or remove it from ann_file')
        for image, _ in source.pairs
        if image in absent
    ]


def _absence(path: str, kind: str) -> str:
    if os.path.isdir(path):
        return f'the {kind} is a folder'
    return f'the {kind} is a broken link' if os.path.islink(path) else f'the {kind} is missing'


def present_files(paths: Iterable[str]) -> set[str]:
    """Return the paths that are files. Lists each folder once, because one query per file is slow on network disks."""
    found = set()
    for folder in {os.path.dirname(path) for path in paths}:
        try:
            with os.scandir(folder or '.') as entries:
                found.update(os.path.join(folder, entry.name) for entry in entries if entry.is_file())
        except OSError:
            continue
    return found


def left_over_files(source: Source) -> list[Finding]:
    """Find what mmseg ignores silently: labels without an image, and image names that are not files."""
    if source.listed or not source.image_suffix:
        return []
    split, known = source.rules.split, {os.path.normpath(path) for pair in source.pairs for path in pair if path}
    findings = []
    for path in _named(source.image_dir, source.image_suffix):
        if path not in known and not os.path.isfile(path):
            problem = _absence(path, 'image')
            findings.append(Finding(split, 'missing image', path, problem, 'restore the image or remove the name'))
    for path in _named(source.label_dir, source.label_suffix):
        if path not in known and os.path.isfile(path):
            remedy = 'add the image or remove the label'
            findings.append(Finding(split, 'label without image', path, 'it has no image', remedy, fault=False))
    return findings


def _named(folder: str, suffix: str) -> list[str]:
    if not folder or not suffix:
        return []
    return sorted(
        os.path.normpath(os.path.join(place, name))
        for place, folders, files in os.walk(folder)
        for name in chain(folders, files)
        if name.endswith(suffix) and not name.startswith('.')
    )
