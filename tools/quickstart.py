"""Draw street scenes, train VOLO-D1 + UperNet on them, test the model and show its predictions.

Runs tools/train.py and tools/test.py as a user would, then writes one figure of images, ground truth and predictions.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import cv2
import numpy as np
from mmengine.config import Config
from mmseg.registry import DATASETS

from mmseg_volo.cli import run_tool
from mmseg_volo.inference.visualize import side_by_side

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / 'configs/volo_d1_quickstart.py'


def run(script: str, *arguments: str) -> None:
    """Run one of our tools after printing its command, so that users can repeat it."""
    command = [sys.executable, '-W', 'ignore', str(TOOLS / script), *arguments]
    print(f'\n$ python {shlex.join(command[3:])}', flush=True)
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description='Train VOLO-D1 + UperNet on drawn street scenes, then test and show it.'
    )
    parser.add_argument('--config', default=str(CONFIG), help=argparse.SUPPRESS)
    parser.add_argument('--work-dir', default='work_dirs/volo_d1_quickstart', help='folder for all results')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override values of the config'
    )
    args = parser.parse_args()

    start = time.time()
    work_dir = Path(args.work_dir)
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    try:
        run('train.py', args.config, '--work-dir', str(work_dir), *options)
        checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
        predictions = work_dir / 'predictions'
        run('test.py', args.config, str(checkpoint), '--work-dir', str(work_dir), '--out', str(predictions), *options)
    except subprocess.CalledProcessError as error:
        return error.returncode  # the tool has printed the error

    figure = work_dir / 'quickstart.png'
    show(Config.fromfile(work_dir / Path(args.config).name), predictions, figure)
    print(f'\nImage, ground truth and prediction: {figure}\nCheckpoint: {checkpoint}')
    print(f'Done in {time.time() - start:.0f} seconds.')
    return 0


def show(config: Config, predictions: Path, figure: Path) -> None:
    """Write the first two validation scenes with ground truth and prediction, one scene below the other."""
    dataset = DATASETS.build(dict(config.test_dataloader.dataset, pipeline=[]))
    rows = []
    for index in range(min(2, len(dataset))):
        info = dataset.get_data_info(index)
        prediction = predictions / f'{Path(info["img_path"]).stem}.png'
        images = [cv2.imread(info['img_path']), cv2.imread(info['seg_map_path'], -1), cv2.imread(str(prediction), -1)]
        rows.append(side_by_side(*images, dataset.metainfo['palette'], dataset.metainfo['classes']))
    cv2.imwrite(str(figure), np.concatenate(rows))


if __name__ == '__main__':
    run_tool(main)
