"""Checkpoint files that are whole or not there, and that say so themselves.

A checkpoint is written beside its place under a hidden name, synced to the disk, read back, sealed with its SHA-256,
and only then renamed: whatever happens in between, what stands under a checkpoint's name is complete. The seal is the
comment of the zip file that :func:`torch.save` writes, so that a sealed checkpoint is an ordinary one to everything
else, and keeps its seal when it is copied, moved or renamed.
"""

import contextlib
import errno
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import mmengine
import torch
from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from .errors import SaveError
from .sealing import seal
from .sharding import VOLOFullyShardedDataParallel, full_state
from .version import __version__

_PART = '.part'
_CONFIG_TEXTS: WeakKeyDictionary[Runner, str] = WeakKeyDictionary()


class _Pickler(pickle._Pickler):
    """Marks every tensor as a CPU's: :func:`torch.save` then copies one at a time from a GPU, where mmengine's way,
    to copy them all before, needs the host's memory for a second model and optimizer. Only the small tree around the
    tensors passes through this pickler, hence Python's will do."""

    def save_pers(self, pid: tuple) -> None:
        kind, storage, key, _, size = pid
        super().save_pers((kind, storage, key, 'cpu', size))


def collect(runner: Runner, meta: dict, save_optimizer: bool = True, save_param_scheduler: bool = True) -> dict | None:
    """What mmengine's checkpoints hold, by reference: nothing is copied, tensors stay on their device.

    Args:
        runner: all of its processes must call this where the weights are shards; only the first gets something.
        meta: ``epoch`` and ``iter``; completed in place as in :meth:`mmengine.runner.Runner.save_checkpoint`.
        save_optimizer, save_param_scheduler: whether they go into it.
    """
    meta.update(
        cfg=_config_text(runner),
        seed=runner.seed,
        experiment_name=runner.experiment_name,
        time=time.strftime('%Y%m%d_%H%M%S', time.localtime()),
        saved_at=time.time(),
        sealed_by=f'mmseg_volo {__version__}',
        world_size=runner.world_size,
        mmengine_version=mmengine.__version__,
    )
    if hasattr(runner.train_dataloader.dataset, 'metainfo'):
        meta['dataset_meta'] = runner.train_dataloader.dataset.metainfo
    wrapper = runner.optim_wrapper if save_optimizer else None
    if isinstance(runner.model, VOLOFullyShardedDataParallel):
        weights, state = full_state(runner.model, wrapper)
    else:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights, state = model.state_dict(), wrapper and wrapper.state_dict()
    if not is_main_process():
        return None
    checkpoint = dict(meta=meta, state_dict=weights, message_hub=runner.message_hub.state_dict())
    if save_optimizer:
        checkpoint['optimizer'] = state
    if save_param_scheduler and runner.param_schedulers is not None:
        schedulers = runner.param_schedulers
        if isinstance(schedulers, dict):
            states = {name: [one.state_dict() for one in some] for name, some in schedulers.items()}
        else:
            states = [one.state_dict() for one in schedulers]
        checkpoint['param_schedulers'] = states
    runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
    return checkpoint


def _config_text(runner: Runner) -> str:
    """Laid out once for a run: that takes longer than writing a small checkpoint."""
    if runner not in _CONFIG_TEXTS:
        _CONFIG_TEXTS[runner] = runner.cfg.pretty_text
    return _CONFIG_TEXTS[runner]


def write(checkpoint: dict, path: str | Path) -> Path:
    """Write a checkpoint beside ``path`` under a hidden name, tensor by tensor; :func:`finish` puts it in its place.

    Returns:
        The hidden file.

    Raises:
        SaveError: it could not be written; no part of it stays.
    """
    path = Path(path)
    part = _part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open('wb') as file:
            torch.save(checkpoint, file, pickle_module=SimpleNamespace(__name__='pickle', Pickler=_Pickler))
    except BaseException as error:
        _remove(part)
        cause = _os_error(error)
        if cause is None:
            raise
        raise _save_error(path, cause) from error
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
        raise _save_error(path, error) from error


def save(checkpoint: dict, path: str | Path) -> None:
    """:func:`write` and :func:`finish`."""
    finish(write(checkpoint, path), path)


def remove_parts(folder: str | Path) -> None:
    """Remove what killed runs left half-written in ``folder``."""
    for part in Path(folder).glob(f'.*.pth{_PART}'):
        part.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Put a small text file in the place of another in one step."""
    path = Path(path)
    part = _part_of(path)
    part.write_text(text, encoding='utf-8')
    _sync(part)
    os.replace(part, path)


class Writer:
    """Saves checkpoints, training going on while the disk works: only :func:`write` holds it up."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._running: Future | None = None

    def save(self, checkpoint: dict, path: str | Path, then: Callable[[], None]) -> None:
        """Save a checkpoint, after the one before; ``then`` is called when it stands in its place.

        Raises:
            SaveError: this one could not be written, or the one before not be finished.
        """
        self.wait()
        part = write(checkpoint, path)

        def rest():
            finish(part, path)
            try:
                then()
            except OSError as error:
                raise _save_error(error.filename or path, error) from error

        self._running = self._pool.submit(rest)

    @property
    def failed(self) -> bool:
        """Whether the last one is known to have failed; :meth:`wait` then raises its error."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Wait for the last one; raises SaveError if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _part_of(path: Path) -> Path:
    return path.with_name(f'.{path.name}{_PART}')


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


def _save_error(path: str | Path, error: Exception) -> SaveError:
    reason = getattr(error, 'strerror', None) or error
    return SaveError(
        f'{path}: the checkpoint could not be written ({reason}). The ones before it are intact: make room or put the '
        'work dir in order, then go on with --resume'
    )
