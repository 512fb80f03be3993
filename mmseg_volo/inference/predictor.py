"""Predict the class ids of images with mmseg's model, pipeline and test-time augmentation."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from ..config_check import building
from ..config_check.lookup import nearest
from ..errors import ConfigError
from ..models.inputs import check_images, expected_by
from ..models.onnx import is_onnx, with_onnx
from ..models.segmentors import StreamingEncoderDecoder
from ..models.windows import WindowNetwork
from .model import init_model
from .options import check_tta, datasets_to_test, set_inference_options
from .pipeline import LoadedImage, Pipeline


class Prediction(NamedTuple):
    """Class ids (H, W), int64, and with the option ``confidence`` the probability (H, W), float32, of these classes."""

    classes: np.ndarray
    confidence: np.ndarray | None


class Predictor:
    """Predict the class ids of images with a trained segmentor.

    Args:
        config: config file or object; not changed.
        checkpoint: a checkpoint of this config, or an ``.onnx`` file of ``tools/export.py``, which does not take the
            options ``precision``, ``compile``, ``channels_last`` and ``cuda_graph``.
        device: 'cpu', 'cuda', 'cuda:1', ...; default: a GPU if there is one, else the CPU.
        aug_test: use the config's ``tta_pipeline`` (multi-scale and flip) and ``tta_model``.
        options: precision, compile, channels_last, window_batch, confidence, cuda_graph, allow_mismatch: see
            :class:`~mmseg_volo.models.segmentors.StreamingEncoderDecoder`.

    Attributes:
        classes, palette: class names and RGB colours of the checkpoint, or else of the config's data set.
        config: the config; do not change it.
        channels: channels of the images that the model takes.

    Raises:
        CheckpointError, FileNotFoundError: see :mod:`mmseg_volo.checkpoints.reading`.
        ConfigError: the config does not support ``aug_test`` or one of the options.
        TypeError: there is no such option.
    """

    def __init__(
        self,
        config: str | PathLike | Config,
        checkpoint: str | PathLike,
        device: str | None = None,
        aug_test: bool = False,
        **options: str | bool | int | None,
    ):
        config = Config.fromfile(config) if isinstance(config, str | PathLike) else copy.deepcopy(config)
        _check_options(options)
        if is_onnx(checkpoint):
            config, checkpoint = with_onnx(config, checkpoint, device or get_device())[0], None
        self.config = copy.deepcopy(config)
        set_inference_options(config, aug_test, **options)
        self._segmentor = init_model(config, checkpoint, device)
        self.classes = self._segmentor.dataset_meta['classes']
        self.palette = self._segmentor.dataset_meta['palette']
        convolutions = (m for m in self._segmentor.backbone.modules() if isinstance(m, nn.Conv2d))
        self.channels = next((m.in_channels for m in convolutions), 3)
        self._use(config, aug_test)

    def _use(self, config: Config, aug_test: bool) -> None:
        self.model, self._test_cfg = self._segmentor, config.model.get('test_cfg')
        if aug_test:
            check_tta(config)
            with building(config, 'tta_model'):
                self.model = MODELS.build(dict(config.tta_model, module=self._segmentor)).eval()
        pipeline = config.tta_pipeline if aug_test else datasets_to_test(config)[0].get('pipeline')
        if not pipeline:
            raise ConfigError('test_dataloader.dataset.pipeline is missing in the config: how images are prepared')
        expected = expected_by(self._segmentor)
        takes_bgr = self.channels == 3 and (expected.is_8_bit or not expected.mean)
        with building(config, 'tta_pipeline' if aug_test else 'test_dataloader.dataset.pipeline'):
            self.pipeline = Pipeline(pipeline, takes_bgr)

    def with_options(self, aug_test: bool = False, **options: str | bool | int | None) -> 'Predictor':
        """Return a predictor with other options that shares the weights of this one.

        Do not use both at the same time from different threads.

        Args:
            aug_test, options: see the class; without ``allow_mismatch``.

        Raises:
            ConfigError: see the class.
        """
        config = copy.deepcopy(self.config)
        _check_options(options)
        set_inference_options(config, aug_test, **options)
        other = copy.copy(self)
        other._use(config, aug_test)
        return other

    def __call__(self, image: np.ndarray | str | PathLike) -> np.ndarray:
        """Return the class ids (H, W), int64, of one image; see :meth:`prepare` for its form."""
        return self.predict(self.prepare(image)).classes

    def read(self, path: str | PathLike) -> LoadedImage:
        """Read a file with the loader of the config's test pipeline, as ``tools/test.py`` does.

        Returns:
            The image, for :meth:`prepare`; its method ``shown`` gives it as BGR (H, W, 3), uint8, to look at.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no image that the loader reads, or broken.
        """
        return self.pipeline.read(path)

    def read_frame(self, frame: np.ndarray) -> LoadedImage:
        """Convert a frame of a video, BGR (H, W, 3), uint8, to what the loader would return for such an image.

        Raises:
            ValueError: the loader cannot read it, or the model needs more channels.
        """
        loaded, needed = self.pipeline.from_frame(frame), expected_by(self._segmentor).channels or 0
        if needed > 3 and loaded.results['img'].shape[2:] < (needed,):
            raise ValueError(f'the frames of a video have 3 channels, the model takes {needed}')
        return loaded

    def prepare(self, image: np.ndarray | str | PathLike | LoadedImage) -> dict:
        """Run the test pipeline on one image; return the input of :meth:`predict`.

        Args:
            image: a file; or what :meth:`read` returned; or an array. If the loader of the config reads 8 bits (the
                default), an array is BGR (H, W, 3), uint8, or one that :func:`as_bgr` converts to this form. For other
                loaders (``color_type='unchanged'``, own ones) the array is taken as it is, in place of what the loader
                returns, unless the model takes 8-bit colours. RGB arrays cannot be detected: the caller converts them.

        Raises:
            OSError: the file cannot be read.
            ValueError: no such image, or too narrow for the pipeline.
        """
        if isinstance(image, (str, PathLike)):
            image = self.read(image)
        elif not isinstance(image, LoadedImage):
            image = self.pipeline.from_array(image)
        return self.pipeline.finish(image)

    @torch.no_grad()
    def predict(self, data: dict, progress: Callable[[int, int], None] | None = None) -> Prediction:
        """Run the model on one prepared image.

        Args:
            data: the result of :meth:`prepare`.
            progress: called after each batch of windows with the number of windows done and their total, by models of
                this package only. An exception from it ends the prediction.
        """
        self._segmentor.test_cfg = self._test_cfg
        network = getattr(self.model, 'network', None)
        if isinstance(network, WindowNetwork):
            network.progress = progress
        sample = self.model.test_step(data)[0]
        confidence = sample.seg_confidence.data[0].cpu().numpy() if 'seg_confidence' in sample else None
        return Prediction(_to_numpy(sample.pred_sem_seg.data[0], self._segmentor.out_channels), confidence)

    @property
    def confident(self) -> bool:
        """Whether predictions have a confidence."""
        return bool((self._test_cfg or {}).get('confidence'))

    @property
    def needs_whole(self) -> str:
        """Why an image cannot be predicted window by window, as a clause; '' if it can."""
        cfg = self._test_cfg or {}
        if self.model is not self._segmentor:
            return 'test-time augmentation needs the whole image; leave out --aug-test'
        if self.pipeline.changes:
            return f"the test pipeline's {', '.join(self.pipeline.changes)} needs the whole image; leave it out"
        if cfg.get('mode', 'whole') != 'slide':
            return "model.test_cfg.mode is 'whole'; set mode='slide' with crop_size and stride"
        if not (isinstance(self.model, StreamingEncoderDecoder) and self.model.predicts_windows):
            return f'the {type(self.model).__name__} has an own way of prediction; use StreamingEncoderDecoder'
        return ''

    def check(self, image: torch.Tensor, path: str) -> None:
        """Check that an image (C, H, W) from a file, or a part of it, is of the kind that the model takes.

        Raises:
            ValueError: another number of channels, or another range of values.
        """
        check_images(self._segmentor, [image], [SegDataSample(metainfo=dict(img_path=path))])

    @torch.no_grad()
    def predict_windows(
        self,
        size: tuple[int, int],
        read: Callable[[int, int, int, int], torch.Tensor],
        by_rows: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray | None]]:
        """Predict an image that need not fit into memory; only if :attr:`needs_whole` is ''.

        Args:
            size, read, by_rows: see
                :meth:`~mmseg_volo.models.segmentors.StreamingEncoderDecoder.predict_windows`.
            progress: see :meth:`predict`.

        Yields:
            The rows and columns of a tile, its class ids, and its confidence or None.
        """
        self._segmentor.test_cfg = self._test_cfg
        self.model.network.progress = progress
        for rows, columns, classes, confidence in self.model.predict_windows(size, read, by_rows):
            certain = None if confidence is None else confidence.cpu().numpy()
            yield rows, columns, classes.cpu().numpy(), certain


def _check_options(options: Mapping) -> None:
    """Raise TypeError, as Python does, for an option that a predictor does not have."""
    known = set(inspect.signature(set_inference_options).parameters) - {'config', 'aug_test'}
    for name in options:
        if name not in known:
            raise TypeError(f'Predictor has no option {name!r}{nearest(name, known) or f"; it has {sorted(known)}"}')


def _to_numpy(classes: torch.Tensor, count: int) -> np.ndarray:
    """Copy class ids to the CPU. Up to 256 classes leave the GPU as uint8, an eighth of int64."""
    if classes.is_cuda and classes.dtype == torch.int64 and count <= 256:
        return classes.to(torch.uint8).cpu().numpy().astype(np.int64)
    return classes.cpu().numpy()
