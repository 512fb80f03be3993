"""Outlook attention on a device, against its definition in float64."""

import copy
from functools import partial

import pytest
import torch
from device_errors import relative_error, worst_error
from torch import Tensor

from mmseg_volo.benchmark.timing import autocast
from mmseg_volo.models.volo import OutlookAttention
from mmseg_volo.ops import IMPLEMENTATIONS, outlook_attention


def draw(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype, stride: int = 2) -> list[Tensor]:
    """v, logits and the gradient of the result for (B, H, W, M), with 32 channels a head."""
    generator = torch.Generator(device).manual_seed(0)
    batch, height, width, heads = shape
    grid = (height - 1) // stride + 1, (width - 1) // stride + 1
    sizes = (batch, height, width, 32 * heads), (batch, *grid, heads, 9, 9), (batch, height, width, 32 * heads)
    v, logits, grad = (torch.randn(size, generator=generator, device=device) for size in sizes)
    return [v.to(dtype), (3 * logits).to(dtype), grad.to(dtype)]


def results(v: Tensor, logits: Tensor, grad: Tensor, impl: str, stride: int = 2) -> list[Tensor]:
    """The result and both gradients."""
    v, logits = v.detach().requires_grad_(), logits.detach().requires_grad_()
    out = outlook_attention(v, logits, scale=0.4, stride=stride, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (v, logits), grad)]


def exact(inputs: list[Tensor], stride: int = 2) -> list[Tensor]:
    return results(*(tensor.double() for tensor in inputs), 'reference', stride)


@pytest.fixture
def fused(device, cuda) -> None:
    try:
        outlook_attention(*draw(device, (1, 4, 4, 1), torch.float32)[:2], scale=1.0, stride=2, impl='fused')
    except ValueError as error:
        if cuda:  # the package exists for the fused kernels, so on a GPU this is an error
            raise
        pytest.skip(str(error))


def test_dtypes(device, cuda, fused, say):
    """operation: result and gradients in bfloat16, float16 and float32"""
    texts, fine = [], True
    for dtype in (torch.bfloat16, torch.float32, *[torch.float16] * cuda):
        inputs = draw(device, (2, 32, 32, 6) if cuda else (1, 8, 8, 2), dtype)
        wanted = exact(inputs)
        plain, ours = (
            [relative_error(a, b) for a, b in zip(results(*inputs, impl), wanted, strict=True)]
            for impl in ('reference', 'fused')
        )
        fine &= all(own <= 2 * theirs + 1e-6 for own, theirs in zip(ours, plain, strict=True))
        texts.append(f'{str(dtype).removeprefix("torch.")} {max(ours):.1e} (unfold/fold {max(plain):.1e})')
    say('errors: ' + ', '.join(texts))
    assert fine, texts


def test_odd_sizes(device, fused, say):
    """operation: odd sizes, one row, stride 1"""
    shapes = [((2, 33, 47, 3), 2), ((1, 1, 5, 1), 2), ((3, 7, 2, 2), 1), ((1, 18, 31, 6), 1)]
    worst = 0.0
    for shape, stride in shapes:
        inputs = draw(device, shape, torch.float32, stride)
        worst = max(worst, worst_error(results(*inputs, 'fused', stride), exact(inputs, stride)))
    say(f'{len(shapes)} shapes, error {worst:.1e}')
    assert worst < 1e-5


def test_strides(device, fused, say):
    """operation: inputs that are not contiguous, or begin in the middle of a tensor"""
    v, logits, grad = inputs = draw(device, (2, 16, 20, 2), torch.float32)
    wanted = exact(inputs)
    shifted = torch.cat([v.new_zeros(1), v.flatten()])[1:].view_as(v)
    kinds = {
        'transposed': (v.transpose(1, 2).contiguous().transpose(1, 2), logits, grad),
        'channels first': (v, logits, grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)),
        'logits with heads first': (v, logits.permute(0, 3, 1, 2, 4, 5).contiguous().permute(0, 2, 3, 1, 4, 5), grad),
        'shifted by one number': (shifted, logits, grad),
    }
    errors = {name: worst_error(results(*given, 'fused'), wanted) for name, given in kinds.items()}
    say(f'{len(kinds)} kinds, error {max(errors.values()):.1e}')
    assert max(errors.values()) <= 1e-5, errors


def test_not_finite(device, fused, say):
    """operation: NaN and infinity spread as in the definition"""
    v, logits, _ = draw(device, (2, 16, 16, 2), torch.float32)
    logits[0, 0, 0] *= 1e4
    call = partial(outlook_attention, scale=0.7, stride=2)
    large = relative_error(call(v, logits, impl='fused'), call(v, logits, impl='reference'))
    say(f'logits of 30,000: error {large:.1e}')
    assert large < 1e-5
    for value in (float('nan'), float('inf')):
        bad = logits.clone()
        bad[1, 1, 2, 0, 4, 3] = value
        assert torch.equal(*(call(v, bad, impl=impl).isnan() for impl in ('fused', 'reference')))
    bad = v.clone()
    bad[0, 3, 3, 5] = float('nan')
    assert torch.equal(*(call(bad, logits, impl=impl).isnan() for impl in ('fused', 'reference')))


def test_large(device, needs_cuda, say):
    """operation: more than 2**31 numbers in all, and just less in one image"""
    free, _ = torch.cuda.mem_get_info(device)
    texts, worst = [], 0.0
    for batch, height, width, heads in ((3, 1024, 2048, 12), (1, 2048, 2560, 12)):
        numbers = batch * height * width * heads * 32
        need = 2 * (4 * numbers + 2 * numbers * 81 // 128) + 2e9  # v, result, two gradients; logits and theirs
        if need > free:
            pytest.skip(f'needs {need / 1e9:.0f} GB of free memory')
        made = partial(torch.empty, device=device, dtype=torch.bfloat16)
        v = made(batch, height, width, heads * 32).normal_()
        logits = made(batch, height // 2, width // 2, heads, 9, 9).normal_(std=3)
        grad = torch.zeros_like(v)
        grad[-1, -32:, -32:].normal_()
        found = results(v, logits, grad, 'fused')
        # The last corner of the last image by itself; its first rows and columns lack the windows of their neighbours.
        wanted = exact([t[-1:, -n:, -n:] for t, n in ((v, 32), (logits, 16), (grad, 32))])
        errors = [
            relative_error(found[0][-1:, -30:, -30:], wanted[0][:, 2:, 2:]),
            relative_error(found[1][-1:, -30:, -30:], wanted[1][:, 2:, 2:]),
            relative_error(found[2][-1:, -15:, -15:], wanted[2][:, 1:, 1:]),
        ]
        worst = max(worst, *errors)
        texts.append(f'{numbers / 2**31:.2f} x 2**31: errors {", ".join(f"{e:.1e}" for e in errors)}')
        del v, logits, grad, found
        torch.cuda.empty_cache()
    say('; '.join(texts))
    assert worst < 0.01, texts


@pytest.fixture
def attention(device, cuda) -> tuple[OutlookAttention, Tensor]:
    """The module, and an input for it."""
    torch.manual_seed(0)
    side = 32 if cuda else 8
    module = OutlookAttention(64, 2, kernel_size=3, stride=2, padding=1).to(device)
    return module, torch.randn(2, side, side, 64, device=device)


@torch.no_grad()
def test_stream(device, needs_cuda, attention):
    """operation: in a stream of its own, the same bits again"""
    module, x = attention
    wanted = module(x)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        found = [module(x) for _ in range(3)]
    torch.cuda.synchronize(device)
    assert all(torch.equal(one, wanted) for one in found)


@torch.no_grad()
def test_graph(device, needs_cuda):
    """operation: in a CUDA graph, replayed on other numbers"""
    v, logits, _ = draw(device, (1, 64, 64, 6), torch.bfloat16)
    call = partial(outlook_attention, v, logits, scale=0.2, stride=2, impl='fused')
    first = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    v.mul_(2)
    graph.replay()
    assert torch.equal(out, call()) and not torch.equal(out, first)


def test_autocast(device, attention, say):
    """operation: under autocast, with gradients in float32"""
    module, x = attention
    reference = copy.deepcopy(module).double()
    reference.impl = 'reference'
    with autocast('bf16', device):
        found = module(x)
    found.float().square().sum().backward()
    error = relative_error(found, reference(x.double()))
    say(f'error {error:.1e}')
    assert error < 0.02 and module.v.weight.grad.dtype == torch.float32


def test_compile(cuda, attention, say):
    """operation: torch.compile, one graph"""
    module, x = attention
    # Without Inductor on a CPU, whose C++ compiler takes long.
    compiled = torch.compile(module, fullgraph=True, backend='inductor' if cuda else 'aot_eager')
    found = []
    for call in (module, compiled):
        module.zero_grad()
        out = call(x)
        out.square().sum().backward()
        found.append((out.detach(), module.attn.weight.grad.clone()))
    errors = [relative_error(a, b) for a, b in zip(*found, strict=True)]
    say(f'errors: result {errors[0]:.1e}, gradient {errors[1]:.1e}')
    assert max(errors) < 1e-5


def test_auto(device, fused):
    """operation: 'auto' takes the fused kernels"""
    v, logits, _ = draw(device, (1, 16, 16, 2), torch.float32)
    found = {impl: outlook_attention(v, logits, scale=0.4, stride=2, impl=impl) for impl in IMPLEMENTATIONS}
    same = [impl for impl in IMPLEMENTATIONS if impl != 'auto' and torch.equal(found[impl], found['auto'])]
    assert same == ['fused']
