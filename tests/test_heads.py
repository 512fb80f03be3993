"""LeanUPerHead against mmseg's UPerHead."""

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from small_models import segmentor_config

from mmseg_volo.heads import conv_of_enlarged

# (height, width) of the four maps: VOLO's own, odd ones, a pyramid's, LV-ViT's.
SIZES = {
    'direct': [(8, 12), (4, 6), (4, 6), (4, 6)],
    'odd': [(9, 13), (5, 7), (5, 7), (5, 7)],
    'pyramid': [(16, 24), (8, 12), (4, 6), (2, 3)],
    'lv_vit': [(16, 24), (8, 12), (4, 6), (4, 6)],
    'one': [(8, 12)] * 4,
}


def heads(**changes) -> list:
    config = dict(segmentor_config().decode_head, **changes)
    torch.manual_seed(0)
    stock = MODELS.build(dict(config, type='UPerHead'))
    lean = MODELS.build(dict(config, type='LeanUPerHead'))
    lean.load_state_dict(stock.state_dict())  # the same names
    return [stock, lean]


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('name', SIZES)
def test_output_and_gradients_are_mmsegs(name, align_corners):
    stock, lean = (head.double().eval() for head in heads(align_corners=align_corners))
    maps = [
        torch.randn(2, c, *size, dtype=torch.float64) for c, size in zip((32, 64, 64, 64), SIZES[name], strict=True)
    ]
    results = []
    for head in (stock, lean):
        inputs = [x.clone().requires_grad_() for x in maps]
        out = head(inputs)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs), *(p.grad for _, p in sorted(head.named_parameters()))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_in_training_batch_norms_see_the_same():
    stock, lean = heads(dropout_ratio=0.0)
    maps = [torch.randn(2, c, *size) for c, size in zip((32, 64, 64, 64), SIZES['direct'], strict=True)]
    torch.testing.assert_close(lean(maps), stock(maps), rtol=1e-4, atol=1e-4)
    for (name, expected), got in zip(stock.named_buffers(), lean.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_other_convolutions_and_no_norm():
    maps = [torch.randn(2, c, *size) for c, size in zip((32, 64, 64, 64), SIZES['direct'], strict=True)]
    for changes in (dict(conv_cfg=dict(type='Conv2dAdaptivePadding')), dict(norm_cfg=None)):
        stock, lean = (head.eval() for head in heads(**changes))
        torch.testing.assert_close(lean(maps), stock(maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('size', 'out'), [((3, 5), (6, 10)), ((4, 3), (7, 9)), ((1, 1), (5, 4)), ((6, 6), (4, 5))])
def test_conv_of_enlarged_is_interpolate_then_conv(size, out, align_corners):
    x, weight = torch.randn(2, 5, *size, dtype=torch.float64), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    enlarged = F.interpolate(x, out, mode='bilinear', align_corners=align_corners)
    got = conv_of_enlarged([x], weight, out, align_corners)
    torch.testing.assert_close(got, F.conv2d(enlarged, weight, padding=1), rtol=1e-12, atol=1e-12)
