"""Make a folder to share of a checkpoint: tools/publish.py CHECKPOINT OUT [--license apache-2.0] [--config CONFIG]."""

import argparse
import sys

from mmseg_volo.cli import run_tool
from mmseg_volo.publishing import publish


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Weights alone as .pth and .safetensors, one config, a model card and a metafile.'
    )
    parser.add_argument('checkpoint', help='checkpoint file, in its work dir')
    parser.add_argument('out', help='folder to make')
    parser.add_argument('--config', help='the config that it was trained with; by default the one in the checkpoint')
    parser.add_argument('--name', help='of the model: letters, digits, - and _; by default that of the config')
    parser.add_argument('--work-dir', help="where its evaluations and logs are; by default the checkpoint's folder")
    parser.add_argument(
        '--license', metavar='ID', help="as the hub's: apache-2.0, cc-by-nc-4.0, other; none is stated by default"
    )
    args = parser.parse_args()

    done = publish(args.checkpoint, args.out, args.config, args.name, args.work_dir, args.license)
    for note in done.notes:
        print(f'passed over {note}', file=sys.stderr)
    if not done.measured:
        print('no evaluation of this checkpoint was found: the card says so; tools/test.py makes one', file=sys.stderr)
    if not args.license:
        print('no licence was given: the card says that one is to be chosen; --license states it', file=sys.stderr)
    print(f'{"already there, and the same" if done.unchanged else "published"}: {done.weights}, {done.safetensors}')


if __name__ == '__main__':
    run_tool(main)
