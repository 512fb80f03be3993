"""LeanUPerHead against mmseg's UPerHead."""

import copy
from collections import Counter, OrderedDict

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from small_models import segmentor_config
from torch import nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_volo.export import exporting
from mmseg_volo.models import heads as heads_module

torch_version = tuple(map(int, torch.__version__.split('.')[:2]))

# (height, width) of the four maps: VOLO's own, odd sizes, a pyramid, LV-ViT's pyramid, one size.
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
def test_output_and_gradients_equal_mmseg(name, align_corners):
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


def test_batch_norm_statistics_equal_mmseg():
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
def test_conv_of_upsampled_is_interpolate_then_conv(size, out, align_corners):
    maps = [torch.randn(2, c, *size, dtype=torch.float64) for c in (5, 3)]
    weight = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    upsampled = F.interpolate(torch.cat(maps, 1), out, mode='bilinear', align_corners=align_corners)
    for given, kernels, whole in ((maps, weight, upsampled), (maps[:1], weight[:, :5], upsampled[:, :5])):
        got = heads_module.conv_of_upsampled(given, kernels, out, align_corners)
        torch.testing.assert_close(got, F.conv2d(whole, kernels, padding=1), rtol=1e-12, atol=1e-12)
    for of in (heads_module.upsampled, heads_module._upsampled_by_products):  # the second on a GPU
        torch.testing.assert_close(of(maps[0], out, align_corners), upsampled[:, :5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('align_corners', [False, True])
def test_conv_of_pooled_is_interpolate_then_conv(align_corners):
    shapes = [(5, 1, 1), (3, 2, 3), (4, 6, 4)]
    maps = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(4, 12, 3, 3, dtype=torch.float64)
    upsampled = [F.interpolate(x, (7, 5), mode='bilinear', align_corners=align_corners) for x in maps]
    got = heads_module.conv_of_pooled(maps, weight, (7, 5), align_corners)
    torch.testing.assert_close(got, F.conv2d(torch.cat(upsampled, 1), weight, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size', [(1, 1), (4, 5), (13, 7), (33, 64)], ids=str)
def test_pooling_all_scales_at_once(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    averages, first = heads_module._averages(x, (1, 2, 3, 6)), 0
    for scale in (1, 2, 3, 6):
        own = slice(first, first + scale)
        expected = F.adaptive_avg_pool2d(x, scale)
        torch.testing.assert_close(averages[:, own, own].permute(0, 3, 1, 2), expected, rtol=1e-12, atol=1e-12)
        first += scale


def volo_maps(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32, device: str = 'cpu') -> list:
    """Maps with the sizes and the memory format (channels last) of VOLO's."""
    sizes = [(height, width)] + [(height // 2, width // 2)] * 3
    made = [torch.randn(batch, *size, c, dtype=dtype) for c, size in zip((32, 64, 64, 64), sizes, strict=True)]
    return [x.permute(0, 3, 1, 2).to(device) for x in made]


class Operations(TorchDispatchMode):
    """Count the operations that compute something; on a GPU each takes one launch or more."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.name().split('.')[0]
        if not function.is_view and name not in ('aten::_unsafe_view', 'aten::empty'):
            self.counted[name] += 1
        return out


@pytest.mark.parametrize(('autocast', 'most'), [(False, 66), (True, 76)])
def test_few_operations(autocast, most):
    _, lean = (head.eval() for head in heads())
    maps = volo_maps(1, 8, 12)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        lean(maps)  # fills the cache and casts the weights
        with Operations() as operations:
            lean(maps)
    assert 50 < operations.counted.total() <= most, operations.counted
    assert 'aten::arange' not in operations.counted


def test_cache_filled_in_inference_mode_works_in_training_and_is_bounded(monkeypatch):
    stock, lean = heads()
    monkeypatch.setattr(heads_module, '_MATRICES', OrderedDict())
    monkeypatch.setattr(heads_module, '_MATRICES_LIMIT', 6)
    maps = volo_maps(2, 8, 12)
    with torch.inference_mode():
        lean.eval()(maps)
    made = list(heads_module._MATRICES.values())
    lean.train()(maps).sum().backward()
    stock.load_state_dict(lean.state_dict())
    assert all(one is other for one, other in zip(made, heads_module._MATRICES.values(), strict=True))
    for height in (10, 12, 14):
        maps = volo_maps(1, height, 12)
        torch.testing.assert_close(lean.eval()(maps), stock.eval()(maps), rtol=1e-4, atol=1e-4)
        assert len(heads_module._MATRICES) <= 6


def test_autocast_is_as_precise_as_in_mmseg():
    stock, lean = (head.eval() for head in heads())
    maps = volo_maps(2, 8, 12)
    with torch.no_grad():
        exact = stock(maps)
        with torch.autocast('cpu', torch.bfloat16):
            of_stock, of_lean = ((head(maps).float() - exact).abs().mean() for head in (stock, lean))
    assert 0 < of_lean < 1.5 * of_stock


def test_torch_compile_makes_one_graph():
    _, lean = (head.eval() for head in heads())
    torch._dynamo.reset()
    compiled = torch.compile(lean, backend='eager', fullgraph=True)
    with torch.no_grad():
        for height, width in ((8, 12), (10, 6), (16, 16)):
            maps = volo_maps(2, height, width)
            torch.testing.assert_close(compiled(maps), lean(maps), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch_version < exporting._LEAST_TORCH, reason='export needs a newer PyTorch')
def test_export_takes_any_batch_and_size():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = heads()[1].eval()

        def forward(self, image):
            channels = zip((32, 64, 64, 64), (8, 16, 16, 16), strict=True)
            return self.head([F.avg_pool2d(image[:, :c], side) for c, side in channels])

    network = Network()
    sizes = {0: Dim('batch', max=64), 2: 16 * Dim('rows', max=64), 3: 16 * Dim('columns', max=64)}
    image = torch.randn(2, 64, 64, 96)
    program = torch.export.export(network, (image,), dynamic_shapes=dict(image=sizes), strict=False).module()
    for batch, height, width in ((1, 64, 64), (3, 96, 32)):
        image = torch.randn(batch, 64, height, width)
        torch.testing.assert_close(program(image), network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_output_and_gradients_equal_mmseg(gpu, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    stock, lean = (head.eval().to(gpu) for head in heads())
    maps = volo_maps(3, 10, 14, device=gpu)
    results = []
    for head, precise in ((copy.deepcopy(stock).double(), True), (stock, False), (lean, False), (lean, False)):
        inputs = [(x.double() if precise else x).clone().requires_grad_() for x in maps]
        with torch.autocast('cuda', torch.bfloat16, enabled=dtype == torch.bfloat16 and not precise):
            out = head(inputs)
        head.zero_grad()
        (out.double() * torch.linspace(-1, 1, out.numel(), device=gpu).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for expected, of_stock, got, again in zip(*results, strict=True):
        errors = [((found.double() - expected).norm() / expected.norm()).item() for found in (of_stock, got)]
        # In bfloat16 mmseg's own gradients are up to 8 % off.
        assert errors[1] < (1e-5 if dtype == torch.float32 else 1.5 * errors[0] + 1e-3), errors
        torch.testing.assert_close(got, again, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_matrices_that_a_cuda_graph_reads_stay_in_memory(gpu, monkeypatch):
    monkeypatch.setattr(heads_module, '_MATRICES', OrderedDict())
    monkeypatch.setattr(heads_module, '_MATRICES_LIMIT', 8)
    _, lean = (head.eval().to(gpu) for head in heads())
    maps = volo_maps(2, 8, 12, device=gpu)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = lean(maps).clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = lean(maps)
        for height in range(10, 30, 2):
            lean(volo_maps(1, height, 16, device=gpu))
        junk = [torch.full((4096,), torch.nan, device=gpu) for _ in range(1000)]
        graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    del junk
