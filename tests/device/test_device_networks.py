"""Backbone, head and loss on a device, against timm's VOLO and mmseg's heads."""

import torch
from device_errors import relative_error, worst_error
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead, UPerHead
from mmseg.structures import SegDataSample

from mmseg_volo.benchmark import SIDES, BackboneCase
from mmseg_volo.benchmark.timing import autocast
from mmseg_volo.models.heads import LeanUPerHead
from mmseg_volo.models.losses import LeanFCNHead
from mmseg_volo.models.volo import ARCHS


@torch.no_grad()
def test_backbone(device, cuda, say):
    """backbone: against timm's, float32 and bfloat16"""
    size = (512, 256) if cuda else (64, 96)
    models = BackboneCase(size=size, device=device).build()
    x = torch.randn(2, 3, *size, device=device)
    wanted, found = (models[side](x) for side in SIDES)
    full = worst_error(found, wanted)
    with autocast('bf16', device):
        stock, ours = (worst_error(models[side](x), wanted) for side in SIDES)
    say(f'errors: float32 {full:.1e}; bfloat16 {ours:.1e} (stock {stock:.1e})')
    assert full < 1e-4 and ours < 1.5 * stock + 1e-3


def test_backbone_gradients(device, cuda, say):
    """backbone: gradients against timm's, float32"""
    size = (256, 256) if cuda else (64, 64)
    models = BackboneCase(size=size, device=device).build()
    x, grads = torch.randn(2, 3, *size, device=device), {}
    for side, model in models.items():
        sum(m.square().mean() for m in model.train()(x)).backward()
        named = model.named_parameters()
        grads[side] = {name.removeprefix('volo.'): p.grad for name, p in named if p.grad is not None}
    names = grads['ours'].keys() & grads['stock'].keys()
    errors = {name: relative_error(grads['ours'][name], grads['stock'][name]) for name in names}
    worst = max(errors, key=errors.get)
    say(f'{len(names)} parameters, worst {worst} {errors[worst]:.1e}')
    assert len(names) > 100 and errors[worst] < 5e-3


@torch.no_grad()
def test_head(device, cuda, say):
    """head: against mmseg's UPerHead, float32 and bfloat16"""
    dims, n = ARCHS['d1']['dims'][:4], 64 if cuda else 8
    config = dict(in_channels=list(dims), in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), num_classes=150)
    config.update(channels=512 if cuda else 16, norm_cfg=dict(type='BN'), align_corners=False)
    stock, ours = (kind(**config).to(device).eval() for kind in (UPerHead, LeanUPerHead))
    ours.load_state_dict(stock.state_dict())
    sides = (n, n // 2, n // 2, n // 2)
    maps = [torch.randn(2, dim, side, side, device=device) for dim, side in zip(dims, sides, strict=True)]
    wanted = stock(maps)
    full = relative_error(ours(maps), wanted)
    with autocast('bf16', device):
        low = [relative_error(head(maps), wanted) for head in (stock, ours)]
    say(f'errors: float32 {full:.1e}; bfloat16 {low[1]:.1e} (stock {low[0]:.1e})')
    assert full < 1e-4 and low[1] < 2 * low[0] + 1e-3


def test_loss(device, cuda, say):
    """loss: value, accuracy and gradient against mmseg's, class weights, ignored pixels"""
    classes, coarse, size = (150, (64, 64), (512, 512)) if cuda else (19, (12, 16), (96, 128))
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.randint(classes, (2, 1, *size), generator=generator, device=device)
    labels[torch.rand(labels.shape, generator=generator, device=device) < 0.2] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in labels]
    logits = 3 * torch.randn(2, classes, *coarse, generator=generator, device=device)
    weights = (0.5 + torch.arange(classes) % 3).tolist()
    options = {}, dict(avg_non_ignore=True), dict(class_weight=weights, loss_weight=0.4)
    shared = dict(in_channels=8, channels=8, num_convs=0, concat_input=False, num_classes=classes)
    shared.update(norm_cfg=dict(type='BN'), align_corners=False)
    worst = 0.0
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        for option in options:
            results = []
            for kind in (FCNHead, LeanFCNHead):
                head = kind(loss_decode=dict(type='CrossEntropyLoss', **option), **shared).to(device)
                x = logits.to(dtype)  # mmseg's loss of the same numbers in float32
                x = (x.float() if kind is FCNHead else x).clone().requires_grad_()
                found = head.loss_by_feat(x, samples)
                found['loss_ce'].backward()
                results.append((found['loss_ce'].detach(), found['acc_seg'], x.grad))
            value, accuracy, gradient = (relative_error(b, a) for a, b in zip(*results, strict=True))
            assert value < 1e-5 and accuracy < 1e-3 and gradient < limit, (dtype, option)
            worst = max(worst, gradient / limit)
    say(f'{2 * len(options)} kinds, gradients at {worst:.0%} of what is allowed')
