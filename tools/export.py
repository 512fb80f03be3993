"""Export a model: tools/export.py CONFIG CHECKPOINT --format onnx|pt2 --out FILE [--size H W | --dynamic]."""

import argparse
import os
import signal

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.cli import run_tool
from mmseg_volo.config_check import check_model
from mmseg_volo.export.exporting import export_model
from mmseg_volo.export.formats import FORMATS
from mmseg_volo.export.network import OUTPUTS
from mmseg_volo.utils.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description='Export a model and compare the file with PyTorch on images.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--format', choices=list(FORMATS), default='onnx', help='onnx: opset 17; pt2: torch.export')
    parser.add_argument('--out', required=True, metavar='FILE', help='output file, .onnx or .pt2')
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='input size in pixels; default: that of the test windows in the config, or of its training crops',
    )
    shape.add_argument('--dynamic', action='store_true', help='accept all heights and widths that are multiples of 16')
    parser.add_argument(
        '--precision',
        choices=['fp32', 'fp16', 'int8'],
        default='fp32',
        help='of weights and arithmetic; int8: ONNX files for CPUs',
    )
    parser.add_argument(
        '--calibrate', nargs='+', default=[], metavar='P', help='images for int8; default: training data of the config'
    )
    parser.add_argument(
        '--with-preprocess', action='store_true', help='accept images (B, H, W, 3), BGR, uint8, as OpenCV reads them'
    )
    parser.add_argument('--output', choices=OUTPUTS, default='logits', help='(B, C, H, W) or class ids (B, H, W)')
    parser.add_argument(
        '--pictures', nargs='+', default=[], metavar='P', help='images to compare on; default: test data of the config'
    )
    parser.add_argument(
        '--allow-mismatch', action='store_true', help='accept a checkpoint of another model or other classes'
    )
    args = parser.parse_args()
    config = load_config(args.config)
    check_model(config, any_classes=True)
    export_model(
        config,
        args.checkpoint,
        args.out,
        args.format,
        tuple(args.size) if args.size else None,
        args.dynamic,
        args.precision,
        args.with_preprocess,
        args.output,
        args.pictures,
        args.allow_mismatch,
        args.calibrate,
    )


if __name__ == '__main__':
    run_tool(main)
