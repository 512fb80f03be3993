"""Train configs alike with several seeds and compare them: tools/ablate.py CONFIG CONFIG ... --rates 3e-4 1e-3 3e-3."""

import argparse
import os
import signal
from pathlib import Path

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.benchmark.ablation import Plan, compare
from mmseg_volo.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description='mIoU of several configs over several seeds, with intervals.')
    parser.add_argument('configs', nargs='+', type=Path, help='the first is what the others are compared with')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='default 0 1 2')
    parser.add_argument(
        '--rates', nargs='+', type=float, default=[], help='learning rates to choose from, on held-out training images'
    )
    parser.add_argument(
        '--hold-out', type=int, default=5, metavar='N', help='hold out the last 1/N; default %(default)s'
    )
    parser.add_argument('--on-held-out', action='store_true', help='report on the held-out images, to choose a config')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/ablation'), help='default %(default)s')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    args = parser.parse_args()
    if args.hold_out < 2:
        parser.error('--hold-out must be 2 or more')
    plan = Plan(args.work_dir, args.seeds, args.rates, args.hold_out, args.on_held_out, ['--amp'] * args.amp)
    print(compare(args.configs, plan))


if __name__ == '__main__':
    run_tool(main)
