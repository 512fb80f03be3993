"""The part of the suite that trains on real images: VOLO-D1 on CamVid-11, from random weights."""

import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from ..engine.runner import build_runner
from ..utils.config import load_config
from .machine import ROOT, on_gpu
from .suite import Plan, Task
from .tables import size_text
from .timing import seconds_of
from .training import TrainCase


def find_camvid(given: str | None) -> Path | None:
    """The folder that was named, or data/camvid if it exists."""
    if given:
        return Path(given)
    here = Path('data/camvid')
    return here if (here / 'labels/val').is_dir() else None


@HOOKS.register_module()
class ClockHook(Hook):
    """Ends training after so many seconds."""

    def __init__(self, seconds: float):
        self._seconds, self._end = seconds, 0.0

    def before_train(self, runner) -> None:
        self._end = time.monotonic() + self._seconds

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        runner.train_loop.stop_training = time.monotonic() > self._end


def camvid(task: Task) -> None:
    """Train VOLO-D1 on CamVid-11 from random weights while there is time, then validate (on a CPU on two images)."""
    plan, folder = task.plan, task.plan.camvid
    path = ROOT / 'configs/volo_d1_camvid.py'
    if folder is None or not (folder / 'labels/val').is_dir():
        task.write('Skipped: needs CamVid-11 in data/camvid or --camvid DIR, as tools/prepare_data.py lays it out.')
        return
    if not path.is_file():
        task.write('Skipped: needs configs/ of a clone of the repository.')
        return
    crop, batch = ((64, 64), 2) if plan.tiny else ((352, 480), 16)
    step = _seconds_of_step(plan, crop, batch)
    seconds = 0.75 * task.left() - 10 if not plan.tiny else 60
    iterations = max(int(seconds / (1.3 * step)), 2) if not plan.tiny else 2
    if seconds < 5 and not plan.tiny:
        task.write('No time left.')
        return
    config = load_config(str(path), None, str(task.folder / 'camvid'))
    suffix = next((folder / 'images/val').iterdir()).suffix
    workers = 0 if plan.tiny else max(min(torch.multiprocessing.cpu_count() - 2, 14), 0)
    data = {'dataset.data_root': f'{folder}/', 'dataset.img_suffix': suffix}
    changes = {
        'model.data_preprocessor.size': crop,
        'model.backbone.img_size': crop,
        'model.backbone.init_cfg': None,
        'model.backbone.drop_path_rate': 0.0,
        'train_dataloader.batch_size': batch,
        'train_dataloader.dataset.pipeline.3.crop_size': crop,
        'train_cfg.max_iters': iterations,
        'train_cfg.val_interval': iterations + 1,
        'optim_wrapper.type': 'BFloat16OptimWrapper',
        'optim_wrapper.optimizer.lr': 1e-3,
        'optim_wrapper.optimizer.weight_decay': 0.05,
        'optim_wrapper.clip_grad': dict(max_norm=1.0),
        'param_scheduler.0.end': iterations // 20 + 1,
        'param_scheduler.1.begin': iterations // 20 + 1,
        'param_scheduler.1.end': iterations,
        'default_hooks.checkpoint.interval': iterations + 1,
        'default_hooks.checkpoint.save_last': False,
        'default_hooks.checkpoint.save_best': None,
        'default_hooks.logger.interval': max(iterations // 10, 1),
        'randomness.seed': 0,
    }
    for loader, count in (('train_dataloader', workers), ('val_dataloader', min(workers, 4))):
        changes.update({f'{loader}.{key}': value for key, value in data.items()})
        changes.update({f'{loader}.num_workers': count, f'{loader}.persistent_workers': count > 0})
    if plan.tiny:
        changes['val_dataloader.dataset.indices'] = 2  # a CPU takes a second for each
    config.merge_from_dict(changes)
    config.custom_hooks.append(dict(type='ClockHook', seconds=seconds))
    runner = build_runner(config)
    runner.train()
    peak = torch.cuda.max_memory_allocated(plan.device) / 1e6 if on_gpu(plan.device) else None
    done, images = runner.iter, len(runner.train_dataloader.dataset)
    times = runner.message_hub.get_scalar('train/time')  # of each iteration, its loading included
    each = times.mean(max(done - (0 if plan.tiny else 10), 1))  # the first ten warm up
    metrics = runner.val()
    task.write(
        f'VOLO-D1 + UPerHead, random weights, crop {crop[0]} x {crop[1]}, batch {batch}, bfloat16, AdamW 1e-3, '
        f'{images} training and {len(runner.val_dataloader.dataset)} validation images.'
    )
    task.table('iterations', 's', 'images/s, loading included', 'peak memory', 'mIoU (%)', 'pixel accuracy (%)')
    speed, accuracy = f'{batch / each:.0f}', (f'{metrics[name]:.1f}' for name in ('mIoU', 'aAcc'))
    task.row(str(done), f'{each * done:.0f}', speed, size_text(peak), *accuracy)


def _seconds_of_step(plan: Plan, crop: tuple[int, int], batch: int) -> float:
    """Of training on a prepared batch."""
    precision, times = ('fp32', 1) if plan.tiny else ('bf16', 5)
    case = TrainCase(size=crop, batch=batch, classes=19, precision=precision, device=plan.device)
    trainer = case.build_alone('ours')
    data = case.inputs(trainer)
    for _ in range(times):
        trainer.step(data)
    return median(seconds_of(partial(trainer.step, data)) for _ in range(times))
