"""VOLO-D1 + UperNet on CamVid-11, crop 352 x 480, batch 16 (1 GPU), 8k iterations. Not trained yet.

python tools/train.py configs/volo_d1_camvid.py
To use your own data set, copy this file and _base_/datasets/camvid.py, then change classes, paths and sizes.
"""

_base_ = [
    './_base_/models/upernet_volo.py',
    './_base_/datasets/camvid.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    backbone=dict(
        img_size={{_base_.crop_size}},
        init_cfg=dict(type='Pretrained', checkpoint='timm://volo_d1_384.sail_in1k'),
    ),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
max_iters = 8000
warmup_iters = 400
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=warmup_iters),
    dict(type='PolyLR', eta_min=5e-6, power=1.0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
