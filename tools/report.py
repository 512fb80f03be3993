"""Write a report on one or more runs: tools/report.py work_dirs/volo_d1_camvid [MORE WORK DIRS] [--out report.html]."""

import argparse
import os
import signal

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.cli import run_tool
from mmseg_volo.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Write one HTML file on one run, or compare several: curves, IoU per class, confusions, worst and '
        'best images, calibration, speed and config. The file needs no network.'
    )
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='work dir of tools/train.py or tools/test.py')
    parser.add_argument('--out', metavar='FILE', help='default: report.html in the first work dir')
    args = parser.parse_args()
    print(write_report(args.work_dirs, args.out))


if __name__ == '__main__':
    run_tool(main)
