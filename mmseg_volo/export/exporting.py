"""What ``tools/export.py`` does: a trained model becomes a file, and the file is held against the model."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmseg.models import EncoderDecoder
from torch import nn

from ..errors import ConfigError
from ..inference.model import init_model
from ..models.onnx import STEP, check_packages, open_onnx
from ..models.windows import has_plain_head
from ..version import __version__
from .checks import check_onnx, compare, judge, sample_images, sizes_to_check
from .formats import FORMATS, OPSET, open_pt2, trace, write_onnx, write_pt2
from .network import ExportNetwork, exportable, swaps_channels
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
) -> None:
    """Write a model to a file, and check the file; one that fails a check is not left behind.

    Args:
        config, checkpoint: the model.
        out: the file; its folder is made.
        format: 'onnx', opset 17, or 'pt2', of :func:`torch.export.save`.
        size: (height, width) of the input; by default that of the config's test windows or training crops.
        dynamic: any height and width that are multiples of 16. The batch is always open.
        precision: 'fp32', or 'fp16' of weights and arithmetic; inputs and outputs stay float32.
        preprocess: see :class:`~mmseg_volo.export.network.ExportNetwork`, as for ``output``.
        output: 'logits' or 'classes'.
        pictures: files, folders or patterns to compare on; by default the config's test data.
        allow_mismatch: take checkpoints of other models or classes.

    Raises:
        CheckpointError, FileNotFoundError: see :func:`~mmseg_volo.inference.model.init_model`.
        ConfigError: the model cannot be exported, or a package is missing.
        ExportError: the file failed a check.
        OSError: the file cannot be written.
    """
    _check_request(out, format, size)
    if allow_mismatch:
        config.model.test_cfg = {**(config.model.get('test_cfg') or {}), 'allow_mismatch': True}
    wanted = exportable(config)
    size = size or _default_size(config)
    path = Path(out)
    part = path.with_name(f'.{path.stem}.{os.getpid()}.part{FORMATS[format]}')
    try:  # whether it can be written is said before all the work
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise OSError(error.errno, f'the file cannot be written ({error.strerror}); give another --out', out) from error
    try:
        segmentor = init_model(config, checkpoint, 'cpu')
        _check_model(segmentor, preprocess)
        twin = init_model(wanted, device='cpu')
        state = segmentor.state_dict()
        twin.load_state_dict({name: value for name, value in state.items() if not name.startswith('auxiliary_head.')})
        network = ExportNetwork(twin, output, preprocess, precision == 'fp16').eval()
        about = _about(segmentor, size, dynamic, precision, preprocess, output)
        print_log(f'exporting {_words(about)}', logger='current')
        program = trace(network, _example(size) if dynamic else size, dynamic)
        if format == 'onnx':
            write_onnx(program, network, about, part)
            del program
            operators = check_onnx(part)
            names = ', '.join(f'{name} ({count})' for name, count in operators.items())
            print_log(
                f'onnx.checker and shape inference pass, opset {OPSET}; {len(operators)} operators, all in the table '
                f'of TensorRT {TENSORRT}: {names}',
                logger='current',
            )
            run = open_onnx(part)[0]
        else:
            write_pt2(program, about, part)
            del program
            run = open_pt2(part)[0]
        images, source = sample_images(config, pictures)
        print_log(f'comparing on {len(images)} {source}', logger='current')
        judge(compare(run, about, segmentor, images, sizes_to_check(size, dynamic)), precision)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print_log(f'{path}: {path.stat().st_size / 1e6:.1f} MB', logger='current')


def _check_request(out: str, format: str, size: tuple[int, int] | None) -> None:
    if format == 'onnx':
        check_packages('onnx', 'onnxscript', 'onnxruntime')
    if Path(out).suffix != FORMATS[format]:
        raise ConfigError(f'--out {out}: a file of the format {format} ends with {FORMATS[format]}')
    if Path(out).is_dir():
        raise ConfigError(f'--out {out} is a folder; give a file name in it')
    if size is not None and min(size) < 32:
        raise ConfigError(f'--size {size[0]} {size[1]}: VOLO needs 32 x 32 pixels or more')
    if tuple(map(int, torch.__version__.split('.')[:2])) < _LEAST_TORCH:
        raise ConfigError(
            f'exporting needs PyTorch {".".join(map(str, _LEAST_TORCH))} or newer, found {torch.__version__}: its '
            'exporters before that close open sizes'
        )


def _check_model(segmentor: EncoderDecoder, preprocess: bool) -> None:
    if not has_plain_head(segmentor):
        raise ConfigError(
            f'{type(segmentor.decode_head).__name__} makes its predictions in a way of its own; what can be exported '
            "are heads whose logits mmseg's BaseDecodeHead resizes"
        )
    first = next((m for m in segmentor.backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != 3:
        raise ConfigError(f'the model takes pictures of {first.in_channels} channels; exported ones have 3')
    pre = segmentor.data_preprocessor
    if preprocess and not (getattr(pre, '_enable_normalize', False) and pre.mean.numel() == 3):
        raise ConfigError('--with-preprocess: the data_preprocessor normalises nothing, or not three channels')


def _default_size(config: Config) -> tuple[int, int]:
    test_cfg = config.model.get('test_cfg') or {}
    crop = test_cfg.get('crop_size') if test_cfg.get('mode') == 'slide' else None
    size = crop or (config.model.get('data_preprocessor') or {}).get('size') or (512, 512)
    return tuple(map(int, size))


def _example(size: tuple[int, int]) -> tuple[int, int]:
    """Like ``size``, in multiples of 16 that are not alike: the tracer would take equal ones for one."""
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


def _words(about: dict) -> str:
    shape = (
        'heights and widths of multiples of 16' if about['size'] is None else '{} x {} pixels'.format(*about['size'])
    )
    what = 'uint8 pictures (B, H, W, 3), BGR' if about['preprocess'] else 'normalised pictures (B, 3, H, W)'
    return f'{what} of {shape} to {about["output"]} of {len(about["classes"])} classes, {about["precision"]}'
