"""What each option of prediction changes on a user's model and images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..inference.predictor import Predictor
from ..inference.sources import find_images
from ..models.windows import PRECISIONS
from ..utils.config import load_config
from . import plots, tables
from .comparison import Comparison, Settings, compare
from .tables import Columns, Spread, text, times_faster
from .timing import progress, seconds_of

_BASELINE = 'fp32'
OPTIONS = {
    **{name: dict(precision=name) for name in PRECISIONS},
    'channels-last': dict(precision='fp32', channels_last=True),
    'compile': dict(precision='fp32', compile=True),
}
# What runs an exported file, in float32 unless the name says more.
FILE_RUNTIMES = {
    'onnxruntime': dict(runtime='onnxruntime'),
    'openvino': dict(runtime='openvino'),
    'openvino-bf16': dict(runtime='openvino', precision='bf16'),
}


@dataclass(frozen=True, kw_only=True)
class PrecisionCase(Comparison):
    """A model, images, and the options that are compared with float32.

    Args:
        sides: names in :data:`OPTIONS`, 'fp32' first, and the names of ``files``.
        config, checkpoint: of the model.
        files: the model as exported by ``tools/export.py``, and a name in :data:`FILE_RUNTIMES`, by the side's name.
        images: arrays (H, W, 3), BGR, uint8.
        aug_test: multi-scale and flip.
        others: see :class:`Comparison`.
    """

    config: str
    checkpoint: str
    files: dict[str, tuple[str, str]]
    images: tuple[np.ndarray, ...]
    aug_test: bool = False

    NAME = 'precision'
    BASELINE = _BASELINE

    @classmethod
    def of(
        cls, config: str, checkpoint: str, sources: Sequence[str], options: Sequence[str], onnx: Sequence[str],
        runtimes: Sequence[str], limit: int, **others: Any,
    ) -> 'PrecisionCase':  # fmt: skip
        """The case for images that a user names.

        Raises:
            FileNotFoundError: no config, or no image that can be read.
        """
        load_config(config)  # a wrong name is reported before images are read
        files = {f'{Path(file).name}, {runtime}': (file, runtime) for file in onnx for runtime in runtimes}
        sides = tuple(dict.fromkeys([_BASELINE, *options, *files]))
        images = tuple(read_images(sources, limit))
        return cls(sides=sides, config=config, checkpoint=checkpoint, files=files, images=images, **others)

    @staticmethod
    def label(row: dict) -> str:
        return row['option']

    @staticmethod
    def title(row: dict) -> str:
        return f'images: {row["pictures"]}; median (least–greatest) of {row["rounds"]}; against {_BASELINE}'

    def __str__(self) -> str:
        return f'{len(self.images)} images'

    def build(self) -> dict[str, Predictor]:
        return {side: self.build_alone(side) for side in self.sides}

    def build_alone(self, side: str) -> Predictor:
        config = load_config(self.config)
        if side in self.files:
            path, runtime = self.files[side]
            config.model.test_cfg = {**(config.model.get('test_cfg') or {}), **FILE_RUNTIMES[runtime]}
            return Predictor(config, path, self.device, self.aug_test)
        return Predictor(config, self.checkpoint, self.device, self.aug_test, **OPTIONS[side])

    def inputs(self, model: Predictor) -> '_Images':
        return _Images(self.images)

    def warm_up(self, model: Predictor, side: str, data: '_Images') -> None:
        """Predict every image, so that every shape is warmed up, and count the pixels whose class differs."""
        changed = 0
        for i, image in enumerate(data.images):
            classes = model(image).astype(np.uint16)
            if side == _BASELINE:
                data.baseline.append(classes)
            changed += int((classes != data.baseline[i]).sum())
        data.changed[side] = changed / sum(classes.size for classes in data.baseline)

    def run(self, model: Predictor, side: str, data: '_Images') -> float:
        """Predict every image; the seconds for one of them, without preparing it."""
        seconds = 0.0
        for image in data.images:
            prepared = model.prepare(image)
            seconds += seconds_of(lambda prepared=prepared: model.predict(prepared))
        return seconds / len(data.images)

    def seconds(self, call: Callable[[], float], calls: int) -> float:
        return call()

    def may_be_missing(self, side: str, error: Exception) -> bool:
        """An option that PyTorch cannot run on this device."""
        return isinstance(error, RuntimeError) and side != _BASELINE and side not in self.files

    def rows(self, settings: Settings) -> list[dict]:
        """A row for each option that runs here."""
        found = compare(self, replace(settings, memory=False))
        shared = dict(pictures=len(self.images), views='aug-test' if self.aug_test else 1, rounds=settings.rounds)
        return [
            dict(
                option=side,
                **shared,
                **Spread.of(seconds).columns('seconds'),
                **times_faster(found.seconds, side, _BASELINE).columns('times_faster'),
                changed_pixels=found.data.changed[side],
            )
            for side, seconds in found.seconds.items()
        ]

    def columns(self) -> Columns:
        return {
            'option': self.label,
            'time for an image': tables.time('seconds'),
            'times faster': tables.spread('times_faster'),
            'changed pixels': text('{changed_pixels:.3%}'),
        }

    def plot(self, rows: Sequence[dict], path: Path) -> None:
        panels = {
            'seconds for an image': {'seconds': [row['seconds'] for row in rows]},
            '% of pixels that change': {'changed': [100 * row['changed_pixels'] for row in rows]},
        }
        plots.bars(path, rows, [self.label(row) for row in rows], panels)


@dataclass
class _Images:
    """The images, the classes that float32 finds, and the share of pixels that each side changes."""

    images: Sequence[np.ndarray]
    baseline: list[np.ndarray] = field(default_factory=list)
    changed: dict[str, float] = field(default_factory=dict)


def read_images(sources: Sequence[str], limit: int) -> list[np.ndarray]:
    """The first images of files, folders and glob patterns; broken ones are reported and skipped."""
    paths = list(find_images(sources))
    read = {path: cv2.imread(str(path)) for path in paths[:limit]}
    for path, image in read.items():
        if image is None:
            progress(f'skipped {path}: it is no image, or broken')
    images = [image for image in read.values() if image is not None]
    if not images:
        raise FileNotFoundError(f'none of the first {limit} images could be read')
    progress(f'{len(images)} of {len(paths)} images')
    return images
