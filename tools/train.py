"""Train a segmentor: tools/train.py configs/volo_d1_cityscapes.py [--amp] [--ema] [--resume [CHECKPOINT]]."""

import argparse
import os
import signal

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.cli import add_common_arguments, run_tool
from mmseg_volo.engine.averaging import use_ema
from mmseg_volo.engine.optim import use_amp
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.utils.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a segmentor.')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        metavar='CHECKPOINT',
        help='continue a run from this file, or from the newest complete checkpoint of this work dir; default: '
        'of --work-dir',
    )
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision: bfloat16, or float16 on a GPU without bfloat16'
    )
    parser.add_argument(
        '--ema',
        action='store_true',
        help='validate and save a moving average of the weights; its mean age is 1/32 of the run',
    )
    add_common_arguments(parser)
    args = parser.parse_args()

    config = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    if args.resume:
        config.resume = True
        if args.resume is True:
            config.auto_resume = True  # load_from of the config is used only if there is nothing to resume
        else:
            config.load_from = args.resume
    if args.amp:
        use_amp(config)
    if args.ema:
        use_ema(config)
    build_runner(config, 'train').train()


if __name__ == '__main__':
    run_tool(main)
