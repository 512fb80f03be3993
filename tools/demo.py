"""Try a model in the browser: tools/demo.py CONFIG CHECKPOINT [--port 7860] [--host 127.0.0.1]."""

import argparse
import os
import signal
import time
from pathlib import Path

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmengine.device import get_device

from mmseg_volo.cli import run_tool
from mmseg_volo.demo import check_installed
from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor
from mmseg_volo.inference.sources import IMAGE_SUFFIXES, find_images
from mmseg_volo.models.onnx import use_runtime
from mmseg_volo.models.runtimes import RUNTIMES
from mmseg_volo.utils.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description='Open a web page to try a model on images; needs the extra "demo".')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 lets everyone in who reaches this machine')
    parser.add_argument('--port', type=int, default=7860, help='0 for any that is free; default 7860')
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ...; default: a GPU if there is one')
    parser.add_argument('--examples', metavar='DIR', help='folder whose first 10 images the page offers')
    parser.add_argument('--max-megapixels', type=float, default=16, metavar='N', help='limit on an image; default 16')
    parser.add_argument('--max-megabytes', type=float, default=20, metavar='N', help='limit on its file; default 20')
    parser.add_argument('--queue', type=int, default=16, metavar='N', help='predictions that may wait; default 16')
    parser.add_argument(
        '--allow-mismatch', action='store_true', help='take a checkpoint of another model or other classes as it fits'
    )
    parser.add_argument('--runtime', choices=RUNTIMES, help='what runs an ONNX file; default onnxruntime')
    args = parser.parse_args()

    check_installed()
    from mmseg_volo.demo.server import Limits, free_port, serve
    from mmseg_volo.demo.shared_model import SharedModel

    examples = _images(args.examples) if args.examples else []
    port = free_port(args.host, args.port)  # before the model is loaded, which takes long
    config = load_config(args.config)
    use_runtime(config, args.checkpoint, args.runtime)
    predictor = Predictor(config, args.checkpoint, args.device, allow_mismatch=args.allow_mismatch)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with serve(
        SharedModel(predictor),
        args.host,
        port,
        Limits(args.max_megapixels, args.max_megabytes),
        title=Path(args.config).stem,
        about=f'{Path(args.checkpoint).name} on {args.device or get_device()}',
        queue=args.queue,
        examples=examples,
    ) as page:
        print(f'{page.blocks.local_url} (Ctrl-C ends it)', flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            print('stopping', flush=True)  # a prediction takes a moment to end
    print('stopped; no files were kept')


def _images(folder: str) -> list[Path]:
    try:
        return list(find_images([folder]))[:10]
    except FileNotFoundError as error:
        raise ConfigError(f'--examples: there are no images ({", ".join(IMAGE_SUFFIXES)}) in {folder}') from error


if __name__ == '__main__':
    run_tool(main)
