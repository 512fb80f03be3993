"""What a checkpoint may hold besides tensors and plain data: NumPy numbers, log histories and mmengine's dicts.

torch's safe reader calls what a file names, if it is allowed, and hands it arguments and a state from the file. NumPy
trusts both: a data type with a crafted state makes it read memory outside of its buffers. So under these names stand
functions and classes of this module, which check what they are given. None runs code of the file. Their
CheckpointError says what the file holds; the reader adds the file's name.
"""

import math
import pickle
import re

import numpy as np
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from ..errors import CheckpointError

_TYPE = re.compile(r'[biufc]\d{1,2}|U[1-9]\d{0,8}')  # numbers and texts, as NumPy names them


class _Dtype:
    """Stands for ``np.dtype``. Its state must be that which NumPy gives this type, in either byte order."""

    dtype = np.dtype('f8')  # a file may skip __init__

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            raise CheckpointError('an array or number of unsupported type')
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        plain = isinstance(state, tuple) and all(type(one) in (int, str, type(None)) for one in state)
        for order in '<>':
            dtype = self.dtype.newbyteorder(order)
            if plain and state == dtype.__reduce__()[2]:
                self.dtype = dtype
                return
        raise CheckpointError(f'the data type {self.dtype} with a state that is not its own')

    def __reduce__(self) -> tuple:
        return self.dtype.__reduce__()


class _Array(np.ndarray):
    """Stands for ``np.ndarray``: empty, until it takes an array from the file, once. It is pickled as an array."""

    def __new__(cls) -> '_Array':
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, data = state
        if self.size or not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise CheckpointError('an array that is none')
        shape = tuple(shape)
        if not all(type(one) is int and one >= 0 for one in shape):
            raise CheckpointError('an array that is none')
        _check_length(data, dtype.dtype, math.prod(shape))
        super().__setstate__((1, shape, dtype.dtype, bool(by_columns), data))
        if dtype.dtype.kind == 'U':
            self.tolist()  # raises ValueError for characters that there are not

    def __reduce_ex__(self, protocol: int) -> tuple:
        return np.array(self).__reduce_ex__(protocol)


def _array(kind: type, shape: tuple = (0,), code: bytes = b'b') -> _Array:
    """Replace NumPy's ``_reconstruct``, which begins every array with an empty one."""
    if kind is not _Array:
        raise CheckpointError('an array that is none')
    return _Array()


def _number(dtype: _Dtype, data: bytes) -> np.generic:
    """Replace NumPy's ``scalar``."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise CheckpointError('a number that is none')
    _check_length(data, dtype.dtype, 1)
    return np.frombuffer(data, dtype.dtype)[0]


def _check_length(data: bytes, dtype: np.dtype, count: int) -> None:
    if len(data) != count * dtype.itemsize:
        raise CheckpointError(f'an array of {count} values with {len(data)} bytes')


class _History(HistoryBuffer):
    """Stands for mmengine's HistoryBuffer in a file, whose own ``__setstate__`` changes all buffers of the process."""

    def __setstate__(self, state: dict) -> None:
        log, count = state['_log_history'], state['_count_history']
        if not all(isinstance(one, np.ndarray) and one.ndim == 1 for one in (log, count)) or len(log) != len(count):
            raise CheckpointError('a log history that is none')
        self._set_default_statistics()
        self.__dict__.update(
            max_length=int(state['max_length']), _log_history=np.array(log), _count_history=np.array(count)
        )
        self.__class__ = HistoryBuffer


def _history_getattr(owner: type, name: str) -> str:
    """Replace the getattr that mmengine's log histories pickle for their statistics, which are not read."""
    if owner is _History and isinstance(name, str) and not name.startswith('_'):
        return name
    raise pickle.UnpicklingError(f'GLOBAL getattr was asked for {name} of {owner}')


def _no_bytes() -> bytes:
    """Replace the ``bytes`` that an empty array is pickled with; with an argument it could fill the memory."""
    return b''


class _Dict:
    """Stands for mmengine's ConfigDict, and makes a plain dict of it."""

    def __new__(cls, items: dict | None = None) -> dict:
        if not isinstance(items, (dict, type(None))):
            raise CheckpointError('a dict that is none')
        return dict(items or {})


def allowed_globals() -> list:
    """What torch's safe reader may call for a checkpoint of mmengine, under the names in the file."""
    # NumPy 1 and 2 give these two functions different names; allow both, to read files of either version.
    arrays = [
        (function, f'numpy.{core}.multiarray.{name}')
        for function, name in ((_number, 'scalar'), (_array, '_reconstruct'))
        for core in ('core', '_core')
    ]
    arrays += [(_Dtype, 'numpy.dtype'), (_Array, 'numpy.ndarray')]
    # torch looks for the name in the file, and for the type of an object that it completes.
    buffer = f'{HistoryBuffer.__module__}.{HistoryBuffer.__name__}'
    history = [(_History, buffer), (_history_getattr, 'builtins.getattr'), (_no_bytes, 'builtins.bytes')]
    # The statistics that this process has registered, by name: they are not read, but stand in the file.
    own = {f'{m.__module__}.{m.__qualname__}' for m in HistoryBuffer._statistics_methods.values()}
    history += [(_no_bytes, name) for name in own if not name.startswith(buffer)]
    return [slice, (_Dict, f'{ConfigDict.__module__}.{ConfigDict.__name__}'), *arrays, *history]
