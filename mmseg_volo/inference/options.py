"""Write the options of prediction and test-time augmentation into a config."""

import copy
import os
import shutil

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS

from ..config_check import check_tta_pipeline
from ..errors import ConfigError
from ..models.onnx import is_settled
from ..models.segmentors import StreamingEncoderDecoder, StreamingTTAModel
from ..utils.unwrap import bare_datasets, class_of


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
    if aug_test and not _is_a(config.get('tta_model'), StreamingTTAModel):
        # mmseg's SegTTAModel merges the logits of the views.
        config.model.test_cfg = {**(config.model.get('test_cfg') or {}), 'return_logits': True}
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
    backbone = config.model.backbone
    if backbone.type == 'OnnxNetwork' and (
        settled := [name for name, value in options.items() if is_settled(name, value, backbone.runtime)]
    ):
        raise ConfigError(
            f'{", ".join(settled)}: fixed when the ONNX file was exported; leave it out, or give the .pth checkpoint '
            '(openvino and tensorrt take some precisions)'
        )
    needed, key = (StreamingTTAModel, 'tta_model') if aug_test else (StreamingEncoderDecoder, 'model')
    if not _is_a(given := config.get(key), needed):
        raise ConfigError(
            f'{", ".join(options)}: {(given or {}).get("type")} has no such options; set {key}.type to '
            f"'{needed.__name__}', which takes the same arguments"
        )
    if window_batch is not None and window_batch < 1:
        raise ConfigError(f'window_batch must be 1 or more, got {window_batch}')
    if compile and get_device() == 'cpu' and not any(map(shutil.which, (os.getenv('CXX') or 'g++', 'clang++', 'cl'))):
        raise ConfigError('compile needs a C++ compiler on a CPU, and none was found; install g++, or leave it out')
    config.model.test_cfg = {**(config.model.get('test_cfg') or {}), **options}


def _is_a(config: dict | None, wanted: type) -> bool:
    """Whether a model's config builds a ``wanted`` or a subclass of it."""
    kind = class_of(config, MODELS)
    return isinstance(kind, type) and issubclass(kind, wanted)


def check_tta(config: Config) -> None:
    """Check that a config has test-time augmentation, and that the model's own data preprocessor prepares the views.

    Raises:
        ConfigError: ``tta_pipeline`` or ``tta_model`` is missing; ``tta_pipeline`` has a fault; ``tta_model`` has
            another data preprocessor; or it is mmseg's SegTTAModel, and the model has one output channel, of which
            every pixel would be foreground.
    """
    if not config.get('tta_pipeline') or not isinstance(config.get('tta_model'), dict):
        raise ConfigError('--aug-test needs tta_pipeline and tta_model in the config; see configs/_base_')
    check_tta_pipeline(config)
    given = config.tta_model.get('data_preprocessor')
    if given is not None and given != model_preprocessor(config):
        raise ConfigError(
            "tta_model.data_preprocessor differs from the model's: the views of an image are prepared like the image "
            'itself; remove it, or change model.data_preprocessor'
        )
    head = config.model.get('decode_head') or {}
    head = head[-1] if isinstance(head, (list, tuple)) else head
    threshold = 0.3 if head.get('threshold') is None else head.threshold  # the default is mmseg's
    merges = getattr(class_of(config.tta_model, MODELS), 'merge_preds', None)
    streams = _is_a(config.tta_model, StreamingTTAModel)
    if head.get('out_channels') == 1 and threshold <= 0.5 and merges is SegTTAModel.merge_preds and not streams:
        raise ConfigError(
            f'{config.tta_model.type} applies the sigmoid twice to a single output channel: no value is below 0.5, and '
            f'every pixel is over the threshold {threshold}; set tta_model.type to StreamingTTAModel, which averages '
            'the probabilities'
        )


def model_preprocessor(config: Config) -> ConfigDict | None:
    """The data preprocessor of ``config.model``: its own, else that at the top level, as mmengine's Runner has it."""
    return config.model.get('data_preprocessor', config.get('data_preprocessor'))


def datasets_to_test(config: Config) -> list[ConfigDict]:
    """The configs of the test data sets, without wrappers such as ``ConcatDataset``.

    Raises:
        ConfigError: the config has none.
    """
    dataset = (config.get('test_dataloader') or {}).get('dataset')
    if not dataset:
        raise ConfigError('the config has no test_dataloader with a data set; see configs/_base_/datasets')
    return bare_datasets(dataset)


def use_tta(config: Config) -> None:
    """Make a config test with its ``tta_pipeline``, whose views its ``tta_model`` merges.

    The model keeps its own data preprocessor. mmengine's Runner would give the top-level one to ``tta_model``, which
    would put it in place of the model's.

    Raises:
        ConfigError: the config has no test-time augmentation (:func:`check_tta`) or no test data.
    """
    check_tta(config)
    for dataset in datasets_to_test(config):
        dataset.pipeline = copy.deepcopy(config.tta_pipeline)
    # Views of several sizes give windows of several shapes; cuDNN would benchmark its kernels for each of them.
    config.setdefault('env_cfg', {})['cudnn_benchmark'] = False
    if config.test_dataloader.get('num_workers'):
        # The ten views of an image take 50 bytes per pixel: one image in advance per worker is enough.
        config.test_dataloader.setdefault('prefetch_factor', 1)
    model = dict(config.model)
    if (preprocessor := model_preprocessor(config)) is not None:
        model['data_preprocessor'] = preprocessor
    config.pop('data_preprocessor', None)
    config.model = {**config.tta_model, 'module': model}
