"""VOLO-D1 + UperNet on drawn street scenes, from scratch, in minutes on two CPU cores.

python tools/quickstart.py
The package draws the scenes, with Cityscapes' classes, labels and folders. They show that training works, not how good
VOLO is.
"""

_base_ = [
    './_base_/models/upernet_volo.py',
    './_base_/datasets/cityscapes.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]

crop_size = (128, 256)
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size, drop_path_rate=0.0, norm_cfg=norm_cfg),
    # From random weights, a narrow head learns faster in the first minutes, without an auxiliary loss.
    decode_head=dict(channels=96, norm_cfg=norm_cfg, dropout_ratio=0.0),
    auxiliary_head=None,
)
train_pipeline = [
    dict(type='LoadCheckedImage'),
    dict(type='LoadCheckedAnnotations'),
    dict(type='RandomResize', scale=(512, 256), ratio_range=(0.5, 0.75), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 128), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=16),
    dict(type='LoadCheckedAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(int(256 * r), int(128 * r)), keep_ratio=True) for r in (1.0, 1.25, 1.5)],
            [dict(type='ResizeToMultiple', size_divisor=16)],
            [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [dict(type='LoadCheckedAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
data_root = 'data/street_scenes'
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type='StreetSceneDataset', data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type='StreetSceneDataset', data_root=data_root, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
randomness = dict(seed=0)
max_iters = 240
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_iters, save_best=None))
