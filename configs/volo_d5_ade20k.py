"""VOLO-D5 + UperNet on ADE20K, crop 512 x 512, batch 16 (8 GPUs), 160k iterations. Not trained yet.

tools/dist_train.sh configs/volo_d5_ade20k.py 8
To shard the model over the GPUs, add --cfg-options model_wrapper_cfg.type=VOLOFullyShardedDataParallel
"""

_base_ = './volo_d1_ade20k.py'
model = dict(
    backbone=dict(
        arch='d5',
        drop_path_rate=0.75,
        init_cfg=dict(checkpoint='timm://volo_d5_512.sail_in1k'),
    ),
    decode_head=dict(in_channels=[384, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
