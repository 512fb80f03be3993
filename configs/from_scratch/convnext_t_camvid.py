"""timm's ConvNeXt-T + UPerHead from random weights on CamVid for as long as volo_small_camvid.py."""

_base_ = './volo_small_camvid.py'
model = dict(
    backbone=dict(_delete_=True, type='TIMMBackbone', model_name='convnext_tiny', features_only=True, pretrained=False),
    decode_head=dict(type='UPerHead', in_channels=[96, 192, 384, 768], channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
max_iters = 343
warmup_iters = max_iters // 12
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=warmup_iters),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
