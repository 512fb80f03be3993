"""Hooks that keep a training run from being lost: checkpoints, signals, steps that are not finite."""

import os
import signal
import threading
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from mmengine.dist import broadcast_object_list, get_dist_info, is_distributed, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor

from .errors import SaveError, TrainingDiverged, TrainingStopped
from .saving import Writer, collect, remove_parts, replace_text
from .sharding import VOLOFullyShardedDataParallel

_STOP, _FAILED = 1, 2


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, same arguments, whose checkpoints survive whatever happens to the run.

    A checkpoint is whole before it gets its name and before those it outdates are removed; training goes on while the
    disk works (:mod:`mmseg_volo.saving`). On SIGTERM and SIGINT, which Slurm, a spot machine and Ctrl-C send, it saves
    one more, and training ends with :class:`TrainingStopped`; a second SIGINT ends it at once. What goes wrong in
    writing is raised in every process. A folder that is not on a local path is left to mmengine.
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
        if state == _STOP and _should_update(runner.optim_wrapper):
            if self._saved_step != step:
                self._save_in_between(runner, step)
            self._stop(step)

    def before_val_epoch(self, runner: Runner) -> None:
        """Let the disk come to its end: validation's workers are forked, which wants no thread at work beside it."""
        self._raise_everywhere(self._wait())

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


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skips the steps of the optimizer whose loss or gradient is not finite.

    The weights, the optimizer's state and the running statistics of the norms stay as they were before that batch; the
    learning rate goes on. All processes skip together. Steps that a loss scaler skips by itself count, too.

    Args:
        max_in_row: after so many of them without one that is finite, training ends with :class:`TrainingDiverged`.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_in_row: int = 25):
        if max_in_row < 1:
            raise ValueError(f'max_in_row must be 1 or more, got {max_in_row}')
        self.max_in_row = max_in_row
        self.in_row = self.total = 0
        self._loss: Tensor | None = None
        self._hooks: list = []

    def before_train(self, runner: Runner) -> None:
        """Listen to the model's losses and the optimizer's steps."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        optimizers = [one.optimizer for one in _wrappers(runner.optim_wrapper)]
        self.in_row, self.total = runner.message_hub.runtime_info.get('skipped_steps', (0, 0))
        self._buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._hooks = [model.register_forward_hook(self._after_forward)]
        self._hooks += [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keep the running statistics, which a forward pass changes before anyone sees its loss."""
        self._loss, self._asked, self._skipped = None, False, False
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count; raises TrainingDiverged after too many in a row."""
        if not self._skipped and not self._asked and _should_update(runner.optim_wrapper):
            self._skipped = True  # by a loss scaler, which found it before the optimizer was asked
            if self._loss is not None and not torch.isfinite(self._loss):
                self._restore()
        if self._skipped:
            self._count(runner, data_batch)
        elif self._asked and self.in_row:
            self.in_row = 0
            runner.message_hub.update_info('skipped_steps', (self.in_row, self.total))

    def after_train(self, runner: Runner) -> None:
        """Leave model and optimizer as they were."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, runner: Runner, data_batch) -> None:
        self.in_row, self.total = self.in_row + 1, self.total + 1
        runner.message_hub.update_info('skipped_steps', (self.in_row, self.total))
        samples = data_batch.get('data_samples', []) if isinstance(data_batch, dict) else []
        files = ', '.join(str(getattr(sample, 'img_path', '?')) for sample in samples) or 'unknown'
        loss = 'unknown' if self._loss is None else f'{float(self._loss):g}'
        what = (
            f'iteration {runner.iter + 1}: loss or gradient not finite (loss of this process: {loss}), step skipped, '
            f'{self.in_row} in a row, {self.total} in all; pictures: {files}'
        )
        if self.in_row < self.max_in_row:
            runner.logger.warning(what)
            return
        last = runner.message_hub.runtime_info.get('last_ckpt') or 'none yet'
        raise TrainingDiverged(
            f'{what}. Training ends here. Last good checkpoint: {last}. Lower the learning rate, set '
            'optim_wrapper.clip_grad=dict(max_norm=1.0), or train in bfloat16 or float32 where it was float16; look at '
            'the pictures if it is always the same ones.'
        )

    def _after_forward(self, model, inputs, outputs) -> None:
        if isinstance(outputs, dict):  # losses; predictions are no dict
            parts = [
                part.detach().float().sum()
                for name, value in outputs.items()
                if 'loss' in name
                for part in (value if isinstance(value, (list, tuple)) else [value])
            ]
            if parts:
                loss = torch.stack(parts).sum()
                self._loss = loss if self._loss is None else self._loss + loss

    def _before_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        self._asked = True
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not parameters:
            return
        grads = [p.grad.to_local() if hasattr(p.grad, 'to_local') else p.grad for p in parameters]
        total = torch.nn.utils.get_total_norm([grad for grad in grads if grad.numel()])
        if self._loss is not None:
            total = total + self._loss.to(total.device)
        finite = torch.isfinite(total).int()
        if is_distributed():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite:
            # An optimizer leaves parameters without a gradient alone, decay and momentum included.
            for parameter in parameters:
                parameter.grad = None
            self._skipped = True
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)


def _should_update(wrapper: OptimWrapper | OptimWrapperDict) -> bool:
    """Whether the iteration that just ended was one at whose end the optimizer steps, by gradient accumulation."""
    return all(one.should_update() for one in _wrappers(wrapper))


def _wrappers(wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    return [wrapper] if isinstance(wrapper, OptimWrapper) else list(wrapper.values())
