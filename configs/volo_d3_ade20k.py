"""VOLO-D3 + UperNet on ADE20K, crop 512 x 512, batch 16 (8 GPUs), 160k iterations. Not trained yet.

tools/dist_train.sh configs/volo_d3_ade20k.py 8
"""

_base_ = './volo_d1_ade20k.py'
model = dict(
    backbone=dict(
        arch='d3',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='timm://volo_d3_448.sail_in1k'),
    ),
    decode_head=dict(in_channels=[256, 512, 512, 512]),
    auxiliary_head=dict(in_channels=512),
)
