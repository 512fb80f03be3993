"""Quantize an ONNX file to 8 bits for CPUs, and measure what that costs.

Static quantization by onnxruntime, in QuantizeLinear and DequantizeLinear of opset 17: weights int8 with a scale for
each output channel, activations uint8 with the range that they had on the calibration images.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmseg.registry import DATASETS
from torch import Tensor

from ..errors import ConfigError, ExportError
from ..evaluation.metric import confusion_of, iou_of
from ..inference import Predictor
from ..inference.sources import find_images
from ..models.runtimes import METADATA_KEY
from ..utils.unwrap import bare_dataset

CALIBRATED_ON = MEASURED_ON = 32  # images, if the user names none
LEAST_EQUAL = 0.95  # share of the pixels with the same class as in float32
_LEAST_CHANNELS = 16  # products with smaller matrices are resizing and pooling


def quantize(path: Path, out: Path, config: Config, images: Sequence[Path]) -> None:
    """Write a float32 file with its convolutions and linear layers in 8 bits.

    Products of two activations (attention and outlook attention), softmax, GELU and norms stay in float32: in 8 bits
    they lose more time in conversions than they gain.

    Args:
        path: the float32 file.
        out: the new file, with the same metadata, and the precision 'int8' in them.
        config: the file's config, whose test pipeline and windows give the inputs to calibrate on.
        images: files to calibrate on.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self._inputs = _network_inputs(path, config, images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({'image': one} for one in self._inputs), None)

    prepared = out.with_suffix('.prepared.onnx')
    try:
        # Fold constants, so that weights which the network slices are known.
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(str(prepared))
        weights = {i.name: list(i.dims) for i in model.graph.initializer}
        products = [
            node.name
            for node in model.graph.node
            if node.op_type == 'MatMul' and min(weights.get(node.input[1], [0])) < _LEAST_CHANNELS
        ]
        quantization.quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=['Conv', 'MatMul'],
            nodes_to_exclude=products,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # A product's result stays float32, as the norm, softmax or GELU after it needs it.
            extra_options=dict(OpTypesToExcludeOutputQuantization=['MatMul']),
        )
    finally:
        prepared.unlink(missing_ok=True)
    props = {prop.key: prop.value for prop in onnx.load(str(path)).metadata_props}
    about = {**json.loads(props[METADATA_KEY]), 'precision': 'int8'}
    model = onnx.load(str(out))
    domains = {node.domain for node in model.graph.node}
    for opset in [one for one in model.opset_import if one.domain not in domains]:  # onnxruntime lists all it knows
        model.opset_import.remove(opset)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(about)})
    onnx.save(model, str(out))


def _network_inputs(path: Path, config: Config, images: Iterable[Path]) -> Iterator[np.ndarray]:
    """Yield what the network gets when ``tools/predict.py`` predicts the images: windows, resized and normalised."""
    predictor = Predictor(config, path, 'cpu', allow_mismatch=True)
    network = predictor.model.backbone
    run, given = network._run, []

    def remember(image: np.ndarray, names: list[str]) -> list[np.ndarray]:
        given.append(image)
        return run(image, names)

    network._run = remember
    for image in images:
        predictor(image)
        yield from given
        given.clear()


def calibration_images(config: Config, sources: Sequence[str]) -> tuple[list[Path], str]:
    """Return the images to calibrate on, and a text that says where they come from: ``sources``, else training images.

    Raises:
        ConfigError: ``sources`` is empty, and the training data is not there.
        FileNotFoundError: a source does not exist.
    """
    if sources:
        paths = list(find_images(sources))
        return paths, f'images from {paths[0].parent}'
    try:
        dataset = DATASETS.build(dict(bare_dataset((config.get('train_dataloader') or {}).get('dataset')), pipeline=[]))
        paths = [Path(dataset.get_data_info(i)['img_path']) for i in _spread(len(dataset), CALIBRATED_ON)]
    except (OSError, ValueError, IndexError, KeyError) as error:  # KeyError: without a type
        raise ConfigError(
            'int8 is calibrated on images like those it will see, and the training data of the config is not here: '
            'name some 30 images or a folder with --calibrate'
        ) from error
    return paths, 'training images of the config'


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices, evenly over the length."""
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length))})


def measure_loss(config: Config, before: Path, after: Path, images: Sequence[Path] = ()) -> None:
    """Predict images with two files, and print how many pixels agree, and both mIoU if there are labels.

    Args:
        config: the files' config.
        before, after: a float32 file and its quantized one.
        images: image files; none means labelled test images of the config.

    Raises:
        ExportError: fewer pixels than :data:`LEAST_EQUAL` have the same class.
    """
    predictors = [Predictor(config, path, 'cpu', allow_mismatch=True) for path in (before, after)]
    classes = len(predictors[0].classes)
    confusions = torch.zeros(2, classes, classes, dtype=torch.int64)
    count = equal = pixels = 0
    for data, truth in _test_data(config, predictors[0], images):
        first, second = (predictor.predict(data).classes for predictor in predictors)
        count, equal, pixels = count + 1, equal + int((first == second).sum()), pixels + first.size
        if truth is not None:
            confusions += torch.stack(
                [confusion_of(torch.from_numpy(ids), truth, classes)[:-1, :-1] for ids in (first, second)]
            )
    line = f'on {count} images {equal / pixels:.2%} of the pixels have the same class as in float32'
    if confusions.any():
        old, new = (100 * np.nanmean(iou_of(confusion.numpy())) for confusion in confusions)
        line += f'; mIoU {old:.2f} before, {new:.2f} after'
    if equal < LEAST_EQUAL * pixels:
        raise ExportError(
            f'the int8 file differs too much: {line}; allowed: {LEAST_EQUAL:.0%}. Calibrate it on more images like '
            'those that it will see (--calibrate), or export it with --precision fp32'
        )
    print_log(line, logger='current')


def _test_data(config: Config, predictor: Predictor, images: Sequence[Path]) -> Iterator[tuple[dict, Tensor | None]]:
    """Yield prepared images, and the ground truth (H, W) if the test data of the config has it."""
    if images:
        yield from ((predictor.prepare(image), None) for image in images)
        return
    dataset = DATASETS.build(bare_dataset(config.test_dataloader.dataset))
    for i in _spread(len(dataset), MEASURED_ON):
        data = pseudo_collate([dataset[i]])
        truth = data['data_samples'][0].get('gt_sem_seg')
        yield data, None if truth is None else truth.data[0]
