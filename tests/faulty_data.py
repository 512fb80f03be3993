"""A small data set of random images and labels, and more than forty ways to spoil it."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

CLASSES = ('road', 'sky', 'tree', 'car')
HEIGHT, WIDTH = 24, 40
PIPELINE = [dict(type='LoadCheckedImage'), dict(type='LoadCheckedAnnotations'), dict(type='PackSegInputs')]
IMAGE, LABEL = 'images/train/3.png', 'labels/train/3.png'


def random_image(seed: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def random_label(seed: int, low: int = 0, high: int = len(CLASSES), shape: tuple = (HEIGHT, WIDTH)) -> np.ndarray:
    """Class ids from ``low`` to ``high - 1``, and 255 in the first two rows."""
    ids = np.random.default_rng(seed).integers(low, high, shape).astype(np.uint8)
    ids[:2] = 255
    return ids


def write(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_labels(root: Path, make: Callable[[int], np.ndarray]) -> None:
    """Write all training labels anew: ``make`` is called with the number of each."""
    for i in range(6):
        write(root / f'labels/train/{i}.png', make(i))


def write_data(root: Path) -> Path:
    """Write six valid images with labels for training and three for validation."""
    for split, count, first in (('train', 6, 0), ('val', 3, 100)):
        for i in range(count):
            write(root / f'images/{split}/{i}.png', random_image(first + i))
            write(root / f'labels/{split}/{i}.png', random_label(first + i))
    return root


def dataset_config(root: Path, split: str = 'train', **options) -> dict:
    prefix = dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}')
    cfg = dict(type='BaseSegDataset', data_root=str(root), data_prefix=prefix, img_suffix='.png', pipeline=PIPELINE)
    return {**cfg, 'metainfo': dict(classes=CLASSES), **options}


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def to_jpeg(folder: Path) -> None:
    """Store the images of a folder as JPEG, whatever the suffix says."""
    for file in folder.iterdir():
        with Image.open(file) as image:
            image.load()
        image.save(file, 'JPEG')


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def tiff(array: np.ndarray) -> bytes:
    """An image (H, W, bands) as a TIFF with a tag of GeoTIFF. PIL and OpenCV write at most four bands."""
    bands = array.shape[2]
    tags = ImageFileDirectory_v2()
    tags[256], tags[257] = array.shape[1::-1]
    tags[258], tags[339] = (8 * array.itemsize,) * bands, ({'u': 1, 'i': 2, 'f': 3}[array.dtype.kind],) * bands
    tags[259], tags[262], tags[277], tags[278], tags[284] = 1, 2, bands, len(array), 1
    tags[273], tags[279] = 0, array.nbytes  # PIL adds the end of the tags to the offset of the pixels
    tags[338] = (0,) * (bands - 3)
    tags.tagtype[33550], tags[33550] = 12, (1.0, 1.0, 0.0)
    file = io.BytesIO()
    tags.save(file)
    return file.getvalue() + array.tobytes()


def bands(count: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, count)).astype(dtype)


class Fault(NamedTuple):
    """One way to spoil the data set.

    Attributes:
        spoil: changes the valid data set below a folder.
        path: the file or folder that the report must name.
        kind: the kind of fault that the report must state.
        quick: whether the quick check before training finds it too.
        options: options of the data set's config.
    """

    spoil: Callable[[Path], object]
    path: str
    kind: str
    quick: bool = True
    options: dict = {}


def _cut_off(path: str, percent: int, jpeg: bool = False) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        if jpeg:
            to_jpeg((root / path).parent)
        rewrite(root / path, lambda content: content[: max(9, len(content) * percent // 100)])

    return spoil


def _flip(path: str, at: int) -> Callable[[Path], None]:
    """Flip one bit of the byte at a position, counted from the end where negative."""

    def change(content: bytes) -> bytes:
        i = at % len(content)
        return content[:i] + bytes([content[i] ^ 0x10]) + content[i + 1 :]

    return lambda root: rewrite(root / path, change)


def _damage_jpeg_header(root: Path) -> None:
    to_jpeg(root / 'images/train')
    rewrite(root / IMAGE, lambda content: content.replace(b'\xff\xc0\x00\x11', b'\xff\xc0\x00\x10', 1))


def _turn(root: Path) -> None:
    to_jpeg(root / 'images/train')
    write(root / IMAGE, random_image(3), format='JPEG', exif=exif(6))


def _replace(path: str, kind: str) -> Callable[[Path], None]:
    """Put a folder or a broken link in the place of a file."""

    def spoil(root: Path) -> None:
        (root / path).unlink()
        (root / path).mkdir() if kind == 'folder' else (root / path).symlink_to(root / 'gone.png')

    return spoil


def _list_missing_image(root: Path) -> None:
    (root / 'list.txt').write_text('1\n2\n9\n')
    write(root / 'labels/train/9.png', random_label(9))


def _replace_folder(kind: str) -> Callable[[Path], None]:
    """Remove the training images and put an empty folder or a file in their place, or nothing."""

    def spoil(root: Path) -> None:
        shutil.rmtree(root / 'images/train')
        if kind == 'folder':
            (root / 'images/train').mkdir()
        elif kind == 'file':
            (root / 'images/train').write_text('')

    return spoil


def _validate_on_train(root: Path) -> None:
    for kind in ('images', 'labels'):
        shutil.rmtree(root / kind / 'val')
        (root / kind / 'val').symlink_to(root / kind / 'train')


def _forbid_reading(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip('root reads every file')
    (root / LABEL).chmod(0)


def write_masks(root: Path, on: int) -> None:
    write_labels(root, lambda i: np.uint8(random_label(i, high=2) > 0) * np.uint8(on))


def _label(array: np.ndarray, **options) -> Callable[[Path], Path]:
    return lambda root: write(root / LABEL, array, **options)


def _labels(make: Callable[[int], np.ndarray]) -> Callable[[Path], None]:
    return lambda root: write_labels(root, make)


def _text(path: str, text: str) -> Callable[[Path], int]:
    return lambda root: (root / path).write_text(text)


def _bytes(path: str, content: bytes) -> Callable[[Path], int]:
    return lambda root: (root / path).write_bytes(content)


def _nothing(root: Path) -> None:
    pass


BINARY = dict(metainfo=dict(classes=('background', 'object')))
FIRST, BAD_IMAGE, BAD_LABEL = 'labels/train/0.png', 'unreadable image', 'unreadable label'
_ID = random_label(3)
FAULTS = {
    'JPEG with a damaged header': Fault(_damage_jpeg_header, IMAGE, BAD_IMAGE),
    'empty image file': Fault(_text(IMAGE, ''), IMAGE, BAD_IMAGE),
    'empty label file': Fault(_text(LABEL, ''), LABEL, BAD_LABEL),
    'text in place of an image': Fault(_text(IMAGE, '<html>404 not found</html>'), IMAGE, BAD_IMAGE),
    'text in place of a label': Fault(_text(LABEL, 'version https://git-lfs.github.com/spec/v1'), LABEL, BAD_LABEL),
    'label of colours': Fault(_label(random_image(9)), LABEL, 'channels of a label'),
    'label of three equal channels': Fault(_label(np.stack([_ID] * 3, axis=2)), LABEL, 'channels of a label'),
    'label with alpha': Fault(_label(np.stack([_ID, random_label(4)], axis=2)), LABEL, 'channels of a label'),
    '16-bit label': Fault(_label(_ID.astype(np.uint16) * 1000), LABEL, 'depth of a label'),
    'JPEG label': Fault(_label(_ID, format='JPEG'), LABEL, 'lossy label'),
    'sizes swapped': Fault(_label(random_label(3, shape=(WIDTH, HEIGHT))), LABEL, 'size'),
    'label one pixel too small': Fault(_label(_ID[1:]), LABEL, 'size'),
    'image turned by EXIF': Fault(_turn, LABEL, 'size'),
    'class beyond the last': Fault(_label(random_label(3, high=len(CLASSES) + 1)), LABEL, 'label value'),
    'label ids instead of train ids': Fault(_labels(lambda i: random_label(i, 4, 34)), FIRST, 'label value'),
    'reduce_zero_label missing': Fault(_labels(lambda i: random_label(i, 0, len(CLASSES) + 1)), FIRST, 'label value'),
    'reduce_zero_label extra': Fault(_nothing, FIRST, 'reduce_zero_label', False, dict(reduce_zero_label=True)),
    'mask of 0 and 255': Fault(lambda root: write_masks(root, 255), FIRST, 'mask', options=BINARY),
    'mask of 0 and 254': Fault(lambda root: write_masks(root, 254), FIRST, 'label value', options=BINARY),
    'all ignored': Fault(_labels(lambda i: np.full_like(_ID, 255)), FIRST, 'no labelled pixel'),
    'all ignored by reduce_zero_label': Fault(
        _labels(lambda i: np.zeros_like(_ID)), FIRST, 'no labelled pixel', options=dict(reduce_zero_label=True)
    ),
    'missing label': Fault(lambda root: (root / LABEL).unlink(), LABEL, 'missing label'),
    'folder in place of a label': Fault(_replace(LABEL, 'folder'), LABEL, 'missing label'),
    'broken link in place of a label': Fault(_replace(LABEL, 'link'), LABEL, 'missing label'),
    'broken link in place of an image': Fault(_replace(IMAGE, 'link'), IMAGE, 'missing image', quick=False),
    'folder in place of an image': Fault(_replace(IMAGE, 'folder'), IMAGE, 'missing image', quick=False),
    'listed image that is not there': Fault(
        _list_missing_image, 'images/train/9.png', 'missing image', options=dict(ann_file='list.txt')
    ),
    'list that is not there': Fault(_nothing, 'list.txt', 'empty', options=dict(ann_file='list.txt')),
    'empty list': Fault(_text('list.txt', ''), 'images/train', 'empty', options=dict(ann_file='list.txt')),
    'wrong suffix of labels': Fault(_nothing, 'labels/train', 'missing label', options=dict(seg_map_suffix='_gt.png')),
    'wrong suffix of images': Fault(_nothing, 'images/train', 'empty', options=dict(img_suffix='.jpg')),
    'empty folder of images': Fault(_replace_folder('folder'), 'images/train', 'empty'),
    'no folder of images': Fault(_replace_folder('nothing'), 'images/train', 'empty'),
    'a file in place of the folder of images': Fault(_replace_folder('file'), 'images/train', 'empty'),
    'no folder of labels': Fault(lambda root: shutil.rmtree(root / 'labels/train'), 'labels/train', 'missing label'),
    'labels not in the config': Fault(
        _nothing, 'images/train', 'missing label', options=dict(data_prefix=dict(img_path='images/train'))
    ),
    'training image in val': Fault(
        lambda root: shutil.copy(root / 'images/train/4.png', root / 'images/val/1.png'),
        'images/val/1.png',
        'duplicate',
        quick=False,
    ),
    'val is train': Fault(_validate_on_train, 'images/val/0.png', 'duplicate', quick=False),
    'label that ends in .PNG': Fault(
        lambda root: (root / LABEL).rename((root / LABEL).with_suffix('.PNG')), LABEL, 'missing label'
    ),
    'label in another case': Fault(
        lambda root: [
            (root / k / 'train/3.png').rename(root / k / f'train/{n}.png')
            for k, n in (('images', 'A'), ('labels', 'a'))
        ],
        'labels/train/A.png',
        'missing label',
    ),
    'image of six bands': Fault(_bytes(IMAGE, tiff(bands(6))), IMAGE, BAD_IMAGE),
    'image of float values': Fault(_bytes(IMAGE, tiff(bands(3, np.float32))), IMAGE, BAD_IMAGE),
    "macOS's notes in place of an image": Fault(_bytes(IMAGE, b'\0\5\x16\7\0\2\0\0Mac OS X'), IMAGE, BAD_IMAGE),
    "macOS's notes in place of a label": Fault(_bytes(LABEL, b'\0\5\x16\7\0\2\0\0Mac OS X'), LABEL, BAD_LABEL),
    'link to the folder itself': Fault(
        lambda root: (root / 'images/train/again').symlink_to(root / 'images/train'), 'images/train/again', 'folder'
    ),
    'unreadable for permissions': Fault(_forbid_reading, LABEL, BAD_LABEL),
}
for _percent in (1, 25, 50, 90, 99):
    for _path, _kind in ((IMAGE, BAD_IMAGE), (LABEL, BAD_LABEL)):
        FAULTS[f'{_kind} cut off at {_percent} %'] = Fault(_cut_off(_path, _percent), _path, _kind)
    FAULTS[f'JPEG cut off at {_percent} %'] = Fault(_cut_off(IMAGE, _percent, jpeg=True), IMAGE, BAD_IMAGE)
for _at in (18, 60, 200, -6):
    FAULTS[f'PNG image with a flipped bit at {_at}'] = Fault(_flip(IMAGE, _at), IMAGE, BAD_IMAGE)
    FAULTS[f'PNG label with a flipped bit at {_at}'] = Fault(_flip(LABEL, _at), LABEL, BAD_LABEL)
