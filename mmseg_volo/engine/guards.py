"""Hooks that protect a run from wrong labels, steps that are not finite, and checkpoints of another model."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from mmengine.dist import is_distributed
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..checkpoints.compatibility import check_checkpoint
from ..checkpoints.content import as_checkpoint
from ..datasets.checks.labels import likely_cause
from ..errors import DataError, TrainingDiverged
from ..utils.unwrap import bare_model
from .loop import check_epochs_end
from .optim import should_update, wrappers_of


@HOOKS.register_module()
class MatchingCheckpointHook(Hook):
    """Check what ``VOLORunner`` checks itself, for other runners: checkpoints against the model, and the sampler.

    Training loads what fits and logs the rest. A test rejects a checkpoint of another model or of other class names,
    unless ``model.test_cfg.allow_mismatch`` is true. Training by epochs needs a sampler that ends them.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which loads the content too

    def before_train(self, runner: Runner) -> None:
        """Raise ConfigError for epochs that never end."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            check_epochs_end(runner.train_dataloader)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the content of the file.

        Raises:
            CheckpointError: see :func:`~mmseg_volo.checkpoints.compatibility.check_checkpoint`.
        """
        arranged = as_checkpoint(checkpoint)
        checkpoint.update(arranged)
        if isinstance(runner._train_loop, BaseLoop):  # built in training; still a config in a test
            check_checkpoint(bare_model(runner.model), checkpoint, 'train')
        else:
            check_checkpoint(bare_model(runner.model), checkpoint, 'infer', classes_of(runner))


def classes_of(runner: Runner) -> Sequence[str] | None:
    """Class names of the data set that a runner tests or validates on, if it has built one that knows them."""
    for loop in (runner._test_loop, runner._val_loop):
        if hasattr(loop, 'dataloader'):  # else it is still a config
            return getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
    return None


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skip optimizer steps whose loss or gradient is not finite.

    Weights, optimizer state and running statistics of norms stay as before that batch. The learning rate schedule
    continues. All ranks skip together. Steps that a loss scaler skips are counted too.

    Args:
        max_in_row: after so many skipped steps in a row, training ends with :class:`TrainingDiverged`.
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
        """Hook into the model's forward pass and the optimizer's steps."""
        model = bare_model(runner.model)
        optimizers = [one.optimizer for one in wrappers_of(runner.optim_wrapper)]
        self.in_row, self.total = runner.message_hub.runtime_info.get('skipped_steps', (0, 0))
        self._buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._hooks = [model.register_forward_hook(self._after_forward)]
        self._hooks += [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keep a copy of the buffers: the forward pass changes running statistics before the loss is known."""
        self._loss, self._step_called, self._skipped = None, False, False
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count skipped steps; raise TrainingDiverged after too many in a row."""
        if not self._skipped and not self._step_called and should_update(runner.optim_wrapper):
            self._skipped = True  # a loss scaler skipped the step without a call to the optimizer
            if self._loss is not None and not torch.isfinite(self._loss):
                self._restore()
        if self._skipped:
            self._count(runner, data_batch)
        elif self._step_called and self.in_row:
            self.in_row = 0
            runner.message_hub.update_info('skipped_steps', (self.in_row, self.total))

    def after_train(self, runner: Runner) -> None:
        """Remove the hooks from model and optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, runner: Runner, data_batch) -> None:
        self.in_row, self.total = self.in_row + 1, self.total + 1
        runner.message_hub.update_info('skipped_steps', (self.in_row, self.total))
        samples = data_batch.get('data_samples', []) if isinstance(data_batch, dict) else []
        files = ', '.join(str(getattr(sample, 'img_path', '?')) for sample in samples) or 'unknown'
        loss = 'unknown' if self._loss is None else f'{float(self._loss):g}'
        message = (
            f'iteration {runner.iter + 1}: loss or gradient not finite (loss on this rank: {loss}), step skipped, '
            f'{self.in_row} in a row, {self.total} in all; images: {files}'
        )
        if self.in_row < self.max_in_row:
            runner.logger.warning(message)
            return
        last = runner.message_hub.runtime_info.get('last_ckpt') or 'none yet'
        raise TrainingDiverged(
            f'{message}. Training ends here. Last good checkpoint: {last}. Lower the learning rate, set '
            'optim_wrapper.clip_grad=dict(max_norm=1.0), or use bfloat16 or float32 instead of float16. If it is '
            'always the same images, look at them.'
        )

    def _after_forward(self, model, inputs, outputs) -> None:
        if isinstance(outputs, dict):  # losses; predictions are not a dict
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
        self._step_called = True
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
            # An optimizer does not change parameters without a gradient, not even by decay or momentum.
            for parameter in parameters:
                parameter.grad = None
            self._skipped = True
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)


@HOOKS.register_module()
class LabelGuardHook(Hook):
    """Raise DataError before a batch with label values that are not classes of the model.

    Without this check such a label ends training with "target is out of bounds" or a GPU assert, and gives a wrong mIoU
    in validation. The check takes about 0.3 ms per megapixel.

    Args:
        max_unlabelled: raise after so many training batches in a row without a labelled pixel. Their loss of 0 and
            accuracy of 100 % look like success.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_unlabelled: int = 100):
        self.max_unlabelled = max_unlabelled
        self._unlabelled = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check a training batch, and count those without labelled pixels."""
        found = list(self._check(runner, data_batch))
        if not found:
            return
        self._unlabelled = 0 if any(labelled for _, labelled in found) else self._unlabelled + 1
        if self._unlabelled >= self.max_unlabelled:
            raise DataError(
                f'{_path(found[-1][0])}: the labels of {self._unlabelled} training batches in a row have no labelled '
                'pixel, and this file is in the last one; check labels and reduce_zero_label with tools/check_data.py'
            )

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check a validation batch."""
        for _ in self._check(runner, data_batch):
            pass

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check a test batch."""
        self.before_val_iter(runner, batch_idx, data_batch)

    @staticmethod
    def _check(runner: Runner, data_batch: dict | None) -> Iterator[tuple[SegDataSample, bool]]:
        """Yield each sample that has a label, and whether it has labelled pixels; raise DataError at a wrong label."""
        head = getattr(bare_model(runner.model), 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head  # the last head of a cascade predicts
        classes, ignore = getattr(head, 'num_classes', None), getattr(head, 'ignore_index', 255)
        if classes is None or not isinstance(data_batch, dict):
            return
        seen = set()
        for sample in _flat(data_batch.get('data_samples') or []):
            # With test-time augmentation all views of an image carry the same label.
            if 'gt_sem_seg' not in sample or (path := sample.get('seg_map_path')) in seen:
                continue
            seen.update({path} - {None})
            label = sample.gt_sem_seg.data.cpu().numpy()
            low, high = int(label.min(initial=ignore)), int(label.max(initial=ignore))
            if low < 0 or (high >= classes and _highest(label, high, ignore) >= classes):
                _raise_for(sample, label, classes, ignore)
            yield sample, not low == high == ignore


def _highest(label: np.ndarray, high: int, ignore: int) -> int:
    """Highest value except ``ignore``; ``high`` is the highest of all."""
    if high == ignore == 255:
        # Adding 1 wraps 255 to 0. This is two passes over single bytes instead of a mask over int64.
        return int((label.astype(np.uint8) + np.uint8(1)).max()) - 1
    return high if high != ignore else int(np.max(label, initial=-1, where=label != ignore))


def _raise_for(sample: SegDataSample, label: np.ndarray, classes: int, ignore: int) -> None:
    values, counts = np.unique(label, return_counts=True)
    wrong = ((values < 0) | (values >= classes)) & (values != ignore)
    if not wrong.any():  # the negative value is ignore_index
        return
    reduced = bool(sample.get('reduce_zero_label'))
    pixels = ', '.join(f'{v} ({n} pixels)' for v, n in zip(values[wrong][:5], counts[wrong][:5], strict=True))
    after = ' after reduce_zero_label' if reduced else ''
    raise DataError(
        f"{_path(sample)}: label value {pixels}{after} is none of the model's {classes} classes (0 to {classes - 1}, "
        f'{ignore} is ignored); {likely_cause(values[wrong].tolist(), classes, reduced)}'
    )


def _path(sample: SegDataSample) -> str:
    return sample.get('seg_map_path') or sample.get('img_path') or 'a label without a path'


def _flat(samples: Iterable) -> Iterator[SegDataSample]:
    for sample in samples:
        if isinstance(sample, list | tuple):
            yield from _flat(sample)
        else:
            yield sample
