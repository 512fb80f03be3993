"""Outlook attention against four loops in float64, timm's module, and gradcheck."""

import math

import pytest
import torch
from timm.models.volo import OutlookAttention as TimmOutlookAttention

from mmseg_volo.ops import outlook_attention
from mmseg_volo.volo import OutlookAttention


def four_loops(v, logits, scale, kernel_size, stride, padding):
    """Equations 3-5 of the paper, token by token."""
    B, H, W, C = v.shape
    _, h, w, M = logits.shape[:4]
    out, D = torch.zeros_like(v), C // M
    offsets = [(i, j) for i in range(kernel_size) for j in range(kernel_size)]
    for b in range(B):
        for y in range(h):
            for x in range(w):
                for m in range(M):
                    attn = torch.softmax(logits[b, y, x, m] * scale, dim=-1)
                    head = slice(m * D, (m + 1) * D)
                    for p, (i, j) in enumerate(offsets):
                        for q, (k, n) in enumerate(offsets):
                            to = (y * stride + i - padding, x * stride + j - padding)
                            of = (y * stride + k - padding, x * stride + n - padding)
                            if 0 <= to[0] < H and 0 <= to[1] < W and 0 <= of[0] < H and 0 <= of[1] < W:
                                out[b, to[0], to[1], head] += attn[p, q] * v[b, of[0], of[1], head]
    return out


CASES = [  # height, width, kernel, stride, padding
    (6, 8, 3, 2, 1),
    (5, 7, 3, 2, 1),
    (4, 5, 3, 1, 1),
    (1, 1, 3, 2, 1),
    (6, 6, 3, 3, 0),
    (5, 6, 2, 1, 0),
    (7, 5, 5, 2, 2),
]


def inputs(height, width, kernel, stride, padding, dtype=torch.float64, batch=2, heads=2, dim=3):
    grid = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
    v = torch.randn(batch, height, width, heads * dim, dtype=dtype)
    logits = 3 * torch.randn(batch, *grid, heads, kernel**2, kernel**2, dtype=dtype)
    return v, logits, dict(scale=0.7, kernel_size=kernel, stride=stride, padding=padding)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_equals_four_loops(case):
    v, logits, kwargs = inputs(*case)
    torch.testing.assert_close(outlook_attention(v, logits, **kwargs), four_loops(v, logits, **kwargs))


@pytest.mark.parametrize('case', CASES[:4], ids=str)
def test_gradcheck(case):
    v, logits, kwargs = inputs(min(case[0], 4), min(case[1], 4), *case[2:], batch=1)
    v.requires_grad_(), logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: outlook_attention(a, b, **kwargs), (v, logits))


@pytest.mark.parametrize('size', [(8, 8), (7, 9)], ids=str)
@pytest.mark.parametrize('stride', [1, 2])
def test_module_equals_timms(size, stride):
    theirs = TimmOutlookAttention(48, 2, kernel_size=3, padding=1, stride=stride)
    ours = OutlookAttention(48, 2, kernel_size=3, padding=1, stride=stride)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 48)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_stays_and_precision_is_that_of_the_dtype(dtype):
    v, logits, kwargs = inputs(6, 8, 3, 2, 1)
    exact = outlook_attention(v, logits, **kwargs)
    out = outlook_attention(v.to(dtype), logits.to(dtype), **kwargs)
    assert out.dtype == dtype and out.shape == v.shape
    assert (out.double() - exact).norm() / exact.norm() < 20 * math.sqrt(9) * torch.finfo(dtype).eps


def test_inputs_need_not_be_contiguous():
    v, logits, kwargs = inputs(6, 8, 3, 2, 1)
    turned = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(outlook_attention(turned, logits, **kwargs), outlook_attention(v, logits, **kwargs))


def test_bad_input_is_named():
    v, logits, kwargs = inputs(6, 8, 3, 2, 1)
    with pytest.raises(ValueError, match='impl must be'):
        outlook_attention(v, logits, **kwargs, impl='fast')
    with pytest.raises(ValueError, match=r'logits must be \(2, 6, 8, 2, 9, 9\)'):
        outlook_attention(v, logits, **{**kwargs, 'stride': 1})
    with pytest.raises(ValueError, match=r'v must be \(B, H, W, C\)'):
        outlook_attention(v[0], logits, **kwargs)
    with pytest.raises(ValueError, match='5 channels of v cannot be split into the 2 heads'):
        outlook_attention(v[..., :5], logits, **kwargs)
