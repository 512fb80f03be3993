"""One model for many visitors: the options that run here, one prediction at a time."""

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from ..datasets.street_drawing import draw_scene
from ..errors import ConfigError
from ..inference.predictor import Prediction, Predictor
from ..models.windows import PRECISIONS


class Stopped(Exception):
    """Nobody waits for this prediction any more."""


class SharedModel:
    """A predictor with options that visitors choose, held in memory once and used by one of them at a time.

    Args:
        predictor: the model.

    Attributes:
        classes, palette: as of :class:`~mmseg_volo.inference.Predictor`.
        multi_scale: whether the config has test-time augmentation.
        precisions: those of :data:`~mmseg_volo.models.windows.PRECISIONS` that run on the device; empty where the model
            cannot choose.
    """

    def __init__(self, predictor: Predictor):
        self.classes, self.palette = predictor.classes, predictor.palette
        self._lock = threading.Lock()
        self._with_options = cache(predictor.with_options)
        self.multi_scale = self._takes(aug_test=True)
        modes = (False, True) if self.multi_scale else (False,)
        self._confidence = {'confidence': True} if all(self._takes(aug_test=m, confidence=True) for m in modes) else {}
        self.precisions = [
            name
            for name in PRECISIONS
            if all(self._takes(aug_test=m, precision=name) for m in modes) and self._runs(name)
        ]

    def _takes(self, **options: str | bool) -> bool:
        try:
            self._with_options(**options)
        except ConfigError:
            return False
        return True

    def _runs(self, precision: str) -> bool:
        """Whether the first windows of a picture come out."""

        def enough(done: int, total: int) -> None:
            raise Stopped

        predictor = self._with_options(precision=precision)
        try:
            predictor.predict(predictor.prepare(draw_scene(0, (64, 64))[0]), enough)
        except Stopped:
            return True
        except (RuntimeError, NotImplementedError):  # an operator that the device has not in this precision
            return False
        return True

    def predict(
        self,
        image: np.ndarray,
        multi_scale: bool = False,
        precision: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prediction:
        """Predict one picture, after those that came before.

        Args:
            image: BGR (H, W, 3), uint8.
            multi_scale, precision: of those offered; None for the config's own precision.
            progress: as of :meth:`~mmseg_volo.inference.Predictor.predict`; also called before the first window, with
                0 windows of 1 done.

        Returns:
            Class ids (H, W), and their probability where the model can tell it.

        Raises:
            ConfigError: an option that is not offered.
            ValueError: the pipeline cannot take such a picture.
        """
        if (multi_scale and not self.multi_scale) or (precision and precision not in self.precisions):
            raise ConfigError('this model has no such option here')
        options = {**self._confidence, **({'precision': precision} if precision else {})}
        with self._lock:
            if progress:
                progress(0, 1)
            predictor = self._with_options(aug_test=multi_scale, **options)
            try:
                return predictor.predict(predictor.prepare(image), progress)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise
