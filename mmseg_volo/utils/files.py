"""Write files atomically, link or copy them, and compute their SHA-256."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_CHUNK = 2**22  # bytes


def part_of(path: str | Path, mark: str = '') -> Path:
    """The temporary name under which ``path`` is written first: ``.NAME.part.SUFFIX`` in the same folder.

    Processes that may write the same file at the same time pass a different ``mark`` each, which is added to NAME.
    """
    path = Path(path)
    return path.with_name(f'.{path.stem}{mark}.part{path.suffix}')


@contextlib.contextmanager
def atomic_write(path: str | Path, mark: str = '') -> Iterator[Path]:
    """Yield the temporary path of :func:`part_of`; it replaces ``path`` on success and is deleted on failure.

    Raises:
        OSError: the file cannot be written. An existing file at ``path`` stays unchanged.
    """
    part = part_of(path, mark)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may be gone, and the first error matters
            part.unlink()
        raise


def link_or_copy(source: str | Path, target: Path) -> None:
    """Make ``target`` a hard link to a file, or a copy of it where links are impossible."""
    try:
        os.link(os.path.realpath(source), target)  # the file itself: os.link would link a symlink
    except OSError:
        shutil.copyfile(source, target)


def sha256(file: str | Path | BinaryIO, size: int | None = None) -> str:
    """Hexadecimal SHA-256 of a file, or of its first ``size`` bytes."""
    with open(file, 'rb') if isinstance(file, (str, Path)) else contextlib.nullcontext(file) as content:
        content.seek(0)
        digest = hashlib.sha256()
        while chunk := content.read(_CHUNK if size is None else min(size, _CHUNK)):
            digest.update(chunk)
            size = size and size - len(chunk)
        return digest.hexdigest()
