"""Training runs for tests: a tiny VOLO on drawn scenes, with every kind of randomness of a real run."""

from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = f"""
_base_ = '{ROOT}/configs/volo_d1_quickstart.py'
arch = dict(depths=(1, 1, 1, 2), dims=(24, 48, 48, 48), heads=(1, 2, 2, 2), mlp_ratios=1, stem_width=8)
crop_size = (64, 64)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(arch=dict(_delete_=True, **arch), img_size=crop_size, drop_path_rate=0.3),
    decode_head=dict(in_channels=[24, 48, 48, 48], channels=16, dropout_ratio=0.1),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(128, 64), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
data = dict(type='StreetSceneDataset', data_root='DATA', train=7, val=2, size=(64, 128))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(num_workers=0, dataset=dict(**data))
test_dataloader = val_dataloader
max_iters = 8
train_cfg = dict(max_iters=max_iters, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=3, end=max_iters),
]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, save_best='mIoU', max_keep_ckpts=2))
"""


def checkpoint(step: int = 10) -> dict:
    """A checkpoint in the format that training saves."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 20))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 40)).sum().backward()
    optimizer.step()
    meta = dict(epoch=0, iter=step, saved_at=float(step), sealed_by='mmseg_volo', cfg='a = 1\n')
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    return dict(meta=meta, state_dict=model.state_dict(), optimizer=optimizer.state_dict(), message_hub=hub)


def write_config(folder: Path, data: Path | None = None, more: str = '') -> Path:
    """Write a config file into ``folder``, with the overrides ``more`` at its end."""
    path = folder / 'small.py'
    path.write_text(TEXT.replace('DATA', str(data or folder / 'scenes')) + more)
    return path


def small_config(folder: Path, work_dir: str = 'run', **options) -> Config:
    """Read the small config; ``options`` are overrides with __ instead of dots."""
    config = load_config(str(write_config(folder)), None, str(folder / work_dir))
    config.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    # mmengine shares message hubs and visualizers of the same name among all runs of a process.
    config.experiment_name = config.visualizer.name = f'{folder.name}_{work_dir}'
    return config


def differences(first: Path, second: Path) -> list[str]:
    """Names of weights, optimizer and scheduler states that differ, bit for bit, in two checkpoints."""
    one, two = (flat(load_from_local(str(path))) for path in (first, second))
    assert one.keys() == two.keys()
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name])
    ]


def flat(checkpoint: dict) -> dict:
    """Weights, optimizer and scheduler states by dotted names."""
    out = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f'{name}.{key}', inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(f'{name}.{i}', inner)
        else:
            out[name] = value

    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        walk(part, checkpoint[part])
    return out
