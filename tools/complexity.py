"""Print parameters and multiply-adds of VOLO-D1...D5 beside the paper's: tools/complexity.py [--size 224]."""

import argparse
import os
import signal

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.benchmark.complexity import table
from mmseg_volo.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description='Parameters and multiply-adds, counted as the VOLO paper counts them.')
    parser.add_argument('--size', type=int, default=224, help='side of the image in pixels, a multiple of 16')
    args = parser.parse_args()
    try:
        print(table(args.size))
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    run_tool(main)
