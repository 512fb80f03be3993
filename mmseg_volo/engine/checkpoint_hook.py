"""Save checkpoints during training so that no interruption loses a run."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from mmengine.dist import broadcast, broadcast_object_list, get_dist_info, is_distributed, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor

from ..checkpoints.writing import remove_parts, replace_text
from ..errors import ConfigError, SaveError, TrainingStopped
from ..utils.signals import StopSignals
from .early_stopping import early_stopping_of, restore_early_stopping
from .loop import is_validation_due
from .optim import should_update
from .saving import Writer, collect, has_own_save
from .sharding import VOLOFullyShardedDataParallel

_STOP, _FAILED = 1, 2


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, same arguments, with atomic files and a checkpoint on SIGTERM and SIGINT.

    A checkpoint is complete before it gets its name and before older ones are removed. Training continues while the
    disk works (:mod:`mmseg_volo.checkpoints.writing`). On SIGTERM or SIGINT (Slurm, a spot machine, Ctrl-C) the hook
    saves one more checkpoint and ends training with :class:`TrainingStopped`; a second SIGINT ends it at once. A failed
    save raises SaveError on every rank. If the folder is not on a local disk, mmengine saves as usual. A runner with a
    ``save_checkpoint`` of its own saves itself.

    A checkpoint also holds the best score and the count of each EarlyStoppingHook, so a resumed run stops where an
    uninterrupted one does.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._writer = Writer()
        self._signals = StopSignals(notice='a checkpoint will be saved, then training ends')
        self._active_signals = ExitStack()
        self._agreement: tuple[Tensor, dist.Work] | None = None
        self._saved_step = -1
        self._outdated_best: list[Path] = []
        self._save_again = self._in_background = False

    def before_train(self, runner: Runner) -> None:
        """As in mmengine; also remove partial files of a killed run, and start to handle signals.

        Raises:
            ConfigError: the hook has arguments that neither it nor ``save_checkpoint`` of the runner knows.
        """
        if self.args and not has_own_save(runner):
            raise ConfigError(f'default_hooks.checkpoint: {type(self).__name__} does not know {", ".join(self.args)}')
        super().before_train(runner)
        # A hook that comes after this one may open the file that ``last_ckpt`` names, so it must be there by then.
        later = runner.hooks[runner.hooks.index(self) + 1 :] if self in runner.hooks else []
        stages = {stage for hook in later for stage in hook.get_triggered_stages()}
        self._in_background = self in runner.hooks and not stages & {'after_train_iter', 'after_train_epoch'}
        restore_early_stopping(runner)
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
        measured = runner.message_hub.runtime_info.get('measured_iter')
        if runner.val_loop is not None and runner.iter not in (0, measured) and is_validation_due(runner.train_loop):
            runner.val_loop.run()

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
                for hook in runner.hooks:
                    if isinstance(hook, EMAHook):
                        hook.after_val_epoch(runner)  # put back the weights that are trained
                self._save_in_between(runner, runner.iter, alone=True)
            self._stop(runner.iter, alone=True)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """As in mmengine; also note in later checkpoints that this validation is done."""
        if self._trains:  # in a validation alone, asking for the iteration would build the training data
            runner.message_hub.update_info('measured_iter', runner.iter)
        super().after_val_epoch(runner, metrics)

    def after_val(self, runner: Runner) -> None:
        """If there is a new best checkpoint, save the last one again, which notes it.

        mmengine saves it in ``after_val_epoch``, where EarlyStoppingHook has not counted yet.
        """
        if self._save_again:
            self._save_again = False
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, runner.epoch if self.by_epoch else runner.iter, meta)

    def after_train(self, runner: Runner) -> None:
        """Wait for the last save."""
        self._end_agreement()
        self._raise_everywhere(self._wait())
        self.release()
        super().after_train(runner)

    @property
    def _trains(self) -> bool:
        """Whether training has begun; a validation alone saves nothing."""
        return hasattr(self, 'file_backend')

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
        name = name or self.filename_tmpl.format(step)
        path = Path(self.out_dir, name)
        if not should_update(runner.optim_wrapper):
            runner.logger.warning(
                f'{name} is saved between two optimizer steps, without the gradients accumulated so far, so a run that '
                'resumes from it will differ; set default_hooks.checkpoint.interval and train_cfg.val_interval to '
                'multiples of optim_wrapper.accumulative_counts'
            )
        self.last_ckpt = str(path)
        self._saved_step = step
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.message_hub.update_info('early_stopping', early_stopping_of(runner))

        def update_folder():
            replace_text(Path(runner.work_dir, 'last_checkpoint'), str(path))
            for file in outdated:
                file.unlink(missing_ok=True)

        error = None
        try:
            if has_own_save(runner):
                options = dict(save_optimizer=self.save_optimizer, save_param_scheduler=self.save_param_scheduler)
                options.update(meta=meta, by_epoch=self.by_epoch, backend_args=self.backend_args, **self.args)
                runner.save_checkpoint(self.out_dir, name, self.file_client_args, **options)
                if is_main_process():
                    update_folder()
            else:
                checkpoint = collect(runner, meta, self.save_optimizer, self.save_param_scheduler)
                if is_main_process():
                    self._writer.save(checkpoint, path, update_folder)
                    if not self._in_background:
                        self._writer.wait()
        except SaveError as caught:
            error = caught
        if not alone:
            self._raise_everywhere(error)
        elif error:
            raise error

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """As in mmengine, but remove the previous best file only after the new one is saved."""
        if not self.save_best or not self._trains:
            return
        if not isinstance(self.file_backend, LocalBackend):
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
        self._save_again = recorder.save_again

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
