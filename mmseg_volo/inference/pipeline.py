"""Run a config's test pipeline on files, arrays and frames of videos, so that all tools predict the same pixels."""

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine.dataset import pseudo_collate
from mmseg.datasets.transforms import LoadImageFromNDArray, PackSegInputs
from mmseg.registry import TRANSFORMS
from PIL import UnidentifiedImageError

from ..datasets.bands import LoadBands
from ..datasets.checks.headers import read_header
from ..datasets.loading import LoadCheckedImage, check_loaders, without_labels
from ..errors import ConfigError, DataError
from ..utils.unwrap import bare_dataset, class_of
from .images import as_bgr, check_complete, for_display, read_image, why_unreadable

_KNOWN = LoadImageFromFile.transform, LoadCheckedImage.transform, LoadImageFromNDArray.transform


class LoadedImage(NamedTuple):
    """What the loader of a pipeline returned: a dict with ``img``, (H, W) or (H, W, C) of any dtype."""

    results: dict

    @property
    def pixels(self) -> int:
        height, width = self.results['img'].shape[:2]
        return height * width

    def shown(self) -> np.ndarray:
        """The image to look at: BGR (H, W, 3), uint8; see :func:`~mmseg_volo.inference.images.for_display`."""
        image = self.results['img']
        if self.results.get('order') == 'rgb' and image.shape[2:] >= (3,):  # of LoadBands
            image = image[..., 2::-1]
        return for_display(image)


def reads_bands(config: Mapping, aug_test: bool = False) -> bool:
    """Whether a ``LoadBands`` is in the test pipeline of a config, or in its ``tta_pipeline`` if ``aug_test``."""
    dataset = bare_dataset((config.get('test_dataloader') or {}).get('dataset'))
    steps = config.get('tta_pipeline') if aug_test else dataset.get('pipeline')
    kinds = [class_of(step, TRANSFORMS) for step in steps or () if isinstance(step, Mapping)]
    return any(isinstance(kind, type) and issubclass(kind, LoadBands) for kind in kinds)


class Pipeline:
    """A test pipeline without labels. Files go through its own loader; arrays replace what the loader returns.

    The loader is the first transform whose name begins with ``Load``, or else the first one. It is used as the config
    has it: colour type, decoder, EXIF orientation. Only its storage client is not used, since the files are local.

    Args:
        steps: the config of the pipeline.
        takes_bgr: whether the model takes colour images of 8 bits; then arrays of other kinds are converted to these
            where the loader leaves the kind open.

    Attributes:
        bands: the loader, if it is a ``LoadBands``, else None.
        changes: names of the transforms after the loader that may change the image, or read all of it.

    Raises:
        ConfigError: a package that the loader needs is not installed.
        ValueError: the loader's arguments let it read no file.
    """

    def __init__(self, steps: Sequence, takes_bgr: bool):
        try:
            self._transforms = Compose(without_labels(steps)).transforms
        except (RuntimeError, ImportError) as error:
            raise ConfigError(f'the test pipeline of the config cannot be built: {error}') from error
        names = [type(transform).__name__ for transform in self._transforms]
        first = next((i for i, name in enumerate(names) if name.startswith('Load')), 0)
        self._loader, self._loaded = self._transforms[first], first + 1
        self.bands = self._loader if isinstance(self._loader, LoadBands) else None
        self.changes = [
            type(step).__name__ for step in self._transforms[first + 1 :] if type(step) is not PackSegInputs
        ]
        self._kind = self._kind_of(self._loader, takes_bgr and self.bands is None)
        check_loaders(self._loader)

    def _kind_of(self, loader: object, takes_bgr: bool) -> str:
        """'colour' or 'grey' (8 bits), 'as stored', or 'own': what a file of colours would become is not known."""
        default = 'colour' if takes_bgr else 'as stored'
        if getattr(type(loader), 'transform', None) not in _KNOWN:
            return f'own, {default}'
        loader.backend_args = loader.file_client_args = None
        backend = loader.imdecode_backend or mmcv.image.io.imread_backend
        if backend == 'tifffile':
            if importlib.util.find_spec('tifffile') is None:
                raise ConfigError("imdecode_backend='tifffile' in the config needs a package: pip install tifffile")
            return f'own, {default}'
        if not isinstance(loader.color_type, str):  # a number of OpenCV
            return f'own, {default}'
        if loader.color_type == 'unchanged':
            return default
        return 'grey' if loader.color_type.startswith('grayscale') else 'colour'

    def read(self, path: str | os.PathLike) -> LoadedImage:
        """Read a file with the loader.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no image that the loader reads, or broken.
        """
        if self.bands:  # which checks the file itself
            try:
                return self._load(str(path))
            except DataError as error:
                raise ValueError(str(error).removeprefix(f'{path}: ')) from error
        data = Path(path).read_bytes()
        check_complete(data)
        try:
            return self._load(str(path))
        except UnidentifiedImageError as error:  # an OSError, but the file was read
            raise ValueError(self._why(data, error)) from error
        except OSError:
            raise
        except Exception as error:  # decoders and own loaders may raise anything
            if (
                self._kind == 'colour' and (read_header(data).bands or 0) <= 4
            ):  # OpenCV refuses floats, as_bgr takes them
                return self._of_array(read_image(Path(path)), str(path))
            raise ValueError(self._why(data, error)) from error

    def _why(self, data: bytes, error: Exception) -> str:
        most = {'colour': 3, 'grey': 1}.get(self._kind, 4)
        why = why_unreadable(data, f"the config's loader ({self._name})", most)
        told = str(error).splitlines()[:1]
        if isinstance(error, KeyError):
            told = [f'it needs {error} from the data set']
        known = self._kind[:3] != 'own'
        return why if known or 'bands' in why or not told else f'{why}: {self._name}: {told[0]}'

    @property
    def _name(self) -> str:
        return type(self._loader).__name__

    def _load(self, path: str) -> LoadedImage:
        results = dict(img_path=path, seg_fields=[])
        for i, transform in enumerate(self._transforms):
            if i >= self._loaded and 'img' in results:
                self._loaded = i
                break
            results = _apply(transform, results)
        if results.get('img') is None:
            raise ValueError('no image')
        return LoadedImage(results)

    def from_array(self, image: np.ndarray) -> LoadedImage:
        """Take an array in place of what the loader returns.

        Args:
            image: for loaders of 8-bit colours or grey values, any image that :func:`as_bgr` takes; for others the
                array as the loader would return it.

        Raises:
            ValueError: the array is no such image.
        """
        if not isinstance(image, np.ndarray):
            raise ValueError(f'expected an image as a NumPy array (H, W, 3), BGR, uint8, got {type(image).__name__}')
        # What came in 8 bits is not suspicious, however dark it is.
        source = '' if image.dtype == np.uint8 else None
        if self._kind == 'grey':
            return self._of_array(self._grey(image), source)
        if self._kind.endswith('colour'):
            return self._of_array(as_bgr(image), source)
        if image.ndim not in (2, 3) or not image.size or image.dtype.kind not in 'uif':
            raise ValueError(f'an image of shape {image.shape}, {image.dtype}: expected (H, W) or (H, W, channels)')
        return self._of_array(image, None)

    def from_frame(self, frame: np.ndarray) -> LoadedImage:
        """Give what the loader would return for a file with this image, BGR (H, W, 3), uint8.

        Raises:
            ValueError: the loader cannot read such a file.
        """
        if not self._kind.startswith('own'):
            return self.from_array(frame)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'frame.tif')
            Path(path).write_bytes(cv2.imencode('.tif', frame, [cv2.IMWRITE_TIFF_COMPRESSION, 1])[1].tobytes())
            try:
                loaded = self.read(path)
            except (OSError, ValueError) as error:
                raise ValueError(f'{self._name} in the config reads no frames of videos: {error}') from error
        return LoadedImage({**loaded.results, 'img_path': ''})

    def _grey(self, image: np.ndarray) -> np.ndarray:
        if image.ndim == 2 or image.shape[2:] == (1,):
            return as_bgr(image)[..., 0]
        data = cv2.imencode('.png', as_bgr(image), [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
        backend = self._loader.imdecode_backend
        return mmcv.imfrombytes(data, flag='grayscale', backend='pillow' if backend == 'pillow' else 'cv2')

    def _of_array(self, image: np.ndarray, source: str | None) -> LoadedImage:
        if getattr(self._loader, 'to_float32', False):
            image = image.astype(np.float32)
        shape = image.shape[:2]
        return LoadedImage(dict(img=image, img_path=source, img_shape=shape, ori_shape=shape, seg_fields=[]))

    def finish(self, loaded: LoadedImage) -> dict:
        """Run the transforms after the loader; return the input of a model's ``test_step`` for this image.

        Raises:
            ValueError: the image is too narrow to be resized.
        """
        results = dict(loaded.results)
        try:
            for transform in self._transforms[self._loaded :]:
                results = _apply(transform, results)
        except cv2.error as error:
            height, width = loaded.results['img'].shape[:2]
            raise ValueError(
                f'the test pipeline cannot resize {width} x {height} pixels (a side may shrink to nothing): {error.err}'
            ) from error
        return pseudo_collate([results])


def _apply(transform: object, results: dict) -> dict:
    try:
        return transform(results)
    except KeyError as error:
        if error.args != ('seg_map_path',):
            raise
        return results  # a loader of labels that is not derived from mmcv's
