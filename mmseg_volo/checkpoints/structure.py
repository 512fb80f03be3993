"""Bounds on the objects in a file: none that later code could not copy, print or walk through."""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ..errors import CheckpointError

_DEEPEST = 100  # levels; Python's own limit of recursion is 1,000, and code takes several calls for one level
_EXPANDED = 10**6  # objects that may come from repeated references
_UNBACKED = 2**28  # bytes of a tensor that repeats the few values in its storage


def check_structure(content: object, source: str, size: int) -> None:
    """Reject content that is nested too deeply, holds itself, or is larger than the file that it came from.

    Args:
        content: what a file held.
        source: the file, for the message.
        size: size of the file in bytes, after decompression.

    Raises:
        CheckpointError: says what is wrong.
    """
    done: dict[int, tuple[int, int]] = {}  # objects in an object, counted each time that it is referred to; levels
    active: set[int] = set()
    stack: list[tuple[object, list | None]] = [(content, None)]
    while stack:
        value, children = stack.pop()
        if children is None:
            if id(value) in active:
                raise CheckpointError(f'{source}: refused, because an object in it holds itself')
            children = [] if id(value) in done else _children(value, source, size)
            if not children:
                done.setdefault(id(value), (1, 1))
                continue
            if len(active) > _DEEPEST:
                raise CheckpointError(f'{source}: refused, because it is nested more than {_DEEPEST} levels deep')
            active.add(id(value))
            stack.append((value, children))
            stack.extend((child, None) for child in children)
        else:
            active.discard(id(value))
            found = [done[id(child)] for child in children]
            count, levels = 1 + sum(one for one, _ in found), 1 + max(level for _, level in found)
            if levels > _DEEPEST:
                raise CheckpointError(f'{source}: refused, because it is nested more than {_DEEPEST} levels deep')
            if count > _EXPANDED and count > 4 * size:
                raise CheckpointError(f'{source}: refused, because its lists expand to {count:.0e} objects')
            done[id(value)] = count, levels


def _children(value: object, source: str, size: int) -> list:
    if isinstance(value, (torch.Tensor, torch.UntypedStorage, torch.TypedStorage, np.ndarray, bytearray)):
        _check_size(value, source, size)
    if isinstance(value, dict):
        children = [part for pair in value.items() for part in pair]
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = list(value)
    elif isinstance(value, slice):
        children = [value.start, value.stop, value.step]
    else:
        children = []
    if isinstance(value, HistoryBuffer) and '_log_history' not in vars(value):
        raise CheckpointError(f'{source}: refused, because it holds a log history without its values')
    if isinstance(value, (dict, torch.Tensor, HistoryBuffer)) and getattr(value, '__dict__', None):
        children.append(value.__dict__)
    return children


def _check_size(value: object, source: str, size: int) -> None:
    if isinstance(value, np.ndarray):
        held = value.nbytes
        if value.dtype.hasobject:
            raise CheckpointError(f'{source}: refused, because it holds a NumPy array of Python objects')
    elif isinstance(value, bytearray):
        held = len(value)
    elif not isinstance(value, torch.Tensor):
        held = value.nbytes() if callable(value.nbytes) else value.nbytes
    elif value.layout is not torch.strided or value.is_meta:
        return  # has no storage
    else:
        held = value.untyped_storage().nbytes()
        repeated = value.numel() * value.element_size()
        if repeated > max(held, _UNBACKED):
            raise CheckpointError(
                f'{source}: refused, because a tensor of shape {tuple(value.shape)} has {held} bytes in the file'
            )
    if held > size:
        raise CheckpointError(f'{source}: refused, because a value in it has {held:,} bytes, more than the file')
