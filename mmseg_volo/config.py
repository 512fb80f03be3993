"""From a config file and command-line options to a config that is ready to run."""

import argparse
import atexit
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.runner import Runner
from mmseg.registry import RUNNERS

from .errors import STOPPED_NOTE, USER_ERRORS, ConfigError, TrainingStopped
from .export.running import SETTLED
from .segmentors import PRECISIONS

# What the visualizer's backends need, which mmengine asks for only when it first writes to one.
_BACKENDS = {
    'TensorboardVisBackend': 'tensorboard',
    'WandbVisBackend': 'wandb',
    'MLflowVisBackend': 'mlflow',
    'ClearMLVisBackend': 'clearml',
    'NeptuneVisBackend': 'neptune',
    'DVCLiveVisBackend': 'dvclive',
    'AimVisBackend': 'aim',
}


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


def set_inference_options(
    config: Config,
    aug_test: bool = False,
    precision: str | None = None,
    compile: bool = False,
    channels_last: bool = False,
    window_batch: int | None = None,
    confidence: bool = False,
    allow_mismatch: bool = False,
    cuda_graph: bool | None = None,
) -> None:
    """Write what is asked for into ``model.test_cfg``, where the segmentor reads it; to be done before :func:`use_tta`.

    Args:
        config: changed in place.
        aug_test: whether the config's ``tta_model`` will run the model.
        precision, compile, channels_last, window_batch, confidence, cuda_graph: see
            :class:`~mmseg_volo.segmentors.StreamingEncoderDecoder`.
        allow_mismatch: take checkpoints of other models or classes; for models of any type.

    Raises:
        ConfigError: the model does not know these options, a batch under 1, or no compiler where one is needed.
    """
    if allow_mismatch:
        config.model.test_cfg = {**(config.model.get('test_cfg') or {}), 'allow_mismatch': True}
    options = dict(
        precision=precision,
        compile=compile,
        channels_last=channels_last,
        window_batch=window_batch,
        confidence=confidence,
    )
    asked = {name: value for name, value in options.items() if value is not None and value is not False}
    if cuda_graph is not None:
        asked['cuda_graph'] = cuda_graph
    if not asked:
        return
    if config.model.backbone.type == 'OnnxNetwork' and (settled := [name for name in asked if name in SETTLED]):
        raise ConfigError(
            f'{", ".join(settled)}: settled when the ONNX file was exported; leave it out, or give the .pth checkpoint'
        )
    needed, given = 'StreamingEncoderDecoder', config.model.type
    if aug_test:
        needed, given = 'StreamingTTAModel', config.get('tta_model', {}).get('type')
    if given != needed:
        raise ConfigError(
            f'{", ".join(asked)}: {given} has no such options; set {"tta_model" if aug_test else "model"}.type to '
            f"'{needed}', which takes the same arguments"
        )
    if window_batch is not None and window_batch < 1:
        raise ConfigError(f'window_batch must be 1 or more, got {window_batch}')
    if compile and get_device() == 'cpu' and not any(map(shutil.which, (os.getenv('CXX') or 'g++', 'clang++', 'cl'))):
        raise ConfigError('compile needs a C++ compiler on a CPU, and none was found; install g++ or do without')
    config.model.test_cfg = {**(config.model.get('test_cfg') or {}), **asked}


def use_amp(config: Config) -> None:
    """Switch training to mixed precision: bfloat16, or float16 with loss scaling on a GPU that has no bfloat16.

    A config that names its own wrapper keeps it, and one with ``optim_wrapper.loss_scale`` gets float16 on a GPU.
    """
    optim = config.optim_wrapper
    if optim.get('type', 'OptimWrapper') == 'OptimWrapper':
        if get_device() == 'cpu' or ('loss_scale' not in optim and _has_bfloat16()):
            optim.type = 'BFloat16OptimWrapper'
        else:
            optim.type = 'AmpOptimWrapper'
            optim.setdefault('loss_scale', 'dynamic')


def _has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16; older ones emulate it, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def check_tta(config: Config) -> None:
    """Raise ConfigError where the config has no test-time augmentation."""
    if 'tta_pipeline' not in config or 'tta_model' not in config:
        raise ConfigError('--aug-test needs tta_pipeline and tta_model in the config, as configs/_base_ has them')


def use_tta(config: Config) -> None:
    """Switch testing to the config's ``tta_pipeline``, its views merged by ``tta_model``.

    Raises:
        ConfigError: the config names neither.
    """
    check_tta(config)
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    # Views of several sizes make windows of several shapes: cuDNN would look for its fastest kernels for each of them.
    config.setdefault('env_cfg', {})['cudnn_benchmark'] = False
    if config.test_dataloader.get('num_workers'):
        # A picture's ten views take 50 bytes a pixel: one picture in waiting per worker is enough.
        config.test_dataloader.setdefault('prefetch_factor', 1)
    config.model = dict(**config.tta_model, module=config.model)


def check_vis_backends(config: Config) -> None:
    """Raise ConfigError where the visualizer writes to something that is not installed."""
    visualizer = config.get('visualizer') or {}
    for backend in visualizer.get('vis_backends') or []:
        package = _BACKENDS.get(backend.get('type')) if isinstance(backend, dict) else None
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'visualizer.vis_backends has {backend["type"]}, but {package} is not installed: pip install {package}'
            )


def build_runner(config: Config) -> Runner:
    """The runner that the config asks for, mmengine's own where it does not say.

    Raises:
        ConfigError: see :func:`check_vis_backends`.
    """
    check_vis_backends(config)
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


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
