"""Read Pascal VOC's colour masks, in ``SegmentationClass``, with ``ImageSets/Segmentation`` and ``labelmap.txt``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..checks.listing import is_image, names_below
from .annotations import Annotations, Colour, Images, read_text, split_of

MASKS = 'SegmentationClass'
VOID: Colour = (224, 224, 192)
_CLASSES = (
    'background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
    'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip


def colour_of(index: int) -> Colour:
    """VOC's colour of a class id: the bits of the id, spread over the three channels from the top bit down."""
    return tuple(sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))


def palette_of(classes: Sequence[str], given: Mapping[str, Colour] | None = None) -> list[Colour]:
    """The given colours of classes, or else VOC's, with black for the background only."""
    first = 0 if 'background' in classes else 1
    colours = [colour_of(index + first) for index in range(len(classes))]
    if 'background' in classes:
        at = classes.index('background')
        colours = [*colours[1 : at + 1], colours[0], *colours[at + 1 :]]
    return [(given or {}).get(name, colour) for name, colour in zip(classes, colours, strict=True)]


def read(files: list[Path], src: Path, images: Images, names: list[str] | None = None) -> Annotations:
    """Read the colour masks of one folder ``SegmentationClass``.

    The colours are those of ``labelmap.txt`` (CVAT and Datumaro write it), or else the 21 of Pascal VOC.
    """
    folder, *others = files
    if others:
        raise DataError(
            f'{src} holds several folders {MASKS}, such as {folder} and {others[0]}; name one data set as SRC'
        )
    root = folder.parent
    labelmap = next((path for path in (root / 'labelmap.txt', src / 'labelmap.txt') if path.is_file()), None)
    classes, palette = _labelmap(labelmap)
    first = classes[0] if classes[0] == 'background' or palette[classes[0]] == (0, 0, 0) else None
    result = Annotations(classes, [], palette, background=first)
    splits = _splits(root / 'ImageSets/Segmentation')
    for path in names_below(str(folder), folders=False):
        if not is_image(path):
            continue
        below = Path(path).relative_to(folder)
        name = below.with_suffix('').as_posix()
        split = splits.get(name) if splits else None
        if splits and split is None:
            result.notes.note('masks that no file of ImageSets/Segmentation lists, left out', str(below))
            continue
        result.items.append(images.item(name, below.as_posix(), near=root / 'JPEGImages', split=split, colours=path))
    listed = {item.where.rpartition('.')[0] for item in result.items}
    for name in splits.keys() - listed:
        result.notes.note('names in ImageSets/Segmentation without a mask', name)
    return result


def _splits(folder: Path) -> dict[str, str]:
    """Name to split, of the files that state one, such as train.txt; trainval.txt and default.txt do not."""
    found = {}
    for path in sorted(folder.glob('*.txt')):
        if split := split_of([path.stem]):
            found.update({line.strip(): split for line in read_text(path).splitlines() if line.strip()})
    return found


def _labelmap(path: Path | None) -> tuple[list[str], dict[str, Colour]]:
    """Read lines ``name:r,g,b:parts:actions``; the background comes first."""
    if path is None:
        return list(_CLASSES), {name: colour_of(index) for index, name in enumerate(_CLASSES)}
    palette: dict[str, Colour] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith('#'):
            continue
        name, _, rest = line.partition(':')
        try:
            colour = tuple(int(value) for value in rest.split(':')[0].split(','))
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise ValueError
        except ValueError:
            raise DataError(f'{path}, line {number}: expected NAME:R,G,B:: but found {line!r}') from None
        if colour in palette.values():
            raise DataError(f'{path}, line {number}: two classes have the colour {colour}; give each its own')
        palette[name.strip()] = colour
    if not palette:
        raise DataError(f'{path}: no class; expected lines NAME:R,G,B::')
    first = next((name for name, colour in palette.items() if colour == (0, 0, 0) or name == 'background'), None)
    return sorted(palette, key=lambda name: name != first), palette


def ids_of(colours: np.ndarray, table: dict[Colour, int]) -> tuple[np.ndarray, dict[Colour, int]]:
    """Map an image of colours (H, W, 3), uint8, to ids (H, W), uint8; also return unknown colours and their pixels."""
    codes = colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    known, at = np.unique(codes, return_inverse=True)
    rgb = [(int(code) >> 16, int(code) >> 8 & 255, int(code) & 255) for code in known]
    ids = np.array([table.get(colour, 255) for colour in rgb], np.uint8)
    pixels = np.bincount(at.ravel(), minlength=len(rgb))
    unknown = {colour: int(count) for colour, count in zip(rgb, pixels, strict=True) if colour not in table}
    return ids[at].reshape(codes.shape), unknown
