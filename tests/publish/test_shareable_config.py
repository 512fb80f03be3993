"""Configs are published without private content; they are read and written as data and never run."""

import pytest

from mmseg_volo.checkpoints.config_text import literals
from mmseg_volo.errors import ConfigError
from mmseg_volo.publish.shareable_config import as_text, check_nothing_private, read_config, shareable

PRIVATE = dict(
    model=dict(
        pretrained='/home/alice/p.pth',
        backbone=dict(type='VOLO', init_cfg=dict(type='Pretrained', checkpoint='/home/alice/volo.pth')),
        decode_head=dict(type='UPerHead', init_cfg=dict(type='Pretrained', checkpoint='timm://volo_d1_384.sail_in1k')),
        neck=dict(init_cfg=dict(type='Pretrained', checkpoint='https://alice:word@host/x.pth?token=alice')),
        test_cfg=dict(mode='whole', allow_mismatch=True),
    ),
    train_dataloader=dict(
        dataset=dict(
            type='CityscapesDataset',
            data_root='/mnt/alice/cs',
            ann_file='D:\\alice\\train.txt',
            data_prefix=dict(img_path='~/alice/img', seg_map_path='gtFine/train'),
            pipeline=[dict(type='LoadImageFromFile', backend_args=dict(backend='s3', key='alice'))],
        )
    ),
    val_dataloader=dict(dataset=dict(type='MineDataset', data_root='../../alice')),
    test_dataloader=dict(dataset=dict(type='ADE20KDataset', data_root='s3://alice/ade')),
    default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', out_dir='/scratch/alice', interval=5)),
    visualizer=dict(
        type='SegLocalVisualizer', save_dir='/alice', vis_backends=[dict(init_kwargs=dict(entity='alice'))]
    ),
    env_cfg=dict(cudnn_benchmark=True, dist_cfg=dict(backend='nccl', init_method='tcp://alice:29500')),
    work_dir='/home/alice/run',
    load_from='/home/alice/run/iter_1.pth',
    resume=True,
    note='alice',
)


def test_private_content_is_removed():
    shared = shareable(PRIVATE)
    text = as_text(shared)
    assert 'alice' not in text and literals(text) == shared
    model, train = shared['model'], shared['train_dataloader']['dataset']
    assert model['backbone']['init_cfg'] is None and model['neck']['init_cfg'] is None
    assert model['decode_head'] == PRIVATE['model']['decode_head'] and model['test_cfg'] == dict(mode='whole')
    assert train['data_root'] == 'data/cityscapes' and train['ann_file'] == 'train.txt'
    assert train['data_prefix'] == dict(img_path='img', seg_map_path='gtFine/train')
    assert shared['val_dataloader']['dataset']['data_root'] == 'data/mine'
    assert shared['test_dataloader']['dataset']['data_root'] == 'data/ade/ADEChallengeData2016'
    assert shared['default_hooks'] == dict(checkpoint=dict(type='AtomicCheckpointHook', interval=5))
    assert shared['custom_imports']['imports'] == ['mmseg_volo']


@pytest.mark.parametrize(
    'text',
    [
        'a = __import__("os").getcwd()',
        'import os',
        'a = dict(**{})',
        'a = [b for b in ()]',
        'a = b',
        'a, b = 1, 2',
        'a = f"{1}"',
        'a = (',
        'a = dict([])',
        'a = b"x"',
        'a = {[]: 1}',
    ],
)
def test_text_that_is_more_than_data_is_refused(text):
    with pytest.raises((ValueError, TypeError, SyntaxError)):
        literals(text)


def test_text_of_data_is_read():
    value = dict(a=-1.5, b=(1, 'x', None, True), c=[{'k.e-y': 2}], d=dict(e={}))
    assert literals(as_text(value)) == value
    value['a'] = float('inf')
    assert literals(as_text(value)) == value


def test_what_cannot_be_published_is_named(tmp_path):
    (tmp_path / 'c.py').write_text('model = dict(type=dict, hook=print)')
    with pytest.raises(ConfigError, match=r'model.type is .*dict.*: a published config may hold text'):
        read_config(str(tmp_path / 'c.py'), None, tmp_path / 'x.pth')
    with pytest.raises(ConfigError, match='look for nan'):
        as_text(dict(clip=float('nan')))
    with pytest.raises(ConfigError, match='would give away /home/alice; remove it'):
        check_nothing_private(dict(a=[dict(note='see /home/alice')]), ['/home/alice'])
