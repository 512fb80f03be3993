"""VOLO-D1 + UPerHead. The head sizes are those of mmseg's UperNet with Swin or ViT, the closest published models."""

norm_cfg = dict(type='SyncBN', requires_grad=True)
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    # VOLO works on multiples of 16. The test pipelines resize to them. Images of other pipelines are padded with zeros,
    # which mmseg removes from the logits, but which cost accuracy at the border (docs/benchmarks.md).
    test_cfg=dict(size_divisor=16),
)
model = dict(
    type='StreamingEncoderDecoder',  # mmseg's EncoderDecoder; loads the same checkpoints
    data_preprocessor=data_preprocessor,
    backbone=dict(type='VOLO', arch='d1', drop_path_rate=0.1, norm_cfg=norm_cfg),
    decode_head=dict(
        type='LeanUPerHead',  # mmseg's UPerHead with less computation and memory
        in_channels=[192, 384, 384, 384],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    # The paper does not mention an auxiliary head. LV-ViT, Swin and mmseg's ViT use one on the third map, weight 0.4.
    auxiliary_head=dict(
        type='LeanFCNHead',  # mmseg's FCNHead with less memory
        in_channels=384,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
