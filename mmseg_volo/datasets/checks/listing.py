"""List the files of a data set from its config, and how they are read; find missing files."""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from mmseg.registry import DATASETS
from torch.utils.data import Dataset

from ...utils.unwrap import class_of

_IMAGES = (
    '.jpg',
    '.jpeg',
    '.jpe',
    '.jfif',
    '.png',
    '.bmp',
    '.tif',
    '.tiff',
    '.webp',
    '.gif',
    '.jp2',
    '.pgm',
    '.ppm',
)

FILE_REMEDY = 'check its permissions and the disk'

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

    ``image`` is (flag, backend) for ``mmcv.imfrombytes``, ``bands`` is (bands, fill) of ``LoadBands`` in its place, and
    ``label`` is (name of the transform, backend). They are None, and the content is not checked, if the pipeline does
    not use ``LoadImageFromFile`` and ``LoadAnnotations``, or the transforms of this package in their place.
    """

    split: str
    classes: int | None
    ignore_index: int
    reduce_zero_label: bool
    label_map: Mapping[int, int] | None
    image: tuple[str, str] | None
    label: tuple[str, str] | None
    bands: tuple[Sequence[int] | None, float | Sequence[float]] | None = None


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
    kind = class_of(cfg, DATASETS)
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
    image = _transform(steps, ('LoadImageFromFile', 'LoadCheckedImage'))
    bands = _transform(steps, ('LoadBands',))
    label = _transform(steps, ('LoadAnnotations', 'LoadCheckedAnnotations'))
    rules = Rules(
        split=split,
        classes=None,
        ignore_index=cfg.get('ignore_index', 255),
        reduce_zero_label=False,
        label_map=None,
        image=image and (image.get('color_type', 'color'), image.get('imdecode_backend', 'cv2')),
        bands=bands and (bands.get('bands'), bands.get('fill', 0)),
        label=label and (_name(label), label.get('imdecode_backend', 'pillow')),
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
        if not needed and isinstance(error, OSError) and error.filename:
            return Source(rules, findings=[_unlisted(split, error)])
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


def _unlisted(split: str, error: OSError) -> Finding:
    """The fault of a folder that cannot be listed."""
    if error.errno == errno.ELOOP:
        for folder in reversed(Path(error.filename).parents):
            if folder.is_symlink() and Path(os.path.realpath(folder.parent)).is_relative_to(os.path.realpath(folder)):
                problem, remedy = 'this link leads back to a folder above it', 'remove the link'
                return Finding(split, 'folder', str(folder), problem, remedy)
    return Finding(split, 'folder', error.filename, f'it cannot be listed ({error.strerror})', FILE_REMEDY)


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


def _transform(steps: Iterable[Mapping], names: Sequence[str]) -> Mapping | None:
    return next((step for step in steps if _name(step) in names), None)


def _name(step: Mapping) -> str:
    kind = step.get('type')
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit('.', 1)[-1]


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
    suffixes = Counter(Path(path).suffix or 'without a suffix' for path in names_below(folder, folders=False))
    return 'it holds ' + (', '.join(f'{count} {suffix}' for suffix, count in suffixes.most_common(3)) or 'no files')


def names_below(folder: str, folders: bool = True) -> Iterator[str]:
    """Yield the paths below a folder, as mmseg lists them: links are followed, names with a dot in front left out.

    Folders are yielded too, unless ``folders`` is false. A folder to which several links lead is listed once.
    """
    seen = set()
    for place, inner, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not name.startswith('.')]
        names = [*(inner if folders else []), *files]
        yield from (os.path.join(place, name) for name in sorted(names) if not name.startswith('.'))


def missing_files(source: Source) -> list[Finding]:
    """Find missing images and labels. If all labels are missing, that is one finding."""
    split, labels = source.rules.split, [label for _, label in source.pairs if label is not None]
    paths = [path for pair in source.pairs for path in pair if path is not None]
    absent = set(paths) - present_files(paths)
    others = _similar(absent, set(paths))
    if not source.pairs or (not labels and (source.rules.label is None or split == 'test')):
        unlabelled = []
    elif not labels:
        remedy = "give data_prefix['seg_map_path'] in the config"
        where = source.image_dir or source.pairs[0][0]
        unlabelled = [Finding(split, 'missing label', where, 'it has no folder of labels', remedy)]
    elif absent.issuperset(labels):
        folder = source.label_dir or str(Path(labels[0]).parent)
        there = f', but {others[labels[0]]} is there' if labels[0] in others else ''
        expected = f'{_holdings(folder)}; the first expected is {labels[0]}{there}'
        problem = f'none of the {len(labels)} labels exists ({expected})'
        remedy = 'correct seg_map_suffix and data_prefix in the config'
        remedy += ', or rename the labels' if there else ''
        unlabelled = [Finding(split, 'missing label', folder, problem, remedy)]
    else:
        unlabelled = [
            _missing(split, 'label', label, others, _label_remedy(source, image))
            for image, label in source.pairs
            if label in absent
        ]
    return unlabelled + [
        _missing(split, 'image', image, others, 'restore it, or take it out of ann_file')
        for image, _ in source.pairs
        if image in absent
    ]


def _label_remedy(source: Source, image: str) -> str:
    folder = os.path.dirname(image)
    if source.image_dir and not source.listed and re.search(r'(^|/)\.\w', os.path.relpath(folder, source.image_dir)):
        return f'mmseg uses the images in hidden folders too: move {folder} out of the data set'
    return f'restore it, or take the image {image} out of the data set'


def _missing(split: str, kind: str, path: str, others: Mapping[str, str], remedy: str) -> Finding:
    problem = missing_reason(path, kind)
    if path in others:
        problem += f', but {others[path]} is there'
        remedy = f'rename that file to {os.path.basename(path)}'
        remedy += ' (or correct img_suffix, if all images end so)' if kind == 'image' else ''
    return Finding(split, f'missing {kind}', path, problem, remedy)


def missing_reason(path: str, kind: str) -> str:
    """Say what is in the place of a missing image or label."""
    if os.path.isdir(path):
        return f'the {kind} is a folder'
    return f'the {kind} is a broken link' if os.path.islink(path) else f'the {kind} is missing'


def _similar(absent: Iterable[str], used: Collection[str]) -> dict[str, str]:
    """Map missing files to unused ones whose name differs only by upper and lower case, or by the extension."""
    folders: dict[str, dict[str, str]] = {}
    found = {}
    for path in absent:
        folder, name = os.path.split(path)
        if folder not in folders:
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            free = [n for n in names if is_image(n) and os.path.join(folder, n) not in used]
            folders[folder] = {os.path.splitext(n)[0].lower(): n for n in free}
        other = folders[folder].get(os.path.splitext(name)[0].lower())
        if other:
            found[path] = other
    return found


def is_image(name: str) -> bool:
    """Whether a file name is not hidden and ends as those of images do."""
    return not name.startswith('.') and os.path.splitext(name)[1].lower() in _IMAGES


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
