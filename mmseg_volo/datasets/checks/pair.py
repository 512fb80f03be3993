"""Check the content of an image and its label: both readable, of the same size, with valid label values."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from ...errors import DataError
from ...utils.files import sha256
from .bands import BandsInfo, check_bands, dropped_bands
from .images import ImageError, check_image
from .labels import LabelError, decode_label, label_table, likely_cause
from .listing import FILE_REMEDY, Finding, Pair, Rules, Source

_NAMED = 5  # values that a finding lists
_DEPTH_REMEDY = (
    'save the image with 8 bits, scaled to 0 to 255, or load all bits: LoadImageFromFile with color_type='
    "'unchanged' and to_float32=True (of a TIFF: LoadBands), and mean and std of data_preprocessor in the range of the "
    'values'
)
_BANDS_REMEDY = (
    'read all of them with LoadBands, with in_channels of the backbone and mean and std of data_preprocessor for so '
    'many, if they are more than colours and transparency'
)


@dataclass
class PairResult:
    """Result for one pair: pixels of each raw label value (256,) int64 or None if unread, hash of the image's bytes.

    ``bands`` is what an image has that LoadBands can read.
    """

    pair: Pair
    findings: list[Finding] = field(default_factory=list)
    values: np.ndarray | None = None
    digest: bytes = b''
    bands: BandsInfo | None = None


def check_pair(pair: Pair, rules: Rules) -> PairResult:
    """Check an image and its label; what ``rules`` has no decoder for is not read. Faults are returned, not raised."""
    result, (image, label) = PairResult(pair), pair

    def add(kind: str, path: str, problem: str, remedy: str, fault: bool = True) -> None:
        result.findings.append(Finding(rules.split, kind, path, problem, remedy, fault))

    shape, orientation = None, 1
    try:
        if rules.bands:  # such files may be larger than the memory
            result.digest = bytes.fromhex(sha256(image))
            result.bands = check_bands(image, *rules.bands)
            shape = result.bands.shape
        else:
            data = Path(image).read_bytes()
            result.digest = hashlib.blake2b(data, digest_size=16).digest()
        if rules.image:
            shape, orientation, damage, loss = check_image(data, *rules.image)
            if damage:
                problem = f'the decoder says that the image is damaged ({damage})'
                add('damaged image', image, problem, 'look at it, and replace it if it is', fault=False)
            if loss:
                add('depth of an image', image, loss, _DEPTH_REMEDY, fault=False)
            if dropped := dropped_bands(data, rules.image[0]):
                add('bands of an image', image, dropped, _BANDS_REMEDY, fault=False)
    except ImageError as error:
        add('unreadable image', image, error.problem, error.remedy)
    except DataError as error:  # of LoadBands
        problem, _, remedy = str(error).removeprefix(f'{image}: ').partition('; ')
        add('unreadable image', image, problem, remedy)
    except OSError as error:
        add('unreadable image', image, f'the image cannot be read ({_reason(error)})', FILE_REMEDY)
    if label is None or rules.label is None:
        return result
    try:
        ids = decode_label(Path(label).read_bytes(), rules.label[1], limited=rules.label[0] == 'LoadAnnotations')
    except LabelError as error:
        add(error.kind, label, error.problem, error.remedy)
        return result
    except OSError as error:
        add('unreadable label', label, f'the label cannot be read ({_reason(error)})', FILE_REMEDY)
        return result

    result.values = _histogram(ids)
    if shape is not None and shape != ids.shape:
        sizes = f'the label is {_size(ids.shape)} pixels, its image {image} {_size(shape)}'
        rotated = ' after rotation by its EXIF orientation' if orientation != 1 else ''
        add('size', label, sizes + rotated, 'make both the same size')
    elif orientation != 1:
        problem = f'its EXIF orientation ({orientation}) rotates the image, but not its label {label}'
        add('turned image', image, problem, 'save the image rotated, if they do not fit', fault=False)
    table = label_table(rules.reduce_zero_label, rules.label_map)
    known = table == rules.ignore_index
    if rules.classes is not None:
        wrong = np.flatnonzero(result.values * ~(known | (table < rules.classes)))
        if len(wrong):
            shown = ', '.join(f'{value} ({result.values[value]} pixels)' for value in wrong[:_NAMED])
            shown += ', ...' if len(wrong) > _NAMED else ''
            first = int(rules.reduce_zero_label)
            problem = f'label value {shown} is none of the {rules.classes} classes'
            if not rules.label_map:
                problem += f' ({first} to {rules.classes - 1 + first} in the file, {rules.ignore_index} is ignored)'
            add('label value', label, problem, likely_cause(table[wrong].tolist(), rules.classes, bool(first)))
    if not (result.values * ~known).any():
        remedy = 'correct the label if that is not intended'
        add('no labelled pixel', label, 'every pixel of the label is ignored', remedy, fault=False)
    return result


def _size(shape: Sequence[int]) -> str:
    return f'{shape[1]} x {shape[0]}'


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _histogram(ids: np.ndarray) -> np.ndarray:
    """Number of pixels of each value, (256,) int64; several times as fast as ``np.bincount``."""
    flat = ids.ravel()
    # OpenCV counts in float32, exact up to 2^24.
    parts = [flat[i : i + 2**24] for i in range(0, len(flat), 2**24)]
    return sum(cv2.calcHist([part], [0], None, [256], [0, 256]).ravel().astype(np.int64) for part in parts)


def faults_of_all(source: Source, results: Sequence[PairResult]) -> list[Finding]:
    """Find faults that only show in all labels together: all pixels ignored, or only the values 0 and 255."""
    read = [result for result in results if result.values is not None]
    rules, values = source.rules, sum(result.values for result in read)
    if not read:
        return []
    label, where = read[0].pair[1], source.label_dir or 'this data set'
    table = label_table(rules.reduce_zero_label, rules.label_map)
    if not values[table != rules.ignore_index].any():
        problem = f'every pixel of this label and of all others in {where} is ignored'
        cause = 'reduce_zero_label=True ignores 0' if rules.reduce_zero_label else 'write class ids from 0'
        return [Finding(rules.split, 'no labelled pixel', label, problem, f'{cause}: check labels and config')]
    if (rules.classes or 0) > 1 and rules.ignore_index == 255 and set(np.flatnonzero(values)) == {0, 255}:
        problem = f'this label and all others in {where} hold only 0 and 255, and 255 is ignored'
        return [Finding(rules.split, 'mask', label, problem, 'write 0 for background and 1 for the object')]
    return []


def shifted_labels(source: Source, results: Sequence[PairResult]) -> list[Finding]:
    """Find labels that ``reduce_zero_label`` shifts wrongly: they have all values from 0, but not the highest one."""
    rules, values = source.rules, sum(result.values for result in results if result.values is not None)
    if not rules.reduce_zero_label or rules.classes is None or rules.label_map or isinstance(values, int):
        return []
    if values[rules.classes] or not values[: rules.classes].all():
        return []
    label = next(result.pair[1] for result in results if result.values is not None and result.values[0])
    problem = f'the labels hold 0 to {rules.classes - 1}, but reduce_zero_label=True ignores 0 and shifts the others'
    return [Finding(rules.split, 'reduce_zero_label', label, problem, 'set reduce_zero_label=False if 0 is a class')]
