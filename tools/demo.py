"""Try a model in the browser: tools/demo.py CONFIG CHECKPOINT [--port 7860] [--host 127.0.0.1]."""

import argparse
from pathlib import Path

from mmengine.device import get_device

from mmseg_volo.cli import run_tool
from mmseg_volo.demo import check_installed
from mmseg_volo.inference import Predictor
from mmseg_volo.utils.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description='Open a page to try a model on pictures; needs the extra "demo".')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 lets everyone in who reaches this machine')
    parser.add_argument('--port', type=int, default=7860, help='0 for any that is free')
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ...; by default a GPU where there is one')
    parser.add_argument('--max-megapixels', type=float, default=16, metavar='N', help='of a picture; default 16')
    parser.add_argument('--max-megabytes', type=float, default=20, metavar='N', help='of its file; default 20')
    parser.add_argument('--queue', type=int, default=16, metavar='N', help='pictures that may wait; default 16')
    parser.add_argument(
        '--allow-mismatch', action='store_true', help='take a checkpoint of another model or other classes as it fits'
    )
    args = parser.parse_args()

    check_installed()
    from mmseg_volo.demo.model import SharedModel
    from mmseg_volo.demo.server import DemoServer, Limits, bind, serve

    bound = bind(args.host, args.port)  # a taken port is told before a model is loaded
    predictor = Predictor(load_config(args.config), args.checkpoint, args.device, allow_mismatch=args.allow_mismatch)
    server = DemoServer(
        bound,
        SharedModel(predictor),
        Path(args.config).stem,
        f'{Path(args.checkpoint).name} on {args.device or get_device()}',
        Limits(args.max_megapixels, args.max_megabytes),
        args.queue,
    )
    print(f'{server.url} (Ctrl-C ends it)', flush=True)
    serve(server)


if __name__ == '__main__':
    run_tool(main)
