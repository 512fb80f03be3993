"""Keep two training runs out of one folder."""

import errno
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from mmengine.logging import print_log

from ..errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NAME = '.training.lock'
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # the error depends on the system
_LOCKED_BYTE = 2**30  # Windows lets nobody read a locked byte, so this one is beyond the text
_OWN: dict[Path, str] = {}  # lock files that this process holds, and their text: its own locks never conflict


class FolderLock:
    """Lock a folder for one training run, until :meth:`release`; other processes may still read it.

    The operating system holds the lock on the file ``.training.lock``, and releases it when this process ends, however
    it ends. So a file that is left behind locks nothing. Child processes, such as data loader workers, do not inherit
    the lock. Where the file system has no locks, a warning is logged and the folder is not locked. POSIX drops a lock
    when its process opens and closes the file a second time, so nothing else in this package opens it.

    Args:
        folder: created where it is missing.
        patience: seconds to wait for another process; one that is being killed holds its lock a moment longer.

    Raises:
        ConfigError: another run has locked the folder; the message names its process, host and start.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, patience: float = 0.0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder.resolve() / NAME
        if self._file in _OWN:
            raise _in_use(folder, _OWN[self._file])
        self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666)
        error, deadline = _lock(self._handle), time.monotonic() + patience
        while error in _BUSY and time.monotonic() < deadline:
            time.sleep(0.1)
            error = _lock(self._handle)
        if error:
            text = os.read(self._handle, 300).decode(errors='replace')
            os.close(self._handle)
            self._handle = None
            if error in _BUSY:
                raise _in_use(folder, text)
            message = f'{folder} cannot be locked ({os.strerror(error)}): start no second run there'
            print_log(message, 'current', logging.WARNING)
            return
        with suppress(OSError):  # whoever may write into the folder may lock it later
            os.chmod(self._file, folder.stat().st_mode & 0o666)
        text = f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n'
        os.ftruncate(self._handle, 0)
        os.write(self._handle, text.encode())
        _OWN[self._file] = text

    def release(self) -> None:
        """Release the lock; the file stays, because removing it could hit the next run's lock."""
        if self._handle is not None:
            del _OWN[self._file]
            os.close(self._handle)
            self._handle = None


def is_locked(folder: str | Path) -> bool:
    """Whether a training run has locked the folder."""
    if not Path(folder, NAME).exists():
        return False
    try:
        FolderLock(folder).release()
    except ConfigError:
        return True
    except OSError:  # such as a file of another user
        pass
    return False


def _lock(handle: int) -> int:
    """Try to lock an open file; return 0, or the number of the error."""
    try:
        if fcntl is not None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's locks would live on in forked children
        else:
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno or errno.ENOLCK
    finally:
        os.lseek(handle, 0, os.SEEK_SET)
    return 0


def _in_use(folder: Path, holder: str) -> ConfigError:
    return ConfigError(
        f'{folder} is in use by another training run: {holder.strip() or "unknown"}. Two runs would overwrite each '
        "other's checkpoints: wait for its end, stop it, or give another --work-dir"
    )
