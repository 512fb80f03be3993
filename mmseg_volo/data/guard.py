"""A hook that stops a run at the first label which the model has no class for."""

from collections.abc import Iterable, Iterator

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from torch import nn

from ..errors import DataError
from .labels import likely_cause


@HOOKS.register_module()
class LabelGuardHook(Hook):
    """Raise DataError before a batch whose labels the model cannot learn from or be measured with.

    In training such a label ends in a bare "target is out of bounds" or a GPU assert, in validation in a wrong mIoU.
    Takes about 0.3 ms per megapixel of labels.

    Args:
        max_unlabelled: training batches in a row without one labelled pixel after which the run stops. Their loss is
            0 and their accuracy 100 %, which looks like success.
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
                f'{_path(found[-1][0])}: the labels of {self._unlabelled} training batches in a row, of which this is '
                'the last, hold no labelled pixel; check the labels and reduce_zero_label with tools/check_data.py'
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
        """Each sample that has a label, with whether it has labelled pixels; raises at one that does not fit."""
        head = _head(runner.model)
        classes, ignore = getattr(head, 'num_classes', None), getattr(head, 'ignore_index', 255)
        if classes is None or not isinstance(data_batch, dict):
            return
        seen = set()
        for sample in _flat(data_batch.get('data_samples') or []):
            # The views of test-time augmentation carry one label ten times.
            if 'gt_sem_seg' not in sample or (path := sample.get('seg_map_path')) in seen:
                continue
            seen.update({path} - {None})
            label = sample.gt_sem_seg.data.cpu().numpy()
            low, high = int(label.min(initial=ignore)), int(label.max(initial=ignore))
            if low < 0 or (high >= classes and _highest(label, high, ignore) >= classes):
                _refuse(sample, label, classes, ignore)
            yield sample, not low == high == ignore


def _highest(label: np.ndarray, high: int, ignore: int) -> int:
    """The highest value besides ``ignore``, given the highest of all."""
    if high == ignore == 255:
        # 255 wraps to 0 and the others grow by 1: two passes over single bytes instead of a mask over int64.
        return int((label.astype(np.uint8) + np.uint8(1)).max()) - 1
    return high if high != ignore else int(np.max(label, initial=-1, where=label != ignore))


def _refuse(sample: SegDataSample, label: np.ndarray, classes: int, ignore: int) -> None:
    values, counts = np.unique(label, return_counts=True)
    wrong = ((values < 0) | (values >= classes)) & (values != ignore)
    if not wrong.any():  # a negative ignore_index
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


def _head(model: nn.Module) -> nn.Module | None:
    """The head that decides, below wrappers for several processes and for test-time augmentation."""
    while not hasattr(model, 'decode_head') and hasattr(model, 'module'):
        model = model.module
    head = getattr(model, 'decode_head', None)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def _flat(samples: Iterable) -> Iterator[SegDataSample]:
    for sample in samples:
        if isinstance(sample, list | tuple):
            yield from _flat(sample)
        else:
            yield sample
