"""Run the command-line tools as users do, and a small config on drawn scenes."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import warnings
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
    """Run a command, check that it succeeds or fails as expected, and return its output."""
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


def tool(name: str, *arguments, fails: bool = False, limit: float = 300, **env: str) -> str:
    """Run a Python tool in a forked process, which need not import the packages again, and return its output.

    multiprocessing's fork server imports them once. It never computes, so its children start as a fresh Python does.
    Tests of signals, and tests with environment variables that Python or OpenMP read at their start, need :func:`run`.
    """
    if env:
        return run(sys.executable, '-W', 'ignore', ROOT / 'tools' / name, *arguments, fails=fails, limit=limit, **env)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmseg_volo', 'mmseg.evaluation', 'mmseg.visualization', 'matplotlib.pyplot'])
    with tempfile.NamedTemporaryFile('r') as output:
        command = [str(ROOT / 'tools' / name), *map(str, arguments)]
        process = context.Process(target=_run_here, args=(command, output.name))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
        text = output.read()
    assert (process.exitcode != 0) == fails, text
    return text


def _run_here(command: list[str], output: str) -> None:
    """Run the tool in the child process."""
    handle = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.setsid()
    os.chdir(ROOT)
    warnings.simplefilter('ignore')
    sys.argv = command
    # Replace the path and the open files of the parent's Python.
    sys.path[:] = [str(ROOT / 'tools'), str(ROOT), *(path for path in sys.path if 'tests' not in Path(path).parts)]
    sys.stdout, sys.stderr = (os.fdopen(stream, 'w', buffering=1, closefd=False) for stream in (1, 2))
    runpy.run_path(command[0], run_name='__main__')


def miou(output: str) -> str:
    """The last mIoU in the output."""
    return re.findall(r'mIoU: ([\d.]+)', output)[-1]


def iou_table(output: str) -> list[str]:
    """The last table of IoU and accuracy per class."""
    return re.findall(r'^\+-.*?\n((?:\|.*\n|\+-.*\n)+)', output, re.MULTILINE)[-1].splitlines()
