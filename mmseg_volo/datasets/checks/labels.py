"""Decode label files, and map their values to class ids as mmseg does."""

import io
import threading
from collections.abc import Iterable, Mapping

import mmcv
import numpy as np
from PIL import Image

from .headers import read_header
from .images import RESTORE, UNKNOWN_TIFF, general_reason

_CITYSCAPES_IDS = 33
_DENSEST = 20_000  # pixels in a byte: deflate packs at most 1032 bytes of 8 one-bit pixels into one
_PILLOW = threading.Lock()


class LabelError(ValueError):
    """A file that is not a usable label; ``kind`` of fault, and ``problem`` and ``remedy`` as clauses."""

    def __init__(self, kind: str, problem: str, remedy: str):
        super().__init__(f'{problem}; {remedy}')
        self.kind, self.problem, self.remedy = kind, problem, remedy


def decode_label(data: bytes, backend: str = 'pillow', limited: bool = False) -> np.ndarray:
    """Decode a label file to its values (H, W), uint8, as mmseg's ``LoadAnnotations`` does.

    Args:
        data: content of the file.
        backend: ``imdecode_backend`` of the transform.
        limited: reject a label with more pixels than Pillow accepts, which mmseg's ``LoadAnnotations`` cannot read. By
            default, it is read like any other.

    Raises:
        LabelError: the file is cut off, damaged or a JPEG, has several channels, or has values of more than 8 bits,
            which mmseg would truncate.
    """
    try:
        header = read_header(data)
        if header.format == 'jpeg':
            label = None
        elif backend == 'pillow' and not limited:
            label = np.array(_open_any_size(data))
        else:
            label = mmcv.imfrombytes(data, flag='unchanged', backend=backend)
    except LabelError:
        raise
    except Image.DecompressionBombError as error:
        problem = 'the label has more pixels than Pillow accepts, so LoadAnnotations cannot read it'
        raise LabelError('unreadable label', problem, 'use LoadCheckedAnnotations in its place') from error
    except Exception as error:  # decoders may raise anything on broken data
        raise _unreadable(data, backend, error) from error
    if header.format == 'jpeg':
        raise LabelError(
            'lossy label', 'the label is a JPEG, which changes class ids', 'create it again as PNG from the source'
        )
    if label is None or label.ndim not in (2, 3):
        raise _unreadable(data, backend)
    if label.ndim != 2 and label.shape[2] > 1:
        raise _several_channels(label)
    ids = label.reshape(label.shape[:2]).astype(np.uint8)
    if label.dtype not in (np.uint8, bool) and (label.reshape(ids.shape) != ids).any():
        raise LabelError(
            'depth of a label',
            f'the label has values from {label.min()} to {label.max()} ({label.dtype}), but mmseg keeps only 8 bits',
            'save class ids from 0 to 255 as an 8-bit PNG',
        )
    return ids


def _open_any_size(data: bytes) -> Image.Image:
    """Open a file with Pillow, without its limit on pixels: users choose their labels themselves."""
    with _PILLOW:  # the limit is a global variable; only the header is read under the lock
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > max(limit or 0, _DENSEST * len(data)):
        problem = f'the label cannot be read (it is damaged: its header gives {image.width} x {image.height} pixels)'
        raise LabelError('unreadable label', problem, 'restore it')
    return image


def _unreadable(data: bytes, backend: str, error: Exception | None = None) -> LabelError:
    found = general_reason(data, '' if backend == 'pillow' else backend, error)  # Pillow's limit is no reason here
    if found:
        reason, remedy = found.reason, 'restore it' if found.remedy == RESTORE else found.remedy
    elif read_header(data).format == 'tiff':
        reason, remedy = UNKNOWN_TIFF.format(backend), 'restore it, or save it as an 8-bit PNG with one channel'
    else:
        reason, remedy = 'it is damaged or not an image', 'restore it'
    return LabelError('unreadable label', f'the label cannot be read ({reason})', remedy)


def _several_channels(label: np.ndarray) -> LabelError:
    count = label.shape[2]
    colours = label[..., :3] if count > 2 else label[..., :1]  # the second of two is alpha
    if (colours == colours[..., :1]).all():
        first = {2: 'the second is transparency: save the first', 3: 'they are equal: save one of them'}
        problem = f'the label has {count} channels'
        remedy = f'{first.get(count, "the first three are equal: save one of them")} as PNG'
    else:
        problem = f'the label has {count} channels with colours instead of class ids'
        remedy = 'convert the colours to class ids and save them as a grey-scale or palette PNG'
    return LabelError('channels of a label', problem, remedy)


def label_table(reduce_zero_label: bool, label_map: Mapping[int, int] | None) -> np.ndarray:
    """Table (256,), uint8, from each value of a label file to the class id that ``LoadAnnotations`` gives it."""
    table = np.arange(256, dtype=np.uint8)
    if reduce_zero_label:
        table -= 1  # 0 becomes 255
        table[255] = 255
    mapped = table.copy()
    for old, new in (label_map or {}).items():
        mapped[table == old] = new
    return mapped


def likely_cause(values: Iterable[int], classes: int, reduce_zero_label: bool) -> str:
    """Suggest why labels hold ``values`` that are not class ids below ``classes``, and what to do.

    The values are those after ``reduce_zero_label``.
    """
    values = set(values)
    if classes == 19 and max(values) <= _CITYSCAPES_IDS:
        return (
            'these look like Cityscapes label ids instead of train ids: use the *_labelTrainIds.png files that '
            'tools/prepare_data.py cityscapes creates'
        )
    if values == {classes} and not reduce_zero_label:
        return (
            f'set reduce_zero_label=True in the data set if 0 means unlabelled, write 255 instead if {classes} means '
            'void, or add the missing class to the config'
        )
    if reduce_zero_label:
        return (
            f'write 1 to {classes} for the classes and 0 for ignored pixels, or set reduce_zero_label=False if 0 is a '
            'class, or correct the classes and num_classes in the config'
        )
    if classes <= 2:
        return 'this looks like a mask in grey values: write 0 for background and 1 for the object'
    return (
        f'write class ids from 0 to {classes - 1} and 255 for ignored pixels (are these label ids instead of train '
        'ids?), or correct the classes and num_classes in the config'
    )
