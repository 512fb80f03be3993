"""Export a trained model to a file and compare the file with the model; ``tools/export.py`` is its command line."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmseg.models import EncoderDecoder
from torch import nn

from ..errors import ConfigError
from ..inference.model import init_model
from ..inference.sources import find_images
from ..models.onnx import STEP, open_onnx
from ..models.runtimes import check_packages, why_no_tensorrt
from ..models.windows import has_plain_head
from ..utils.files import atomic_write, part_of
from ..version import __version__
from .checks import check_onnx, compare, judge, sample_images, sizes_to_check
from .formats import FORMATS, OPSET, open_pt2, trace, write_onnx, write_pt2
from .network import ExportNetwork, exportable, swaps_channels
from .quantization import calibration_images, measure_loss, quantize
from .tensorrt import TENSORRT

_LEAST_TORCH = (2, 8)


def export_model(
    config: Config,
    checkpoint: str,
    out: str,
    format: str = 'onnx',
    size: tuple[int, int] | None = None,
    dynamic: bool = False,
    precision: str = 'fp32',
    preprocess: bool = False,
    output: str = 'logits',
    pictures: Sequence[str] = (),
    allow_mismatch: bool = False,
    calibrate: Sequence[str] = (),
) -> None:
    """Write a model to a file and check the file. If a check fails, the file is removed.

    Args:
        config, checkpoint: the model.
        out: the output file; its folder is made.
        format: 'onnx' (opset 17) or 'pt2' (:func:`torch.export.save`).
        size: (height, width) of the input in pixels; default: that of the test windows or training crops in the config.
        dynamic: accept all heights and widths that are multiples of 16. The batch size is always open.
        precision: 'fp32', 'fp16' for weights and arithmetic, or for an ONNX file 'int8'; inputs and outputs stay
            float32.
        preprocess: normalise in the file; see :class:`~mmseg_volo.export.network.ExportNetwork`.
        output: 'logits' or 'classes'; see :class:`~mmseg_volo.export.network.ExportNetwork`.
        pictures: image files, folders or patterns for the comparison; default: the test data of the config.
        allow_mismatch: accept checkpoints of other models or classes.
        calibrate: image files, folders or patterns to calibrate int8 on; default: training images of the config.

    Raises:
        CheckpointError, FileNotFoundError: see :func:`~mmseg_volo.inference.model.init_model`.
        ConfigError: the model cannot be exported, or a package is missing.
        ExportError: the file failed a check.
        OSError: the file cannot be written.
    """
    _check_request(out, format, size, precision)
    if allow_mismatch:
        config.model.test_cfg = {**(config.model.get('test_cfg') or {}), 'allow_mismatch': True}
    export_config = exportable(config)
    int8 = precision == 'int8'
    if int8:
        precision = 'fp32'  # until the file is quantized
        to_calibrate, source_of_these = calibration_images(config, calibrate)
    size = size or _default_size(config)
    path = Path(out)
    try:  # report an unwritable file before the work
        path.parent.mkdir(parents=True, exist_ok=True)
        part_of(path).touch()
    except OSError as error:
        raise OSError(error.errno, f'the file cannot be written ({error.strerror}); give another --out', out) from error
    with atomic_write(path) as part, tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / 'float32.onnx' if int8 else part
        segmentor = init_model(config, checkpoint, 'cpu')
        _check_model(segmentor, preprocess)
        twin = init_model(export_config, device='cpu')
        state = segmentor.state_dict()
        twin.load_state_dict({name: value for name, value in state.items() if not name.startswith('auxiliary_head.')})
        network = ExportNetwork(twin, output, preprocess, precision == 'fp16').eval()
        about = _about(segmentor, size, dynamic, precision, preprocess, output)
        print_log(f'exporting {_describe(about)}', logger='current')
        program = trace(network, _example(size) if dynamic else size, dynamic)
        if format == 'onnx':
            write_onnx(program, network, about, written)
            del program
            operators = check_onnx(written)
            names = ', '.join(f'{name} ({count})' for name, count in operators.items())
            print_log(
                f'onnx.checker and shape inference pass, opset {OPSET}; TensorRT {TENSORRT} supports all '
                f'{len(operators)} operators: {names}',
                logger='current',
            )
            run = open_onnx(written)[0]
        else:
            digest = write_pt2(program, about, part)
            del program
            run = open_pt2(part, digest)
        images, source = sample_images(config, pictures)
        print_log(f'comparing on {len(images)} {source}', logger='current')
        judge(compare(run, about, segmentor, images, sizes_to_check(size, dynamic)), precision)
        if format == 'onnx':
            if why := why_no_tensorrt():
                print_log(f'TensorRT engine: not run, because {why}', logger='current')
            else:
                run = open_onnx(written, 'cuda', runtime='tensorrt')[0]
                judge(compare(run, about, segmentor, images, [size]), 'fp16', 'TensorRT engine')  # it computes in TF32
        if int8:
            del segmentor, twin, network, run  # room for the calibration
            print_log(f'quantizing to int8, calibrated on {len(to_calibrate)} {source_of_these}', logger='current')
            quantize(written, part, config, to_calibrate)
            check_onnx(part, tensorrt=False)
            measure_loss(config, written, part, list(find_images(pictures)) if pictures else ())
    print_log(f'{path}: {path.stat().st_size / 1e6:.1f} MB', logger='current')


def _check_request(out: str, format: str, size: tuple[int, int] | None, precision: str) -> None:
    if format == 'onnx':
        check_packages('onnx', 'onnxscript', 'onnxruntime')
    if Path(out).suffix != FORMATS[format]:
        raise ConfigError(f'--out {out}: the name of a {format} file must end with {FORMATS[format]}')
    if precision == 'int8' and format != 'onnx':
        raise ConfigError(f'--precision int8 is for ONNX files, not for {format}')
    if Path(out).is_dir():
        raise ConfigError(f'--out {out} is a folder; give a file name in it')
    if size is not None and min(size) < 32:
        raise ConfigError(f'--size {size[0]} {size[1]}: VOLO needs 32 x 32 pixels or more')
    if tuple(map(int, torch.__version__.split('.')[:2])) < _LEAST_TORCH:
        raise ConfigError(
            f'exporting needs PyTorch {".".join(map(str, _LEAST_TORCH))} or newer, found {torch.__version__}: '
            'older exporters fix dynamic sizes'
        )


def _check_model(segmentor: EncoderDecoder, preprocess: bool) -> None:
    if not has_plain_head(segmentor):
        raise ConfigError(
            f'{type(segmentor.decode_head).__name__} cannot be exported, because it overrides the prediction of '
            "mmseg's BaseDecodeHead"
        )
    first = next((m for m in segmentor.backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != 3:
        raise ConfigError(f'the model takes images of {first.in_channels} channels; exported models take 3')
    pre = segmentor.data_preprocessor
    if preprocess and not (getattr(pre, '_enable_normalize', False) and pre.mean.numel() == 3):
        raise ConfigError('--with-preprocess: the data_preprocessor does not normalise, or not three channels')


def _default_size(config: Config) -> tuple[int, int]:
    test_cfg = config.model.get('test_cfg') or {}
    crop = test_cfg.get('crop_size') if test_cfg.get('mode') == 'slide' else None
    size = crop or (config.model.get('data_preprocessor') or {}).get('size') or (512, 512)
    return tuple(map(int, size))


def _example(size: tuple[int, int]) -> tuple[int, int]:
    """Round ``size`` up to multiples of 16 that differ: the tracer would assume that equal sizes are always equal."""
    height, width = (max(-(-side // STEP), 4) for side in size)
    return height * STEP, (width + (width == height)) * STEP


def _about(
    segmentor: EncoderDecoder, size: tuple[int, int], dynamic: bool, precision: str, preprocess: bool, output: str
) -> dict:
    pre, head = segmentor.data_preprocessor, segmentor.decode_head
    return dict(
        mmseg_volo=__version__,
        output=output,
        precision=precision,
        size=None if dynamic else list(size),
        preprocess=preprocess,
        mean=pre.mean.flatten().tolist() if hasattr(pre, 'mean') else None,
        std=pre.std.flatten().tolist() if hasattr(pre, 'std') else None,
        classes=list(map(str, segmentor.dataset_meta['classes'])),
        palette=[list(map(int, colour)) for colour in segmentor.dataset_meta['palette']],
        out_channels=segmentor.out_channels,
        align_corners=bool(segmentor.align_corners),
        threshold=head.threshold,
        swap=swaps_channels(pre),
    )


def _describe(about: dict) -> str:
    shape = (
        'heights and widths in multiples of 16' if about['size'] is None else '{} x {} pixels'.format(*about['size'])
    )
    what = 'uint8 images (B, H, W, 3), BGR' if about['preprocess'] else 'normalised images (B, 3, H, W)'
    return f'{what}, {shape}, to {about["output"]} of {len(about["classes"])} classes, {about["precision"]}'
