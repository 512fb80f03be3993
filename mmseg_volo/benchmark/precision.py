"""What each option of prediction changes on a user's model and pictures."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..inference.files import find_images
from ..inference.predictor import Predictor
from ..models.windows import PRECISIONS
from ..utils.config import load_config
from .measuring import timed
from .reporting import Spread, figure, print_table, progress, times_faster, write_csv

OPTIONS = {
    **{name: dict(precision=name) for name in PRECISIONS},
    'channels-last': dict(precision='fp32', channels_last=True),
    'compile': dict(precision='fp32', compile=True),
}


def measure_precision(
    config: str,
    checkpoint: str,
    sources: Sequence[str],
    options: Sequence[str],
    files: Sequence[str],
    rounds: int,
    aug_test: bool,
    limit: int,
    out: Path,
    environment: dict,
) -> None:
    """Time and predictions with each of :data:`OPTIONS`, and with exported ``files`` of the model, against fp32.

    An option that PyTorch cannot run on this device is reported and left out.

    Raises:
        CheckpointError, ConfigError, FileNotFoundError: see :class:`mmseg_volo.inference.Predictor`.
    """
    load_config(config)  # a wrong name is said before pictures are read
    pictures = _read_pictures(sources, limit)
    device = environment['device']
    predictors = _predictors(config, checkpoint, options, aug_test, device, pictures[0])
    for file in files:
        predictors[Path(file).name] = Predictor(load_config(config), file, device, aug_test)
    changed = _changed_pixels(predictors, pictures)
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for i in range(rounds):
        for name, predictor in predictors.items():
            spent = 0.0
            for picture in pictures:
                data = predictor.prepare(picture)
                spent += timed(lambda run=predictor.predict, data=data: run(data), device)[0]
            seconds[name].append(spent / len(pictures))
        progress(f'round {i + 1} of {rounds}: ' + ', '.join(f'{name} {s[-1]:.3g} s' for name, s in seconds.items()))
    rows = []
    for name, of_option in seconds.items():
        row = dict(option=name, pictures=len(pictures), views='aug-test' if aug_test else 1, rounds=rounds)
        row.update(Spread.of(of_option).columns('seconds'))
        row.update(times_faster(seconds, name, 'fp32').columns('times_faster'))
        rows.append({**row, 'changed_pixels': changed[name], **environment})
    write_csv(out / 'precision.csv', rows)
    _print(rows)
    _plot(rows, out / 'precision.png')


def _read_pictures(sources: Sequence[str], limit: int) -> list[np.ndarray]:
    paths = list(find_images(sources))
    read = {path: cv2.imread(str(path)) for path in paths[:limit]}
    for path, picture in read.items():
        if picture is None:
            progress(f'skipped {path}: it is no image, or broken')
    pictures = [picture for picture in read.values() if picture is not None]
    if not pictures:
        raise FileNotFoundError(f'none of the first {limit} pictures could be read')
    progress(f'{len(pictures)} of {len(paths)} pictures')
    return pictures


def _predictors(
    config: str, checkpoint: str, options: Sequence[str], aug_test: bool, device: str, picture: np.ndarray
) -> dict[str, Predictor]:
    """A predictor for fp32, which all is held against, and for each option that runs here."""
    found = {}
    for name in dict.fromkeys(['fp32', *options]):
        predictor = Predictor(load_config(config), checkpoint, device, aug_test, **OPTIONS[name])
        try:
            predictor(picture)
        except RuntimeError as error:
            if name == 'fp32':
                raise
            progress(f'{name} does not run here: {str(error).strip().splitlines()[0]}')
        else:
            found[name] = predictor
    return found


def _changed_pixels(predictors: dict[str, Predictor], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of all pixels whose class differs from fp32's. It also warms up every option on every picture's shape."""
    changed, total = dict.fromkeys(predictors, 0), 0
    for picture in pictures:
        maps = {name: predictor(picture) for name, predictor in predictors.items()}
        for name, ids in maps.items():
            changed[name] += int((ids != maps['fp32']).sum())
        total += maps['fp32'].size
    return {name: count / total for name, count in changed.items()}


def _print(rows: Sequence[dict]) -> None:
    cells = []
    for row in rows:
        times = [str(Spread.in_row(row, name)) for name in ('seconds', 'times_faster')]
        cells.append([row['option'], *times, f'{row["changed_pixels"]:.3%}'])
    print(f'pictures: {rows[0]["pictures"]}; median (least–greatest) of {rows[0]["rounds"]}; against fp32')
    print_table(['option', 's / picture', 'times faster', 'changed pixels'], cells)


def _plot(rows: Sequence[dict], path: Path) -> None:
    drawn, axes = figure(2, rows, 1.2 + 0.4 * len(rows))
    names = [row['option'] for row in rows]
    axes[0].barh(names, [row['seconds'] for row in rows])
    axes[1].barh(names, [100 * row['changed_pixels'] for row in rows])
    for axis, title in zip(axes, ('seconds per picture', '% of pixels that change'), strict=True):
        axis.set(xlabel=title)
        axis.invert_yaxis()
    drawn.savefig(path, dpi=120)
