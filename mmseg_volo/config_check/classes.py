"""Faults in the number of classes: data sets, palettes and heads must have the same number."""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from mmengine.fileio import list_from_file
from mmseg.models.decode_heads import STDCHead

from .lookup import NOTHING
from .parts import Part


def check_names(dataset: Part) -> Iterator[str]:
    """The faults in the class list and palette that a config gives a data set."""
    key, given = f'{dataset.key}.metainfo', dataset.cfg.get('metainfo') or {}
    if not isinstance(given, Mapping):
        yield f"{key}: {_short(given)} is no dict; write metainfo=dict(classes=('road', 'sky'))"
        return
    for old in ('CLASSES', 'PALETTE', 'class', 'class_names', 'palettes'):
        if old in given:
            new = 'palette' if old.lower().startswith('palette') else 'classes'
            yield f'{key}.{old}: mmseg 1.x does not read it; write {new}'
    names = given.get('classes')
    if names is None:
        key, names = f"METAINFO['classes'] of {_name(dataset)} ({dataset.key}.type)", _metainfo(dataset).get('classes')
    else:
        key = f'{key}.classes'
    if names is None:
        return
    if isinstance(names, str):
        if '://' not in names and not Path(names).is_file():
            file = '; there is no file of this name' if Path(names).suffix else ''
            yield (
                f'{key}: {names!r} is a text, of which mmseg would take each letter for a class{file}; write '
                f'classes=({names!r},) for one class'
            )
        return
    if not isinstance(names, Sequence) or not names:
        yield f'{key}: {_short(names)} is no list of names'
        return
    names, own = list(names), _own(dataset)
    other = [name for name in names if not isinstance(name, str)]
    if other:
        yield f"{key}: {_short(other[0])} is no name; write a list of texts, such as ('road', 'sky')"
        return
    twice = [name for name, count in Counter(map(str, names)).items() if count > 1]
    if twice:
        yield f'{key}: {_short(twice[0])} is there twice; each class needs a name of its own'
    strange = [name for name in names if name not in own] if own else []
    if strange:
        hint = difflib.get_close_matches(str(strange[0]), own, 1, 0.6)
        yield (
            f'{key}: {_short(strange[0])} is no class of {_name(dataset)}'
            + (f'; did you mean {hint[0]!r}?' if hint else '; other classes need another data set type')
        )
        return
    yield from _check_palette(dataset, names, bool(own) and names != own)


def _name(dataset: Part) -> str:
    return getattr(dataset.kind, '__name__', str(dataset.kind))


def _check_palette(dataset: Part, names: Sequence[str], part_of_own: bool) -> Iterator[str]:
    """As :meth:`BaseSegDataset._update_palette` does it: a longer palette is fine for a part of the own classes."""
    given = (dataset.cfg.get('metainfo') or {}).get('palette')
    palette = _metainfo(dataset).get('palette') if given is None else given
    if palette is None:
        return
    is_list = isinstance(palette, Sequence) and not isinstance(palette, str)
    strange = [one for one in palette if not _is_colour(one)] if is_list else [palette]
    if strange:
        yield (
            f'{dataset.key}.metainfo.palette: {_short(strange[0])} is no {"colour" if is_list else "list of colours"}; '
            'give three whole numbers from 0 to 255, (R, G, B), for each class'
        )
        return
    count = len(palette)
    if count in (0, len(names)) or (part_of_own and count > len(names)):
        return
    yield (
        f'{dataset.key}.metainfo.palette: {count} colours for {len(names)} classes; give one colour (R, G, B) for each '
        'class, or none'
    )


def _is_colour(value: Any) -> bool:
    is_triple = isinstance(value, list | tuple) and len(value) == 3
    return is_triple and all(isinstance(one, Integral) and 0 <= one <= 255 for one in value)


def check_same(trained: Sequence[Part], measured: Sequence[Part]) -> Iterator[str]:
    """The faults that would make scores wrong: the order of classes, or the labels, differ between training and a test.

    Args:
        trained: the training data sets, without wrappers.
        measured: those of validation or test, without wrappers.
    """
    for one in measured:
        for first in trained[:1]:
            names, other = class_list(first), class_list(one)
            if names and other and names != other and sorted(names) == sorted(other):
                yield (
                    f'{one.key}.metainfo.classes: {_listed(other)} in another order than in {first.key}: '
                    f'{_listed(names)}; the order decides which label is which class, so make them equal'
                )
        for same in trained:
            mine, its = one.get('reduce_zero_label'), same.get('reduce_zero_label')
            if one.kind is same.kind and one.get('data_root') == same.get('data_root') and mine != its:
                yield f'{one.key}.reduce_zero_label: {mine}, but {same.key} has {its}; make them equal'


def class_list(dataset: Part) -> list[str] | None:
    """The class names of a data set, or None if they are not known before it is built."""
    given = dataset.cfg.get('metainfo')
    names = given.get('classes') if isinstance(given, Mapping) else None
    if isinstance(names, str):
        return list_from_file(names) if Path(names).is_file() else None
    if isinstance(names, Sequence):
        return list(map(str, names))
    return _own(dataset) or None


def _metainfo(dataset: Part) -> Mapping:
    found = getattr(dataset.kind, 'METAINFO', None)
    return found if isinstance(found, Mapping) else {}


def _own(dataset: Part) -> list[str]:
    names = _metainfo(dataset).get('classes')
    return list(names) if isinstance(names, list | tuple) else []


def check_counts(heads: Sequence[Part], datasets: Sequence[Part], guarded: bool) -> Iterator[str]:
    """The heads whose number of classes is not that of the data sets, or of the first head.

    Args:
        heads: decode and auxiliary heads.
        datasets: without wrappers.
        guarded: whether labels that are no class are rejected, so that one output for two classes needs num_classes=2.
    """
    known = [(dataset, names) for dataset in datasets if (names := class_list(dataset))]
    heads = [head for head in heads if not head.is_a(STDCHead) and isinstance(head.get('num_classes'), int)]
    for head in heads:
        count = head.get('num_classes')
        one_output = count == 1 and not guarded  # mmseg's older form of binary segmentation
        other = next(((d, n) for d, n in known if len(n) != count and not (one_output and len(n) == 2)), None)
        if other:
            dataset, names = other
            yield (
                f'{head.key}.num_classes: {count}, but {dataset.key} has {len(names)} classes ({_listed(names)}); '
                'make them equal'
            )
        elif not known and count != heads[0].get('num_classes'):
            yield (
                f'{head.key}.num_classes: {count}, but {heads[0].key}.num_classes is {heads[0].get("num_classes")}; '
                'make them equal'
            )


def _listed(names: Sequence[str]) -> str:
    return ', '.join(map(str, names[:3])) + (', ...' if len(names) > 3 else '')


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f'{repr(value)[:57]}...'


def outputs_of(head: Part) -> int | None:
    """Number of maps that a head predicts, if the config says it."""
    for name in ('out_channels', 'num_classes'):
        value = head.get(name)
        if value is not NOTHING and value is not None:
            return value if isinstance(value, int) else None
    return None
