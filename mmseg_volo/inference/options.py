"""Write the options of prediction and test-time augmentation into a config."""

import os
import shutil

from mmengine.config import Config
from mmengine.device import get_device

from ..errors import ConfigError
from ..models.onnx import SETTLED


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
    """Write the options into ``model.test_cfg``, where the segmentor reads them. Call it before :func:`use_tta`.

    Args:
        config: changed in place.
        aug_test: whether the config's ``tta_model`` will run the model.
        precision, compile, channels_last, window_batch, confidence, cuda_graph: see
            :class:`~mmseg_volo.models.segmentors.StreamingEncoderDecoder`.
        allow_mismatch: accept checkpoints of other models or classes; works with every model type.

    Raises:
        ConfigError: the model type has no such options, ``window_batch`` is less than 1, or ``compile`` finds no
            compiler.
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
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    if cuda_graph is not None:
        options['cuda_graph'] = cuda_graph
    if not options:
        return
    if config.model.backbone.type == 'OnnxNetwork' and (settled := [name for name in options if name in SETTLED]):
        raise ConfigError(
            f'{", ".join(settled)}: fixed when the ONNX file was exported; leave it out, or give the .pth checkpoint'
        )
    needed, given = 'StreamingEncoderDecoder', config.model.type
    if aug_test:
        needed, given = 'StreamingTTAModel', config.get('tta_model', {}).get('type')
    if given != needed:
        raise ConfigError(
            f'{", ".join(options)}: {given} has no such options; set {"tta_model" if aug_test else "model"}.type to '
            f"'{needed}', which takes the same arguments"
        )
    if window_batch is not None and window_batch < 1:
        raise ConfigError(f'window_batch must be 1 or more, got {window_batch}')
    if compile and get_device() == 'cpu' and not any(map(shutil.which, (os.getenv('CXX') or 'g++', 'clang++', 'cl'))):
        raise ConfigError('compile needs a C++ compiler on a CPU, and none was found; install g++, or leave it out')
    config.model.test_cfg = {**(config.model.get('test_cfg') or {}), **options}


def check_tta(config: Config) -> None:
    """Raise ConfigError if the config has no test-time augmentation."""
    if 'tta_pipeline' not in config or 'tta_model' not in config:
        raise ConfigError('--aug-test needs tta_pipeline and tta_model in the config; see configs/_base_')


def use_tta(config: Config) -> None:
    """Make a config test with its ``tta_pipeline``, whose views its ``tta_model`` merges.

    Raises:
        ConfigError: the config has no test-time augmentation.
    """
    check_tta(config)
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    # Views of several sizes give windows of several shapes; cuDNN would benchmark its kernels for each of them.
    config.setdefault('env_cfg', {})['cudnn_benchmark'] = False
    if config.test_dataloader.get('num_workers'):
        # The ten views of an image take 50 bytes per pixel: one image in advance per worker is enough.
        config.test_dataloader.setdefault('prefetch_factor', 1)
    config.model = dict(**config.tta_model, module=config.model)
