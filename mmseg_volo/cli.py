"""What the command-line tools share: arguments, and errors in one line."""

import argparse
import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed
from mmengine.config import DictAction

from .errors import STOPPED_NOTE, USER_ERRORS, TrainingStopped
from .models.windows import PRECISIONS


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


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every tool which predicts shares; :func:`set_inference_options` applies them."""
    parser.add_argument(
        '--precision',
        choices=list(PRECISIONS),
        help="of the network's arithmetic; bf16 and fp16 are autocast",
    )
    parser.add_argument('--compile', action='store_true', help='run the network through torch.compile')
    parser.add_argument(
        '--cuda-graph',
        action=argparse.BooleanOptionalAction,
        help='replay CUDA graphs of the network; default: on a GPU where windows of one shape come again',
    )
    parser.add_argument('--channels-last', action='store_true', help="keep convolutions' weights in this memory format")
    parser.add_argument(
        '--allow-mismatch', action='store_true', help='take a checkpoint of another model or other classes as it fits'
    )
    parser.add_argument(
        '--window-batch', type=int, metavar='N', help='sliding windows in one forward pass; default: chosen to fit'
    )


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command-line tool: what the user can put right ends in one line and status 1, without a traceback.

    Training that was stopped by a signal, and is saved, ends with ``TrainingStopped.exit_code``.
    """
    os.environ.setdefault('LOCAL_RANK', '0')
    process = f' (process {os.environ["RANK"]})' if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ''
    try:
        _leave(main() or 0)
    except TrainingStopped as stopped:
        print(f'{stopped}{process}', file=sys.stderr)
        if os.environ.get(STOPPED_NOTE):
            Path(os.environ[STOPPED_NOTE]).touch()
        _leave(TrainingStopped.exit_code)
    except USER_ERRORS as error:
        sys.exit(f'error{process}: {error}')


def _leave(status: int) -> NoReturn:
    """End this process; one of several on Gloo without taking itself apart.

    Gloo's threads now and then abort a process in that ("terminate called without an active exception"), which would
    turn a run that ended well into a failed one.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != 'gloo':
        sys.exit(status)
    if status == 0:  # with another all do not end at one moment
        with suppress(RuntimeError):  # another process may have ended by an error
            torch.distributed.barrier()
    atexit._run_exitfuncs()  # logs and the like
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
