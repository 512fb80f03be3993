"""Save checkpoints during training so that no interruption loses a run."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from ..utils.unwrap import bare_model
from ..version import __version__
from .loop import ResumableTrainLoop
from .optim import should_update
from .sharding import VOLOFullyShardedDataParallel, full_state

_CONFIG_TEXTS: WeakKeyDictionary[Runner, str] = WeakKeyDictionary()


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
    """Laid out once for a run: that takes longer than writing a small checkpoint."""
    if runner not in _CONFIG_TEXTS:
        _CONFIG_TEXTS[runner] = runner.cfg.pretty_text
    return _CONFIG_TEXTS[runner]


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
                raise save_error(error.filename or path, error) from error

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


_STOP, _FAILED = 1, 2


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, same arguments, whose checkpoints survive whatever happens to the run.

    A checkpoint is whole before it gets its name and before outdated ones are removed. Training goes on while the disk
    works (:mod:`mmseg_volo.checkpoints.writing`). On SIGTERM and SIGINT, which Slurm, a spot machine and Ctrl-C send,
    the hook saves one more checkpoint, and training ends with :class:`TrainingStopped`; a second SIGINT ends it at
    once. An error in writing is raised in every rank. A folder that is not on a local path is left to mmengine.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._writer = Writer()
        self._signal: int | None = None
        self._handlers: dict[int, object] = {}
        self._agreement: tuple[Tensor, dist.Work] | None = None
        self._saved_step = -1
        self._outdated_best: list[Path] = []

    def before_train(self, runner: Runner) -> None:
        """As in mmengine; removes what a killed run left half-written, and listens to signals from here on."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            if is_main_process():
                remove_parts(self.out_dir)
            self._follow_moved_folder()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save when it is time to, or when a signal came; raises TrainingStopped then, SaveError if it failed."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        state = self._agree(_FAILED if self._writer.failed else _STOP if self._signal else 0)
        if state == _FAILED:
            self._raise_everywhere(self._wait())
        step = runner.iter + 1
        # Gradients that are being accumulated are in no checkpoint.
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

        All ranks also take the buffers of the first one, which are those that are saved; SyncBN's are the same anyway.
        """
        self._raise_everywhere(self._wait())
        if is_distributed() and not isinstance(runner.model, VOLOFullyShardedDataParallel):
            for buffer in runner.model.buffers():
                broadcast(buffer)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Stop a validation within training when a signal came: going on, it will be repeated."""
        # Processes may validate unequal numbers of batches, so each heeds its own signal, and none waits for another.
        # Shards can be gathered by all together only: then training saves at its next iteration.
        if self._signal and self._handlers and not isinstance(runner.model, VOLOFullyShardedDataParallel):
            if is_main_process() and self._saved_step != runner.iter:
                self._save_in_between(runner, runner.iter, alone=True)
            self._stop(runner.iter, alone=True)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """As in mmengine; what is saved from here on knows that this validation is done."""
        runner.message_hub.update_info('measured_iter', runner.iter)
        super().after_val_epoch(runner, metrics)

    def after_train(self, runner: Runner) -> None:
        """Wait until the last checkpoint stands."""
        self._end_agreement()
        self._raise_everywhere(self._wait())
        self.release()
        super().after_train(runner)

    def release(self) -> None:
        """Give signals back to who had them; for a run that ends by an error, too."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number
        os.write(2, f'\n{signal.Signals(number).name}: a checkpoint will be saved, then training ends\n'.encode())

    def _save_in_between(self, runner: Runner, step: int, alone: bool = False) -> None:
        meta = dict(epoch=runner.epoch, iter=step)
        # Where files are named by epochs, this one belongs to none.
        self._save_checkpoint_with_step(runner, step, meta, alone, f'iter_{step}.pth' if self.by_epoch else None)

    def _stop(self, step: int, alone: bool = False) -> NoReturn:
        error = self._wait()
        # Nobody leaves before the first process has saved: a launcher ends the others with the first that leaves.
        if not alone:
            self._end_agreement()
            self._raise_everywhere(error)
        elif error:
            raise error
        self.release()
        name = signal.Signals(self._signal).name if self._signal else 'a signal to another process'
        raise TrainingStopped(f'stopped by {name} after iteration {step}, saved as {self.last_ckpt}; --resume goes on')

    def _agree(self, state: int) -> int:
        """The largest state of all processes, as of the iteration before, so that nobody waits for a GPU."""
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
        """Wait for the exchange under way: a process that leaves in the midst of one can abort another."""
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
        """Raise the first process's error in all of them."""
        told = [str(error) if error else None]
        if is_distributed():
            broadcast_object_list(told)
        if told[0]:
            raise error or SaveError(told[0])

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict, alone: bool = False, name: str | None = None
    ) -> None:
        """In place of mmengine's, which removes before it saves.

        Args:
            runner, step, meta: as there.
            alone: other processes do not take part.
            name: of a file that is not counted among those to keep.
        """
        if not isinstance(self.file_backend, LocalBackend):
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        if isinstance(self.file_backend, _RemovalsNoted):
            self.file_backend.again = True
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

        def settle():
            replace_text(Path(runner.work_dir, 'last_checkpoint'), str(path))
            for file in outdated:
                file.unlink(missing_ok=True)

        error = None
        if is_main_process():
            try:
                self._writer.save(checkpoint, path, settle)
            except SaveError as caught:
                error = caught
        if not alone:
            self._raise_everywhere(error)
        elif error:
            raise error

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """As in mmengine, which removes the best one before it saves the new one: here that comes last."""
        if not self.save_best or not isinstance(self.file_backend, LocalBackend):
            super()._save_best_checkpoint(runner, metrics)
            return
        backend, self.file_backend = self.file_backend, _RemovalsNoted()
        error = None
        try:
            super()._save_best_checkpoint(runner, metrics)
        except SaveError as caught:
            error = caught
        finally:
            noted, self.file_backend = self.file_backend, backend
        self._raise_everywhere(error)
        best = [Path(path) for path in self._best_paths() if path]
        self._outdated_best += [path for path in noted.removed if path not in best]
        if noted.again:  # as mmengine does: the last checkpoint learns of the new best one
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, runner.epoch if self.by_epoch else runner.iter, meta)

    def _best_paths(self) -> list[str | None]:
        if hasattr(self, 'best_ckpt_path_dict'):
            return list(self.best_ckpt_path_dict.values())
        return [getattr(self, 'best_ckpt_path', None)]

    def _follow_moved_folder(self) -> None:
        """The best checkpoint so far is noted with the folder it was saved to, which may have been moved."""
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = os.path.join(self.out_dir, os.path.basename(self.best_ckpt_path))
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            if path:
                self.best_ckpt_path_dict[key] = os.path.join(self.out_dir, os.path.basename(path))


class _RemovalsNoted(LocalBackend):
    """Notes what is to be removed, and whether a checkpoint is to be saved once more."""

    def __init__(self):
        self.removed: list[Path] = []
        self.again = False

    def remove(self, filepath: str | Path) -> None:
        self.removed.append(Path(filepath))
