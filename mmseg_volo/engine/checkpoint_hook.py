"""Save checkpoints during training so that no interruption loses a run."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn
from weakref import WeakKeyDictionary

import mmengine
import torch
import torch.distributed as dist
from mmengine.dist import broadcast, broadcast_object_list, get_dist_info, is_distributed, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor

from ..checkpoints.writing import finish, remove_parts, replace_text, save_error, write
from ..errors import SaveError, TrainingStopped
from ..utils.signals import StopSignals
from ..utils.unwrap import bare_model
from ..version import __version__
from .loop import ResumableTrainLoop
from .optim import should_update
from .sharding import VOLOFullyShardedDataParallel, full_state

_CONFIG_TEXTS: WeakKeyDictionary[Runner, str] = WeakKeyDictionary()


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
        weights, state = bare_model(runner.model).state_dict(), wrapper and wrapper.state_dict()
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
    """Format the config once per run, because that takes longer than writing a small checkpoint."""
    if runner not in _CONFIG_TEXTS:
        _CONFIG_TEXTS[runner] = runner.cfg.pretty_text
    return _CONFIG_TEXTS[runner]


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


_STOP, _FAILED = 1, 2


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, same arguments, with atomic files and a checkpoint on SIGTERM and SIGINT.

    A checkpoint is complete before it gets its name and before older ones are removed. Training continues while the
    disk works (:mod:`mmseg_volo.checkpoints.writing`). On SIGTERM or SIGINT (Slurm, a spot machine, Ctrl-C) the hook
    saves one more checkpoint and ends training with :class:`TrainingStopped`; a second SIGINT ends it at once. A failed
    save raises SaveError on every rank. If the folder is not on a local disk, mmengine saves as usual.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._writer = Writer()
        self._signals = StopSignals(notice='a checkpoint will be saved, then training ends')
        self._active_signals = ExitStack()
        self._agreement: tuple[Tensor, dist.Work] | None = None
        self._saved_step = -1
        self._outdated_best: list[Path] = []

    def before_train(self, runner: Runner) -> None:
        """As in mmengine; also remove partial files of a killed run, and start to handle signals."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            if is_main_process():
                remove_parts(self.out_dir)
            self._follow_moved_folder()
        self._active_signals.enter_context(self._signals)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save when a checkpoint is due.

        Raises:
            TrainingStopped: a signal arrived, and a checkpoint was saved.
            SaveError: a save failed.
        """
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        state = self._agree(_FAILED if self._writer.failed else _STOP if self._signals.received else 0)
        if state == _FAILED:
            self._raise_everywhere(self._wait())
        step = runner.iter + 1
        # A checkpoint does not hold partly accumulated gradients, so wait for the optimizer's step.
        if state == _STOP and should_update(runner.optim_wrapper):
            if self._saved_step != step:
                self._save_in_between(runner, step)
            self._stop(step)

    def before_train_epoch(self, runner: Runner) -> None:
        """Rerun an interrupted validation on resume."""
        loop, measured = runner.train_loop, runner.message_hub.get_info('measured_iter')
        if isinstance(loop, ResumableTrainLoop) and runner.iter not in (0, measured):
            loop.validate_again()

    def before_val_epoch(self, runner: Runner) -> None:
        """Wait for the pending write: forking validation workers while a thread runs is unsafe.

        All ranks also take the buffers of rank 0, which are those that are saved; those of SyncBN are equal anyway.
        """
        self._raise_everywhere(self._wait())
        if is_distributed() and not isinstance(runner.model, VOLOFullyShardedDataParallel):
            for buffer in runner.model.buffers():
                broadcast(buffer)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Stop a validation during training when a signal arrives; it is rerun on resume."""
        # Ranks may validate different numbers of batches, so each acts on its own signal, and none waits for another.
        # A sharded model needs all ranks to save, so there training saves after its next iteration.
        if self._signals.received and not isinstance(runner.model, VOLOFullyShardedDataParallel):
            if is_main_process() and self._saved_step != runner.iter:
                self._save_in_between(runner, runner.iter, alone=True)
            self._stop(runner.iter, alone=True)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """As in mmengine; also note in later checkpoints that this validation is done."""
        runner.message_hub.update_info('measured_iter', runner.iter)
        super().after_val_epoch(runner, metrics)

    def after_train(self, runner: Runner) -> None:
        """Wait for the last save."""
        self._end_agreement()
        self._raise_everywhere(self._wait())
        self.release()
        super().after_train(runner)

    def release(self) -> None:
        """Restore the previous signal handlers, also when training ends with an error."""
        self._active_signals.close()

    def _save_in_between(self, runner: Runner, step: int, alone: bool = False) -> None:
        meta = dict(epoch=runner.epoch, iter=step)
        # If files are named by epoch, name this one by its iteration.
        self._save_checkpoint_with_step(runner, step, meta, alone, f'iter_{step}.pth' if self.by_epoch else None)

    def _stop(self, step: int, alone: bool = False) -> NoReturn:
        error = self._wait()
        # No rank may exit before rank 0 has saved: when one exits, the launcher kills the others.
        if not alone:
            self._end_agreement()
            self._raise_everywhere(error)
        elif error:
            raise error
        number = self._signals.received
        self.release()
        name = signal.Signals(number).name if number else 'a signal to another rank'
        raise TrainingStopped(
            f'stopped by {name} after iteration {step}, saved as {self.last_ckpt}; --resume continues from there'
        )

    def _agree(self, state: int) -> int:
        """The largest state of all ranks one iteration ago, so that no rank waits for its GPU."""
        if not is_distributed() or get_dist_info()[1] == 1:
            return state
        before, device = self._agreement, 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
        mine = torch.tensor(state, device=device)
        self._agreement = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def _end_agreement(self) -> None:
        """Wait for the pending all-reduce: a rank that exits during it can abort another rank."""
        if self._agreement:
            self._agreement[1].wait()
            self._agreement = None

    def _wait(self) -> SaveError | None:
        try:
            self._writer.wait()
        except SaveError as error:
            return error
        return None

    @staticmethod
    def _raise_everywhere(error: SaveError | None) -> None:
        """Raise the error of rank 0 on all ranks."""
        message = [str(error) if error else None]
        if is_distributed():
            broadcast_object_list(message)
        if message[0]:
            raise error or SaveError(message[0])

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict, alone: bool = False, name: str | None = None
    ) -> None:
        """Save, then remove old files; mmengine removes first.

        Args:
            runner, step, meta: as in mmengine.
            alone: save without the other ranks.
            name: file name of a checkpoint that does not count for ``max_keep_ckpts``.
        """
        if not isinstance(self.file_backend, LocalBackend):
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        if isinstance(self.file_backend, _RemovalRecorder):
            self.file_backend.save_again = True
            return
        outdated, self._outdated_best = self._outdated_best, []
        if self.max_keep_ckpts > 0 and name is None and step not in self.keep_ckpt_ids:
            while len(self.keep_ckpt_ids) >= self.max_keep_ckpts:
                outdated.append(Path(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids.popleft())))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        path = Path(self.out_dir, name or self.filename_tmpl.format(step))
        self.last_ckpt = str(path)
        self._saved_step = step
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        checkpoint = collect(runner, meta, self.save_optimizer, self.save_param_scheduler)

        def update_folder():
            replace_text(Path(runner.work_dir, 'last_checkpoint'), str(path))
            for file in outdated:
                file.unlink(missing_ok=True)

        error = None
        if is_main_process():
            try:
                self._writer.save(checkpoint, path, update_folder)
            except SaveError as caught:
                error = caught
        if not alone:
            self._raise_everywhere(error)
        elif error:
            raise error

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """As in mmengine, but remove the previous best file only after the new one is saved."""
        if not self.save_best or not isinstance(self.file_backend, LocalBackend):
            super()._save_best_checkpoint(runner, metrics)
            return
        backend, self.file_backend = self.file_backend, _RemovalRecorder()
        error = None
        try:
            super()._save_best_checkpoint(runner, metrics)
        except SaveError as caught:
            error = caught
        finally:
            recorder, self.file_backend = self.file_backend, backend
        self._raise_everywhere(error)
        best = [Path(path) for path in self._best_paths() if path]
        self._outdated_best += [path for path in recorder.removed if path not in best]
        if recorder.save_again:  # as in mmengine: the last checkpoint notes the new best one
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, runner.epoch if self.by_epoch else runner.iter, meta)

    def _best_paths(self) -> list[str | None]:
        if hasattr(self, 'best_ckpt_path_dict'):
            return list(self.best_ckpt_path_dict.values())
        return [getattr(self, 'best_ckpt_path', None)]

    def _follow_moved_folder(self) -> None:
        """Correct the folder in the paths of the best checkpoints, in case the work dir was moved."""
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = os.path.join(self.out_dir, os.path.basename(self.best_ckpt_path))
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            if path:
                self.best_ckpt_path_dict[key] = os.path.join(self.out_dir, os.path.basename(path))


class _RemovalRecorder(LocalBackend):
    """Record which files mmengine removes, and whether it saves the last checkpoint again."""

    def __init__(self):
        self.removed: list[Path] = []
        self.save_again = False

    def remove(self, filepath: str | Path) -> None:
        self.removed.append(Path(filepath))
