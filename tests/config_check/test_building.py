"""What a constructor rejects is one line with the key, and errors of training keep their traceback."""

import contextlib
import copy
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmseg.registry import HOOKS, MODELS
from small_runs import small_config

from mmseg_volo.config_check import building
from mmseg_volo.config_check.lookup import accepted, default_of, find
from mmseg_volo.engine.runner import VOLORunner, build_runner
from mmseg_volo.errors import ConfigError, DataError
from mmseg_volo.inference.model import init_model
from mmseg_volo.inference.predictor import Predictor


@HOOKS.register_module()
class FaultyHook(Hook):
    """A hook with a bug in training."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        raise ValueError('a bug')


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('model.backbone.arch', 'd9', r'small\.py: model\.backbone: .*d9'),
        ('model.decode_head.in_channels', [24, 48], r'small\.py: model\.decode_head: '),
        ('model.decode_head.loss_decode.loss_name', 3, None),  # accepted
        ('custom_hooks.1.max_in_row', 0, r'small\.py: custom_hooks\.1: max_in_row must be 1 or more'),
        (
            'train_dataloader.dataset.pipeline.3.crop_size',
            (0, 0),
            r'train_dataloader\.dataset\.pipeline\.3: ',
        ),
        ('train_dataloader.batch_size', 0, r'small\.py: train_dataloader: batch_size should be a positive'),
    ],
)
def test_constructors(key, value, message, tmp_path):
    config = small_config(tmp_path, train_dataloader__dataset__train=1, train_dataloader__dataset__val=1)
    config.merge_from_dict({key: value})
    built = dict(model=MODELS.build, custom_hooks=lambda cfgs: [*map(HOOKS.build, cfgs)])
    built['train_dataloader'] = VOLORunner.build_dataloader
    init_default_scope('mmseg')
    name = key.split('.')[0]
    context = pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext()
    with context as error, building(config, name):
        built[name](copy.deepcopy(config[name]))
    assert message is None or '\n' not in str(error.value)


def test_training(tmp_path):
    config = small_config(tmp_path, optim_wrapper__optimizer__lr=-1)
    with pytest.raises(ConfigError, match=r'small\.py: optim_wrapper\.optimizer: Invalid learning rate'):
        build_runner(config, 'train').train()


def test_hooks_and_weights_before_training(tmp_path):
    hook = dict(type='EMAHook', momentum=2)
    runner = build_runner(small_config(tmp_path, custom_hooks=[hook], model__backbone__init_cfg=['x.pth']), 'train')
    with runner._run(), pytest.raises(ConfigError, match=r'small\.py: default_hooks or custom_hooks: momentum must be'):
        runner.call_hook('before_run')
    with runner._run(), pytest.raises(ConfigError, match=r'small\.py: model: .* \(TypeError\)$'):
        runner._init_model_weights()
    with pytest.raises(AssertionError, match='momentum must be'):
        runner.call_hook('before_run')


@pytest.mark.slow
def test_a_bug_in_training_keeps_its_error(tmp_path):
    config = small_config(tmp_path, custom_hooks=[dict(type='FaultyHook')])
    with pytest.raises(ValueError, match='a bug') as error:
        build_runner(config, 'train').train()
    assert not isinstance(error.value, ConfigError)


def test_the_model_alone(tmp_path):
    config = small_config(tmp_path, model__backbone__arch='d9')
    with pytest.raises(ConfigError, match=r'small\.py: model\.backbone: .*d9'):
        init_model(config, device='cpu')
    config = small_config(tmp_path, model__backbone__drop_path=0.1, model__decode_head__num_classes=5)
    with pytest.raises(ConfigError, match=r'2 faults.*\n.*drop_path.*\n.*num_classes: 5, but test_dataloader'):
        init_model(config, device='cpu')


def test_pipelines_and_augmentation_for_prediction(tmp_path):
    path = tmp_path / 'x.pth'
    config = small_config(tmp_path)
    torch.save(init_model(config, device='cpu').state_dict(), path)
    wrong = small_config(tmp_path, tta_model=dict(type='NoTTA'))
    wrong.test_dataloader.dataset.pipeline[1].type = 'Rezise'
    with pytest.raises(ConfigError, match=r'small\.py: test_dataloader\.dataset\.pipeline.*: .*Rezise'):
        Predictor(wrong, str(path), 'cpu')
    wrong.test_dataloader.dataset.pipeline[1].type = 'Resize'
    with pytest.raises(ConfigError, match=r'small\.py: tta_model: .*NoTTA'):
        Predictor(wrong, str(path), 'cpu', aug_test=True)
    wrong = small_config(tmp_path)
    wrong.tta_pipeline[1].transforms[0][0].keep_ration = True
    with pytest.raises(ConfigError, match=r'small\.py: tta_pipeline\.1\.transforms\.0\.0.*keep_ration'):
        Predictor(wrong, str(path), 'cpu', aug_test=True)


def test_only_errors_of_constructors_are_changed():
    config = Config(dict(a=dict(type='X')))
    for error in (DataError('x'), ConfigError('x'), OSError('x'), RuntimeError('out of memory'), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, building(config, 'a'):
            raise error
        assert raised.value is error
    with pytest.raises(ConfigError, match=r'^a: x \(KeyError\)$'), building(config, 'a'):
        raise KeyError('x')


def test_keys_of_constructors():
    """Checked with mmengine's and mmseg's own classes."""
    import mmengine.hooks
    import mmseg.evaluation
    from mmseg.models.decode_heads import UPerHead

    keys, is_open = accepted(UPerHead)
    assert {'pool_scales', 'in_channels', 'num_classes', 'init_cfg', 'loss_decode'} <= set(keys) and not is_open
    assert 'self' not in keys and 'kwargs' not in keys and default_of(UPerHead, 'ignore_index') == 255
    for kind in (mmseg.evaluation.IoUMetric, mmengine.hooks.EMAHook):  # one drops its **kwargs, the other keeps them
        assert accepted(kind)[1]

    class Child(UPerHead):
        def __init__(self, extra=1, **kwargs):
            self.kept = kwargs.pop('kept')
            super().__init__(**kwargs)

    assert accepted(Child)[1] and set(accepted(Child)[0]) == {'extra'}


def test_types_are_found_without_an_import():
    assert find(MODELS, 'mmengine.GELU', 'mmseg') is find(MODELS, 'GELU', 'mmseg') is not None
    for name in ('antigravity.x', 'mmdet.Mask2FormerHead', 'os.path.join.x'):
        before = set(sys.modules)
        find(MODELS, name, 'mmseg')
        assert 'antigravity' not in sys.modules and set(sys.modules) == before
    assert find(MODELS, 'EncoderDecoder', 'mmengine') is None
