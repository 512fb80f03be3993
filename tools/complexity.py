"""Print parameters and multiply-adds of VOLO beside the paper's: tools/complexity.py [--size 224 | --ablations]."""

import argparse
import os
import signal

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.benchmark.complexity import ablations, table
from mmseg_volo.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description='Parameters and multiply-adds, counted as the VOLO paper counts them.')
    parser.add_argument('--size', type=int, default=224, help='side of the image in pixels, a multiple of 16')
    parser.add_argument('--ablations', action='store_true', help="the paper's ablations of VOLO-D1, at 224 x 224")
    args = parser.parse_args()
    try:
        print(ablations() if args.ablations else table(args.size))
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    run_tool(main)
