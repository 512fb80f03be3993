"""Publish a checkpoint as a folder: tools/publish.py CHECKPOINT OUT [--license apache-2.0] [--push-to USER/NAME]."""

import argparse
import os
import signal
import sys

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.cli import run_tool
from mmseg_volo.publish.hub import check_push, push_to_hub
from mmseg_volo.publish.publish import publish


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Write a folder with the weights as .pth and .safetensors, one config, a model card and a metafile.'
    )
    parser.add_argument('checkpoint', help='checkpoint file, in its work dir')
    parser.add_argument('out', help='folder to write')
    parser.add_argument('--config', help='config that it was trained with; default: the one in the checkpoint')
    parser.add_argument('--name', help='name of the model: letters, digits, - and _; default: that of the config')
    parser.add_argument(
        '--work-dir', help='folder with its evaluations and logs; default: the folder of the checkpoint'
    )
    parser.add_argument(
        '--license', metavar='ID', help="identifier as the hub's: apache-2.0, cc-by-nc-4.0, other; default: none stated"
    )
    parser.add_argument('--push-to', metavar='USER/NAME', help='repository on the Hugging Face hub that gets the files')
    parser.add_argument('--private', action='store_true', help='with --push-to: the repository is private')
    args = parser.parse_args()
    if args.private and not args.push_to:
        parser.error('--private needs --push-to')
    if args.push_to:
        check_push(args.push_to)

    done = publish(args.checkpoint, args.out, args.config, args.name, args.work_dir, args.license, args.push_to)
    for note in done.notes:
        print(f'skipped {note}', file=sys.stderr)
    if not done.measured:
        print(
            'no evaluation of this checkpoint was found, and the card says so; tools/test.py makes one', file=sys.stderr
        )
    if not args.license:
        print('no licence is stated, and the card says so; state one with --license', file=sys.stderr)
    print(f'{"already there, and the same" if done.unchanged else "published"}: {done.weights}, {done.safetensors}')
    if args.push_to:
        print(f'pushed: {push_to_hub(args.out, args.push_to, private=args.private or None)}')


if __name__ == '__main__':
    run_tool(main)
