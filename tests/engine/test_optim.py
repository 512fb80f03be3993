"""Layer-wise learning-rate decay follows its definition, together with mmengine's options."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmseg.registry import MODELS
from small_models import ARCH, BN, build, segmentor_config
from torch import nn

from mmseg_volo import ARCHS, VOLO
from mmseg_volo.engine.optim import should_update, wrappers_of
from mmseg_volo.errors import ConfigError

LR, DECAY = 0.1, 0.05
PARAMWISE = dict(norm_decay_mult=0.0, custom_keys={'pos_embed': dict(decay_mult=0.0)})


def optimiser(model: nn.Module, constructor: str | None = 'VOLOLayerDecayConstructor', **paramwise) -> OptimWrapper:
    cfg = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY), paramwise_cfg=paramwise)
    return build_optim_wrapper(model, dict(cfg, constructor=constructor) if constructor else cfg)


def settings(model: nn.Module, wrapper: OptimWrapper) -> dict[str, tuple[float, float]]:
    """Map the name of each parameter in the optimizer to its learning rate and weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], (g['lr'], g['weight_decay'])) for g in wrapper.optimizer.param_groups for p in g['params']]
    assert len(dict(found)) == len(found)  # each parameter is in one group only
    return dict(found)


def full_size(arch: str) -> nn.Module:
    dims = ARCHS[arch]['dims']
    cfg = segmentor_config(backbone=dict(type='VOLO', arch=arch, norm_cfg=BN))
    cfg.decode_head.in_channels = list(dims)
    with torch.device('meta'):
        return MODELS.build(cfg)


def forward_order(backbone: VOLO) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters of each depth, from the input on."""
    yield list(backbone.patch_embed.parameters())
    outlookers, downsample, *stages = backbone.network
    *outlookers, last = outlookers
    for block in outlookers:
        yield list(block.parameters())
    yield [*last.parameters(), *downsample.parameters(), backbone.pos_embed]
    for stage in stages:
        for block in stage:
            yield list(block.parameters())


@pytest.mark.parametrize('arch', ['d1', 'd4'])
def test_rates_by_definition(arch):
    model, rate = full_size(arch), 0.8
    expected = {parameter: LR for parameter in model.parameters()}
    layers = list(forward_order(model.backbone))
    assert len(layers) == sum(ARCHS[arch]['depths']) + 1
    current = LR
    for layer in reversed(layers):
        current = current * rate
        for parameter in layer:
            expected[parameter] = current
    wrapper = optimiser(model, layer_decay_rate=rate, **PARAMWISE)
    found = settings(model, wrapper)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {name: lr for name, (lr, _) in found.items()} == pytest.approx(
        {name: expected[p] for name, p in model.named_parameters()}
    )
    # At most two groups per depth, with and without weight decay.
    assert len(wrapper.optimizer.param_groups) <= 2 * (len(layers) + 1)
    options = {(g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups}
    assert len(options) == len(wrapper.optimizer.param_groups)


def test_depths_rise_along_the_network():
    backbone = VOLO('d1', img_size=64)
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    depths = [{backbone.get_layer_depth(names[p]) for p in layer} for layer in forward_order(backbone)]
    assert depths == [{(i, 20)} for i in range(19)]
    for name in ('norm.weight', 'norm0.bias'):
        assert backbone.get_layer_depth(name) == (19, 20)
        assert backbone.get_layer_depth(f'backbone.{name}', 'backbone.') == (19, 20)
    assert backbone.get_layer_depth('backbone.network.2.1.attn.qkv.weight', prefix='backbone.') == (6, 20)
    assert backbone.get_layer_depth('decode_head.patch_embed.weight', prefix='backbone.') == (19, 20)
    # Stages that are not built are not counted.
    assert VOLO('d1', img_size=64, out_indices=(0, 1)).get_layer_depth('network.2.3.norm1.bias') == (8, 10)
    assert VOLO('d1', img_size=64, out_indices=(0,)).get_layer_depth('network.0.3.norm1.bias') == (4, 6)


@pytest.mark.parametrize(
    'paramwise',
    [
        {},
        PARAMWISE,
        dict(bias_lr_mult=2.0, bias_decay_mult=0.0, norm_decay_mult=0.5),
        dict(flat_decay_mult=0.0, custom_keys={'head': dict(lr_mult=10.0), 'stem': dict(lr_mult=0.1)}),
        dict(custom_keys={'backbone.network.0': dict(lr_mult=0.5, decay_mult=2.0), 'decode_head': dict(eps=1e-3)}),
    ],
    ids=str,
)
def test_mmengine_options_apply_and_rate_1_equals_its_constructor(paramwise):
    model = build()
    default = settings(model, optimiser(model, None, **paramwise))
    assert settings(model, optimiser(model, layer_decay_rate=1.0, **paramwise)) == default
    decayed = optimiser(model, layer_decay_rate=0.5, **paramwise)
    for name, (lr, decay) in settings(model, decayed).items():
        depth, depths = model.backbone.get_layer_depth(name, 'backbone.')
        assert (lr, decay) == pytest.approx((default[name][0] * 0.5 ** (depths - 1 - depth), default[name][1])), name
    if 'eps' in str(paramwise):
        head = model.decode_head.conv_seg.weight
        heads = [g for g in decayed.optimizer.param_groups if any(p is head for p in g['params'])]
        assert heads[0]['eps'] == 1e-3 and {g['eps'] for g in decayed.optimizer.param_groups} == {1e-3, 1e-8}


def test_frozen_stages_are_left_out():
    model = build(backbone=dict(type='VOLO', arch=ARCH, img_size=64, norm_cfg=BN, frozen_stages=2))
    found = settings(model, optimiser(model, layer_decay_rate=0.5))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(('backbone.patch', 'backbone.pos', 'backbone.network.1')) for name in found)
    assert found['backbone.network.4.0.norm1.weight'][0] == LR * 0.5  # frozen stages do not change depths


def test_neck_and_head_have_the_full_rate():
    neck = dict(type='VOLOPyramid', arch=ARCH['dims'], project=True)
    model = build(neck=neck)
    found = settings(model, optimiser(model, layer_decay_rate=0.5))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {lr for name, (lr, _) in found.items() if name.startswith(('neck.', 'decode_head.'))} == {LR}
    assert found['backbone.network.0.0.attn.v.weight'][0] == LR * 0.5**4


def test_a_data_parallel_model(tmp_path):
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = build()
        wrapped = MMDistributedDataParallel(module=model)
        assert settings(model, optimiser(wrapped, layer_decay_rate=0.7)) == settings(
            model, optimiser(model, layer_decay_rate=0.7)
        )
    finally:
        dist.destroy_process_group()


def test_one_step_of_sgd():
    """One SGD step moves each parameter by its own learning rate times its gradient."""
    model = build()
    cfg = dict(
        optimizer=dict(type='SGD', lr=LR),
        constructor='VOLOLayerDecayConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    wrapper = build_optim_wrapper(model, cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wrapper.step()
    for name, parameter in model.named_parameters():
        depth, depths = model.backbone.get_layer_depth(name, 'backbone.')
        step = LR * 0.5 ** (depths - 1 - depth)
        assert torch.allclose(before[name] - parameter, torch.full_like(parameter, step), atol=1e-6), name


@pytest.mark.parametrize('rate', [None, 0, -0.5, 1.5, 'high', True, float('nan')])
def test_a_bad_rate(rate):
    with pytest.raises(ConfigError, match='layer_decay_rate must be a number above 0 and at most 1, got'):
        optimiser(build(), **({} if rate is None else dict(layer_decay_rate=rate)))


def test_a_model_without_depths_or_an_optimizer_without_a_rate():
    model = build()
    model.backbone = nn.Conv2d(3, 3, 1)
    for other, name in ((model, 'Conv2d'), (nn.Sequential(nn.Linear(2, 2)), 'Sequential')):
        with pytest.raises(ConfigError, match=f'needs a backbone with get_layer_depth, as VOLO has; {name} has none'):
            optimiser(other, layer_decay_rate=0.9)
    cfg = dict(
        optimizer=dict(type='AdamW'), constructor='VOLOLayerDecayConstructor', paramwise_cfg=dict(layer_decay_rate=0.9)
    )
    with pytest.raises(ConfigError, match=r'multiplies optimizer\.lr'):
        build_optim_wrapper(build(), cfg)


def test_layer_decay_by_command_line_options():
    config = Config.fromfile('configs/volo_d1_ade20k.py')
    config.merge_from_dict(
        {
            'optim_wrapper.constructor': 'VOLOLayerDecayConstructor',
            'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.9,
            'param_scheduler.1.eta_min': 0,
        }
    )
    assert config.param_scheduler[1].eta_min == 0
    model = full_size('d1')
    found = settings(model, build_optim_wrapper(model, config.optim_wrapper))
    assert found['backbone.patch_embed.proj.weight'] == pytest.approx((6e-5 * 0.9**19, 0.01))
    assert found['backbone.pos_embed'] == pytest.approx((6e-5 * 0.9**15, 0.0))


def test_several_optimizers_step_together():
    def wrapper(steps: int) -> OptimWrapper:
        one = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), accumulative_counts=steps)
        one.initialize_count_status(nn.Linear(1, 1), 1, 10)
        return one

    one, two = wrapper(1), wrapper(2)
    both = OptimWrapperDict(a=one, b=two)
    assert wrappers_of(both) == [one, two] and wrappers_of(one) == [one]
    assert should_update(one) and not should_update(two) and not should_update(both)
