"""Import annotations: choose classes and splits, draw the labels, and report what was met.

The result is written into a hidden folder beside its place, which is renamed at the end, so it is whole or absent. A
killed process may leave the hidden folder ``.<name>.*.tmp`` behind; it can be deleted.
"""

import fnmatch
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...errors import DataError
from ..checks.images import init_checker
from .annotations import Annotations, Colour, Images, Item, Notes, similar
from .drawing import IGNORE, Drawn, Plan, draw
from .formats import read_annotations
from .labelme import BACKGROUND, IGNORED
from .voc import VOID, palette_of

REPORT = 'import.txt'
_SHOWN = 3  # names that a line shows
_MOST_CLASSES = 255  # label ids 0 to 254


@dataclass(frozen=True)
class Options:
    """Options of :func:`import_annotations`.

    Attributes:
        format: name in ``FORMATS``; by default recognised.
        images: folders of the images; by default the source.
        classes: names and order of the classes; by default all of the annotation. Others become background.
        ignore: classes whose pixels are ignored in training.
        ignore_background: ignore uncovered pixels too, so that there is no class for them.
        val: share of the images for validation, if the source has no such split.
        val_names: patterns of the names of validation images, such as ``scene7/*``. They overrule the source's splits.
        empty: 'background' or 'skip': what images without a shape become. By default they are background if the
            annotation lists them, and left out if not.
        small_on_top: draw large shapes first, whatever the order in the annotation.
        keep_going: leave out images with a fault.
        workers: number of processes; by default one per CPU, 8 at most.
    """

    format: str | None = None
    images: Sequence[str] = ()
    classes: Sequence[str] = ()
    ignore: Sequence[str] = ()
    ignore_background: bool = False
    val: float = 0.2
    val_names: Sequence[str] = ()
    empty: str | None = None
    small_on_top: bool = False
    keep_going: bool = False
    workers: int | None = None


@dataclass(frozen=True)
class Imported:
    """The classes of a finished import, and their RGB colours."""

    classes: list[str]
    palette: list[Colour]


def import_annotations(src: str | Path, dst: str | Path, options: Options = Options()) -> Imported:
    """Write images/{train,val,test} and labels/{train,val,test} from annotations, and print what was met.

    Images are hard-linked, or copied where that is impossible. Labels are PNG files of class ids. ``import.txt`` lists
    all names that the output shortens.

    Args:
        src: folder of annotations and images, or one file of annotations.
        dst: folder to create.
        options: see :class:`Options`.

    Raises:
        DataError: the source cannot be read, an image has a fault, or ``dst`` exists or cannot be written. Then ``dst``
            is as it was.
    """
    src, dst = Path(src).absolute(), Path(dst).absolute()
    _check_place(dst)
    kind, found, images = read_annotations(
        src, options.format, [Path(path) for path in options.images], options.classes
    )
    if any(item.shapes for item in found.items) and importlib.util.find_spec('pycocotools') is None:
        raise DataError('pycocotools is needed to draw shapes: pip install pycocotools (or -e ".[import]" here)')
    classes, ids, uncovered = choose_classes(found, options)
    palette = palette_of(classes, found.palette)
    colours = {VOID: IGNORE} | {found.palette[name]: value for name, value in ids.items() if name in found.palette}
    items = _choose_items(found, images, options, uncovered)
    items = choose_splits(items, options, found.notes)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{dst.name}.', suffix='.tmp', dir=dst.parent) as folder:
            plan = Plan(Path(folder, dst.name), ids, colours, uncovered, options.small_on_top)
            drawn = list(_draw_all(items, plan, options.workers))
            lines = _report(kind, found.notes, drawn, classes)
            _check_result(drawn, options)
            (plan.root / REPORT).write_text('\n'.join([f'{kind}: {src}', *lines]) + '\n', encoding='utf-8')
            os.replace(plan.root, dst)
    except OSError as error:
        raise DataError(f'{dst}: not written ({error.strerror or error}); check space and permissions') from error
    return Imported(classes, palette)


def _check_place(dst: Path) -> None:
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise DataError(f'{dst} exists and is not empty; nothing was changed: delete it, or choose another folder')


def choose_classes(found: Annotations, options: Options) -> tuple[list[str], dict[str, int], int]:
    """Return the class names by id, the label id of each name in the annotation, and that of uncovered pixels.

    Raises:
        DataError: a name is unknown or occurs twice, or there are no classes or too many.
    """
    known = list(dict.fromkeys(found.classes))
    background = found.background
    for name in [*options.classes, *options.ignore]:
        if name not in known and name != background:
            raise DataError(f'the annotation has no class {name!r}; {similar(name, known)}')
    if len(set(options.classes)) < len(options.classes):
        raise DataError('--classes names a class twice')
    ignored = {*options.ignore, IGNORED, *([background, BACKGROUND] if options.ignore_background else [])}
    chosen = [name for name in options.classes or known if name not in ignored]
    if background and background not in ignored and background not in chosen:
        chosen.insert(0, background)
    if not set(chosen) - {background}:
        raise DataError('the annotation has no class with a shape')
    if len(chosen) > _MOST_CLASSES:
        raise DataError(
            f'{len(chosen)} classes, but a label has room for {_MOST_CLASSES} (0 to 254; 255 is ignored); '
            'choose some with --classes'
        )
    uncovered = chosen.index(background) if background in chosen else IGNORE
    ids = dict.fromkeys([*known, BACKGROUND], uncovered) | {name: index for index, name in enumerate(chosen)}
    ids |= dict.fromkeys(ignored, IGNORE)
    if left_out := [name for name in known if name not in chosen and name not in ignored]:
        for name in left_out:
            found.notes.note(f'classes that are not in --classes and become {background or "ignored"}', name)
    return chosen, ids, uncovered


def _choose_items(found: Annotations, images: Images, options: Options, uncovered: int) -> list[Item]:
    """Leave out what has no image or no annotation, and name it."""
    unknown = images.unused(found.items)
    chosen, missing = [], 0
    for item in [*found.items, *unknown]:
        if item.image is None and item.embedded is None:
            missing += 1
            found.notes.note('annotated images that do not exist, left out', item.where)
        elif item.shapes or item.colours:
            chosen.append(item)
        else:
            kind = 'images without a shape' if item.listed else 'images without an annotation'
            wanted = options.empty or ('background' if item.listed else 'skip')
            if wanted == 'background' and uncovered != IGNORE:
                chosen.append(item)
                found.notes.note(f'{kind}, all background', item.where)
            else:
                found.notes.note(f'{kind}, left out', item.where)
    if not any(item.shapes or item.colours for item in chosen):
        example = next((item.where for item in found.items), '')
        if missing:
            raise DataError(
                f'none of the {missing} annotated images exists, such as {example}; give their folder with --images'
            )
        met = ''.join(f'; {kind} ({len(names)}): {names[0]}' for kind, names in found.notes.notes.items())
        raise DataError(f'no image has a shape with an area{met}')
    return chosen


def choose_splits(items: list[Item], options: Options, notes: Notes) -> list[Item]:
    """Give each item a split: the source's, or by ``val_names``, or by a hash of the name.

    Raises:
        DataError: there are no images for training or for validation.
    """
    if options.val_names:
        chosen = {
            item.name for item in items if any(fnmatch.fnmatchcase(item.name, pattern) for pattern in options.val_names)
        }
        others = {item.name: item.split if item.split == 'test' else 'train' for item in items}
        items = [replace(item, split='val' if item.name in chosen else others[item.name]) for item in items]
    elif not any(item.split == 'val' for item in items):
        free = [item for item in items if item.split != 'test']
        ranked = sorted(free, key=lambda item: hashlib.sha256(item.name.encode()).digest())
        count = min(max(1, round(options.val * len(free))), len(free) - 1)
        chosen = {id(item) for item in ranked[:count]}
        items = [replace(item, split='val' if id(item) in chosen else item.split or 'train') for item in items]
        print(
            f'the source has no validation split: {count} of {len(free)} images were chosen for it at random; if they '
            'are frames of videos, choose whole scenes with --val-names',
            flush=True,
        )
    else:
        for item in items:
            if item.split is None:
                notes.note('images without a split, used for training', item.where)
        items = [replace(item, split=item.split or 'train') for item in items]
    for split in ('train', 'val'):
        if not any(item.split == split for item in items):
            names = ', '.join(item.name for item in items[:_SHOWN])
            raise DataError(f'there is no image for {split}; there are {len(items)} images ({names}, ...)')
    return items


def _draw_all(items: list[Item], plan: Plan, workers: int | None) -> Iterable[Drawn]:
    """Draw the items; of two with one name, the second is a fault."""
    seen: dict[tuple, Item] = {}
    single = []
    for item in items:
        other = seen.setdefault((item.split, item.name.rpartition('.')[0].lower()), item)
        if other is item:
            single.append(item)
        else:
            twin = Drawn(item.split)
            twin.notes.fault('images of one name', f'{item.where} and {other.where}: rename one of them')
            yield twin
    workers = min(workers or min(os.cpu_count() or 1, 8), len(single))
    task = partial(draw, plan=plan)
    if workers == 1:
        yield from tqdm(map(task, single), total=len(single), unit='image')
        return
    pool = ProcessPoolExecutor(workers, initializer=init_checker)
    try:
        yield from tqdm(pool.map(task, single, chunksize=4), total=len(single), unit='image')
    except BrokenProcessPool as error:
        raise DataError('a worker process was killed (out of memory?); run again with --workers 1') from error
    finally:
        pool.shutdown(cancel_futures=True)


def _report(kind: str, notes: Notes, drawn: Sequence[Drawn], classes: Sequence[str]) -> list[str]:
    """Print counts, classes and notes, shortened; return the lines in full."""
    for each in drawn:
        for name, texts in each.notes.notes.items():
            for text in texts:
                notes.note(name, text)
        for name, texts in each.notes.faults.items():
            for text in texts:
                notes.fault(name, text)
    good = [each for each in drawn if not each.notes.faults]
    lines = []
    for split in ('train', 'val', 'test'):
        if count := sum(each.split == split for each in good):
            lines.append(f'{split}: {count} images with labels')
    pixels = sum((each.pixels for each in good), np.zeros(256, np.int64))
    total = max(int(pixels.sum()), 1)
    shares = [f'{index} {name} {100 * pixels[index] / total:.1f} %' for index, name in enumerate(classes)]
    lines.append(f'{len(classes)} classes: {", ".join(shares)}; ignored {100 * pixels[IGNORE] / total:.1f} %')
    for name, count in zip(classes, pixels, strict=False):
        if not count:
            notes.note('classes without a pixel', name)
    print(f'format: {kind}', *lines, sep='\n')
    for name, texts in notes.notes.items():
        more = f', ... (all in {REPORT})' if len(texts) > _SHOWN else ''
        print(f'note: {name} ({len(texts)}): {", ".join(texts[:_SHOWN])}{more}')
        lines += [f'note: {name} ({len(texts)})', *(f'  {text}' for text in texts)]
    for name, texts in notes.faults.items():
        lines += (found := [f'fault: {name} ({len(texts)})', *(f'  {text}' for text in texts)])
        print(*found, sep='\n', flush=True)
    return lines


def _check_result(drawn: Sequence[Drawn], options: Options) -> None:
    faulty = [each for each in drawn if each.notes.faults]
    if faulty and not options.keep_going:
        kind, (first, *_) = next(iter(faulty[0].notes.faults.items()))
        raise DataError(
            f'{len(faulty)} of {len(drawn)} images have a fault, and nothing was written; first: {kind}: {first}. '
            'Correct them, or leave these images out with --keep-going'
        )
    for split in ('train', 'val'):
        if not any(each.split == split and not each.notes.faults for each in drawn):
            raise DataError(f'no image without a fault is left for {split}; nothing was written')
