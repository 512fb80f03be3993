"""Decode label files, and map their values to class ids as mmseg does."""

from collections.abc import Iterable, Mapping

import mmcv
import numpy as np
from PIL import Image

from .headers import read_header

_CITYSCAPES_IDS = 33


class LabelError(ValueError):
    """A file that is not a usable label; ``kind`` of fault, and ``problem`` and ``remedy`` as clauses."""

    def __init__(self, kind: str, problem: str, remedy: str):
        super().__init__(f'{problem}; {remedy}')
        self.kind, self.problem, self.remedy = kind, problem, remedy


def decode_label(data: bytes, flag: str = 'unchanged', backend: str = 'pillow') -> np.ndarray:
    """Decode a label file to its values (H, W), uint8, as mmseg's ``LoadAnnotations`` does.

    Raises:
        LabelError: the file is cut off, damaged or a JPEG, has several channels, or has values of more than 8 bits,
            which mmseg would truncate.
    """
    try:
        header = read_header(data)
        label = None if header.format == 'jpeg' else mmcv.imfrombytes(data, flag=flag, backend=backend)
    except Exception as error:  # decoders may raise anything on broken data
        clear = isinstance(error, ValueError | Image.DecompressionBombError)
        reason = error if clear else 'it is damaged or not an image'
        raise LabelError('unreadable label', f'the label cannot be read ({reason})', 'restore it') from error
    if header.format == 'jpeg':
        raise LabelError(
            'lossy label', 'the label is a JPEG, which changes class ids', 'create it again as PNG from the source'
        )
    if label is None:
        raise LabelError('unreadable label', 'the label cannot be read (it is damaged or not an image)', 'restore it')
    if label.ndim != 2 and label.shape[2] > 1:
        colours = label[..., :3]
        if (colours == colours[..., :1]).all():
            problem, remedy = f'the label has {label.shape[2]} channels', 'they are equal: save one of them as PNG'
        else:
            problem = f'the label has {label.shape[2]} channels with colours instead of class ids'
            remedy = 'convert the colours to class ids and save them as a grey-scale or palette PNG'
        raise LabelError('channels of a label', problem, remedy)
    ids = label.reshape(label.shape[:2]).astype(np.uint8)
    if label.dtype not in (np.uint8, bool) and (label.reshape(ids.shape) != ids).any():
        raise LabelError(
            'depth of a label',
            f'the label has values from {label.min()} to {label.max()} ({label.dtype}), but mmseg keeps only 8 bits',
            'save class ids from 0 to 255 as an 8-bit PNG',
        )
    return ids


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
    """Suggest why labels hold ``values`` that are not class ids below ``classes``, and what to do."""
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
    if classes <= 2:
        return 'this looks like a mask in grey values: write 0 for background and 1 for the object'
    return (
        f'write class ids from 0 to {classes - 1} and 255 for ignored pixels (are these label ids instead of train '
        'ids?), or correct the classes and num_classes in the config'
    )
