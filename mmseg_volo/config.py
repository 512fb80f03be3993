"""From a config file and command-line options to a config that is ready to run."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.runner import Runner
from mmseg.registry import RUNNERS

from .checkpoint import CheckpointError


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``tools/train.py`` and ``tools/test.py`` share."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go; default work_dirs/NAME_OF_THE_CONFIG')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='overrides of the config, as model.backbone.with_cp=True or train_dataloader.batch_size=2',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')


def load_config(path: str, options: dict | None = None, work_dir: str | None = None, launcher: str = 'none') -> Config:
    """Read a config and apply the command line's wishes to it.

    Args:
        path: the config file.
        options: overrides by dotted key.
        work_dir: folder for logs and checkpoints; by default the config's, or ``work_dirs/<name of the config>``.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        FileNotFoundError: no such config.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'config {path} does not exist; the ones that ship are in configs/')
    config = Config.fromfile(path)
    if options:
        config.merge_from_dict(options)
    config.launcher = launcher
    config.work_dir = work_dir or config.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return config


def use_amp(config: Config) -> None:
    """Switch training to mixed precision: mmengine's float16 with loss scaling on a GPU, bfloat16 on a CPU."""
    optim = config.optim_wrapper
    if optim.get('type', 'OptimWrapper') == 'OptimWrapper':
        if get_device() == 'cpu':
            optim.type = 'BFloat16OptimWrapper'
        else:
            optim.type = 'AmpOptimWrapper'
            optim.setdefault('loss_scale', 'dynamic')


def use_tta(config: Config) -> None:
    """Switch testing to the config's ``tta_pipeline``, its views merged by ``tta_model``.

    Raises:
        ValueError: the config names neither.
    """
    if 'tta_pipeline' not in config or 'tta_model' not in config:
        raise ValueError('--aug-test needs tta_pipeline and tta_model in the config, as configs/_base_ has them')
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    config.model = dict(**config.tta_model, module=config.model)


def build_runner(config: Config) -> Runner:
    """The runner that the config asks for, mmengine's own where it does not say."""
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command-line tool: what the user can put right ends in one line and status 1, without a traceback."""
    os.environ.setdefault('LOCAL_RANK', '0')
    try:
        sys.exit(main() or 0)
    except (CheckpointError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f'error: {error}')
