"""Write a config for images and labels in ``images/{train,val}`` and ``labels/{train,val}``, with fitting sizes."""

import os
import pprint
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..utils.config import load_config
from ..utils.files import atomic_write
from .checks.images import ImageError, check_image
from .checks.listing import is_image, names_below

_SAMPLE = 100  # images whose sizes are read
_LONGEST = 2048  # pixels a side to which images are resized at most
_CROP = 512
_LAPTOP = 320  # longer side of images for training on a CPU
# GB of GPU memory for a crop of 512 x 512, and for everything else. D1 needs 0.45 on an H200 (docs/benchmarks.md), and
# 1.1 where the fused kernels do not run.
_PER_CROP, _FIXED, _MOST_CROPS = 1.1, 2.0, 16

_HEAD = '''"""{network} + UperNet on {root}.

Written by tools/prepare_data.py for {device} and {counts}.
python tools/train.py {path} --amp
"""

_base_ = {base!r}

classes = {classes}
palette = {palette}
size = {size}  # width and height to which images are resized
crop_size = {crop}  # height and width of the training crops{windows}: multiples of 16
'''
_GPU_MODEL = """
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    decode_head=dict(num_classes=len(classes)),
    auxiliary_head=dict(num_classes=len(classes)),{test_cfg}
)
"""
_LAPTOP_MODEL = """
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    decode_head=dict(num_classes=len(classes), loss_decode=dict(class_weight=None)),
)
"""
_SLIDE = """
    test_cfg=dict(mode='slide', crop_size=crop_size, stride={stride}),"""
_PIPELINES = """train_pipeline = [
    dict(type='LoadCheckedImage'),
    dict(type='LoadCheckedAnnotations'),
    dict(type='RandomResize', scale=size, ratio_range={ratios}, keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=16),  # VOLO works on multiples of 16
    dict(type='LoadCheckedAnnotations'),
    dict(type='PackSegInputs'),
]
"""
_TTA = """tta_pipeline = [  # for test.py --aug-test
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(round(size[0] * r), round(size[1] * r)), keep_ratio=True)
                for r in {scales}
            ],
            [dict(type='ResizeToMultiple', size_divisor=16)],
            [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [dict(type='LoadCheckedAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
"""
_DATA = """data = dict(
    type='BaseSegDataset',
    data_root={root!r},
    metainfo=dict(classes=classes, palette=palette),
    seg_map_suffix='.png',
)
"""
_TEST_DATA = "test_data = dict(data_prefix=dict(img_path='images/test', seg_map_path='labels/test'), **data)\n"
_LOADER = '{split}_dataloader = dict({batch}dataset=dict(img_suffix={suffix!r}, pipeline={pipeline}, **{source}))\n'
_MIXED_LOADER = """{split}_dataloader = dict(
    {batch}dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                img_suffix=suffix,
                data_prefix=dict(img_path='images/{split}', seg_map_path='labels/{split}'),
                pipeline={pipeline},
                **data,
            )
            for suffix in {suffixes}
        ],
    ),
)
"""


@dataclass(frozen=True)
class _Split:
    images: list[str]
    suffixes: tuple[str, ...]


def check_new(path: str | Path) -> None:
    """Raise ConfigError if a config cannot be written to ``path``: it exists, or is no .py file."""
    if Path(path).exists():
        raise ConfigError(f'{path} exists; nothing was changed: choose another name with --config, or delete it')
    if not re.fullmatch(r'[A-Za-z0-9_]\w*\.py', Path(path).name):
        raise ConfigError(f'{path}: the name of a config consists of letters, digits and _, and ends in .py')


def gpu_memory() -> float:
    """Memory of the first GPU of this machine in GB; 0 if there is none."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0


def write_config(
    path: str | Path,
    data_root: str | Path,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    bases: str | Path,
    memory: float | None = None,
) -> list[str]:
    """Write a config, and return the commands that check the data, train, and test.

    Args:
        path: file to write.
        data_root: the data set, as the config names it.
        classes, palette: names and RGB colours of the classes.
        bases: folder of this package's configs.
        memory: GB of the GPU that will train; 0 for a CPU; by default that of this machine.

    Raises:
        ConfigError: ``path`` exists, or is no name for a config.
        DataError: images or labels are missing, or an image cannot be read.
    """
    check_new(path)
    memory = gpu_memory() if memory is None else memory
    splits = {split: found for split in ('train', 'val', 'test') if (found := _list(Path(data_root), split))}
    wide, high = _usual_size(splits['train'].images)
    text = _text(
        str(path), f'{Path(data_root).as_posix()}/', classes, palette, (wide, high), splits, memory, Path(bases)
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(text, encoding='utf-8')
    last = load_config(str(path)).train_cfg.max_iters
    name = Path(path).stem
    return [
        f'python tools/check_data.py {path}',
        f'python tools/train.py {path} --amp',
        f'python tools/test.py {path} work_dirs/{name}/iter_{last}.pth',
    ]


def _list(root: Path, split: str) -> _Split | None:
    images = [
        path for path in names_below(str(root / 'images' / split), folders=False) if is_image(os.path.basename(path))
    ]
    if not images:
        if split == 'test':
            return None
        raise DataError(f'{root / "images" / split}: no image; expected images/{{train,val}} and labels/{{train,val}}')
    if not (root / 'labels' / split).is_dir():
        if split == 'test':
            return None
        raise DataError(f'{root / "labels" / split}: no such folder; expected PNG files of class ids there')
    suffixes = Counter(os.path.splitext(path)[1] for path in images)
    return _Split(images, tuple(suffix for suffix, _ in suffixes.most_common()))


def _usual_size(images: Sequence[str]) -> tuple[int, int]:
    """Median width and height, of images that are turned as most are."""
    sizes = []
    for index in np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(int)):
        try:
            sizes.append(check_image(Path(images[index]).read_bytes(), 'color', 'cv2').shape)
        except ImageError as error:
            raise DataError(f'{images[index]}: {error}') from error
    heights, widths = np.array(sizes).T
    long, short = (int(np.median(pick(heights, widths))) for pick in (np.maximum, np.minimum))
    return (long, short) if np.mean(widths >= heights) >= 0.5 else (short, long)


def _sixteens(value: float, most: float = float('inf')) -> int:
    """The multiple of 16 from 32 to ``most`` that is next above a value."""
    return int(max(32, min(most, -(-value // 16) * 16)))


def _text(path, root, classes, palette, usual, splits, memory, bases) -> str:
    shrink = min(1, (_LONGEST if memory else _LAPTOP) / max(usual))
    width, height = (max(32, round(side * shrink)) for side in usual)
    if memory:
        crop = _sixteens(height, _CROP), _sixteens(width, _CROP)
        crops = (memory - _FIXED) / (_PER_CROP * crop[0] * crop[1] / _CROP**2)
        batch = next((size for size in (16, 8, 4, 2) if size <= crops), 2)
        network, base, device = 'VOLO-D1', 'volo_d1_camvid.py', f'a GPU of {memory:.0f} GB'
        ratios, scales = (0.5, 2.0), (0.75, 1, 1.25, 1.5, 1.75)
    else:
        # What learnt most in ten minutes on two cores (docs/benchmarks.md).
        crop, batch = (_sixteens(0.72 * height), _sixteens(0.72 * width)), 4
        network, base, device = 'A small VOLO', 'from_scratch/volo_small_camvid.py', 'a CPU'
        ratios, scales = (0.75, 1.2), (0.75, 0.9, 1, 1.2, 1.35)
    slide = memory and (width > crop[1] or height > crop[0])
    model = _LAPTOP_MODEL
    if memory:
        stride = crop[0] * 2 // 3, crop[1] * 2 // 3
        model = _GPU_MODEL.format(test_cfg=_SLIDE.format(stride=stride) if slide else '')
    head = _HEAD.format(
        network=network,
        root=root.rstrip('/'),
        counts=', '.join(f'{len(found.images)} {split} images' for split, found in splits.items()),
        device=device,
        path=path,
        base=Path(os.path.relpath(bases / base, Path(path).absolute().parent)).as_posix(),
        classes=_layout(tuple(classes)),
        palette=_layout([tuple(colour) for colour in palette]),
        size=(width, height),
        crop=crop,
        windows=' and test windows' if slide else '',
    )
    pipelines = _PIPELINES.format(ratios=ratios)
    if shrink < 1 or not memory:
        pipelines += _TTA.format(scales=scales)
    loaders = ''.join(_loader(split, found, batch) for split, found in splits.items())
    if 'test' not in splits:
        loaders += 'test_dataloader = val_dataloader\n'
    return head + model + pipelines + _DATA.format(root=root) + loaders


def _layout(value: object) -> str:
    return pprint.pformat(value, width=100, compact=True)


def _loader(split: str, found: _Split, batch: int) -> str:
    pipeline = 'train_pipeline' if split == 'train' else 'test_pipeline'
    parts = dict(split=split, pipeline=pipeline, batch='' if split != 'train' else f'batch_size={batch}, ')
    if len(found.suffixes) > 1:
        return _MIXED_LOADER.format(suffixes=found.suffixes, **parts).replace(', dataset=', ',\n    dataset=')
    before, source = (_TEST_DATA, 'test_data') if split == 'test' else ('', 'data')
    return before + _LOADER.format(suffix=found.suffixes[0], source=source, **parts)
