"""Two training runs never share a folder, and no lock outlives its process."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest
from small_runs import small_config
from toy_runs import CutHook, toy_run

from mmseg_volo.cli import run_tool
from mmseg_volo.engine import lock
from mmseg_volo.engine.lock import NAME, FolderLock, is_locked
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.errors import ConfigError


class Holder:
    """A process that locks a folder, and one that it forks, as a run and its data loader worker."""

    def __init__(self, folder):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            FolderLock(folder)
            worker = os.fork()
            if worker:
                os.write(writer, b'%d\n' % worker)
            time.sleep(60)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, 'rb') as pipe:
            self.worker = int(pipe.readline())

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def holder(tmp_path):
    holder = Holder(tmp_path / 'run')
    yield holder
    for pid in (holder.pid, holder.worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_second_run_is_refused_and_changes_nothing(tmp_path, holder, capsys):
    folder = tmp_path / 'run'
    (folder / 'small.py').write_text('the config of the first run')
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: build_runner(small_config(tmp_path)).train())
    told = (
        rf'error: {folder} is in use by another training run: process {holder.pid} on {socket.gethostname()} since 20'
    )
    assert str(ended.value).startswith(told) and '--work-dir' in str(ended.value)
    assert (folder / 'small.py').read_text() == 'the config of the first run'
    assert not list(folder.glob('*.pth'))


def test_the_lock_ends_with_its_process_though_a_worker_lives_on(tmp_path, holder):
    assert is_locked(tmp_path / 'run')
    with pytest.raises(ConfigError):
        FolderLock(tmp_path / 'run')
    holder.kill()
    os.kill(holder.worker, 0)  # it lives
    assert (tmp_path / 'run' / NAME).exists() and not is_locked(tmp_path / 'run')
    FolderLock(tmp_path / 'run').release()


def test_within_one_process(tmp_path):
    own = FolderLock(tmp_path)
    (tmp_path / 'link').symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / 'link'):
        with pytest.raises(ConfigError, match=f'process {os.getpid()} on'):
            FolderLock(path)
    assert is_locked(tmp_path)
    # These attempts did not lose the lock.
    assert os.waitstatus_to_exitcode(os.waitpid(fork_and_try(tmp_path), 0)[1]) == 1
    own.release()
    assert os.waitstatus_to_exitcode(os.waitpid(fork_and_try(tmp_path), 0)[1]) == 0


def fork_and_try(folder) -> int:
    """Try to lock the folder in another process, whose status is 1 if that is refused."""
    pid = os.fork()
    if pid == 0:
        lock._OWN.clear()  # what a fresh process has
        try:
            FolderLock(folder)
        except ConfigError:
            os._exit(1)
        os._exit(0)
    return pid


def test_whoever_may_write_into_the_folder_may_lock_it_later(tmp_path):
    tmp_path.chmod(0o775)
    FolderLock(tmp_path).release()
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o664


def test_a_link_in_place_of_the_lock_file_is_not_followed(tmp_path):
    (tmp_path / 'precious').write_text('kept')
    (tmp_path / NAME).symlink_to(tmp_path / 'precious')
    with pytest.raises(OSError, match=NAME):
        FolderLock(tmp_path)
    assert (tmp_path / 'precious').read_text() == 'kept'


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, 'lockf', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, 'no locks')))
    FolderLock(tmp_path).release()
    FolderLock(tmp_path).release()
    assert not is_locked(tmp_path)


def test_training_releases_the_lock_and_also_locks_the_folder_of_the_checkpoints(tmp_path):
    folders, seen = [tmp_path / 'run', tmp_path / 'disk/run'], []
    look = CutHook('after_train_iter', 3, lambda runner: seen.extend(map(is_locked, folders)))
    elsewhere = dict(out_dir=str(tmp_path / 'disk'))
    other = FolderLock(folders[1])
    with pytest.raises(ConfigError, match='disk/run is in use'):
        toy_run(folders[0], [look], elsewhere).train()
    assert not is_locked(folders[0])
    other.release()
    toy_run(folders[0], [look], elsewhere).train()
    assert seen == [True, True]
    assert not any(map(is_locked, folders))


def test_on_windows(tmp_path, monkeypatch):
    """There msvcrt locks one byte, and denies access to one that is locked."""
    locked = []

    def locking(handle, mode, size):
        place = os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR)
        if place in locked:
            raise PermissionError(errno.EACCES, 'Permission denied')
        locked.append(place)

    monkeypatch.setattr(lock, 'fcntl', None)
    monkeypatch.setattr(lock, 'msvcrt', SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    FolderLock(tmp_path)  # never released, as if by another process
    monkeypatch.setattr(lock, '_OWN', {})
    with pytest.raises(ConfigError, match=f'process {os.getpid()} on'):
        FolderLock(tmp_path)
    assert [offset for _, offset in locked] == [2**30] and (tmp_path / NAME).stat().st_size < 300
