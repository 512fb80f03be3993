"""Write checkpoint files atomically, with a seal: their SHA-256.

A checkpoint is written under a hidden name in the same folder, synced to the disk, read back, sealed, and only then
renamed. So a file under a checkpoint's name is always complete. The seal is stored in the ZIP comment of the file that
:func:`torch.save` writes. Other readers ignore it, and it stays when the file is copied, moved or renamed.
"""

import contextlib
import copyreg
import errno
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from ..errors import SaveError
from ..utils.files import atomic_write, part_of, sha256

_FORM = b'mmseg_volo sha256 %s\n'
_LENGTH = len(_FORM % (b'0' * 64))
_SEAL = re.compile(rb'mmseg_volo sha256 ([0-9a-f]{64})\n')


class _Pickler(pickle._Pickler):
    """Mark every tensor as a CPU tensor, so that :func:`torch.save` copies them from the GPU one at a time.

    mmengine copies all tensors first, which needs host memory for a second model and optimizer. Tensor data bypasses
    the pickler, so Python's slow pickler is fast enough.
    """

    def reducer_override(self, obj: object) -> object:
        """Save log histories without their statistics, which are functions that other processes may not have.

        Parts of a config are saved as plain dicts.
        """
        if isinstance(obj, ConfigDict):
            return OrderedDict, (), None, None, iter(obj.items())
        if type(obj) is not HistoryBuffer:
            return NotImplemented
        state = {key: value for key, value in vars(obj).items() if key != 'statistics_methods'}
        return copyreg.__newobj__, (HistoryBuffer,), state

    def save_pers(self, pid: tuple) -> None:
        kind, storage, key, _, size = pid
        super().save_pers((kind, storage, key, 'cpu', size))


def write(checkpoint: dict, path: str | Path) -> Path:
    """Write a checkpoint under a hidden name beside ``path``; :func:`finish` then moves it to ``path``.

    Returns:
        The hidden file.

    Raises:
        SaveError: the file could not be written; it is removed.
    """
    path = Path(path)
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open('wb') as file:
            dump(checkpoint, file)
    except BaseException as error:
        _remove(part)
        cause = _os_error(error)
        if cause is None:
            raise
        raise save_error(path, cause) from error
    return part


def dump(value: object, file: BinaryIO) -> None:
    """Call :func:`torch.save` with the pickler of this module."""
    torch.save(value, file, pickle_module=SimpleNamespace(__name__='pickle', Pickler=_Pickler))


def finish(part: Path, path: str | Path) -> None:
    """Sync, verify, seal and rename the file that :func:`write` wrote.

    Raises:
        SaveError: the disk failed or returned other bytes than were written; the file is removed.
    """
    path = Path(path)
    try:
        _sync(part)
        # torch.save stored a checksum of every tensor; compare the file with them.
        with zipfile.ZipFile(part) as content:
            broken = content.testzip()
        if broken is not None:
            raise OSError(errno.EIO, f'{broken} was read back with other bytes than were written')
        seal(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, zipfile.BadZipFile) as error:
        _remove(part)
        raise save_error(path, error) from error


def save(checkpoint: dict, path: str | Path) -> None:
    """Call :func:`write` and :func:`finish`."""
    finish(write(checkpoint, path), path)


def remove_parts(folder: str | Path) -> None:
    """Remove partial checkpoints that killed runs left in ``folder``."""
    for part in Path(folder).glob('.*.part.pth'):
        part.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as part:
        part.write_text(text, encoding='utf-8')
        _sync(part)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # if the folder is gone, the caller already raises that error
        part.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, 'posix_fadvise'):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the next read comes from the disk
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync this file or folder
            raise
    finally:
        os.close(handle)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError that caused an error of torch.save, if there is one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def save_error(path: str | Path, error: Exception) -> SaveError:
    """Build the error for a checkpoint that could not be written."""
    reason = getattr(error, 'strerror', None) or error
    return SaveError(
        f'{path}: the checkpoint could not be written ({reason}). Earlier checkpoints are intact: make room or repair '
        'the work dir, then continue with --resume'
    )


def seal(path: Path) -> None:
    """Append the SHA-256 of a file of :func:`torch.save` as its ZIP comment; raise ValueError for any other file."""
    with path.open('r+b') as file:
        # A ZIP file ends with the length of its comment and the comment; torch.save writes no comment.
        file.seek(-2, os.SEEK_END)
        if file.read() != b'\0\0':
            raise ValueError(f'{path}: not a ZIP file, or one that has a comment already')
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack('<H', _LENGTH))
        file.flush()
        size = file.tell()
        digest = sha256(file, size)
        file.seek(size)
        file.write(_FORM % digest.encode())


def is_sealed(path: Path) -> bool | None:
    """Whether a file ends with a seal; None if it ends with something else than torch.save or :func:`seal` wrote."""
    with path.open('rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _LENGTH, 0))
        end = file.read()
    if _SEAL.fullmatch(end):
        return True
    return False if end.endswith(b'\0\0') or not zipfile.is_zipfile(path) else None


def seal_holds(path: Path) -> bool | None:
    """Whether the content of a file matches its seal; None if the file has no seal."""
    with path.open('rb') as file:
        size = file.seek(0, os.SEEK_END) - _LENGTH
        if size < 0:
            return None
        file.seek(size)
        found = _SEAL.fullmatch(file.read())
        return found and sha256(file, size) == found[1].decode()
