"""Draw the label of one image, and put both into the result."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from ...errors import DataError
from ...utils.files import link_or_copy
from ..checks.images import ImageError, check_image
from .annotations import Colour, Item, Notes, Shape, read_json
from .shapes import ShapeError, Size
from .voc import ids_of

IGNORE = 255
_SHOWN = 3  # unknown colours that a fault names
# EXIF orientation to what turns the stored pixels (H, W) upright.
_UPRIGHT = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}


@dataclass(frozen=True)
class Plan:
    """How items are drawn.

    Attributes:
        root: folder of the result.
        ids: label id of each class name of the annotation.
        palette: label id of each colour, for masks of colours.
        uncovered: label id of pixels without a shape.
        small_on_top: draw large shapes first, whatever their order.
    """

    root: Path
    ids: Mapping[str, int]
    palette: Mapping[Colour, int]
    uncovered: int
    small_on_top: bool


@dataclass
class Drawn:
    """What became of an item: notes and faults, and the pixels of each label id (256,). With a fault, no file."""

    split: str
    notes: Notes = field(default_factory=Notes)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))


def draw(item: Item, plan: Plan) -> Drawn:
    """Write the label of an item, and link or copy its image.

    Raises:
        DataError: a file cannot be written or read.
    """
    result = Drawn(item.split)
    try:
        data = _content(item)
        upright = check_image(data, 'color', 'cv2')
        if upright.damage:
            result.notes.note('images whose decoder warns of damage', f'{item.where}: {upright.damage}')
        label = _label(item, plan, upright.shape, upright.orientation, result.notes)
    except ImageError as error:
        result.notes.fault('images that cannot be read', f'{item.image or item.embedded}: {error.reason}')
    except ShapeError as error:
        result.notes.fault('annotations that cannot be drawn', f'{item.where}: {error}')
    except OSError as error:
        raise DataError(
            f'{error.filename}: cannot be read ({error.strerror}); check permissions and the disk'
        ) from error
    if result.notes.faults:
        return result
    image, target = (plan.root / kind / item.split / item.name for kind in ('images', 'labels'))
    target = target.with_suffix('.png')
    try:
        for path in (image, target):
            path.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(cv2.imencode('.png', label)[1])
        if item.image:
            link_or_copy(item.image, image)
        else:
            image.write_bytes(data)
    except OSError as error:
        raise DataError(f'{error.filename}: not written ({error.strerror}); check space and permissions') from error
    result.pixels = np.bincount(label.ravel(), minlength=256)
    return result


def _content(item: Item) -> bytes:
    if item.image:
        return Path(item.image).read_bytes()
    try:
        return base64.b64decode(read_json(Path(item.embedded))['imageData'])
    except (TypeError, ValueError) as error:
        raise ImageError('imageData is not base64') from error


def _label(item: Item, plan: Plan, upright: Size, orientation: int, notes: Notes) -> np.ndarray:
    """Ids (H, W), uint8, as the image is loaded, that is, turned by EXIF."""
    stored = upright[::-1] if orientation >= 5 else upright
    colours = None
    if item.colours:
        colours = _colours(item.colours)
    stated = item.size if colours is None else colours.shape[:2]
    if stated not in (None, upright, stored):
        raise ShapeError(
            f'the annotation is for {stated[1]} x {stated[0]} pixels, the image has {upright[1]} x {upright[0]}; '
            'annotate the image that is here, or restore the one that was annotated'
        )
    turn = stated == stored != upright
    if colours is None:
        label = _draw_shapes(item, plan, stored if turn else upright, notes)
    else:
        label, unknown = ids_of(colours, plan.palette)
        if unknown:
            most = sorted(unknown.items(), key=lambda each: -each[1])
            shown = ', '.join(f'{colour} ({pixels} pixels)' for colour, pixels in most[:_SHOWN])
            more = f' and {len(most) - _SHOWN} more' if len(most) > _SHOWN else ''
            raise ShapeError(f'colours of no class: {shown}{more}; add them to labelmap.txt')
    if turn:
        notes.note('images turned by EXIF after the annotation: the label is turned too', item.where)
        return np.ascontiguousarray(_UPRIGHT[orientation](label))
    if orientation in _UPRIGHT and upright == stored:
        notes.note('images turned by EXIF, with an annotation that may be for either side: look at them', item.where)
    return label


def _colours(path: str) -> np.ndarray:
    """Read a mask as RGB (H, W, 3); palettes are applied."""
    pixels = cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ShapeError(f'the mask {path} is damaged or not an image')
    return pixels[..., ::-1]


def _draw_shapes(item: Item, plan: Plan, size: Size, notes: Notes) -> np.ndarray:
    label = np.full(size, plan.uncovered, np.uint8)
    covered, twice = np.zeros(size, bool), np.zeros(size, bool)
    drawn = _in_order(item.shapes, size, plan.small_on_top)
    for shape, (top, left, mask) in drawn:
        if not mask.any():
            notes.note('shapes without a pixel in the image', f'{item.where}: {shape.label}')
            continue
        place = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
        value = plan.ids[shape.label]
        twice[place] |= mask & covered[place] & (label[place] != value)
        label[place][mask] = value
        covered[place] |= mask
    if count := int(twice.sum()):
        percent = 100 * count / twice.size
        notes.note(
            'images with pixels in shapes of several classes: the last drawn counts', f'{item.where} {percent:.1f} %'
        )
    return label


def _in_order(shapes: tuple[Shape, ...], size: Size, small_on_top: bool):
    """Pairs of shape and mask, in the order in which they are drawn."""
    if not small_on_top:
        return ((shape, shape.draw(size)) for shape in shapes)
    masks = [(shape, shape.draw(size)) for shape in shapes]
    return sorted(masks, key=lambda pair: -int(pair[1].mask.sum()))
