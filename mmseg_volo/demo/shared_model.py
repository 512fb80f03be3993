"""One model for many visitors: the options that run on this device, one prediction at a time."""

import threading
from collections.abc import Callable
from functools import cache
from os import PathLike

import numpy as np
import torch

from ..errors import ConfigError
from ..inference.pipeline import LoadedImage
from ..inference.predictor import Prediction, Predictor
from ..models.windows import PRECISIONS


class Stopped(Exception):
    """Nobody waits for this prediction any more; a progress callback raises it to end the prediction."""


class SharedModel:
    """A predictor with options per prediction. Its weights are in memory once and serve one prediction at a time.

    Args:
        predictor: the model.

    Attributes:
        classes, palette: see :class:`~mmseg_volo.inference.Predictor`.
        multi_scale: whether the config has test-time augmentation.
        precisions: those of :data:`~mmseg_volo.models.windows.PRECISIONS` that run on the device; empty if the model
            has no such option.
        confidence: whether predictions come with their confidence.
    """

    def __init__(self, predictor: Predictor):
        self.classes, self.palette = predictor.classes, predictor.palette
        self._lock = threading.Lock()
        self._with_options = cache(predictor.with_options)
        self.multi_scale = self._accepts(aug_test=True)
        modes = (False, True) if self.multi_scale else (False,)
        self.confidence = all(self._accepts(aug_test=m, confidence=True) for m in modes)
        self.precisions = [
            name
            for name in PRECISIONS
            if all(self._accepts(aug_test=m, precision=name) for m in modes) and self._runs(name)
        ]

    def _accepts(self, **options: str | bool) -> bool:
        try:
            self._with_options(**options)
        except ConfigError:
            return False
        return True

    def _runs(self, precision: str) -> bool:
        """Whether the device can compute the first batch of windows in this precision."""

        def stop(done: int, total: int) -> None:
            raise Stopped

        predictor = self._with_options(precision=precision)
        try:
            predictor.predict(predictor.prepare(np.zeros((64, 64, predictor.channels), np.uint8)), stop)
        except Stopped:
            return True
        except (RuntimeError, NotImplementedError, ConfigError):  # the device lacks an operator in this precision
            return False
        return True

    def read(self, path: str | PathLike, multi_scale: bool = False) -> LoadedImage:
        """Read a file with the loader of the config; see :meth:`~mmseg_volo.inference.Predictor.read`."""
        return self._with_options(aug_test=multi_scale and self.multi_scale).read(path)

    def predict(
        self,
        image: np.ndarray | LoadedImage,
        multi_scale: bool = False,
        precision: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prediction:
        """Predict one image; waits until the prediction before it has ended.

        Args:
            image: what :meth:`read` returned, or an array; see :meth:`~mmseg_volo.inference.Predictor.prepare`.
            multi_scale: use test-time augmentation.
            precision: one of ``precisions``; None for the config's own.
            progress: see :meth:`~mmseg_volo.inference.Predictor.predict`; also called before the first window, with 0
                windows of 1.

        Returns:
            Class ids (H, W), and their confidence if the model has the option.

        Raises:
            ConfigError: an option that is not offered.
            ValueError: the test pipeline cannot take an image of this size.
        """
        if (multi_scale and not self.multi_scale) or (precision and precision not in self.precisions):
            raise ConfigError('this model does not offer this option')
        options = {'confidence': True} if self.confidence else {}
        if precision:
            options['precision'] = precision
        with self._lock:
            if progress:
                progress(0, 1)
            predictor = self._with_options(aug_test=multi_scale, **options)
            try:
                return predictor.predict(predictor.prepare(image), progress)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise
