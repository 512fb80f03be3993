"""A trained model that turns pictures into class maps, with mmseg's own model, pipeline and test-time augmentation."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmseg.registry import MODELS
from torch import nn

from .apis import exported_config, init_model
from .config import check_tta, set_inference_options
from .data.image_files import read_header
from .export.running import is_onnx
from .segmentors import WindowNetwork


class Prediction(NamedTuple):
    """Class ids (H, W), int64, and where it was asked for the probability (H, W), float32, of the class chosen."""

    classes: np.ndarray
    confidence: np.ndarray | None


class Predictor:
    """A trained segmentor that turns pictures into class maps.

    Args:
        config: config file or object; it is not changed.
        checkpoint: its checkpoint, or an ``.onnx`` file of ``tools/export.py``, which has settled ``precision``,
            ``compile``, ``channels_last`` and ``cuda_graph``.
        device: 'cpu', 'cuda', 'cuda:1', ...; by default a GPU where there is one.
        aug_test: use the config's ``tta_pipeline`` (multi-scale and flip) and ``tta_model``.
        options: precision, compile, channels_last, window_batch, confidence, cuda_graph, allow_mismatch: see
            :class:`~mmseg_volo.segmentors.StreamingEncoderDecoder`.

    Attributes:
        classes, palette: names and RGB colours, as the checkpoint holds them, else the config's data set.

    Raises:
        CheckpointError, FileNotFoundError: see :mod:`mmseg_volo.checkpoint`.
        ConfigError: options or ``aug_test`` on a config without them.
    """

    def __init__(
        self,
        config: str | Config,
        checkpoint: str,
        device: str | None = None,
        aug_test: bool = False,
        **options: str | bool | int | None,
    ):
        config = Config.fromfile(config) if isinstance(config, str) else copy.deepcopy(config)
        if is_onnx(checkpoint):
            allowed = bool(options.get('allow_mismatch'))
            config, checkpoint = exported_config(config, checkpoint, device or get_device(), allowed), None
        self._config = copy.deepcopy(config)
        set_inference_options(config, aug_test, **options)
        self._segmentor = init_model(config, checkpoint, device)
        self.classes = self._segmentor.dataset_meta['classes']
        self.palette = self._segmentor.dataset_meta['palette']
        convolutions = (m for m in self._segmentor.backbone.modules() if isinstance(m, nn.Conv2d))
        self._takes_colour = next((m.in_channels for m in convolutions), 3) == 3
        self._use(config, aug_test)

    def _use(self, config: Config, aug_test: bool) -> None:
        self.model, self._test_cfg = self._segmentor, config.model.get('test_cfg')
        if aug_test:
            check_tta(config)
            self.model = MODELS.build(dict(config.tta_model, module=self._segmentor)).eval()
        pipeline = config.tta_pipeline if aug_test else config.test_dataloader.dataset.pipeline
        self.pipeline = Compose(_for_arrays(pipeline))

    def with_options(self, aug_test: bool = False, **options: str | bool | int | None) -> 'Predictor':
        """A predictor with the weights of this one, held in memory once, and other options.

        Not for use in one moment with this one, from another thread.

        Args:
            aug_test, options: as for the class, without ``allow_mismatch``.

        Raises:
            ConfigError: as for the class.
        """
        config = copy.deepcopy(self._config)
        set_inference_options(config, aug_test, **options)
        other = copy.copy(self)
        other._use(config, aug_test)
        return other

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Class ids (H, W), int64, of one picture as :meth:`prepare` takes it."""
        return self.predict(self.prepare(image)).classes

    def prepare(self, image: np.ndarray) -> dict:
        """What the test pipeline makes of one picture: the input of :meth:`predict`.

        Args:
            image: BGR (H, W, 3), uint8, or what :func:`as_bgr` makes this of. Whether an array is RGB cannot be told.

        Raises:
            ValueError: no such picture, or too small for the pipeline.
        """
        if self._takes_colour:
            image = as_bgr(image)
        try:
            return pseudo_collate([self.pipeline(dict(img=image))])
        except cv2.error as error:
            height, width = image.shape[:2]
            raise ValueError(
                f'the test pipeline cannot resize {width} x {height} pixels (a side may shrink to nothing): {error.err}'
            ) from error

    @torch.no_grad()
    def predict(self, data: dict, progress: Callable[[int, int], None] | None = None) -> Prediction:
        """Run the model on what :meth:`prepare` gave.

        Args:
            data: of one picture.
            progress: is called with the windows done and their number after each batch of them, by models of this
                package; what it raises ends the prediction.
        """
        self._segmentor.test_cfg = self._test_cfg
        network = getattr(self.model, 'network', None)
        if isinstance(network, WindowNetwork):
            network.progress = progress
        sample = self.model.test_step(data)[0]
        confidence = sample.seg_confidence.data[0].cpu().numpy() if 'seg_confidence' in sample else None
        return Prediction(_fetched(sample.pred_sem_seg.data[0], self._segmentor.out_channels), confidence)


def _fetched(classes: torch.Tensor, number: int) -> np.ndarray:
    """Class ids below ``number``; from a GPU they come in 8 bits where these are enough, an eighth of int64."""
    if classes.is_cuda and classes.dtype == torch.int64 and number <= 256:
        return classes.to(torch.uint8).cpu().numpy().astype(np.int64)
    return classes.cpu().numpy()


def _for_arrays(pipeline: Sequence) -> list:
    """A test pipeline without labels that takes the picture as an array, nested transforms included."""
    out = []
    for step in pipeline:
        if not isinstance(step, dict):
            nested = _for_arrays(step)
            if nested:
                out.append(nested)
        elif step['type'] == 'LoadImageFromFile':
            out.append(dict(type='LoadImageFromNDArray'))
        elif step['type'] == 'TestTimeAug':
            out.append(dict(step, transforms=_for_arrays(step['transforms'])))
        elif step['type'] not in ('LoadAnnotations', 'LoadCheckedAnnotations'):
            out.append(dict(step))
    return out


def as_bgr(image: np.ndarray) -> np.ndarray:
    """A picture as the models take it: BGR (H, W, 3), uint8.

    Args:
        image: (H, W) or (H, W, 1), grey; (H, W, 3), BGR; or (H, W, 4), BGR and alpha, which is left out. Of integers
            from 0 to 255; uint16 above that, of which the upper 8 bits are taken, as from files; or floats from 0 to 1,
            or else from 0 to 255.

    Returns:
        The picture itself where it is so already.

    Raises:
        ValueError: another shape or type, no pixels, or values that are out of range or not finite.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f'expected a picture as a NumPy array (H, W, 3), BGR, uint8, got {type(image).__name__}')
    what = f'a picture of shape {image.shape}, {image.dtype}'
    is_picture = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
    if not is_picture or image.dtype.kind not in 'uif':
        raise ValueError(f'{what}: expected (H, W, 3), BGR, uint8; (H, W) and 4 channels, 16 bits and floats work too')
    if not image.size:
        raise ValueError(f'{what}: it has no pixels')
    if image.dtype == np.uint16 and image.max() > 255:
        image = (image >> 8).astype(np.uint8)
    elif image.dtype != np.uint8:
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 255):  # false for NaN too
            raise ValueError(f'{what}: values from {low} to {high}, expected 0 to 255, or 0 to 1 for floats')
        if image.dtype.kind == 'f':
            image = np.rint(image * 255 if high <= 1 else image)
        image = image.astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., :3] if image.shape[2] == 4 else image


def read_image(path: Path) -> np.ndarray:
    """The picture in a file as the models take it: BGR (H, W, 3), uint8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no image, or broken.
    """
    data = path.read_bytes()
    try:
        read_header(data)
        image = mmcv.imfrombytes(data)
        if image is None:  # OpenCV converts up to 16 bits a value by itself
            image = mmcv.imfrombytes(data, flag='unchanged')
    except ValueError as error:
        raise ValueError(f'it is no image, or broken: {error}') from error
    except (cv2.error, AttributeError) as error:
        raise ValueError('it is no image, or broken') from error
    if image is None:
        raise ValueError('it is no image, or broken')
    return as_bgr(image)
