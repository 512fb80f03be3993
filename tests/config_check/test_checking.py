"""Each mistake in a config is one line with its key, before anything is built."""

import copy
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, METRICS, MODELS
from mmseg.structures import SegDataSample

from mmseg_volo.config_check import check_config, check_model, check_tta_pipeline, settle
from mmseg_volo.config_check.runs import _RESULTS
from mmseg_volo.datasets.camvid import CamVidDataset
from mmseg_volo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
CAMVID = Config.fromfile(CONFIGS / 'volo_d1_camvid.py')  # 11 classes, decode and auxiliary head
NAMES = tuple('abcdefghijk')


def config(**options) -> Config:
    """The CamVid config with overrides, which have __ instead of dots."""
    cfg = copy.deepcopy(CAMVID)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def faults(cfg: Config, task: str | None = 'train') -> list[str]:
    try:
        check_config(cfg, task)
    except ConfigError as error:
        lines = str(error).removeprefix('volo_d1_camvid.py: ').splitlines()
        return [line.strip() for line in (lines[1:] if lines[0].endswith('faults in the config:') else lines)]
    return []


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What the check logs."""
    lines = []
    monkeypatch.setattr('mmseg_volo.config_check.checking.print_log', lambda message, **_: lines.append(message))
    return lines


def one_of(*crops):
    """Training images are cropped to one of these sizes."""
    choice = dict(type='RandomChoice', transforms=[[dict(type='RandomCrop', crop_size=crop)] for crop in crops])
    steps = 'LoadImageFromFile', 'LoadAnnotations', choice, 'PackSegInputs'
    return dict(train_dataloader__dataset__pipeline=[dict(type=s) if isinstance(s, str) else s for s in steps])


def both(**data) -> dict:
    """Overrides of the data sets of training and validation."""
    return {f'{split}_dataloader__dataset__{key}': value for split in ('train', 'val') for key, value in data.items()}


def heads(**values) -> dict:
    """Overrides of both heads."""
    return {f'model__{head}__{key}': v for head in ('decode_head', 'auxiliary_head') for key, v in values.items()}


RARE = dict(type='BaseSegDataset', metainfo=dict(classes=NAMES[:10]))
CE = dict(type='CrossEntropyLoss')


@DATASETS.register_module()
class WaterDataset(BaseSegDataset):
    """A class list without its comma."""

    METAINFO = dict(classes=('water'), palette=[[0, 0, 9]])


def of_bands(*steps: dict, **options) -> dict:
    """Overrides of a training pipeline with LoadBands, for a model of four channels unless options say otherwise."""
    inner = [dict(type='LoadBands'), dict(type='LoadCheckedAnnotations'), *steps, dict(type='PackSegInputs')]
    channels = dict(
        model__data_preprocessor__type='BandsDataPreProcessor',
        model__backbone__in_channels=4,
        model__data_preprocessor__mean=[900.0] * 4,
        model__data_preprocessor__std=[300.0] * 4,
        model__data_preprocessor__bgr_to_rgb=False,
    )
    crop = dict(type='RandomCrop', crop_size=(32, 32))
    inner.insert(2, crop)
    return {'train_dataloader__dataset__pipeline': inner, **channels, **options}


FAULTS = {
    # channels
    'mean of three': (
        dict(model__backbone__in_channels=4),
        r'data_preprocessor\.mean: 3 numbers, but model\.backbone\.in_channels is 4; .*check_data\.py CONFIG prints',
    ),
    'preprocessor': (
        of_bands(model__data_preprocessor__type='SegDataPreProcessor'),
        r"data_preprocessor\.type: mmseg's SegDataPreProcessor takes 1 or 3 numbers .*'BandsDataPreProcessor'",
    ),
    'argument of the preprocessor': (
        of_bands(model__data_preprocessor__siz=3),
        r"data_preprocessor\.siz: .* no such argument; did you mean 'size'",
    ),
    'one channel': (dict(model__backbone__in_channels=1), r'mean: 3 numbers, but .*in_channels is 1'),
    'other bands': (
        of_bands(train_dataloader__dataset__pipeline__0=dict(type='LoadBands', bands=(3, 2, 1))),
        r'pipeline\.0\.bands: 3 bands, but model\.backbone\.in_channels is 4',
    ),
    'order of colours': (
        of_bands(
            model__backbone__in_channels=3,
            model__data_preprocessor__mean=[1.0] * 3,
            model__data_preprocessor__std=[1.0] * 3,
            model__data_preprocessor__bgr_to_rgb=True,
        ),
        r'data_preprocessor\.bgr_to_rgb: True, but LoadBands gives the bands in the order of the file',
    ),
    'colours of four bands': (
        of_bands(dict(type='PhotoMetricDistortion')),
        r'pipeline\.3: PhotoMetricDistortion takes 3 channels, but images have 4',
    ),
    'eight bits of sixteen': (
        of_bands(dict(type='CLAHE')),
        r'pipeline\.3: CLAHE turns values into 8 bits, but .*mean is of other values \(900\)',
    ),
    # classes
    'one head': (dict(model__decode_head__num_classes=4), r'model\.decode_head\.num_classes: 4, but .* has 11 classes'),
    'auxiliary head': (dict(model__auxiliary_head__num_classes=12), r'model\.auxiliary_head\.num_classes: 12, but'),
    'auxiliary heads': (
        dict(model__auxiliary_head=[CAMVID.model.auxiliary_head, dict(CAMVID.model.auxiliary_head, num_classes=3)]),
        r'model\.auxiliary_head\.1\.num_classes: 3, but',
    ),
    'heads of a data set without a class list': (
        {**both(type='CityscapesDatase', _delete_=True), **heads(), 'model__decode_head__num_classes': 4},
        r'auxiliary_head\.num_classes: 11, but model\.decode_head\.num_classes is 4',
    ),
    'val alone': (
        dict(val_dataloader__dataset=RARE),
        r'model\.decode_head\.num_classes: 11, but val_dataloader\.dataset has 10 classes',
    ),
    'repeated data set': (
        dict(train_dataloader__dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset=RARE)),
        r'num_classes: 11, but train_dataloader\.dataset\.dataset has 10',
    ),
    'several data sets': (
        dict(
            train_dataloader__dataset=dict(
                _delete_=True, type='ConcatDataset', datasets=[CAMVID.train_dataloader.dataset, RARE]
            )
        ),
        r'num_classes: 11, but train_dataloader\.dataset\.datasets\.1 has 10',
    ),
    'text': (both(metainfo=dict(classes='water')), r"metainfo\.classes: 'water' is a text.*classes=\('water',\)"),
    'text in the class': (both(type='WaterDataset'), r"METAINFO\['classes'\] of WaterDataset .*'water' is a text"),
    'no class': (both(metainfo=dict(classes=[])), r'metainfo\.classes: \[\] is no list of names'),
    'missing file': (both(metainfo=dict(classes='names.txt')), r'metainfo\.classes: .*there is no file of this name'),
    'twice': (both(type='BaseSegDataset', metainfo=dict(classes=('a', *NAMES[:10]))), r"classes: 'a' is there twice"),
    'no dict': (both(metainfo=('a', 'b')), r"metainfo: \('a', 'b'\) is no dict"),
    'old name': (both(metainfo=dict(CLASSES=NAMES)), r'metainfo\.CLASSES: mmseg 1\.x does not read it; write classes'),
    'old place': (
        both(classes=NAMES),
        r'dataset\.classes: CamVidDataset has no such argument; mmseg 1\.x has it in meta',
    ),
    'other name': (both(metainfo=dict(classes=('Sky', 'road'))), r"classes: 'road' is no class .*did you mean 'Road'"),
    'palette': (
        both(type='BaseSegDataset', metainfo=dict(classes=NAMES, palette=[[0, 0, 0]] * 3)),
        r'metainfo\.palette: 3 colours for 11 classes',
    ),
    **{
        f'palette {palette!r}': (both(type='BaseSegDataset', metainfo=dict(classes=('a',), palette=palette)), line)
        for line, palettes in {
            r'palette: .* is no list of colours; give': ('red', dict(a=(1, 2, 3))),
            r'palette: .* is no colour; give three whole numbers': (
                *([1, 2, 3], ['#ff0000'], [(1, 2, 3, 4)], [(300.5, 2, 3)], [(-1, 2, 3)], [(0.5, 0.1, 0.2)]),
            ),
        }.items()
        for palette in palettes
    },
    'a name that is a number': (both(type='BaseSegDataset', metainfo=dict(classes=(1, 2))), r'classes: 1 is no name'),
    'a name that is none': (both(type='BaseSegDataset', metainfo=dict(classes=('a', None))), r'None is no name'),
    'another order': (
        dict(val_dataloader__dataset__metainfo=dict(classes=CamVidDataset.METAINFO['classes'][::-1])),
        r'val_dataloader\.dataset\.metainfo\.classes: .* in another order than in train_dataloader\.dataset',
    ),
    'other labels in validation': (
        dict(val_dataloader__dataset__reduce_zero_label=True),
        r'val_dataloader\.dataset\.reduce_zero_label: True, but train_dataloader\.dataset has False',
    ),
    'no names': (dict(val_dataloader__dataset__type='BaseSegDataset'), r'names no classes, which val_evaluator needs'),
    # losses
    'softmax': (
        {**both(type='BaseSegDataset', metainfo=dict(classes=('water',))), **heads(num_classes=1)},
        r'decode_head\.loss_decode: the softmax of one output is always 1',
    ),
    'softmax by out_channels': (
        {**both(type='BaseSegDataset', metainfo=dict(classes=('a', 'b'))), **heads(num_classes=2, out_channels=1)},
        r'decode_head\.loss_decode: the softmax of one output',
    ),
    'softmax in a list': (
        {
            **both(type='BaseSegDataset', metainfo=dict(classes=('a', 'b'))),
            **heads(num_classes=2, out_channels=1),
            'model__decode_head__loss_decode': [dict(CE, use_sigmoid=True), dict(type='LovaszLoss', reduction='none')],
        },
        r'decode_head\.loss_decode\.1: the softmax of one output',
    ),
    'sigmoid of one class': (
        {
            **both(type='BaseSegDataset', metainfo=dict(classes=('water',))),
            **heads(num_classes=1, loss_decode=dict(CE, use_sigmoid=True)),
        },
        r'the sigmoid of one output tells two classes apart, but model\.decode_head\.num_classes is 1',
    ),
    'outputs': (dict(model__decode_head__out_channels=7), r'out_channels: 7, but num_classes is 11'),
    'one output of many': (dict(model__decode_head__out_channels=1), r'out_channels: 1, but num_classes is 11'),
    'loss of another head': (
        dict(model__decode_head__loss_decode=[CE, dict(type='OhemCrossEntropy')]),
        r'loss_decode\.1\.type: OhemCrossEntropy does not take ignore_index and weight, .* instead set .*sampler=',
    ),
    'loss of edges': (
        dict(model__decode_head__loss_decode=[dict(type='BoundaryLoss')]),
        r'loss_decode\.0\.type: BoundaryLoss does not take .*; it is for other heads',
    ),
    'negative weight': (heads(loss_decode=dict(class_weight=[-1.0] * 11)), r'class_weight: .* negative or not finite'),
    'weight of a loss': (heads(loss_decode=dict(loss_weight=float('nan'))), r'loss_weight: nan is no finite number'),
    'weights': (heads(loss_decode=dict(class_weight=[1.0] * 12)), r'loss_decode\.class_weight: 12 weights for 11'),
    'weights in a list': (
        dict(model__decode_head__loss_decode=[CE, dict(type='FocalLoss', class_weight=[1.0] * 5)]),
        r'decode_head\.loss_decode\.1\.class_weight: 5 weights for 11',
    ),
    'weights of sigmoid': (
        dict(model__decode_head__loss_decode=dict(CE, use_sigmoid=True, class_weight=[1.0] * 11)),
        r'class_weight: 11 weights, but with use_sigmoid=True it takes one',
    ),
    # ignored label
    'ignored by one head': (
        dict(model__decode_head__ignore_index=0),
        r'^ignore_index: model\.decode_head\.ignore_index = 0, but model\.auxiliary_head\.ignore_index, val_evaluator',
    ),
    'ignored by heads': (heads(ignore_index=0), r'^ignore_index: .*val_evaluator\.ignore_index.* = 255'),
    'ignored by the metric': (
        dict(val_evaluator__ignore_index=0),
        r'^ignore_index: val_evaluator\.ignore_index = 0, but',
    ),
    'ignored by the padding': (dict(model__data_preprocessor__seg_pad_val=0), r'^ignore_index: .*seg_pad_val = 0, but'),
    'ignored by the data set': (
        both(ignore_index=0),
        r'^ignore_index: .*val_dataloader\.dataset\.ignore_index = 0, but',
    ),
    'ignored by a rotation': (
        dict(train_dataloader__dataset__pipeline__5=dict(type='RandomRotate', prob=0.5, degree=9, seg_pad_val=0)),
        r'^ignore_index: train_dataloader\.dataset\.pipeline\.5\.seg_pad_val = 0, but',
    ),
    'ignored by the loss': (
        dict(model__decode_head__loss_decode=dict(type='OhemCrossEntropy', _delete_=True, ignore_label=0)),
        r'^ignore_index: model\.decode_head\.loss_decode\.ignore_label = 0, but',
    ),
    'ignored label 255 from the data set': (
        {
            **both(reduce_zero_label=True),
            **heads(ignore_index=254),
            'val_evaluator__ignore_index': 254,
            'model__data_preprocessor__seg_pad_val': 254,
        },
        r'reduce_zero_label turns labels into 255, but model\.decode_head\.ignore_index is 254',
    ),
    **{
        f'{key} {value!r}': ({key: value}, r'ignore_index: .* is no whole number|a number here')
        for key in ('model__decode_head__ignore_index', 'val_evaluator__ignore_index')
        for value in ('255', None, 255.0, [255])
    },
    # sizes
    'crop': (
        dict(model__data_preprocessor__size=(352, 256)),
        r'images of 352 x 480 .*\.size = \(352, 256\)',
    ),
    'crop of a number': (
        dict(train_dataloader__dataset__pipeline__3__crop_size=512),
        r'crop_size: images of 512 x 512',
    ),
    'one of two crops': (
        one_of((512, 480), (352, 480)),
        r'pipeline\.2\.transforms\.0\.0\.crop_size: images of 512 x 480',
    ),
    'turned size': (dict(model__data_preprocessor__size=(480, 352)), r'images of 352 x 480 .*\.size = \(480, 352\)'),
    'size of a number': (
        dict(model__data_preprocessor__size=512),
        r'data_preprocessor\.size: 512 is no \(height, width',
    ),
    'no size': (dict(model__data_preprocessor__size=None), r'data_preprocessor: neither of size and size_divisor set'),
    'two sizes': (dict(model__data_preprocessor__size_divisor=16), r'data_preprocessor: both of size and size_divisor'),
    'stride': (
        dict(model__test_cfg=dict(mode='slide', crop_size=(64, 96), stride=(65, 64))),
        r'test_cfg\.stride: \(65, 64\) with crop_size = \(64, 96\) leaves pixels out',
    ),
    'no test_cfg': (dict(model__test_cfg=None), r'model\.test_cfg: not set, but predictions need it'),
    'no stride': (dict(model__test_cfg=dict(mode='slide', crop_size=(9, 9))), r'test_cfg\.stride: None is no \(height'),
    'mode': (dict(model__test_cfg__mode='sliding'), r"test_cfg\.mode: 'sliding' is neither"),
    'mistyped option': (dict(model__test_cfg__precison='bf16'), r"test_cfg\.precison: .* did you mean 'precision'"),
    'precision': (dict(model__test_cfg__precision='fp61'), r"test_cfg\.precision: 'fp61' is none of fp32"),
    'no window': (dict(model__test_cfg__window_batch=0), r'test_cfg\.window_batch: 0 is no whole number from 1'),
    'text of windows': (dict(model__test_cfg__window_batch='4'), r"test_cfg\.window_batch: '4' is no whole"),
    'two sizes in a test': (
        dict(model__data_preprocessor__test_cfg=dict(size=(9, 9), size_divisor=16)),
        r'data_preprocessor\.test_cfg: both of size and size_divisor',
    ),
    'deviation of 0': (dict(model__data_preprocessor__std=[1, 0, 1]), r'data_preprocessor\.std: .* not above 0'),
    'one mean, two deviations': (
        dict(model__data_preprocessor__mean=[0], model__data_preprocessor__std=[1, 1]),
        r'data_preprocessor: 1 numbers in mean and 2 in std',
    ),
    'path object': (dict(load_from=Path('w.pth')), r"^load_from: PosixPath\('w\.pth'\) cannot be written as text"),
    'no preprocessor': (dict(model__data_preprocessor=None), r'^model\.data_preprocessor: not set'),
    # values
    **{
        f'{key} {value!r}': ({key: value}, f'{re.escape(".".join(key.split("__")[1:]))}: .*{kind} here')
        for key, value, kind in (
            ('model__decode_head__align_corners', 'False', 'True or False'),
            ('model__decode_head__loss_decode__loss_weight', '1.0', 'a number'),
            ('model__data_preprocessor__seg_pad_val', '255', 'a number'),
            ('model__backbone__init_cfg', 'x.pth', 'a dict or a list'),
            ('model__backbone', None, 'a dict'),
            ('model__decode_head', 'FCNHead', 'a dict'),
            ('param_scheduler__1__power', '1.0', 'a number'),
            ('train_cfg__val_interval', '4', 'a number'),
            ('val_cfg__fp16', 'maybe', 'True or False'),
            ('default_hooks__checkpoint__interval', 'x', 'a number'),
            ('default_hooks__checkpoint__out_dir', 3, 'a text'),
            ('val_dataloader__dataset__pipeline__1__scale', '480,352', 'a list or a number'),
            ('val_dataloader__dataset__pipeline__1__keep_ratio', 'True', 'True or False'),
            ('val_dataloader__dataset__data_root', 3, 'a text'),
            ('val_dataloader__dataset__indices', '5', 'a list or a number'),
            ('custom_hooks', [dict(type='EarlyStoppingHook', monitor='mIoU', patience='1')], 'a number'),
        )
    },
    'no data set': (dict(val_dataloader__dataset=None), r'val_dataloader\.dataset: None is no dict'),
    'list of data sets': (dict(val_dataloader__dataset=[dict(RARE)]), r'dataset: \[.* is no dict .*ConcatDataset'),
    'name of a data set': (dict(val_dataloader__dataset='Rare'), r"val_dataloader\.dataset: 'Rare' is no dict"),
    'name of a metric': (dict(val_evaluator=['IoUMetric']), r"val_evaluator\.0: 'IoUMetric' is no dict"),
    'name of a model': (dict(model='x'), r"^model: 'x' is no dict"),
    # pipelines
    **{
        f'pipeline of {" ".join(steps)}': (
            dict(val_dataloader__dataset__pipeline=[dict(type=step) for step in steps]),
            line,
        )
        for steps, line in {
            (): r'val_dataloader\.dataset\.pipeline: loads no image',
            ('LoadAnnotations', 'PackSegInputs'): r'val_dataloader\.dataset\.pipeline: loads no image',
            ('LoadImageFromFile', 'LoadAnnotations'): r'pipeline: packs no inputs',
            ('LoadImageFromFile', 'PackSegInputs', 'LoadAnnotations'): r'pipeline\.1: PackSegInputs must be the last',
        }.items()
    },
    'pipeline by name': (dict(val_dataloader__dataset__pipeline='test'), r'dataset\.pipeline: str is no list'),
    'transform by name': (dict(val_dataloader__dataset__pipeline=['Load']), r"pipeline\.0: 'Load' is no transform"),
    'image of no pixels': (
        dict(val_dataloader__dataset__pipeline__1__scale=(0, 9)),
        r'pipeline\.1\.scale: .* 0 pixels',
    ),
    'colours': (
        dict(val_dataloader__dataset__pipeline__0__color_type='colour'),
        r"pipeline\.0\.color_type: 'colour' is none of color, ",
    ),
    'augmentation that does not pack': (
        dict(
            val_dataloader__dataset__pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='TestTimeAug', transforms=[[dict(type='LoadAnnotations')]]),
            ]
        ),
        r'pipeline: packs no inputs',
    ),
    # names
    'backbone': (dict(model__backbone__drop_path=0.1), r"backbone\.drop_path: VOLO has no such .*'drop_path_rate'"),
    'head': (dict(model__decode_head__num_class=11), r"decode_head\.num_class: .* did you mean 'num_classes'"),
    'loss': (dict(model__decode_head__loss_decode__weight=1), r'loss_decode\.weight: CrossEntropyLoss has no such'),
    'loop': (dict(train_cfg__max_iter=10), r"train_cfg\.max_iter: ResumableTrainLoop .* did you mean 'max_iters'"),
    'data set': (dict(train_dataloader__dataset__data_rot='x'), r"dataset\.data_rot: .*did you mean 'data_root'"),
    'wrapper': (
        dict(
            train_dataloader__dataset=dict(
                _delete_=True, type='RepeatDataset', times=2, pipeline=[], dataset=CAMVID.train_dataloader.dataset
            )
        ),
        r'train_dataloader\.dataset\.pipeline: RepeatDataset has no such argument',
    ),
    'transform': (dict(train_dataloader__dataset__pipeline__3__size=9), r'pipeline\.3\.size: RandomCrop has no such'),
    'nested transform': (
        dict(train_dataloader__dataset__pipeline__4=dict(type='RandomApply', transforms=[dict(type='RandomFlipp')])),
        r"pipeline\.4\.transforms\.0\.type: 'RandomFlipp' is not registered; did you mean 'RandomFlip'",
    ),
    'loader': (dict(train_dataloader__num_worker=2), r"train_dataloader\.num_worker: .* did you mean 'num_workers'"),
    'sampler': (dict(val_dataloader__sampler__shufle=True), r'val_dataloader\.sampler\.shufle: DefaultSampler has no'),
    'hook': (dict(default_hooks__checkpoint__intervall=9), r"hooks\.checkpoint\.intervall: .* did you mean 'interval'"),
    'custom hook': (
        dict(custom_hooks=[dict(type='EMAHok')]),
        r"custom_hooks\.0\.type: 'EMAHok' .* did you mean 'EMAHook",
    ),
    'optimizer': (dict(optim_wrapper__optimizer__learning_rate=1), r'optimizer\.learning_rate: AdamW has no such'),
    'wrapper of the optimizer': (dict(optim_wrapper__clip_grads=1), r"clip_grads: .* did you mean 'clip_grad'"),
    'constructor': (dict(optim_wrapper__constructor='X'), r"optim_wrapper\.constructor: 'X' is not registered"),
    'paramwise': (
        dict(optim_wrapper__paramwise_cfg__custom_key={}),
        r"_cfg\.custom_key: .* did you mean 'custom_keys'",
    ),
    'runner': (dict(runner_type='VOLORuner'), r"runner_type: 'VOLORuner' .* did you mean 'VOLORunner'"),
    'scheduler': (dict(param_scheduler__0__begins=1), r"param_scheduler\.0\.begins: LinearLR .* did you mean 'begin'"),
    'visualizer': (dict(visualizer__vis_backends=[dict(type='WandBVisBackend')]), r"did you mean 'WandbVisBackend'"),
    'metric': (dict(val_evaluator=[dict(type='IoUMetrics')]), r"val_evaluator\.0\.type: .* did you mean '.*IoUMetric'"),
    'log processor': (dict(log_processor__windows_size=9), r"log_processor\.windows_size: .* 'window_size'"),
    'randomness': (dict(randomness=dict(sed=1)), r"randomness\.sed: there is no such setting; did you mean 'seed'"),
    'type': (dict(model__backbone__type='Volo'), r"model\.backbone\.type: 'Volo' is not registered"),
    'layer': (dict(model__backbone__norm_cfg__type='BatchNorm'), r"backbone\.norm_cfg\.type: 'BatchNorm' is not reg"),
    'no type': (dict(model__neck=dict(out_channels=3)), r'model\.neck: has no type'),
    'name of a hook': (
        dict(default_hooks__chekpoint=dict(interval=3)),
        r"chekpoint: has no type; did you mean 'checkpoint'",
    ),
    'second hook': (
        dict(default_hooks__chekpoint=dict(type='AtomicCheckpointHook')),
        r"default_hooks\.chekpoint: would be a second AtomicCheckpointHook; did you mean 'checkpoint'",
    ),
    'environment': (dict(env_cfg__cudnn_benchmrk=True), r"env_cfg\.cudnn_benchmrk: .* 'cudnn_benchmark'"),
    'unknown scope': (dict(default_scope='mmsegg'), r"default_scope: 'mmsegg' is no .* did you mean 'mmseg'"),
    'text to resume': (dict(resume='False'), r"^resume: 'False' is neither True nor False"),
    'multiplier': (
        dict(optim_wrapper__paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mul=0.1)))),
        r"custom_keys\.head\.lr_mul: nothing reads this key; did you mean 'lr_mult'",
    ),
    'clipping': (dict(optim_wrapper__clip_grad=dict(max_nrom=1)), r"clip_grad\.max_nrom: .* 'max_norm'"),
    'initialisation': (
        dict(model__backbone__init_cfg=dict(type='Pretraind', checkpoint='x')),
        r"backbone\.init_cfg\.type: 'Pretraind' is not registered",
    ),
    'averaged model': (
        dict(custom_hooks=[dict(type='EMAHook', ema_type='ExponentialMovingAveragee')]),
        r"custom_hooks\.0\.ema_type: .* did you mean 'ExponentialMovingAverage'",
    ),
    'type that is none': (dict(model__backbone__type=3), r'model\.backbone\.type: 3 is no name of a class'),
    'scope': (dict(default_scope='mmengine'), r"set default_scope = 'mmseg'"),
    'top level': (dict(train_dataloaders=dict()), r"^train_dataloaders: .*did you mean 'train_dataloader'"),
    # runs
    'no metric': (dict(val_evaluator=None), r'^val_evaluator: not set, but val_dataloader and val_cfg; set all of'),
    'no loop': (dict(train_cfg=None), r'^train_cfg: not set, but train_dataloader and optim_wrapper'),
    'nothing to train': (
        dict(train_dataloader=None, train_cfg=None, optim_wrapper=None),
        r'^train_dataloader: not set; t',
    ),
    'two loops': (dict(train_cfg__by_epoch=False), r'^train_cfg: has both type and by_epoch'),
    'unlabelled': (
        dict(val_dataloader__dataset__data_prefix=dict(_delete_=True, img_path='images/val')),
        r'val_dataloader\.dataset: has no labels, but val_evaluator measures .*format_only=True.*tools/predict\.py',
    ),
    'labels that are not loaded': (
        dict(val_dataloader__dataset__pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]),
        r'val_dataloader\.dataset: has no labels',
    ),
    'figure': (dict(val_evaluator__iou_metrics=['mIou']), r"iou_metrics: 'mIou' is none of mIoU, mDice, mFscore"),
    'best': (dict(default_hooks__checkpoint__save_best='mIou'), r"save_best: .* no 'mIou'; did you mean 'mIoU'"),
    'early stopping': (
        dict(custom_hooks=[dict(type='EarlyStoppingHook', monitor='mIou')]),
        r"custom_hooks\.0\.monitor: the validation has no 'mIou'; did you mean 'mIoU'",
    ),
    'schedule by epochs': (
        dict(param_scheduler=[dict(type='PolyLR', end=4)]),
        r'param_scheduler\.0\.by_epoch: True \(the default\), but train_cfg counts iterations',
    ),
    'validation each 0 iterations': (dict(train_cfg__val_interval=0), r'train_cfg\.val_interval: 0 is less than 1'),
    'format_only to nowhere': (dict(val_evaluator__format_only=True), r'val_evaluator\.output_dir: not set'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_fault(name):
    options, line = FAULTS[name]
    cfg = config()
    for key, value in options.items():
        if isinstance(value, dict) and value.get('_delete_') is None and key.endswith('__dataset'):
            value = dict(value, _delete_=True)
        cfg.merge_from_dict({key.replace('__', '.'): value})
    found = faults(cfg)
    assert any(re.search(line, one) for one in found), found
    assert all('\n' not in one for one in found)


BINARY = {
    **both(type='BaseSegDataset', metainfo=dict(classes=('ground', 'water'))),
    **heads(num_classes=2, out_channels=1, threshold=0.5, loss_decode=dict(CE, use_sigmoid=True)),
}
VALID = {
    'as it is': {},
    'four bands': of_bands(),
    'four bands of six': of_bands(train_dataloader__dataset__pipeline__0=dict(type='LoadBands', bands=(6, 3, 2, 1))),
    'one mean for all': of_bands(model__data_preprocessor__mean=[9.0], model__data_preprocessor__std=[2.0]),
    'crops that fit': one_of((352, 480), (320, 320)),
    'binary with sigmoid': BINARY,
    'binary with one weight': {**BINARY, 'model__decode_head__loss_decode__class_weight': [3.0]},
    'binary with softmax': {**BINARY, **heads(num_classes=2, out_channels=None, threshold=None, loss_decode=CE)},
    'binary with dice': {
        **BINARY,
        'model__decode_head__loss_decode': [dict(CE, use_sigmoid=True), dict(type='DiceLoss', ignore_index=None)],
    },
    'older binary form': {**BINARY, **heads(num_classes=1), 'custom_hooks': []},
    'a part of the classes': {**both(metainfo=dict(classes=('Road', 'Sky'))), **heads(num_classes=2)},
    'classes in a list without palette': {
        **both(type='BaseSegDataset', metainfo=dict(classes=list(NAMES))),
    },
    'no background': both(reduce_zero_label=True),
    'repeated': dict(
        train_dataloader__dataset=dict(
            _delete_=True, type='RepeatDataset', times=2, dataset=CAMVID.train_dataloader.dataset
        )
    ),
    'another ignored label': {
        **heads(ignore_index=254),
        'val_evaluator__ignore_index': 254,
        'model__data_preprocessor__seg_pad_val': 254,
    },
    'list of metrics': dict(val_evaluator=[dict(type='IoUMetric', anything=1)]),
    'divisor': dict(model__data_preprocessor__size=None, model__data_preprocessor__size_divisor=16),
    'resized after the crop': dict(
        model__data_preprocessor__size=(64, 64),
        train_dataloader__dataset__pipeline__5=dict(type='Resize', scale=(64, 64), keep_ratio=False),
    ),
    'weights of each class': heads(loss_decode=dict(class_weight=[1.0] * 11)),
    'variable of a hook': dict(my_own_variable=3),
    'variable like a key': dict(val_dataloader2=dict()),
    'hook that keeps all arguments': dict(custom_hooks=[dict(type='EMAHook', momentum=0.1, priority='LOW')]),
    'scheduler by epochs': dict(param_scheduler=[dict(type='PolyLR', convert_to_iter_based=True, end=3)]),
    'type by its path': dict(model__backbone__type='mmseg_volo.models.volo.VOLO'),
    'type of a package that is not installed': dict(model__backbone__type='mmpretrain.ConvNeXt'),
    'type of its scope': dict(model__type='mmseg.EncoderDecoder'),
    'best of a list': dict(default_hooks__checkpoint__save_best=['mIoU', 'aAcc', 'auto']),
    'validation on other labels': dict(
        val_dataloader__dataset=dict(reduce_zero_label=True, data_root='elsewhere'),
    ),
    'options of the optimizer': dict(
        optim_wrapper__paramwise_cfg=dict(custom_keys=dict(head=dict(lr=0.1, betas=(0, 0))))
    ),
    'clipping of values': dict(optim_wrapper__clip_grad=dict(type='value', clip_value=1)),
    'scheduler by epochs in a run by epochs': dict(
        train_cfg=dict(_delete_=True, by_epoch=True, max_epochs=3),
        param_scheduler=[dict(type='PolyLR', end=3)],
    ),
    'test images of one size': dict(model__data_preprocessor__test_cfg=dict(_delete_=True, size=(9, 9))),
    'schedule of a loop without validation': dict(
        train_cfg__val_interval=0, val_dataloader=None, val_cfg=None, val_evaluator=None
    ),
    'name of a hook of its own': dict(default_hooks__checkpoint2=dict(type='EMAHook')),
    'no validation': dict(val_dataloader=None, val_cfg=None, val_evaluator=None),
}


@pytest.mark.parametrize('name', VALID)
def test_valid(name):
    cfg = config()
    for key, value in VALID[name].items():
        cfg.merge_from_dict({key.replace('__', '.'): value})
    assert faults(cfg) == []


def test_all_faults_are_told_at_once():
    cfg = config(model__backbone__drop_path=0.1, train_cfg__max_iter=3)
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    first, *rest = str(error.value).splitlines()
    assert first == 'volo_d1_camvid.py: 2 faults in the config:' and len(rest) == 2


def test_each_task_checks_what_it_uses(log):
    cfg = config(train_dataloader__dataset__data_rot='x', optim_wrapper__optimizer__r=1, val_dataloader__num_worker=1)
    assert len(faults(cfg)) == 3 and faults(cfg, 'test') == []
    cfg = config(test_dataloader__dataset__data_prefix=dict(_delete_=True, img_path='images/test'))
    assert faults(cfg, 'train') == []
    assert 'test_dataloader.dataset: has no labels' in log.pop()
    assert len(faults(cfg, 'test')) == 1 and faults(cfg, 'data') == []
    # The evaluator alone decides what a test ignores, so this is a choice; training needs one value everywhere.
    assert faults(config(test_evaluator__ignore_index=0), 'test') == []
    assert 'ignore_index: test_evaluator.ignore_index = 0, but' in log.pop()
    # Auxiliary heads and losses do not take part in a test or a prediction.
    cfg = config(**heads(loss_decode=dict(class_weight=[1.0])), model__auxiliary_head__num_classes=3)
    assert faults(cfg, 'test') == [] and check_model(cfg) is None
    assert faults(config(test_dataloader=None, test_cfg=None, test_evaluator=None), 'test')[0].startswith('test_datal')


def test_the_model_for_prediction():
    with pytest.raises(ConfigError, match=r'num_classes: 4, but test_dataloader\.dataset has 11'):
        check_model(config(model__decode_head__num_classes=4))
    check_model(config(model__decode_head__num_classes=4), any_classes=True)
    with pytest.raises(ConfigError, match=r"backbone\.drop_path: .* 'drop_path_rate'"):
        check_model(config(model__backbone__drop_path=1))
    check_model(config(train_dataloader__dataset__data_rot='x'))
    for model in (None, 'x'):
        with pytest.raises(ConfigError, match=r'^volo_d1_camvid\.py: model: '):
            check_model(config(model=model))
    with pytest.raises(ConfigError, match=r'test_dataloader\.dataset\.pipeline: str is no list'):
        check_model(config(test_dataloader__dataset__pipeline='test'))


def test_the_pipeline_of_augmentation():
    check_tta_pipeline(CAMVID)
    for change, line in (
        (dict(tta_pipeline__1__transforms=[[dict(type='PackSegInputss')]]), r"tta_pipeline\.1.*'PackSegInputs'"),
        (dict(tta_pipeline=[dict(type='LoadImageFromFile')]), r'tta_pipeline: packs no inputs'),
    ):
        with pytest.raises(ConfigError, match=line):
            check_tta_pipeline(config(**change))


def test_settings_that_cannot_hold_are_dropped(log):
    cfg = config(train_dataloader__num_workers=0, train_dataloader__prefetch_factor=2, val_dataloader=None)
    settle(cfg)
    assert 'persistent_workers' not in cfg.train_dataloader and 'prefetch_factor' not in cfg.train_dataloader
    assert cfg.test_dataloader.persistent_workers  # it has workers
    assert cfg.val_cfg is None and cfg.val_evaluator is None and faults(cfg) == []
    assert 'train_dataloader.persistent_workers is left out, because num_workers is 0' in log[0]
    assert 'val_dataloader is not set: there will be no validation' in log[-1]


# What mmengine and mmseg do with such configs.


def test_mmseg_takes_a_text_for_letters_and_rejects_other_names_and_palettes():
    init_default_scope('mmseg')
    text = DATASETS.build(dict(type='BaseSegDataset', metainfo=dict(classes='water'), lazy_init=True))
    assert len(text.metainfo['classes']) == len(text.metainfo['palette']) == 5
    for kind, metainfo in (
        ('CamVidDataset', dict(classes=('Sky', 'road'))),
        ('BaseSegDataset', dict(classes=NAMES, palette=[[0, 0, 0]] * 3)),
    ):
        with pytest.raises(ValueError, match=r'not a\s+subset|palette does not match'):
            DATASETS.build(dict(type=kind, metainfo=metainfo, lazy_init=True))


@pytest.mark.parametrize('outputs', [1, 3])
def test_mmseg_with_wrong_losses(outputs):
    init_default_scope('mmseg')
    head = dict(
        type='FCNHead', in_channels=4, channels=4, num_convs=0, num_classes=max(2, outputs), out_channels=outputs
    )

    def loss(labels: tuple = (0, 1), **cfg) -> torch.Tensor:
        one = MODELS.build(dict(head, loss_decode={**CE, **cfg}))
        label = SegDataSample(gt_sem_seg=PixelData(data=torch.tensor(labels).repeat(36).view(1, 8, 9)))
        return one.loss_by_feat(torch.randn(1, outputs, 8, 9), [label])['loss_ce']

    if outputs == 1:
        assert loss((0, 255)) == 0  # nothing is learnt
        assert loss(use_sigmoid=True, class_weight=[2.0]) > 0
        with pytest.raises(RuntimeError):
            loss(use_sigmoid=True, class_weight=[2.0, 1.0])
    else:
        assert loss(class_weight=[1.0] * 3) > 0
        for wrong in (dict(class_weight=[1.0] * 4), dict(use_sigmoid=True, class_weight=[1.0] * 3)):
            with pytest.raises(RuntimeError):
                loss(**wrong)


def test_mmseg_with_wrong_sizes():
    init_default_scope('mmseg')
    data = dict(
        inputs=[torch.zeros(3, 80, 96), torch.zeros(3, 64, 64)], data_samples=[SegDataSample(), SegDataSample()]
    )
    for sizes, error in (
        (dict(size=(64, 64)), RuntimeError),
        (dict(size=None), AssertionError),
        (dict(size=(96, 96), size_divisor=16), AssertionError),
        (dict(size=512), TypeError),
    ):
        with pytest.raises(error):
            MODELS.build(dict(type='SegDataPreProcessor', **sizes))(copy.deepcopy(data), training=True)
    backbone = dict(
        type='BEiT', img_size=(32, 32), patch_size=16, num_layers=1, embed_dims=8, num_heads=1, out_indices=0
    )
    with pytest.raises(RuntimeError):
        MODELS.build(backbone)(torch.zeros(1, 3, 64, 64))
    cfg = config(model__backbone=dict(_delete_=True, **backbone))
    assert 'model.backbone.img_size: (32, 32), but batches have' in faults(cfg)[0]


def test_mmengine_with_half_of_a_validation(tmp_path):
    cfg = config(val_evaluator=None, work_dir=str(tmp_path))
    with pytest.raises(ValueError, match='should be either all None or not None'):
        Runner.from_cfg(cfg)


def test_mmseg_measures_without_classes_or_labels():
    init_default_scope('mmseg')
    areas = [torch.ones(2)] * 4
    for kind, results in _RESULTS.items():
        found = IoUMetric.total_area_to_metrics(*areas, metrics=[kind])
        assert {'aAcc', *(f'm{name}' for name in found if name != 'aAcc')} == {'aAcc', *results}
    with pytest.raises(KeyError):
        IoUMetric.total_area_to_metrics(*areas, metrics=['mIou'])
    for meta in ({}, dict(classes=NAMES)):
        evaluator = Evaluator(METRICS.build(dict(type='IoUMetric')))
        evaluator.dataset_meta = meta
        sample = SegDataSample(pred_sem_seg=PixelData(data=torch.zeros(1, 4, 4, dtype=torch.long)))
        with pytest.raises(KeyError):
            evaluator.process([sample], {})
