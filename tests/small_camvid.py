"""The config of CamVid with a small network and drawn images, for runs that take seconds."""

import time
from pathlib import Path

import cv2
from mmengine.config import Config

from mmseg_volo.benchmark.inputs import draw
from mmseg_volo.utils.config import load_config

CONFIG = Path(__file__).resolve().parents[1] / 'configs/volo_d1_camvid.py'
# A stem width of 8, not 16: with AMX oneDNN computes the 4 x 4 projection of 16 channels wrongly in bfloat16.
ARCH = dict(depths=(1, 1, 1, 1), dims=(64, 64, 64, 64), heads=(2, 2, 2, 2), mlp_ratios=2, stem_width=8)


def write_camvid(folder: Path, size: tuple[int, int], train: int, val: int) -> None:
    """Draw images and labels of 11 classes in the folders of CamVid-11, as ``tools/prepare_data.py`` lays it out."""
    for split, first, count in (('train', 0, train), ('val', train, val)):
        for kind in ('images', 'labels'):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            image, label = draw(size, i, 11)
            cv2.imwrite(str(folder / f'images/{split}/{i}.png'), image)
            cv2.imwrite(str(folder / f'labels/{split}/{i}.png'), label)


def small_config(folder: Path, name: str = 'run', large: bool = False, **options) -> Config:
    """The config of CamVid with a small network and drawn images; ``options`` have __ for the dots."""
    crop, size = ((256, 256), (256, 512)) if large else ((64, 64), (64, 128))
    write_camvid(folder / 'data', size, train=6, val=2)
    config = load_config(str(CONFIG), None, str(folder / name))
    config.model.backbone.arch = dict(ARCH)
    config.model.auxiliary_head = None
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(batch_size=1, num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(folder / 'data'), img_suffix='.png')
    changes = dict(
        model__backbone__init_cfg=None, model__backbone__img_size=crop, model__backbone__drop_path_rate=0.0,
        model__backbone__norm_cfg__type='BN', model__data_preprocessor__size=crop,
        model__decode_head__in_channels=list(ARCH['dims']), model__decode_head__channels=32,
        model__decode_head__norm_cfg__type='BN', model__decode_head__dropout_ratio=0.0,
        train_dataloader__batch_size=2, train_dataloader__dataset__pipeline__2__scale=size[::-1],
        train_dataloader__dataset__pipeline__3__crop_size=crop,
        train_cfg__max_iters=4, train_cfg__val_interval=100, default_hooks__checkpoint__interval=4,
        default_hooks__checkpoint__save_best=None, optim_wrapper__optimizer__lr=1e-3,
        param_scheduler=[dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=0, end=8)],
        default_hooks__logger__interval=1, env_cfg__cudnn_benchmark=False, randomness__seed=0, log_level='WARNING',
    )  # fmt: skip
    config.merge_from_dict({key.replace('__', '.'): value for key, value in {**changes, **options}.items()})
    # mmengine keeps message hubs and visualizers by name, for all runs of a process.
    config.experiment_name = config.visualizer.name = f'{folder.name}_{name}_{time.monotonic_ns()}'
    return config
