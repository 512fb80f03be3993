"""The backbone against timm's VOLO and its own docstring."""

import copy
import io
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.model import PretrainedInit
from mmseg.registry import MODELS
from small_models import segmentor_config
from timm.models.volo import _create_volo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.feature_extraction import create_feature_extractor

from mmseg_volo import ARCHS, VOLO, CheckpointError
from mmseg_volo.checkpoints.pretrained import CLASSIFIER
from mmseg_volo.models.volo import Block, PatchEmbed, call_block, call_stem, resize_pos_embed
from mmseg_volo.ops.layers import LayerNorm

# The parts of all variants at a size that takes milliseconds. The stem width is not 16, with which oneDNN computes the
# 4 x 4 projection wrongly in bfloat16 on CPUs with AMX.
TINY = dict(depths=(2, 1, 2, 1), dims=(48, 96, 96, 96), heads=(2, 4, 4, 4), mlp_ratios=2, stem_width=8)


def tiny(**kwargs) -> VOLO:
    model = VOLO(**{'arch': TINY, 'img_size': 64, **kwargs})
    model.init_weights()
    return model


def timm_pair(arch: str, **kwargs):
    """timm's model and ours with the same weights, all random, also those that timm initialises to zero or one."""
    theirs = timm.create_model(f'volo_{arch}_224', pretrained=False).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith(('running_var',)):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    ours = VOLO(arch, out_norm=False, **kwargs).eval()
    backbone = {k: v for k, v in theirs.state_dict().items() if not k.startswith((*CLASSIFIER, 'norm.'))}
    assert set(ours.state_dict()) == set(backbone)
    ours.load_state_dict(backbone)
    return theirs, ours


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize('arch', ['d1', 'd2', 'd3', 'd4', pytest.param('d5', marks=pytest.mark.slow)])
def test_stage_outputs_equal_timm(arch):
    theirs, ours = timm_pair(arch)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        got = ours(x)
    assert [tuple(t.shape) for t in got] == [tuple(t.shape) for t in expected]
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-4


def test_another_size_equals_timm_with_a_resized_pos_embed():
    theirs, ours = timm_pair('d1')
    resized = F.interpolate(theirs.pos_embed.permute(0, 3, 1, 2), (16, 20), mode='bicubic', align_corners=False)
    theirs.pos_embed = nn.Parameter(resized.permute(0, 2, 3, 1))
    x = torch.randn(1, 3, 256, 320)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(ours(x), expected, strict=True):
            assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize('arch', ARCHS)
def test_parameter_count_is_timms_without_the_class_part(arch):
    with torch.device('meta'):
        theirs = timm.create_model(f'volo_{arch}_224', pretrained=False)
        ours = VOLO(arch)
    level_norms = 2 * sum(ARCHS[arch]['dims'][:-1])
    backbone = sum(p.numel() for n, p in theirs.named_parameters() if not n.startswith(CLASSIFIER))
    assert sum(p.numel() for p in ours.parameters()) == backbone + level_norms


@pytest.mark.parametrize('size', [(32, 32), (224, 224), (96, 160), (111, 113), (33, 500)], ids=str)
def test_any_input_size_gives_maps_of_the_rounded_up_size(size):
    model = tiny().eval()
    with torch.no_grad():
        outs = model(torch.randn(2, 3, *size))
    for i, out in enumerate(outs):
        stride = 16 if i else 8
        assert out.shape == (2, TINY['dims'][i], math.ceil(size[0] / stride), math.ceil(size[1] / stride))


def test_padding_is_zeros_at_the_right_and_the_bottom():
    model = tiny().eval()
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        for a, b in zip(model(x), model(F.pad(x, (0, 6, 0, 10))), strict=True):
            torch.testing.assert_close(a, b[..., : a.shape[2], : a.shape[3]])


@pytest.mark.parametrize('size', [(31, 64), (64, 9), (14, 200), (1, 1)], ids=str)
def test_small_images_are_padded_to_32_pixels(size):
    model = tiny()
    x = torch.randn(2, 3, *size)
    padded = F.pad(x, (0, max(32 - size[1], -size[1] % 16), 0, max(32 - size[0], -size[0] % 16)))
    for i, (a, b) in enumerate(zip(model(x), model(padded), strict=True)):
        assert a.shape[2:] == tuple(math.ceil(side / (16 if i else 8)) for side in size)
        torch.testing.assert_close(a, b[..., : a.shape[2], : a.shape[3]])


@pytest.mark.parametrize('indices', [(0,), (1,), (0, 2), (3,), (0, 1, 2, 3)], ids=str)
def test_out_indices_pick_maps_and_build_no_stage_past_the_last(indices):
    full = tiny(out_norm=False).eval()
    part = tiny(out_norm=False, out_indices=indices).eval()
    assert len(part.network) == (indices[-1] + 2 if indices[-1] else 1)
    part.load_state_dict({k: v for k, v in full.state_dict().items() if k in part.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = full(x)
        for i, out in zip(indices, part(x), strict=True):
            torch.testing.assert_close(out, expected[i])


def test_level_norms_are_layer_norms_of_each_map():
    normed, raw = tiny().eval(), tiny(out_norm=False).eval()
    raw.load_state_dict({k: v for k, v in normed.state_dict().items() if not k.startswith('norm')})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(normed(x), raw(x), strict=True)):
            expected = F.layer_norm(b.permute(0, 2, 3, 1), [TINY['dims'][i]]).permute(0, 3, 1, 2)
            torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-5)
    assert {n for n, _ in normed.named_children() if n.startswith('norm')} == {'norm0', 'norm1', 'norm2', 'norm'}


@pytest.mark.parametrize('with_cp', [False, True])
def test_every_parameter_gets_a_gradient(with_cp):
    model = tiny(with_cp=with_cp).train()
    sum(out.square().mean() for out in model(torch.randn(2, 3, 64, 48))).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The mean square of a LayerNorm's output depends on its weight and bias, and through eps a little on its input.
    assert not without


def test_checkpointing_changes_neither_outputs_nor_gradients():
    plain = tiny(drop_path_rate=0.5).train()
    saving = tiny(drop_path_rate=0.5, with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for model in (plain, saving):
        torch.manual_seed(3)
        outs = model(x)
        (outs[0].square().sum() + outs[3].cos().sum()).backward()
        grads.append([outs[3], *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_train_and_eval_agree_without_stochastic_parts():
    model = tiny(norm_eval=True)
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        for a, b in zip(model.train()(x), model.eval()(x), strict=True):
            torch.testing.assert_close(a, b)


def test_stochastic_depth_grows_over_all_blocks_and_spares_the_outlookers():
    model = VOLO(TINY, drop_path_rate=0.5)
    rates = [getattr(b.drop_path, 'drop_prob', 0.0) for i in range(4) for b in model._stage(i)]
    assert rates == pytest.approx([0, 0, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('grid', [(6, 8), (3, 5), (4, 7), (20, 3)])
def test_pos_embed_is_resized_as_by_interpolate(device, grid, request):
    if device == 'cuda':
        request.getfixturevalue('gpu')
    pos_embed = torch.randn(1, 4, 7, 5, requires_grad=True)
    channels_first = pos_embed.permute(0, 3, 1, 2)
    expected = F.interpolate(channels_first, grid, mode='bicubic', align_corners=False).permute(0, 2, 3, 1)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    moved = pos_embed.detach().to(device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        resized = resize_pos_embed(moved, grid)
    torch.testing.assert_close(resized.cpu(), expected)
    (resized * weight.to(device)).sum().backward()
    torch.testing.assert_close(moved.grad.cpu(), pos_embed.grad)
    assert resize_pos_embed(moved, (4, 7)) is moved
    half = resize_pos_embed(moved.half(), grid)
    assert half.dtype == torch.float16 and relative_error(half.float().cpu(), expected) < 1e-3


def test_resized_pos_embed_follows_the_weights():
    model, x = tiny().eval(), torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        model(x)
        fresh = copy.deepcopy(model)
        model.pos_embed.data.copy_(-fresh.pos_embed)  # as mmengine's EMAHook does; no version, no address tells of it
        fresh.pos_embed.neg_()
        torch.testing.assert_close(model(x)[3], fresh(x)[3])


def test_pos_embed_is_resized_when_a_state_dict_of_another_size_is_loaded():
    big, small = tiny(img_size=128), tiny(img_size=(64, 96))
    small.load_state_dict(big.state_dict())
    expected = F.interpolate(big.pos_embed.permute(0, 3, 1, 2), (4, 6), mode='bicubic', align_corners=False)
    torch.testing.assert_close(small.pos_embed.detach(), expected.permute(0, 2, 3, 1).detach())
    assert resize_pos_embed(big.pos_embed, (8, 8)) is big.pos_embed


@pytest.mark.parametrize('stages', [0, 1, 2, 4])
def test_frozen_stages(stages):
    model = tiny(frozen_stages=stages, drop_path_rate=0.9).train()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    expected = ['patch_embed.'] + ['network.0.'] * (stages >= 1)
    expected += ['network.1.', 'network.2.', 'pos_embed'] * (stages >= 2)
    expected += ['network.3.', 'network.4.'] * (stages == 4)
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(tuple(expected))}
    assert not any(m.training for part in model._frozen_modules() for m in part.modules())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.startswith('patch_embed'))


def test_norm_eval_freezes_the_statistics_only():
    model = tiny(norm_eval=True).train()
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(bns) == 3 and not any(m.training for m in bns) and all(m.weight.requires_grad for m in bns)
    assert model.network[0].training


def test_sync_bn_becomes_bn_without_a_gpu():
    model = tiny(norm_cfg=dict(type='SyncBN', requires_grad=True))
    kind = nn.SyncBatchNorm if torch.cuda.is_available() else nn.BatchNorm2d
    assert type(model.patch_embed.conv[1]) is kind
    frozen = tiny(norm_cfg=dict(type='BN', requires_grad=False))
    assert not frozen.patch_embed.conv[1].weight.requires_grad


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_close_to_float32(dtype):
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast('cpu', dtype=dtype):
            low = model(x)
    for a, b in zip(low, exact, strict=True):
        assert a.isfinite().all() and relative_error(a.float(), b) < 0.03


def test_half_precision_weights_run():
    model = tiny().eval().to(torch.bfloat16)
    with torch.no_grad():
        assert all(o.dtype == torch.bfloat16 for o in model(torch.randn(1, 3, 80, 64, dtype=torch.bfloat16)))


def test_torch_compile_makes_one_graph():
    """No graph break, also in eval mode with cached embeddings."""
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend='eager', fullgraph=True)
        for a, b in zip(compiled(x), expected, strict=True):
            torch.testing.assert_close(a, b)
    trained = torch.compile(tiny(with_cp=True).train(), backend='aot_eager', fullgraph=True)
    sum(o.sum() for o in trained(x)).backward()


def test_regions_compile_once_for_all_blocks_and_few_times_for_all_sizes():
    model = tiny().eval()
    counter = CompileCounterWithBackend('eager')
    sizes = [(2, 64, 96), (2, 96, 64), (1, 64, 64), (3, 128, 96), (4, 80, 112), (1, 96, 160)]
    inputs = [torch.randn(B, 3, *size) for B, *size in sizes]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        compiled = {Block: call_block, PatchEmbed: call_stem}
        model.calls = {part: torch.compile(call, backend=counter, dynamic=True) for part, call in compiled.items()}
        for x, outs in zip(inputs, expected, strict=True):
            for a, b in zip(model(x), outs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # The stem, the first Outlooker, other Outlookers and transformers, each once for batches and once for one image.
    assert counter.frame_count <= 9


def randomise_norms(model: nn.Module) -> nn.Module:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    return model


@pytest.mark.parametrize('norm', ['BN', 'without weights', 'GN'])
def test_folding_the_norms_does_not_change_the_stem(norm):
    """In eval mode on a CPU; with gradients and in training the norms are not folded."""
    norm_cfg = dict(type='GN', num_groups=4) if norm == 'GN' else dict(type='BN', affine=norm == 'BN')
    stem = PatchEmbed(3, 16, 48, norm_cfg).eval()
    if norm == 'BN':
        randomise_norms(stem)
    x, calls = torch.randn(2, 3, 64, 96), []
    expected = stem.double().proj(stem.conv(x.double())).permute(0, 2, 3, 1).detach()
    stem.float().conv[4].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(stem(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == (norm == 'GN')
    out = stem(x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.requires_grad and len(calls) == 1 + (norm == 'GN')
    if norm == 'BN':
        before = stem.conv[1].running_mean.clone()
        with torch.no_grad():
            stem.train()(x)
        assert len(calls) == 2 and not torch.equal(stem.conv[1].running_mean, before)


def test_gpu_norm_without_gradients_keeps_half_precision(gpu):
    norm = LayerNorm(48).to(gpu)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 48, device=gpu) * 3 + 1
    expected = F.layer_norm(x.bfloat16().double(), [48], norm.weight.double(), norm.bias.double())
    with torch.autocast('cuda', dtype=torch.bfloat16):
        with torch.no_grad():
            low = norm(x.bfloat16())
            assert low.dtype == torch.bfloat16 and norm(x).dtype == torch.float32
        assert norm(x.bfloat16()).dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(norm(x), F.layer_norm(x, [48], norm.weight, norm.bias))
    # Half a unit in the last place of 8 bits, for the result, the weight and the bias.
    limit = (expected.abs() + (expected - norm.bias).abs() + norm.bias.abs()) * 2**-8
    assert ((low.double() - expected).abs() <= limit + 1e-6).all()


def test_gpu_runs_in_half_precision_and_compiled(gpu):
    model = tiny(norm_cfg=dict(type='SyncBN')).to(gpu).train()
    x = torch.randn(2, 3, 70, 90, device=gpu)
    with torch.autocast('cuda', dtype=torch.bfloat16):
        sum(o.float().square().mean() for o in torch.compile(model)(x)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_torchscript():
    """As of timm's VOLO; here the compiled module takes images of any size, and follows ``train()`` and ``eval()``."""
    model = randomise_norms(tiny(drop_path_rate=0.5)).eval()
    images = torch.randn(2, 3, 64, 64), torch.randn(1, 3, 50, 100), torch.randn(1, 3, 20, 64)
    scripted = torch.jit.script(model)
    assert {n: t.data_ptr() for n, t in scripted.state_dict().items()} == {
        n: t.data_ptr() for n, t in model.state_dict().items()
    }
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for other in (scripted, torch.jit.load(file)):
        for x in images:
            for a, b in zip(other(x), model(x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    results = []
    for part in (scripted.train(), model.train()):
        torch.manual_seed(0)
        results.append(part(images[0]))
    for a, b, c in zip(*results, model.eval()(images[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(b, c, rtol=1e-2)
    traced = torch.jit.trace(model, images[0])
    for a, b in zip(traced(images[0] + 1), model(images[0] + 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('grad', [False, True])
def test_fx_tracing(grad):
    model = randomise_norms(tiny(drop_path_rate=0.5)).eval()
    names = 'patch_embed', 'network.0.1', 'network.0.1.mlp.fc1', 'network.2.0.attn.proj', 'network.4.0', 'norm'
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    with torch.set_grad_enabled(grad):
        graph = torch.fx.symbolic_trace(model)
        extractor = create_feature_extractor(model, list(names)).eval()
        for x in (torch.randn(2, 3, 64, 64), torch.randn(1, 3, 50, 100), torch.randn(1, 3, 20, 64)):
            for a, b in zip(graph(x), model(x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            for name, value in extractor(x).items():
                torch.testing.assert_close(value, seen[name], rtol=1e-4, atol=1e-5)
    results = []
    for part in (torch.fx.symbolic_trace(model.train()), model):
        torch.manual_seed(0)
        results.append(part(torch.ones(2, 3, 64, 64))[3])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('given', 'stages'), [(2, (2,)), (np.int64(-1), (3,)), ((0, -1), (0, 3)), ([-4, 1, -2], (0, 1, 2))]
)
def test_out_indices_of_other_forms(given, stages):
    assert tiny(out_indices=given).out_indices == stages


@pytest.mark.parametrize('channels', [1, 2, 4, 16])
def test_pretrained_stem_of_other_channels_is_timms(channels, tmp_path):
    """Both load the same file, made for three channels."""
    torch.manual_seed(0)
    small = dict(layers=(1, 1, 1, 1), embed_dims=(32, 64, 64, 64), num_heads=(1, 2, 2, 2), stem_hidden_dim=8)
    source = _create_volo('volo_d1_224', **small)  # what timm.create_model calls with D1's numbers
    torch.save(source.state_dict(), tmp_path / 'volo.pth')
    overlay = dict(file=str(tmp_path / 'volo.pth'))
    theirs = _create_volo('volo_d1_224', True, pretrained_cfg_overlay=overlay, in_chans=channels, **small)
    arch = dict(depths=(1, 1, 1, 1), dims=(32, 64, 64, 64), heads=(1, 2, 2, 2), mlp_ratios=3, stem_width=8)
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'volo.pth'))
    ours = VOLO(arch, in_channels=channels, init_cfg=pretrained)
    ours.init_weights()
    expected = theirs.state_dict()
    assert expected['patch_embed.conv.0.weight'].shape[1] == channels
    for name, value in ours.state_dict().items():
        if name in expected:
            assert torch.equal(value, expected[name]), name


def test_the_segmentors_argument_pretrained():
    model = MODELS.build(segmentor_config(type='EncoderDecoder', pretrained='volo.pth'))
    assert model.backbone.init_cfg == dict(type='Pretrained', checkpoint='volo.pth')
    with pytest.raises(ValueError, match='pretrained and init_cfg cannot both be given'):
        VOLO(TINY, pretrained='volo.pth', init_cfg=dict(type='Normal', layer='Linear'))


@pytest.mark.parametrize('kind', [PretrainedInit, 'Pretrained'])
def test_a_list_of_initializers(kind, tmp_path):
    source = randomise_norms(tiny())
    torch.save({f'student.{name}': value for name, value in source.state_dict().items()}, tmp_path / 'x.pth')
    pretrained = dict(type=kind, checkpoint=str(tmp_path / 'x.pth'), prefix='student')
    constant = dict(type='Constant', layer='LayerNorm', val=3.0, bias=2.0)
    model = VOLO(TINY, img_size=64, init_cfg=[pretrained, constant])
    model.init_weights()  # as in mmengine, the pretrained weights come last
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.init_cfg == [pretrained, constant]
    nn.init.zeros_(model.norm.weight)
    model.init_weights()  # only the first call initialises, as in mmengine
    assert model.is_init and not model.norm.weight.any()
    model = VOLO(TINY, img_size=64, init_cfg=[constant, dict(type='Normal', layer='Linear', std=0.1)])
    model.init_weights()
    assert (model.norm.weight == 3).all() and 0.08 < model.network[0][0].mlp.fc1.weight.std() < 0.12
    wrong = VOLO(TINY, img_size=64, init_cfg=dict(pretrained, prefix='teacher.'))
    with pytest.raises(CheckpointError, match=r'x\.pth: no name begins with teacher\., the prefix in init_cfg'):
        wrong.init_weights()


def test_registry_and_deepcopy():
    model = MODELS.build(dict(type='VOLO', arch=TINY, img_size=64, in_channels=4)).eval()
    x = torch.randn(1, 4, 64, 96)
    with torch.no_grad():
        for a, b in zip(model(x), copy.deepcopy(model)(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='d6'), "one of d1, d2, d3, d4, d5 or a dict of numbers, got 'd6'"),
        (dict(arch={**TINY, 'width': 3}), 'needs exactly the keys'),
        (dict(arch={**TINY, 'heads': (2, 4, 4)}), 'as many heads as depths'),
        (dict(arch={**TINY, 'heads': (2, 5, 4, 4)}), 'width 96 cannot be split into 5 heads'),
        (dict(arch={**TINY, 'dims': (48, 96, 192, 96)}), 'share one width'),
        (dict(out_indices=(0, 4)), r'within 0\.\.3; got \(0, 4\)'),
        (dict(out_indices=(2, 1)), 'ascending'),
        (dict(out_indices=()), 'ascending'),
        (dict(out_indices=-5), r'within 0\.\.3; got -5'),
        (dict(out_indices=True), 'must be integers; got True'),
        (dict(out_indices='3'), "must be integers; got '3'"),
        (dict(out_indices=(0, 1.0)), 'must be integers'),
        (dict(frozen_stages=5), 'between -1 and the 4 stages'),
        (dict(frozen_stages=2, out_indices=(0,)), 'between -1 and the 1 stages'),
        (dict(img_size=16), 'at least 32 pixels a side, got 16'),
    ],
)
def test_bad_arguments_raise_clear_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VOLO(**{'arch': TINY, **kwargs})
