"""The hook that writes the record of each validation and test."""

import math
import os
import platform
import time
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import collect_results, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import nn

from ..models.predictions import SAMPLE_STEP
from ..models.windows import WindowNetwork, has_plain_head
from .boundary import boundary_iou
from .metric import ConfusionIoUMetric, has_sampled_loss, iou_of, sum_of
from .record import FOLDER, calibration_of, quantiles_of, write_record

_PACKAGES = dict(
    torch='torch', mmengine='onedl-mmengine', mmcv='onedl-mmcv', mmseg='onedl-mmsegmentation', mmseg_volo='mmseg_volo'
)


class _NoRecord(Exception):
    """Why an evaluation leaves no record."""


@HOOKS.register_module()
class EvaluationRecordHook(Hook):
    """Writes what each validation and test found to ``WORK_DIR/TIMESTAMP/evaluation/``, for ``tools/report.py``.

    ``test.json`` or ``val_iter_N.json`` hold the confusion matrix, mIoU and accuracy of each image, the boundary IoU
    and the calibration of the confidence, of which the log has a summary; ``pictures/`` beside it has prediction and
    ground truth of the images with the lowest and the highest mIoU as index PNGs. Of a run's validations the newest and
    the best keep theirs.

    :class:`~mmseg_volo.evaluation.ConfusionIoUMetric` counts. An evaluator without it, with mmseg's IoUMetric say, gets
    the record too: the hook then runs such a metric of its own, which takes additional time. This package's segmentors
    are asked for the logits of a sample of pixels, from which confidence and validation loss are measured.

    An evaluation without ground truth leaves no record and a line in the log; so does one that cannot be written.

    Args:
        keep: images to keep at either end, by their mIoU.
        confidence: measure the calibration of the confidence.
        loss: measure the loss of the decode head in validations, where the evaluator has ConfusionIoUMetric; it is
            logged as ``val/loss``.
        boundary: measure the boundary IoU in tests.

    Raises:
        ValueError: ``keep`` is negative.
    """

    def __init__(self, keep: int = 6, confidence: bool = True, loss: bool = True, boundary: bool = True):
        if keep < 0:
            raise ValueError(f'keep must be 0 or more, got {keep}')
        self.keep, self.confidence, self.loss, self.boundary = keep, confidence, loss, boundary
        self._loaded_iter: int | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note the iteration that the checkpoint is of."""
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        self._loaded_iter = meta.get('iter') if isinstance(meta, dict) else None

    def before_val_epoch(self, runner: Runner) -> None:
        """Find the metric; ask the segmentor for the sampled logits, and the metric for the loss."""
        # mmengine logs what has 'loss' in its name as the mean of the last ten values. Of validations that would be a
        # mistake, so each starts without the earlier ones.
        scalars = runner.message_hub.log_scalars
        for name in [name for name in scalars if name.startswith('val/') and '/val/' in name]:  # a prefix may precede
            del scalars[name]
        self._begin(runner, runner.val_loop, self.loss, False)

    def before_test_epoch(self, runner: Runner) -> None:
        """Find the metric; ask the segmentor for the sampled logits."""
        self._begin(runner, runner.test_loop, False, self.boundary)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    before_test_iter = before_val_iter

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Note the time of each image; run the hook's own metric where there is one."""
        seconds = time.perf_counter() - self._since
        if self._own:
            self._process(outputs)
        if self._refused:
            return
        # The first batch includes compilation and the like.
        for image in self._metric.results[-len(outputs) :]:
            image.update(seconds=seconds / len(outputs), warm=batch_idx > 0)

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write the record."""
        self._end(runner, 'val', metrics or {})

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write the record."""
        self._end(runner, 'test', metrics or {})

    def _begin(self, runner: Runner, loop, loss: bool, boundary: bool) -> None:
        self._dataset = loop.dataloader.dataset
        metrics = getattr(loop.evaluator, 'metrics', ())
        found = [one for one in metrics if isinstance(one, ConfusionIoUMetric) and not one.format_only]
        self._own, self._refused = not found, None
        if self._own:
            ignored = [*(getattr(one, 'ignore_index', None) for one in metrics), 255]
            found = [ConfusionIoUMetric(ignore_index=next(one for one in ignored if one is not None))]
            found[0].dataset_meta = getattr(self._dataset, 'metainfo', None) or {}
        self._metric, self._network = found[0], _network(runner.model)
        self._metric.keep, self._metric.boundary = self.keep, boundary
        if self._network is not None:
            segmentor = self._network.segmentor
            loss = loss and not self._own and has_plain_head(segmentor) and has_sampled_loss(segmentor.decode_head)
            self._metric.head = segmentor.decode_head if loss else None
            self._network.sampled = self.confidence or loss

    def _process(self, outputs) -> None:
        """Count with the hook's own metric. Whatever is odd about this data or model, its evaluation goes on."""
        if self._refused:
            return
        try:
            if not self._metric.dataset_meta.get('classes'):
                raise _NoRecord('the data set names no classes')
            for sample in outputs:
                for name, why in (('gt_sem_seg', 'the data has no ground truth'), ('pred_sem_seg', 'no pred_sem_seg')):
                    if name not in sample:
                        raise _NoRecord(why)
            self._metric.process({}, [sample.to_dict() for sample in outputs])
        except Exception as error:
            self._refused = str(error) if isinstance(error, (_NoRecord, ValueError)) else repr(error)
            self._metric.results = [dict(refused=self._refused)]  # for rank 0

    def _end(self, runner: Runner, kind: str, metrics: dict) -> None:
        metric, network = self._metric, self._network
        metric.head = None
        if network is not None:
            network.sampled = False
        images, metric.images = metric.images, None
        if self._own:
            images = collect_results(metric.results, len(self._dataset))
        if not is_main_process():
            return
        try:
            record = self._record(runner, kind, metrics, images)
            name = kind if kind == 'test' or record['iteration'] is None else f'val_iter_{record["iteration"]}'
            runner.logger.info(f'{kind}: {_summary(record)}')
            write_record(Path(runner.log_dir, FOLDER), name, record, images, self.keep)
        except _NoRecord as error:
            runner.logger.info(f'{kind}: no evaluation record ({error})')
        except OSError as error:
            runner.logger.warning(f'{kind}: the evaluation record could not be written ({error})')

    def _record(self, runner: Runner, kind: str, metrics: dict, images: list[dict]) -> dict:
        if refused := next((image['refused'] for image in images if 'refused' in image), None):
            raise _NoRecord(refused)
        info = self._dataset.metainfo
        confusion = sum_of(images)
        if confusion[:, -1].any():
            raise _NoRecord(f'predictions that are no class: the data set has {len(info["classes"])}')
        if not any(image['pixels'] for image in images):
            raise _NoRecord('no image has a labelled pixel')
        training = runner._train_loop is not None and not isinstance(runner._train_loop, dict)
        model, datasets = _unwrapped(runner.model), _datasets(self._dataset)
        dataset, name = datasets[0], type(datasets[0]).__name__
        seconds = [image['seconds'] for image in images if image['warm']] or [image['seconds'] for image in images]
        return dict(
            kind=kind,
            iteration=runner.iter if training else self._loaded_iter,
            checkpoint=None if kind == 'val' and training else _text(runner._load_from),
            aug_test=isinstance(model, BaseTTAModel),
            date=datetime.now().astimezone().isoformat(timespec='seconds'),
            dataset=dict(
                type=name if len(datasets) == 1 else f'{name} and {len(datasets) - 1} more',
                data_root=_text(getattr(dataset, 'data_root', None)) or '',
                img_path=_text((getattr(dataset, 'data_prefix', None) or {}).get('img_path')) or '',
                pictures=len(images),
                started_in=os.getcwd(),  # relative paths start here
            ),
            classes=[str(name) for name in info['classes']],
            palette=[[int(value) for value in colour] for colour in info.get('palette') or ()],
            ignore_index=int(self._metric.ignore_index),
            confusion=confusion[:-1, :-1].tolist(),
            metrics={
                name: round(float(value), 4) if math.isfinite(value) else None
                for name, value in {**_figures(confusion[:-1, :-1].numpy()), **metrics}.items()
                if isinstance(value, Real) and not isinstance(value, bool)
            },
            pictures=[
                dict(
                    path=_text(image['path']),
                    truth=_text(image['truth']),
                    mIoU=image['mIoU'] and round(image['mIoU'], 6),
                    accuracy=image['accuracy'] and round(image['accuracy'], 6),
                    pixels=image['pixels'],
                )
                for image in images
            ],
            mIoU_of_pictures=quantiles_of(images),
            boundary=boundary_iou(images),
            calibration=calibration_of(images, SAMPLE_STEP) if self.confidence else None,
            seconds_per_picture=float(f'{sum(seconds) / len(seconds) / get_world_size():.4g}'),
            environment=_environment(model, self._network),
        )


def _figures(confusion: np.ndarray) -> dict[str, float]:
    """mIoU, pixel accuracy and mean accuracy in percent, which metrics may lack or name with a prefix."""
    right, truth = np.diag(confusion), confusion.sum(1)
    values = dict(aAcc=right.sum() / truth.sum(), mIoU=iou_of(confusion), mAcc=right[truth > 0] / truth[truth > 0])
    return {name: round(100 * float(np.nanmean(value)), 2) for name, value in values.items()}


def _summary(record: dict) -> str:
    """What a record has beside the metrics, as a line."""
    low, middle, high = (100 * record['mIoU_of_pictures'][name] for name in ('5%', '50%', '95%'))
    parts = [f'mIoU of single images: 5 % are below {low:.2f}, half below {middle:.2f}, 5 % above {high:.2f}']
    if record['boundary']:
        parts.append(f'boundary mIoU {100 * record["boundary"]["mIoU"]:.2f}')
    if record['calibration']:
        parts.append(f'calibration error {100 * record["calibration"]["ece"]:.2f} %')
    return '; '.join(parts)


def _datasets(dataset: object) -> list:
    """The data sets inside wrappers such as SeededDataset, ConcatDataset and RepeatDataset."""
    inner = vars(dataset).get('datasets') or [vars(dataset).get('dataset')]
    if not all(hasattr(one, 'metainfo') for one in inner):
        return [dataset]
    return [found for one in inner for found in _datasets(one)]


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _network(model: nn.Module) -> WindowNetwork | None:
    """The network of this package's segmentor or test-time augmentation."""
    network = getattr(_unwrapped(model), 'network', None)
    return network if isinstance(network, WindowNetwork) else None


def _environment(model: nn.Module, network: WindowNetwork | None) -> dict:
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device('cpu')
    versions = dict(python=platform.python_version())
    for name, package in _PACKAGES.items():
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(package)
    precision = (network.segmentor.test_cfg or {}).get('precision') if network is not None else None
    return dict(
        **versions,
        precision=precision or 'fp32',
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        processes=get_world_size(),
        threads=torch.get_num_threads(),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
