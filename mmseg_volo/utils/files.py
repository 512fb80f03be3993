"""Write files that are complete or absent, and take their SHA-256."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_CHUNK = 2**22  # bytes


def part_of(path: str | Path) -> Path:
    """The hidden name beside ``path`` under which it is written first: ``.NAME.part.SUFFIX``."""
    path = Path(path)
    return path.with_name(f'.{path.stem}.part{path.suffix}')


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield the hidden file of :func:`part_of`; it replaces ``path`` when the block ends, and is removed if it fails.

    Raises:
        OSError: the file cannot be written. What stood under ``path`` is as it was.
    """
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # its folder may be gone, which is the error on its way
            part.unlink()
        raise


def sha256(file: str | Path | BinaryIO, size: int | None = None) -> str:
    """SHA-256 in hexadecimal of a file, or of its first ``size`` bytes."""
    with open(file, 'rb') if isinstance(file, (str, Path)) else contextlib.nullcontext(file) as content:
        content.seek(0)
        digest = hashlib.sha256()
        while chunk := content.read(_CHUNK if size is None else min(size, _CHUNK)):
            digest.update(chunk)
            size = size and size - len(chunk)
        return digest.hexdigest()
