"""Load images and labels, with errors that name the file."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

import cv2
import mmcv
import numpy as np
from mmcv.image.io import imread_flags, supported_backends
from mmcv.transforms import LoadAnnotations as AnyLoadAnnotations
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS

from ..errors import DataError
from ..utils.unwrap import class_of
from .checks.images import general_reason, why_unreadable
from .checks.labels import LabelError, decode_label, label_table

# What mmcv knows for the arguments of loaders.
LOADER_CHOICES = dict(color_type=[*imread_flags], imdecode_backend=supported_backends)


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(LoadAnnotations):
    """mmseg's ``LoadAnnotations``, same arguments and labels, which rejects labels that mmseg would misread.

    It raises DataError with the label's path if the file cannot be read, has several channels or values above 255, or
    has another size than the image. It reads labels of any number of pixels, also above Pillow's limit.

    Pixels of ``nodata`` (H, W), bool, which :class:`~mmseg_volo.datasets.bands.LoadBands` adds, become 255, ignored.

    Without ``seg_map_path`` in the results it does nothing. So ``inference_model`` and ``MMSegInferencer`` can run
    pipelines that contain it.
    """

    def transform(self, results: dict) -> dict:
        """Add ``gt_seg_map`` (H, W), uint8, and append it to ``seg_fields``."""
        return super().transform(results) if 'seg_map_path' in results else results

    def _load_seg_map(self, results: dict) -> None:
        path = results['seg_map_path']
        try:
            label = decode_label(fileio.get(path, backend_args=self.backend_args), self.imdecode_backend)
        except LabelError as error:
            raise DataError(f'{path}: {error}') from error
        except OSError as error:
            raise DataError(
                f'{path}: the label cannot be read ({error.strerror or error}); check the path and the disk'
            ) from error
        size = results.get('ori_shape', label.shape)
        if label.shape != tuple(size):
            raise DataError(
                f'{path}: the label is {label.shape[1]} x {label.shape[0]} pixels, its image {size[1]} x {size[0]}; '
                'make both the same size'
            )
        if self.reduce_zero_label is None:
            self.reduce_zero_label = results['reduce_zero_label']
        if self.reduce_zero_label != results['reduce_zero_label']:
            raise DataError(
                f'{path}: reduce_zero_label is {self.reduce_zero_label} in LoadCheckedAnnotations, but '
                f'{results["reduce_zero_label"]} in the data set; set it in the data set only'
            )
        table = label_table(self.reduce_zero_label, results.get('label_map'))
        results['gt_seg_map'] = cv2.LUT(label, table)
        if (nodata := results.pop('nodata', None)) is not None:  # of LoadBands
            results['gt_seg_map'][nodata] = 255
        results['seg_fields'].append('gt_seg_map')


@TRANSFORMS.register_module()
class LoadCheckedImage(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, same arguments, which raises DataError with the image's path.

    Use it in training pipelines only: ``MMSegInferencer`` needs ``LoadImageFromFile`` itself in the test pipeline.
    """

    def transform(self, results: dict) -> dict | None:
        """Add ``img`` (H, W, 3), ``img_shape`` and ``ori_shape``."""
        try:
            return super().transform(results)
        except Exception as error:  # decoders may raise anything on broken data
            path = results['img_path']
            raise DataError(f'{path}: {self._reason(path, error)}') from error

    def _reason(self, path: str, error: Exception) -> str:
        try:
            data = fileio.get(path, backend_args=self.backend_args)
        except OSError as missing:
            return f'the image cannot be read ({missing.strerror or missing}); check the path and the disk'
        return str(why_unreadable(data, self.color_type, self.imdecode_backend, error))


def check_loaders(part: object) -> None:
    """Check that the arguments of the loaders of images and labels let them read files, which no constructor does.

    Args:
        part: a data set, with wrappers such as ``ConcatDataset``; or transforms.

    Raises:
        ValueError: a loader can read no file at all.
    """
    for loader in _loaders(part):
        given = {name: getattr(loader, name) for name in LOADER_CHOICES if hasattr(loader, name)}
        flag, backend = given.get('color_type', 'unchanged'), given['imdecode_backend']
        try:
            if loader.backend_args:
                fileio.get_file_backend('image.png', backend_args=loader.backend_args)
        except Exception as error:  # a storage client may raise anything
            raise ValueError(f'{type(loader).__name__}: backend_args={loader.backend_args}: {error}') from error
        kind, options = ('.tif', [cv2.IMWRITE_TIFF_COMPRESSION, 1]) if backend == 'tifffile' else ('.jpg', [])
        sample = cv2.imencode(kind, np.zeros((8, 8, 3), np.uint8), options)[1].tobytes()
        try:
            mmcv.imfrombytes(sample, flag=flag, backend=backend)
        except Exception as error:  # a decoder may raise anything
            package = general_reason(sample, backend, error)
            why = f'{package.reason}; {package.remedy}' if package else f'{type(error).__name__}: {error}'
            for name, value in given.items():
                known = LOADER_CHOICES[name]
                if str(value) not in known and (near := difflib.get_close_matches(str(value), known, 1)):
                    why = f'{name} must be one of {", ".join(known)}; did you mean {near[0]!r}?'
            arguments = ', '.join(f'{name}={value!r}' for name, value in given.items() if value is not None)
            raise ValueError(f'{type(loader).__name__}: no file can be read with {arguments}: {why}') from error


def _loaders(part: object) -> Iterator[LoadImageFromFile | LoadAnnotations]:
    """The loaders in a data set or in transforms that read as those of mmcv, mmseg and this package."""
    kind = type(part)
    if getattr(kind, 'transform', None) in (LoadImageFromFile.transform, LoadCheckedImage.transform) or getattr(
        kind, '_load_seg_map', None
    ) in (LoadAnnotations._load_seg_map, LoadCheckedAnnotations._load_seg_map):
        yield part
    names = 'datasets', 'dataset', 'pipeline', 'transforms', 'subroutines'
    own = getattr(part, '__dict__', {})
    for inner in part if isinstance(part, list | tuple) else [own[name] for name in names if name in own]:
        yield from _loaders(inner)


def loads_labels(kind: type | object) -> bool:
    """Whether a transform's class loads labels; own loaders are known by ``Annotation`` in their name."""
    return isinstance(kind, type) and (issubclass(kind, AnyLoadAnnotations) or 'Annotation' in kind.__name__)


def without_labels(steps: Sequence) -> list:
    """Return the config of a pipeline without the loaders of labels, also in nested lists of transforms."""
    out = []
    for step in steps:
        if not isinstance(step, Mapping):
            nested = without_labels(step) if isinstance(step, Sequence) else step
            if nested:
                out.append(nested)
        elif 'transforms' in step:
            if nested := without_labels(step['transforms']):
                out.append({**step, 'transforms': nested})
        elif not loads_labels(class_of(step, TRANSFORMS)):
            out.append(dict(step))
    return out
