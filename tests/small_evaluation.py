"""Tests of a model of random weights on a few drawn images, as tools/test.py runs them."""

import copy
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch
from mmengine.config import Config
from small_models import segmentor_config
from small_runs import small_config

from mmseg_volo.engine.runner import build_runner
from mmseg_volo.inference.options import set_inference_options, use_tta

OWN = dict(
    type='SegDataPreProcessor',
    mean=[90.0, 100.0, 110.0],
    std=[30.0, 20.0, 40.0],
    bgr_to_rgb=False,
    pad_val=40,
    test_cfg=dict(size_divisor=32),
)
ONE_VIEW = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[[dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]]),
]


def drawn_dataset(folder: Path, names: tuple[str, ...] = ('0.png', '1.png'), classes: int = 7, **arguments) -> dict:
    """Draw images and labels, whose sides are no multiples of 16; return the data set's config.

    Args:
        folder: its root, which gets the folders ``images`` and ``labels``.
        names: paths of the images below ``images``.
        classes: number of classes.
        arguments: of the data set.
    """
    rng = np.random.default_rng(len(str(folder)))
    for name in names:
        image, label = folder / 'images' / name, (folder / 'labels' / name).with_suffix('.png')
        for path, size, mode in ((image, (9, 6, 3), cv2.INTER_CUBIC), (label, (9, 6), cv2.INTER_NEAREST)):
            path.parent.mkdir(parents=True, exist_ok=True)
            values = rng.integers(0, min(classes, 256) if path is label else 256, size, np.uint8)
            cv2.imwrite(str(path), cv2.resize(values, (70, 90), interpolation=mode))
    config = dict(
        type='BaseSegDataset',
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        metainfo=dict(
            classes=[f'c{i}' for i in range(classes)], palette=[[i % 256, i // 256, 9] for i in range(classes)]
        ),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
        serialize_data=False,
    )
    return {**config, **arguments}


def evaluation_config(folder: Path, name: str, dataset: dict, classes: int = 7, **changes) -> Config:
    """The config of a test whose model has its own preprocessing; ``changes`` are overrides with __ instead of dots."""
    config = small_config(folder, name)
    config.model = segmentor_config(data_preprocessor=OWN, classes=classes)
    config.test_dataloader.dataset = copy.deepcopy(dataset)
    config.tta_pipeline = ONE_VIEW
    config.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


def measured(config: Config, aug_test: bool = False, change: Callable[[Config], None] = lambda config: None) -> dict:
    """What tools/test.py measures, with a ``change`` of the config after its options; the config stays as it is."""
    config = copy.deepcopy(config)
    config.experiment_name += f' {aug_test}'
    set_inference_options(config, aug_test)
    if aug_test:
        use_tta(config)
    change(config)
    torch.manual_seed(0)
    # A runner formats its config four times, which takes longer than the test.
    with patch.object(Config, 'pretty_text', property(lambda config: '')):
        return build_runner(config, 'test').test()
