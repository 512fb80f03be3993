"""Prepare a data set for training and evaluation.

`cityscapes`, `ade20k` and `camvid` take the official download. `import` takes annotations of your own. `config` writes
the config for images and label PNGs that are there already.
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmseg_volo.cli import run_tool
from mmseg_volo.datasets.importing.formats import FORMATS
from mmseg_volo.datasets.importing.importer import Options, import_annotations
from mmseg_volo.datasets.importing.voc import palette_of
from mmseg_volo.datasets.new_config import check_new, write_config
from mmseg_volo.datasets.prepare import prepare_ade20k, prepare_camvid, prepare_cityscapes

PREPARE = {'cityscapes': prepare_cityscapes, 'ade20k': prepare_ade20k, 'camvid': prepare_camvid}
CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def positive(text: str) -> int:
    """Parse a number of processes; argparse reports the ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def share(text: str) -> float:
    """Parse a number between 0 and 1; argparse reports the ValueError."""
    if not 0 < float(text) < 1:
        raise ValueError(text)
    return float(text)


def gigabytes(text: str) -> float:
    """Parse a number that is not negative; argparse reports the ValueError."""
    if not float(text) >= 0:
        raise ValueError(text)
    return float(text)


def config_path(args: argparse.Namespace, data_root: str) -> str:
    """The config to write: ``--config``, or configs/NAME.py of the data root's name."""
    if args.config:
        return args.config
    name = re.sub(r'\W', '_', Path(data_root).absolute().name)
    return os.path.relpath(CONFIGS / f'{name}.py')


def show(path: str, commands: list[str]) -> None:
    print(f'config: {path}; next:', *(f'  {command}' for command in commands), sep='\n')


def run_prepare(args: argparse.Namespace) -> None:
    PREPARE[args.dataset](args.src, args.dst, workers=args.workers)


def run_import(args: argparse.Namespace) -> None:
    path = config_path(args, args.dst)
    check_new(path)
    options = {name: getattr(args, name) for name in Options.__dataclass_fields__}
    found = import_annotations(args.src, args.dst, Options(**options))
    show(path, write_config(path, args.dst, found.classes, found.palette, CONFIGS, args.gpu_memory))


def run_config(args: argparse.Namespace) -> None:
    path = config_path(args, args.data_root)
    show(path, write_config(path, args.data_root, args.classes, palette_of(args.classes), CONFIGS, args.gpu_memory))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='dataset', required=True, metavar='COMMAND')
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument('--workers', type=positive, help='number of processes (default: one per CPU, 8 at most)')
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument('--config', metavar='FILE', help='config to write (default: configs/NAME_OF_THE_DATA_ROOT.py)')
    config.add_argument(
        '--gpu-memory',
        type=gigabytes,
        metavar='GB',
        help='of the GPU that will train, 0 for a CPU (default: this machine)',
    )
    for name in PREPARE:
        one = commands.add_parser(name, parents=[workers], help=f'{name} from the official archives')
        one.add_argument('src', help='folder with the download (zip files or unpacked), or a zip file')
        one.add_argument('dst', help='data root to fill: data/cityscapes, data/ade or data/camvid')
        one.set_defaults(run=run_prepare)
    add_import(commands.add_parser('import', parents=[workers, config], help='annotations of your own'))
    one = commands.add_parser('config', parents=[config], help='config for images and label PNGs')
    one.add_argument('data_root', help='folder with images/{train,val} and labels/{train,val}')
    one.add_argument('--classes', nargs='+', required=True, metavar='NAME', help='names of the classes 0, 1, 2, ...')
    one.set_defaults(run=run_config)
    return parser.parse_args()


def add_import(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Write images, label PNGs and a config from annotations in the formats of COCO, labelme, Pascal VOC, YOLO, '
        'CVAT and Label Studio.'
    )
    parser.add_argument('src', help='folder of annotations and images, or one file of annotations')
    parser.add_argument('dst', help='data root to create, e.g. data/mine')
    parser.add_argument('--format', choices=[*FORMATS], help='default: recognised')
    parser.add_argument('--images', nargs='+', default=[], metavar='DIR', help='folders of the images (default: SRC)')
    parser.add_argument(
        '--classes',
        nargs='+',
        default=[],
        metavar='NAME',
        help='classes and their order (default: all); others are background',
    )
    parser.add_argument(
        '--ignore', nargs='+', default=[], metavar='NAME', help='classes whose pixels are ignored (255)'
    )
    parser.add_argument(
        '--ignore-background', action='store_true', help='ignore pixels without a shape, instead of a class background'
    )
    parser.add_argument(
        '--val',
        type=share,
        default=0.2,
        help='share of the images for validation where SRC has no such split (default: 0.2)',
    )
    parser.add_argument(
        '--val-names', nargs='+', default=[], metavar='PATTERN', help="images for validation, such as 'scene7*'"
    )
    parser.add_argument(
        '--empty',
        choices=['background', 'skip'],
        help='images without a shape: all background, or left out (default: background if the annotation lists them)',
    )
    parser.add_argument('--small-on-top', action='store_true', help='draw large shapes first, not in the order of SRC')
    parser.add_argument('--keep-going', action='store_true', help='leave out images with a fault')
    parser.set_defaults(run=run_import)


def main() -> int:
    args = parse()
    try:
        args.run(args)
    except KeyboardInterrupt:
        print('interrupted; run the same command again to go on', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    run_tool(main)
