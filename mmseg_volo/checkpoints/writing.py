"""Write checkpoint files that are complete or absent, and that prove it.

A checkpoint is written beside its place under a hidden name, synced to the disk, read back, sealed with its SHA-256,
and only then renamed. Whatever happens in between, a file under a checkpoint's name is complete. The seal is the ZIP
comment of the file that :func:`torch.save` writes. So a sealed checkpoint is an ordinary one to everything else, and
keeps its seal when it is copied, moved or renamed.
"""

import contextlib
import errno
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch

from ..errors import SaveError
from ..utils.files import atomic_write, part_of, sha256

_FORM = b'mmseg_volo sha256 %s\n'
_LENGTH = len(_FORM % (b'0' * 64))
_SEAL = re.compile(rb'mmseg_volo sha256 ([0-9a-f]{64})\n')


class _Pickler(pickle._Pickler):
    """Mark every tensor as a CPU's, so that :func:`torch.save` copies one at a time from a GPU.

    mmengine copies all of them first, which needs host memory for a second model and optimizer. Only the small tree
    around the tensors passes through this pickler, so Python's slow one is enough.
    """

    def save_pers(self, pid: tuple) -> None:
        kind, storage, key, _, size = pid
        super().save_pers((kind, storage, key, 'cpu', size))


def write(checkpoint: dict, path: str | Path) -> Path:
    """Write a checkpoint beside ``path`` under a hidden name, tensor by tensor; :func:`finish` puts it in its place.

    Returns:
        The hidden file.

    Raises:
        SaveError: it could not be written; no part of it stays.
    """
    path = Path(path)
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open('wb') as file:
            torch.save(checkpoint, file, pickle_module=SimpleNamespace(__name__='pickle', Pickler=_Pickler))
    except BaseException as error:
        _remove(part)
        cause = _os_error(error)
        if cause is None:
            raise
        raise save_error(path, cause) from error
    return part


def finish(part: Path, path: str | Path) -> None:
    """Sync, check, seal and rename what :func:`write` wrote.

    Raises:
        SaveError: the disk gave back something else than was written, or an error; no part of it stays.
    """
    path = Path(path)
    try:
        _sync(part)
        # torch.save noted the checksum of every tensor on its way to the file: this compares what arrived.
        with zipfile.ZipFile(part) as content:
            broken = content.testzip()
        if broken is not None:
            raise OSError(errno.EIO, f'{broken} was read back different from what was written')
        seal(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, zipfile.BadZipFile) as error:
        _remove(part)
        raise save_error(path, error) from error


def save(checkpoint: dict, path: str | Path) -> None:
    """:func:`write` and :func:`finish`."""
    finish(write(checkpoint, path), path)


def remove_parts(folder: str | Path) -> None:
    """Remove what killed runs left half-written in ``folder``."""
    for part in Path(folder).glob('.*.part.pth'):
        part.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Put a small text file in the place of another in one step."""
    with atomic_write(path) as part:
        part.write_text(text, encoding='utf-8')
        _sync(part)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # its folder may be gone, which is the error that is on its way
        part.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, 'posix_fadvise'):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # what is read next comes from the disk
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system, or a folder on it, that cannot sync
            raise
    finally:
        os.close(handle)


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's own error behind what torch.save made of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def save_error(path: str | Path, error: Exception) -> SaveError:
    reason = getattr(error, 'strerror', None) or error
    return SaveError(
        f'{path}: the checkpoint could not be written ({reason}). The ones before it are intact: make room or put the '
        'work dir in order, then go on with --resume'
    )


def seal(path: Path) -> None:
    """Append the seal to a file of :func:`torch.save`'s: everything before the seal is under it."""
    with path.open('r+b') as file:
        # A zip file ends with the length of its comment and the comment; torch.save writes none.
        file.seek(-2, os.SEEK_END)
        if file.read() != b'\0\0':
            raise ValueError(f'{path}: no zip file without a comment')
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack('<H', _LENGTH))
        file.flush()
        size = file.tell()
        digest = sha256(file, size)
        file.seek(size)
        file.write(_FORM % digest.encode())


def seal_holds(path: Path) -> bool | None:
    """Whether a file is what was sealed; None where it has no seal."""
    with path.open('rb') as file:
        size = file.seek(0, os.SEEK_END) - _LENGTH
        if size < 0:
            return None
        file.seek(size)
        found = _SEAL.fullmatch(file.read())
        return found and sha256(file, size) == found[1].decode()
