"""Prepare a data set for training and evaluation: `python tools/prepare_data.py cityscapes SRC DST`.

SRC is the folder with the official download (zip files or unpacked), DST the data root that the configs read:
data/cityscapes, data/ade or data/camvid.
"""

import argparse
import os
import signal
import sys

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.cli import run_tool
from mmseg_volo.datasets.prepare import prepare_ade20k, prepare_camvid, prepare_cityscapes

PREPARE = {'cityscapes': prepare_cityscapes, 'ade20k': prepare_ade20k, 'camvid': prepare_camvid}


def positive(text: str) -> int:
    """Parse a number of processes; argparse reports the ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=PREPARE)
    parser.add_argument('src', help='folder with the download, or a zip file')
    parser.add_argument('dst', help='data root to fill, e.g. data/cityscapes')
    parser.add_argument('--workers', type=positive, help='number of processes (default: one per CPU, 8 at most)')
    args = parser.parse_args()
    try:
        PREPARE[args.dataset](args.src, args.dst, workers=args.workers)
    except KeyboardInterrupt:
        print('interrupted; run the same command again to go on', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    run_tool(main)
