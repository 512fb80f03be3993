"""Every config builds the model in its name, with the paper's recipe."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS

from mmseg_volo import ARCHS

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
LEAVES = sorted(path.name for path in CONFIGS.glob('*.py'))
PAPER = [f'volo_{arch}_{data}.py' for arch in ARCHS for data in ('cityscapes', 'ade20k')]
# Table 3 of the paper.
DROP_PATH = {'d1': 0.1, 'd2': 0.2, 'd3': 0.5, 'd4': 0.5, 'd5': 0.75}
RESOLUTION = {'d1': 384, 'd2': 384, 'd3': 448, 'd4': 448, 'd5': 512}


def test_the_documented_configs_exist():
    assert {*PAPER, 'volo_d1_camvid.py', 'volo_d1_quickstart.py'} <= set(LEAVES)


@pytest.mark.parametrize('leaf', LEAVES)
def test_config_builds_and_runs(leaf):
    """The widths match, and the forward pass gives logits. Depths, image size and head are reduced for speed."""
    config = Config.fromfile(CONFIGS / leaf)
    arch = ARCHS[config.model.backbone.arch]
    assert tuple(config.model.decode_head.in_channels) == arch['dims']
    config.model.backbone.arch = dict(arch, depths=(1, 1, 1, 1))
    config.model.backbone.img_size = 64
    config.model.decode_head.channels = 16
    if config.model.get('auxiliary_head'):
        assert config.model.auxiliary_head.in_channels == arch['dims'][2]
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 64))
    classes = {'cityscapes': 19, 'ade20k': 150, 'camvid': 11, 'quickstart': 19}[leaf.split('_')[2].removesuffix('.py')]
    assert logits.shape == (1, classes, 8, 8)
    assert classes == (model.auxiliary_head.num_classes if model.with_auxiliary_head else classes)


@pytest.mark.parametrize('leaf', PAPER)
def test_the_papers_recipe(leaf):
    config = Config.fromfile(CONFIGS / leaf)
    arch, data = leaf.removesuffix('.py').split('_')[1:]
    side, per_gpu, stride = (1024, 1, 768) if data == 'cityscapes' else (512, 2, 341)
    backbone = config.model.backbone
    assert (backbone.arch, backbone.drop_path_rate) == (arch, DROP_PATH[arch])
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'timm://volo_{arch}_{RESOLUTION[arch]}.sail_in1k')
    crop = next(t for t in config.train_dataloader.dataset.pipeline if t.type == 'RandomCrop').crop_size
    assert tuple(crop) == (side, side) == tuple(config.model.data_preprocessor.size) == tuple(backbone.img_size)
    assert config.train_dataloader.batch_size == per_gpu  # 8 and 16 on 8 GPUs
    assert config.model.test_cfg == dict(mode='slide', crop_size=(side, side), stride=(stride, stride))
    assert config.optim_wrapper.optimizer == dict(
        type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01, fused=True
    )
    scales, multiples, flips = config.tta_pipeline[1].transforms[:3]
    assert [s.scale_factor for s in scales] == [0.75, 1.0, 1.25, 1.5, 1.75] and [f.prob for f in flips] == [0.0, 1.0]
    to_multiple = dict(type='ResizeToMultiple', size_divisor=16)
    assert multiples == [to_multiple] == [t for t in config.test_dataloader.dataset.pipeline if t == to_multiple]
    assert config.custom_imports.imports == ['mmseg_volo']


def test_no_weight_decay_for_norms_and_pos_embed():
    config = Config.fromfile(CONFIGS / 'volo_d1_cityscapes.py')
    model = MODELS.build(config.model)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    norms = (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm)
    spared = {f'{name}.{p}' for name, m in model.named_modules() if isinstance(m, norms) for p in ('weight', 'bias')}
    spared.add('backbone.pos_embed')
    assert {'backbone.norm1.weight', 'backbone.patch_embed.conv.1.weight', 'decode_head.bottleneck.bn.weight'} <= spared
    for name, param in model.named_parameters():
        assert decay[id(param)] == (0.0 if name in spared else 0.01), name


def test_the_learning_rate_falls_linearly_from_6e5_to_5e6():
    from mmengine.registry import PARAM_SCHEDULERS

    config = Config.fromfile(CONFIGS / 'volo_d1_ade20k.py')
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=6e-5)
    schedulers = [PARAM_SCHEDULERS.build(dict(cfg, optimizer=optimizer)) for cfg in config.param_scheduler]
    rates = []
    for _ in range(config.train_cfg.max_iters):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] < 1e-9 and rates[1500] == pytest.approx(6e-5, rel=1e-3)
    assert rates[-1] == pytest.approx(5e-6, rel=1e-2)
    middle = (1500 + len(rates)) // 2
    assert rates[middle] == pytest.approx((6e-5 + 5e-6) / 2, rel=1e-2)


@pytest.mark.parametrize('scales', [(2, 2, 1, 0.5), (2, 2, 1, 1)], ids=str)
@pytest.mark.parametrize('project', [False, True])
def test_the_pyramid_by_command_line_options(scales, project):
    """model.neck.type=VOLOPyramid model.neck.arch=d1; the head does not change."""
    config = Config.fromfile(CONFIGS / 'volo_d1_camvid.py')
    config.merge_from_dict({'model.neck.type': 'VOLOPyramid', 'model.neck.arch': 'd1', 'model.neck.project': project})
    config.merge_from_dict({'model.neck.scales': scales})
    config.model.decode_head.channels = 16
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        maps = model.extract_feat(torch.randn(1, 3, 64, 128))
        assert [tuple(m.shape[1:]) for m in maps] == [
            (192, 16, 32),
            (384, 8, 16),
            (384, 4, 8),
            (384, int(4 * scales[3]), int(8 * scales[3])),
        ]
        assert model(torch.randn(1, 3, 64, 128)).shape == (1, 11, 16, 32)


def test_wrong_options_of_the_pyramid():
    with pytest.raises(ValueError, match="one of d1, d2, d3, d4, d5 or a list of widths, got 'd7'"):
        MODELS.build(dict(type='VOLOPyramid', arch='d7'))
    with pytest.raises(ValueError, match='4 maps need as many scales'):
        MODELS.build(dict(type='VOLOPyramid', scales=(2, 1)))
    with pytest.raises(ValueError, match=r'scales must be 2, 1 or 0\.5, got 4'):
        MODELS.build(dict(type='VOLOPyramid', scales=(4, 2, 1, 1)))
