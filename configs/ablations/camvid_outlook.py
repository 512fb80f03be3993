"""A small VOLO from scratch on CamVid, for the paper's Table 6: outlook attention in the Outlookers.

python tools/ablate.py configs/ablations/camvid_*.py --rates 3e-4 1e-3 3e-3 --amp
"""

_base_ = '../volo_d1_camvid_laptop.py'
arch = dict(depths=(4, 2, 4, 1), dims=(96, 192, 192, 192), heads=(3, 6, 6, 6), mlp_ratios=3, stem_width=32)
model = dict(
    backbone=dict(arch=dict(_delete_=True, **arch), mixer='outlook'),
    decode_head=dict(in_channels=[96, 192, 192, 192], channels=64),
)
max_iters = 300
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
