"""The seal of a checkpoint: its SHA-256 in the comment of the zip file that it is."""

import hashlib
import os
import re
import struct
from pathlib import Path

_FORM = b'mmseg_volo sha256 %s\n'
_LENGTH = len(_FORM % (b'0' * 64))
_SEAL = re.compile(rb'mmseg_volo sha256 ([0-9a-f]{64})\n')
_CHUNK = 2**22


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
        digest = _digest(file, size)
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
        return found and _digest(file, size) == found[1].decode()


def _digest(file, size: int) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()
