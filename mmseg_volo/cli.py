"""Shared by the command-line tools: arguments, and errors in one line."""

import argparse
import atexit
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed
from mmengine.config import DictAction

from .errors import STOPPED_NOTE, USER_ERRORS, TrainingStopped
from .models.runtimes import RUNTIMES
from .models.windows import PRECISIONS
from .utils.opencv import quiet_opencv


class ConfigOptions(DictAction):
    """mmengine's action for options ``KEY=VALUE``, which reports a word of another form as a usage error."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list, *args) -> None:
        """Parse the options; exit with status 2 if one has no ``=`` or its brackets do not match."""
        for value in values:
            if not re.match(r'[^=]+=', value):
                parser.error(f'--cfg-options {value}: expected KEY=VALUE without spaces, as train_cfg.max_iters=9')
        try:
            super().__call__(parser, namespace, values, *args)
        except (AssertionError, ValueError) as error:
            parser.error(f'--cfg-options {" ".join(values)}: {error}')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``tools/train.py`` and ``tools/test.py`` share."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default: work_dirs/NAME_OF_THE_CONFIG')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='override config entries: model.backbone.with_cp=True train_dataloader.batch_size=2',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all tools for prediction share; ``set_inference_options`` applies them."""
    parser.add_argument(
        '--precision',
        choices=list(PRECISIONS),
        help='precision of the network; bf16 and fp16 use autocast; of an ONNX file with openvino (bf16) or tensorrt',
    )
    parser.add_argument('--compile', action='store_true', help='run the network through torch.compile')
    parser.add_argument(
        '--cuda-graph',
        action=argparse.BooleanOptionalAction,
        help='replay CUDA graphs of the network; default: on a GPU, if windows of one shape repeat',
    )
    parser.add_argument(
        '--channels-last', action='store_true', help='store convolution weights in channels-last format'
    )
    parser.add_argument(
        '--allow-mismatch',
        action='store_true',
        help='load what fits from a checkpoint of another model or other classes',
    )
    parser.add_argument('--runtime', choices=RUNTIMES, help='what runs an ONNX file; default onnxruntime')
    parser.add_argument(
        '--window-batch', type=int, metavar='N', help='sliding windows per forward pass; default: chosen by their size'
    )


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a command-line tool. An error that the user can fix ends it with one line and status 1, without a traceback.

    If a signal stopped training after a save, the status is ``TrainingStopped.exit_code``. Ctrl-C raises
    KeyboardInterrupt in ``main`` (before that, the tools end at once); if it is not handled there, the status is 130.
    """
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault('LOCAL_RANK', '0')
    process = f' (process {os.environ["RANK"]})' if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ''
    try:
        with quiet_opencv():
            status = main() or 0
        _leave(status)
    except TrainingStopped as stopped:
        print(f'{stopped}{process}', file=sys.stderr)
        if os.environ.get(STOPPED_NOTE):
            Path(os.environ[STOPPED_NOTE]).touch()
        _leave(TrainingStopped.exit_code)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except USER_ERRORS as error:
        sys.exit(f'error{process}: {error}')


def _leave(status: int) -> NoReturn:
    """Exit; with gloo, skip the teardown of the interpreter.

    In the teardown, gloo's threads sometimes abort the process ("terminate called without an active exception"). That
    would turn a successful run into a failed one.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != 'gloo':
        sys.exit(status)
    if status == 0:  # otherwise the ranks do not end at the same time
        with suppress(RuntimeError):  # another rank may have failed
            torch.distributed.barrier()
    atexit._run_exitfuncs()  # flushes logs, among others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
