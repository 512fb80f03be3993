"""Predict images and videos: tools/predict.py CONFIG CHECKPOINT FILE_FOLDER_OR_GLOB --out DIR [--overlay]."""

import argparse
import os
import signal
import sys

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.cli import add_inference_arguments, run_tool
from mmseg_volo.config_check import check_model
from mmseg_volo.inference.files import Recipe, predict_files
from mmseg_volo.inference.video import VIDEO_FORMATS, VIDEO_SUFFIXES
from mmseg_volo.models.onnx import use_runtime
from mmseg_volo.utils.config import load_config
from mmseg_volo.utils.signals import Stopped

DESCRIPTION = """\
Predict images and save their class ids as PNG; predict videos and save overlays.

Each image gives DIR/NAME.png with class ids, with --overlay also NAME_overlay.png, with --confidence also
NAME_confidence.png. With the loader LoadBands in the config, the class ids are a GeoTIFF, DIR/NAME.tif, with the
georeference of the scene, which may be larger than the memory. Each video gives NAME_overlay.mp4 with the times and
the sound of the video. A folder stands for all images in it and in its subfolders, or for all videos if there is no
image.
"""
EPILOG = """\
mp4 (H.264) and webm (VP9) play in browsers and players; webm holds only Opus and Vorbis sound. After Ctrl-C or SIGTERM
all results are complete, and a video has the frames so far; --resume continues with the remaining files. Exit status:
0, 1 if a file failed, 130 after Ctrl-C, 143 after SIGTERM.
"""


def opacity(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not from 0 to 1')
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not 1 or more')
    return value


def main() -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        'source', nargs='+', help=f'images, videos ({" ".join(VIDEO_SUFFIXES)}), folders or quoted glob patterns'
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='output folder')
    parser.add_argument('--aug-test', '--tta', action='store_true', help='multi-scale and flip (tta_pipeline)')
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ...; default: a GPU if there is one')
    parser.add_argument('--overlay', action='store_true', help='also save NAME_overlay.png')
    parser.add_argument('--no-legend', action='store_true', help='draw no legend below overlays')
    parser.add_argument(
        '--opacity', type=opacity, default=0.5, help='weight of the colours in overlays, 0 to 1; default %(default)s'
    )
    parser.add_argument(
        '--confidence', action='store_true', help='also save NAME_confidence.png for images; 255 means certain'
    )
    parser.add_argument(
        '--video-format', choices=list(VIDEO_FORMATS), default='mp4', help='default %(default)s; see below'
    )
    parser.add_argument(
        '--processes',
        type=count,
        default=1,
        metavar='N',
        help='predict images in N processes, one per GPU; on a CPU several are no faster than one',
    )
    parser.add_argument(
        '--resume', action='store_true', help='skip files with results of the same model and options in DIR'
    )
    add_inference_arguments(parser)
    args = parser.parse_args()

    options = dict(
        precision=args.precision,
        compile=args.compile,
        channels_last=args.channels_last,
        window_batch=args.window_batch,
        confidence=args.confidence,
        allow_mismatch=args.allow_mismatch,
        cuda_graph=args.cuda_graph,
    )
    config = load_config(args.config)
    use_runtime(config, args.checkpoint, args.runtime)
    check_model(config, any_classes=True)
    recipe = Recipe(config, args.checkpoint, args.device, args.aug_test, options)
    try:
        failed = predict_files(
            recipe,
            args.source,
            args.out,
            args.overlay,
            with_legend=not args.no_legend,
            opacity=args.opacity,
            video_format=args.video_format,
            processes=args.processes,
            resume=args.resume,
        )
    except Stopped as stopped:
        return stopped.status
    if failed:
        kind = 'videos' if all(path.suffix.lower() in VIDEO_SUFFIXES for path in failed) else 'images'
        print(f'{len(failed)} of the {kind} failed: {", ".join(map(str, failed))}', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    run_tool(main)
