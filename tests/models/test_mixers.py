"""The ablations of the paper: other mixers, other counts, and no Outlookers."""

import pytest
import torch
import torch.nn.functional as F
from small_models import ARCH

from mmseg_volo.models.mixers import Convolution, LocalAttention
from mmseg_volo.models.volo import VOLO


@pytest.mark.parametrize('size', [(5, 7), (1, 4), (2, 2)])
def test_local_attention_equals_its_definition(size):
    mixer, x = LocalAttention(8, 2, 3).double(), torch.randn(2, *size, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).view(*x.shape[:3], 3, 2, 4).unbind(3)
    expected = torch.empty_like(x)
    (H, W), head = size, 4
    for b in range(2):
        for i in range(H):
            for j in range(W):
                window = [(y, z) for y in range(i - 1, i + 2) for z in range(j - 1, j + 2) if 0 <= y < H and 0 <= z < W]
                for m in range(2):
                    scores = torch.stack([q[b, i, j, m] @ k[b, y, z, m] / head**0.5 for y, z in window]).softmax(0)
                    mixed = sum(s * v[b, y, z, m] for s, (y, z) in zip(scores, window, strict=True))
                    expected[b, i, j, m * head : (m + 1) * head] = mixed
    torch.testing.assert_close(mixer(x), mixer.proj(expected))


def test_convolution_equals_torch():
    mixer, x = Convolution(6, 3, 3), torch.randn(2, 5, 4, 6)
    expected = F.conv2d(x.movedim(3, 1), mixer.conv.weight, mixer.conv.bias, padding=1).movedim(1, 3)
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize('mixer', ['outlook', 'local_attention', 'convolution'])
def test_mixers_train_and_keep_the_maps(mixer):
    model, x = VOLO(ARCH, mixer=mixer), torch.randn(2, 3, 64, 96)
    maps = model(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6), (4, 6), (4, 6)]
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_outlookers_patches_have_16_pixels():
    arch = dict(ARCH, depths=(0, 1, 1, 2))
    model = VOLO(arch, out_indices=(1, 2, 3), img_size=64).eval()
    assert model.patch_embed.proj.weight.shape == (64, 8, 8, 8) and not list(model.network[1].parameters())
    x = torch.randn(1, 3, 64, 96)
    maps = model(x)
    assert [tuple(m.shape) for m in maps] == [(1, 64, 4, 6)] * 3
    stem = model.patch_embed.conv(x)
    assert stem.shape[2:] == (32, 48)
    with pytest.raises(ValueError, match=r'within 1\.\.3; got \(0, 1\)'):
        VOLO(arch, out_indices=(0, 1))


def test_an_unknown_mixer_is_named():
    with pytest.raises(ValueError, match='mixer must be one of outlook, local_attention, convolution'):
        VOLO(ARCH, mixer='attention')
