"""Faults in single values: a text where a constructor takes a number, and the like."""

import inspect
import types
import typing
from collections import abc
from collections.abc import Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

from .lookup import accepted
from .parts import Part

_FLAG, _NUMBER, _TEXT, _LIST, _DICT = 'True or False', 'a number', 'a text', 'a list', 'a dict'
_KINDS = {bool: _FLAG, int: _NUMBER, float: _NUMBER, Number: _NUMBER, str: _TEXT, Path: _TEXT, type(None): None}
_LISTS = list, tuple, abc.Sequence, abc.Iterable


def check_values(part: Part) -> Iterator[str]:
    """The values of another kind than the annotation or the default of their argument.

    Only what is surely wrong: a text in place of numbers, flags and dicts; a number in place of a text or a dict (some
    annotations are wrong where the default is a text such as 'dynamic'); None for an argument without a default.
    """
    for name, parameter in accepted(part.kind)[0].items():
        if name not in part.cfg:
            continue
        value, taken = part.cfg[name], _taken(parameter)
        if taken is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            (isinstance(value, str) and _TEXT not in taken)
            or (is_number and not taken & {_NUMBER, _FLAG, _LIST} and parameter.default in (parameter.empty, None, ''))
            or (value is None and None not in taken and parameter.default is parameter.empty)
        ):
            kinds = ' or '.join(sorted(filter(None, taken)))
            yield f'{part.key}.{name}: {value!r}, but {getattr(part.kind, "__name__", part.kind)} takes {kinds} here'


def _taken(parameter: inspect.Parameter) -> set[str | None] | None:
    """The kinds of values that an argument takes, as far as known."""
    default = parameter.default
    if parameter.annotation is parameter.empty:
        return {_KINDS[type(default)]} if type(default) in (bool, int, float) else None
    taken = _kinds(parameter.annotation)
    if taken is None or default is parameter.empty:
        return taken
    own = _KINDS.get(type(default), _DICT if isinstance(default, Mapping) else _LIST)
    return {*taken, own}


def _kinds(annotation: Any) -> set[str | None] | None:
    if annotation in (None, *_KINDS):
        return {_KINDS.get(annotation)}
    origin = typing.get_origin(annotation) or annotation
    inner = [one for one in typing.get_args(annotation) if one is not ...]
    if origin is typing.Literal:
        return {_KINDS.get(type(one), _TEXT) for one in inner}
    kinds = [_kinds(one) for one in inner]
    known = None if None in kinds else set().union(*kinds)
    if origin in (typing.Union, types.UnionType):
        return known
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {_DICT}
    if origin in _LISTS:  # a text is a sequence of texts too
        return {_LIST} if known and _TEXT not in known else {_LIST, _TEXT}
    return None
