"""The folder with visitors' files: how much it may hold."""

import time
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

IDLE = 30  # seconds that an upload may pause


class Store:
    """The folder with visitors' files. What is in it at the start stays; the rest may take so much space.

    Args:
        folder: the folder.
        megabytes: the largest upload; 100 times as much is kept.
    """

    def __init__(self, folder: Path, megabytes: float):
        self.folder, self._most = folder, 100 * megabytes * 2**20
        self._kept = set(folder.rglob('*'))

    def make_room(self, since: float | None = None) -> None:
        """Delete the oldest files, if there are too many, and what interrupted uploads left.

        Args:
            since: no upload that goes on now has paused since then, in seconds of :func:`time.time`.
        """
        since = time.time() - 2 * IDLE if since is None else since
        files = []
        for path in set(self.folder.rglob('*')) - self._kept:
            with suppress(OSError):  # another thread deletes files too
                status = path.stat()
                if not S_ISREG(status.st_mode):
                    continue
                if path.parent == self.folder and status.st_mtime < since:
                    path.unlink()  # complete uploads are in folders of their own
                else:
                    files.append((status.st_mtime, status.st_size, path))
        size = sum(each for _, each, _ in files)
        for _, each, path in sorted(files):
            if size <= self._most:
                return
            with suppress(OSError):
                path.unlink()
                size -= each
