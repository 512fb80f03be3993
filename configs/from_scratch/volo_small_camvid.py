"""A small VOLO from random weights on CamVid: 10 minutes on 2 CPU cores.

python tools/train.py configs/from_scratch/volo_small_camvid.py --amp
The other configs of this folder train other backbones for as long, with the same images (docs/benchmarks.md).
"""

_base_ = '../volo_d1_camvid_laptop.py'
arch = dict(depths=(2, 1, 2, 1), dims=(96, 192, 192, 192), heads=(3, 6, 6, 6), mlp_ratios=3, stem_width=32)
model = dict(
    backbone=dict(arch=dict(_delete_=True, **arch)),
    decode_head=dict(in_channels=[96, 192, 192, 192], channels=64),
)
train_dataloader = dict(batch_size=4)
max_iters = 2950
warmup_iters = max_iters // 12
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=warmup_iters),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
