"""Collect the content of a checkpoint, and write it in a thread."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from weakref import WeakKeyDictionary

import mmengine
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import _ParamScheduler
from mmengine.runner import Runner

from ..checkpoints.reading import is_readable, read_meta
from ..checkpoints.writing import finish, save_error, write
from ..errors import CheckpointError
from ..utils.unwrap import bare_model
from ..version import __version__
from .averaging import VOLOEMAHook
from .continuity import note_of
from .sharding import VOLOFullyShardedDataParallel, full_state

_NOTES: WeakKeyDictionary[Runner, dict] = WeakKeyDictionary()


def collect(runner: Runner, meta: dict, save_optimizer: bool = True, save_param_scheduler: bool = True) -> dict | None:
    """Collect what an mmengine checkpoint holds. Unsharded tensors are not copied and stay on their device.

    Args:
        runner: the runner. If its model is sharded, all ranks must call this.
        meta: ``epoch`` and ``iter``; completed in place as in :meth:`mmengine.runner.Runner.save_checkpoint`.
        save_optimizer, save_param_scheduler: whether to include their states.

    Returns:
        The checkpoint on rank 0, None on the other ranks.
    """
    meta.update(
        **_notes_of(runner),
        seed=runner.seed,
        experiment_name=runner.experiment_name,
        time=time.strftime('%Y%m%d_%H%M%S', time.localtime()),
        saved_at=time.time(),
        sealed_by=f'mmseg_volo {__version__}',
        world_size=runner.world_size,
        mmengine_version=mmengine.__version__,
        run=note_of(runner),
    )
    wrapper = runner.optim_wrapper if save_optimizer else None
    if isinstance(runner.model, VOLOFullyShardedDataParallel):
        weights, state = full_state(runner.model, wrapper)
        for hook in runner.hooks:
            if isinstance(hook, VOLOEMAHook):
                hook.gather()
    else:
        weights, state = bare_model(runner.model).state_dict(), wrapper and wrapper.state_dict()
    if not is_main_process():
        return None
    hub = runner.message_hub.state_dict()
    if 'dataset_meta' in hub['runtime_info']:  # mmengine's RuntimeInfoHook notes it once more
        hub['runtime_info']['dataset_meta'] = meta.get('dataset_meta')
    checkpoint = dict(meta=meta, state_dict=weights, message_hub=hub)
    if save_optimizer:
        checkpoint['optimizer'] = state
    if save_param_scheduler and runner.param_schedulers is not None:
        schedulers = runner.param_schedulers
        if isinstance(schedulers, dict):
            states = {name: [_state_of(one) for one in some] for name, some in schedulers.items()}
        else:
            states = [_state_of(one) for one in schedulers]
        checkpoint['param_schedulers'] = states
    runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
    return checkpoint


def _state_of(schedule: _ParamScheduler) -> dict:
    """State of a schedule without functions, as OneCycleLR has: readers refuse them, and a new schedule has its own."""
    return {key: value for key, value in schedule.state_dict().items() if not callable(value)}


def _notes_of(runner: Runner) -> dict:
    """The config and the data set's notes, made once per run: that takes longer than writing a small checkpoint."""
    if runner not in _NOTES:
        _NOTES[runner] = dict(cfg=runner.cfg.pretty_text)
        metainfo = getattr(runner.train_dataloader.dataset, 'metainfo', None)
        if isinstance(metainfo, Mapping):
            _NOTES[runner]['dataset_meta'] = readable_part(metainfo)
    return _NOTES[runner]


def readable_part(metainfo: Mapping) -> dict:
    """The entries of a data set's ``metainfo`` that a checkpoint can hold; the others are named in a warning."""
    out = {key: value for key, value in metainfo.items() if is_readable(value)}
    for key in metainfo.keys() - out.keys():
        print_log(
            f'train_dataloader.dataset.metainfo.{key} is left out of checkpoints: they hold text, numbers, lists and '
            'dicts only',
            'current',
            logging.WARNING,
        )
    return out


class Writer:
    """Save checkpoints in a thread: training waits only for :func:`write`, not for the disk."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._running: Future | None = None

    def save(self, checkpoint: dict, path: str | Path, then: Callable[[], None]) -> None:
        """Save a checkpoint, and call ``then`` when the file is in its place. Waits for the previous save first.

        Raises:
            SaveError: this checkpoint could not be written, or the previous save failed.
        """
        self.wait()
        part = write(checkpoint, path)

        def rest():
            finish(part, path)
            try:
                read_meta(Path(path))
            except (CheckpointError, OSError) as error:  # such as an object that a hook added
                print_log(f'{error}. So no run can resume from it', 'current', logging.WARNING)
            try:
                then()
            except OSError as error:
                raise save_error(error.filename or path, error) from error

        self._running = self._pool.submit(rest)

    @property
    def failed(self) -> bool:
        """Whether the last save has failed already; :meth:`wait` then raises its error."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Wait for the last save; raise SaveError if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def has_own_save(runner: Runner) -> bool:
    """Whether a subclass of Runner or VOLORunner, or the object itself, replaces ``save_checkpoint``."""
    if 'save_checkpoint' in vars(runner):
        return True
    owner = next(kind for kind in type(runner).__mro__ if 'save_checkpoint' in vars(kind))
    return owner.__module__ not in (Runner.__module__, f'{__package__}.runner')
