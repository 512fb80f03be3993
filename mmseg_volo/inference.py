"""Prediction on files: what ``tools/predict.py`` does, with mmseg's own model, pipeline and test-time augmentation."""

import copy
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.registry import MODELS
from torch import nn
from tqdm import tqdm

from .apis import init_model
from .config import check_tta, set_inference_options
from .data.image_files import read_header
from .visualize import overlay

_PREPARED_AHEAD = 2**22  # pixels
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


class Prediction(NamedTuple):
    """Class ids (H, W), int64, and where it was asked for the probability (H, W), float32, of the class chosen."""

    classes: np.ndarray
    confidence: np.ndarray | None


class Predictor:
    """A trained segmentor that turns pictures into class maps.

    Args:
        config: config file or object; it is not changed.
        checkpoint: its checkpoint.
        device: 'cpu', 'cuda', 'cuda:1', ...; by default a GPU where there is one.
        aug_test: use the config's ``tta_pipeline`` (multi-scale and flip) and ``tta_model``.
        options: precision, compile, channels_last, window_batch, confidence, allow_mismatch: see
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
        set_inference_options(config, aug_test, **options)
        self.model = init_model(config, checkpoint, device)
        self.classes = self.model.dataset_meta['classes']
        self.palette = self.model.dataset_meta['palette']
        if aug_test:
            check_tta(config)
            self.model = MODELS.build(dict(config.tta_model, module=self.model)).eval()
        convolutions = (m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        self._takes_colour = next(convolutions).in_channels == 3
        pipeline = config.tta_pipeline if aug_test else config.test_dataloader.dataset.pipeline
        self.pipeline = Compose(_for_arrays(pipeline))

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
    def predict(self, data: dict) -> Prediction:
        """Run the model on what :meth:`prepare` gave."""
        sample = self.model.test_step(data)[0]
        confidence = sample.seg_confidence.data[0].cpu().numpy() if 'seg_confidence' in sample else None
        return Prediction(sample.pred_sem_seg.data[0].cpu().numpy(), confidence)


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


def find_images(sources: Iterable[str]) -> dict[Path, Path]:
    """The images that files, folders (with all below them) and glob patterns stand for.

    Returns:
        Path of each image, to the path below the output folder, without a suffix, that its results get: its name, or
        for a folder its place in it. Where two images would meet there, their suffix becomes part of the name.

    Raises:
        FileNotFoundError: a source that is not there, or has no image.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_file():
            images = {path: Path(path.name)}
        elif source and path.is_dir():  # an empty name, as an unset variable leaves it, is not the current folder
            inside = sorted(p for p in path.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            images = {p: p.relative_to(path) for p in inside}
        else:
            matches = sorted(Path(p) for p in glob.glob(source, recursive=True))
            images = {p: Path(p.name) for p in matches if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()}
        if not images:
            kinds = ', '.join(IMAGE_SUFFIXES)
            raise FileNotFoundError(
                f'{source or "an empty name"}: no image found; expected a file, a folder or a pattern with {kinds}'
            )
        found.update(images)
    plain = [place.with_suffix('') for place in found.values()]
    targets = {
        image: place.with_suffix('') if plain.count(place.with_suffix('')) == 1 else place
        for image, place in found.items()
    }
    taken: dict[Path, Path] = {}
    for image, target in targets.items():
        if target in taken:
            raise FileExistsError(
                f'{taken[target]} and {image} have one name in the output folder ({target}); predict them apart'
            )
        taken[target] = image
    return targets


def predict_files(
    predictor: Predictor, sources: Iterable[str], out_dir: str, with_overlay: bool = False
) -> dict[Path, str]:
    """Predict each image and save what was found; one that cannot be read or predicted is reported and skipped.

    The next image is read and prepared while the model works on one.

    Args:
        predictor: the model.
        sources: files, folders or glob patterns.
        out_dir: gets ``NAME.png`` with class ids (8 bit, or 16 bit above 256 classes), with ``with_overlay``
            ``NAME_overlay.png``, the picture with the classes' colours over it, and where the predictor was asked for
            the confidence ``NAME_confidence.png``, from 0 to 255 for certain.

    Returns:
        The images that failed, each with the reason.
    """
    targets = find_images(sources)
    dtype = np.uint8 if len(predictor.classes) <= 256 else np.uint16
    failed: dict[Path, str] = {}
    # The bar goes to stderr as logs do, so that stdout can be piped.
    bar = tqdm(total=len(targets), unit='image', file=sys.stderr)
    for path, loaded in _loaded(predictor, list(targets)):
        try:
            image, data = loaded.result()
            found = predictor.predict(predictor.prepare(image) if data is None else data)
            target = Path(out_dir) / targets[path].parent / f'{targets[path].name}.png'
            _write(target, found.classes.astype(dtype))
            if found.confidence is not None:
                grey = np.rint(found.confidence * 255).astype(np.uint8)
                _write(target.with_name(f'{target.stem}_confidence.png'), grey)
            if with_overlay:
                _write(target.with_name(f'{target.stem}_overlay.png'), overlay(image, found.classes, predictor.palette))
        except torch.cuda.OutOfMemoryError:
            failed[path] = 'the GPU has not enough memory for it; try --device cpu'
            torch.cuda.empty_cache()
        except Exception as error:  # whatever is wrong with one picture, the others are still wanted
            failed[path] = str(error) or type(error).__name__
        if path in failed:
            bar.write(f'skipped {path}: {failed[path]}', file=sys.stderr)
        bar.update()
    bar.close()
    return failed


def _loaded(predictor: Predictor, paths: list[Path]) -> Iterator[tuple[Path, Future]]:
    """Each path with its picture and what the pipeline made of it, one ahead of the caller.

    A large picture's views would take too much memory beside those of the one at work: it is only read.
    """

    def load(path: Path) -> tuple[np.ndarray, dict | None]:
        image = _read(path)
        return image, predictor.prepare(image) if image.shape[0] * image.shape[1] <= _PREPARED_AHEAD else None

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(load, paths[0])
        for path, after in zip(paths, [*paths[1:], None], strict=True):
            current, following = following, after and pool.submit(load, after)
            yield path, current


def _read(path: Path) -> np.ndarray:
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


def _write(path: Path, picture: np.ndarray) -> None:
    """Write a PNG under a temporary name and rename it: a run that is stopped leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        part.write_bytes(cv2.imencode('.png', picture)[1].tobytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
