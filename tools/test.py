"""Test a checkpoint: tools/test.py configs/volo_d1_cityscapes.py CHECKPOINT [--aug-test] [--show-dir DIR]."""

import argparse
import os
import signal

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmengine.device import get_device

from mmseg_volo.cli import add_common_arguments, add_inference_arguments, run_tool
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.evaluation.prediction_files import leave_out_labels, save_overlays, save_predictions
from mmseg_volo.inference.model import exported_config
from mmseg_volo.inference.options import set_inference_options, use_tta
from mmseg_volo.models.onnx import is_onnx, use_runtime
from mmseg_volo.utils.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description='Test a checkpoint and print the IoU table.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, or an ONNX file of tools/export.py')
    parser.add_argument('--aug-test', '--tta', action='store_true', help='multi-scale and flip (tta_pipeline)')
    parser.add_argument('--out', metavar='DIR', help='save predictions as PNG files of class ids (8 or 16 bits)')
    parser.add_argument('--show-dir', metavar='DIR', help='save overlays: ground truth left, prediction right')
    add_inference_arguments(parser)
    add_common_arguments(parser)
    args = parser.parse_args()

    config = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    use_runtime(config, args.checkpoint, args.runtime)
    if is_onnx(args.checkpoint):
        config = exported_config(config, args.checkpoint, get_device(), args.allow_mismatch)
    else:
        config.load_from = args.checkpoint
    set_inference_options(
        config,
        args.aug_test,
        args.precision,
        args.compile,
        args.channels_last,
        args.window_batch,
        allow_mismatch=args.allow_mismatch,
        cuda_graph=args.cuda_graph,
    )
    if args.aug_test:
        use_tta(config)
    leave_out_labels(config)
    save_predictions(config, args.out)
    if args.show_dir:
        save_overlays(config, args.show_dir)
    build_runner(config, 'test').test()


if __name__ == '__main__':
    run_tool(main)
