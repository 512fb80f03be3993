"""VOLO-D1 + UperNet on Cityscapes, crop 1024 x 1024, batch 8 (8 GPUs), 160k iterations. Not trained yet.

tools/dist_train.sh configs/volo_d1_cityscapes.py 8
"""

_base_ = [
    './_base_/models/upernet_volo.py',
    './_base_/datasets/cityscapes.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    backbone=dict(
        img_size={{_base_.crop_size}},
        # D1 weights of the largest released resolution, which is closest to the crop.
        init_cfg=dict(type='Pretrained', checkpoint='timm://volo_d1_384.sail_in1k'),
    ),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    # Windows have the size of the crop. The paper gives no stride; 768 is SegFormer's at this crop.
    test_cfg=dict(mode='slide', crop_size={{_base_.crop_size}}, stride=(768, 768)),
)
