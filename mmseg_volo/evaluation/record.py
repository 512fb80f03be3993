"""The record of an evaluation as files: one JSON file, and PNGs of the images with the lowest and the highest mIoU."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..utils.files import atomic_write
from .metric import BINS

FOLDER = 'evaluation'  # within the folder of a run's timestamp


def calibration_of(images: Sequence[dict], step: int) -> dict | None:
    """Accuracy by confidence, and the expected calibration error (Guo et al., 2017), from 0 to 1.

    Args:
        images: of :class:`~mmseg_volo.evaluation.ConfusionIoUMetric`.
        step: of the pixels' grid; the record says it.

    Returns:
        ``bins`` of equal width, ``ece`` and ``step``; None where no confidence was measured.
    """
    measured = [image['calibration'] for image in images if 'calibration' in image]
    if not measured:
        return None
    bins, off = [], 0.0
    total = sum(measured)
    for k, (pixels, confidence, right) in enumerate(total.T):
        means = [round(float(value / pixels), 6) if pixels else None for value in (confidence, right)]
        off += abs(confidence - right)
        bins.append(dict(low=k / BINS, high=(k + 1) / BINS, pixels=int(pixels), confidence=means[0], accuracy=means[1]))
    return dict(bins=bins, ece=round(float(off / max(total[0].sum(), 1)), 6), step=step)


def quantiles_of(images: Sequence[dict]) -> dict[str, float]:
    """Quantiles of the images' own mIoU, from 0 to 1, over the images with a labelled pixel."""
    found = [image['mIoU'] for image in images if image['mIoU'] is not None]
    return {f'{share}%': round(float(np.percentile(found, share)), 6) for share in (5, 25, 50, 75, 95)}


def write_record(folder: Path, name: str, record: dict, images: Sequence[dict], keep: int) -> None:
    """Write ``folder/NAME.json`` and ``folder/pictures/NAME/``; what was there under this name is replaced.

    The PNGs come first, then the file that names them. Of a run's validations the newest and the best keep their PNGs.

    Args:
        folder: created where it is missing.
        name: 'test' or 'val_iter_N'.
        record: what the JSON holds; its ``pictures``, one dict per image, get the paths of their PNGs.
        images: the metric's, in the order of ``record['pictures']``.
        keep: images at either end whose PNGs are written.

    Raises:
        OSError: nothing is left behind then.
    """
    below = folder / 'pictures' / name
    try:
        if below.exists():
            shutil.rmtree(below)
        below.mkdir(parents=True)
        for i in _ends(images, keep):
            for what, png in zip(('prediction', 'truth_map'), images[i].get('pngs', ()), strict=False):
                path = below / f'{i:06d}_{what}.png'
                path.write_bytes(png)
                record['pictures'][i][what] = path.relative_to(folder).as_posix()
        with atomic_write(folder / f'{name}.json') as part:
            part.write_text(json.dumps(record, allow_nan=False), encoding='utf-8')
    except OSError:
        shutil.rmtree(below, ignore_errors=True)
        raise
    if record['kind'] == 'val':
        _drop_pngs(folder, name)


def _ends(images: Sequence[dict], keep: int) -> list[int]:
    """Indices of the images with the lowest and the highest mIoU."""
    order = sorted((image['mIoU'], i) for i, image in enumerate(images) if image['mIoU'] is not None)
    return sorted({i for _, i in [*order[:keep], *(order[-keep:] if keep else [])]})


def _drop_pngs(folder: Path, newest: str) -> None:
    """Remove the PNGs of validations that are neither the newest nor the best of this run."""
    scores = {}
    for path in folder.glob('val*.json'):
        if (folder / 'pictures' / path.stem).is_dir():
            with suppress(OSError, ValueError):
                scores[path.stem] = json.loads(path.read_text(encoding='utf-8'))['metrics'].get('mIoU') or 0.0
    best = max(scores, key=scores.get, default=None)
    for name in scores.keys() - {newest, best}:
        shutil.rmtree(folder / 'pictures' / name, ignore_errors=True)
