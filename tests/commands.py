"""Run the command-line tools as users do; a config small enough for tests, on drawn scenes."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = f"""
_base_ = '{ROOT}/configs/volo_d1_quickstart.py'
arch = dict(depths=(1, 1, 1, 1), dims=(24, 48, 48, 48), heads=(1, 2, 2, 2), mlp_ratios=1, stem_width=8)
model = dict(
    data_preprocessor=dict(size=(64, 128)),
    backbone=dict(arch=dict(_delete_=True, **arch), img_size=(64, 128), norm_cfg=dict(type='SyncBN')),
    decode_head=dict(in_channels=[24, 48, 48, 48], channels=16, norm_cfg=dict(type='SyncBN')),
)
data = dict(type='StreetSceneDataset', data_root='DATA', train=6, val=3, size=(64, 128))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(64, 128)),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=dict(**data))
test_dataloader = val_dataloader
max_iters = 4
train_cfg = dict(max_iters=max_iters, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, save_best='mIoU'))
"""


def run(*command: str, fails: bool = False, limit: float = 300, **env: str) -> str:
    """Run a tool; its output, after checking that it ended as expected."""
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    bin_dir = Path(sys.executable).parent  # torchrun and python of this environment
    path = f'{bin_dir}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'PATH': path, **env},
        timeout=limit,
        check=False,
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


def tool(name: str, *arguments, **kwargs) -> str:
    return run(sys.executable, '-W', 'ignore', ROOT / 'tools' / name, *arguments, **kwargs)


def miou(output: str) -> str:
    return re.findall(r'mIoU: ([\d.]+)', output)[-1]


def iou_table(output: str) -> list[str]:
    """The last table of IoU and accuracy per class."""
    return re.findall(r'^\+-.*?\n((?:\|.*\n|\+-.*\n)+)', output, re.MULTILINE)[-1].splitlines()
