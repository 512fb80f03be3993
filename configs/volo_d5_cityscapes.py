"""VOLO-D5 + UperNet on Cityscapes, crop 1024 x 1024, batch 8 (8 GPUs), 160k iterations. Not trained yet.

tools/dist_train.sh configs/volo_d5_cityscapes.py 8
To shard the model over the GPUs, add --cfg-options model_wrapper_cfg.type=VOLOFullyShardedDataParallel
"""

_base_ = './volo_d1_cityscapes.py'
model = dict(
    backbone=dict(
        arch='d5',
        drop_path_rate=0.75,
        init_cfg=dict(checkpoint='timm://volo_d5_512.sail_in1k'),
    ),
    decode_head=dict(in_channels=[384, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
