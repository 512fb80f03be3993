_base_ = './volo_d1_camvid.py'
crop_size = (256, 256)
model = dict(data_preprocessor=dict(size=crop_size), backbone=dict(img_size=crop_size, init_cfg=None),
  decode_head=dict(channels=128), auxiliary_head=None)
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')]))
val_dataloader=dict(num_workers=0, persistent_workers=False)
test_dataloader=val_dataloader
max_iters=6
train_cfg=dict(max_iters=max_iters, val_interval=max_iters)
default_hooks=dict(logger=dict(interval=1), checkpoint=dict(interval=3))
