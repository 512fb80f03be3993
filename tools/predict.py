"""Predict pictures: tools/predict.py CONFIG CHECKPOINT IMAGE_OR_FOLDER_OR_GLOB --out DIR [--aug-test] [--overlay]."""

import argparse
import sys

from mmseg_volo.config import add_inference_arguments, load_config, run_tool
from mmseg_volo.folders import predict_files
from mmseg_volo.inference import Predictor


def main() -> int:
    parser = argparse.ArgumentParser(description='Predict pictures, save class ids as PNG and overlays.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('source', nargs='+', help='images, folders or quoted glob patterns')
    parser.add_argument('--out', required=True, metavar='DIR', help='where the results go')
    parser.add_argument('--aug-test', '--tta', action='store_true', help='multi-scale and flip (tta_pipeline)')
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ...; by default a GPU where there is one')
    parser.add_argument('--overlay', action='store_true', help='save NAME_overlay.png too')
    parser.add_argument('--confidence', action='store_true', help='save NAME_confidence.png too, 255 for certain')
    add_inference_arguments(parser)
    args = parser.parse_args()

    predictor = Predictor(
        load_config(args.config),
        args.checkpoint,
        args.device,
        args.aug_test,
        precision=args.precision,
        compile=args.compile,
        channels_last=args.channels_last,
        window_batch=args.window_batch,
        confidence=args.confidence,
        allow_mismatch=args.allow_mismatch,
    )
    failed = predict_files(predictor, args.source, args.out, args.overlay)
    if failed:
        print(f'{len(failed)} of the images failed: {", ".join(map(str, failed))}', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    run_tool(main)
