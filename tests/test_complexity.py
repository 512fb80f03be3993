"""Parameters against timm's models, multiply-adds against PyTorch's own counter, both against the paper."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmseg_volo import ARCHS
from mmseg_volo.complexity import PAPER, count, outlook_attention_macs, self_attention_macs, table


@pytest.mark.parametrize('arch', ARCHS)
def test_counts(arch):
    with torch.device('meta'):
        theirs = timm.create_model(f'volo_{arch}_224', pretrained=False).eval()
        with FlopCounterMode(display=False) as counter:
            theirs(torch.randn(1, 3, 224, 224))
    ours = count(arch)
    assert ours.params == sum(p.numel() for p in theirs.parameters())
    # Equation 8 counts K^2 where the weighted sum takes K^4: the one difference.
    assert ours.macs == pytest.approx(counter.get_total_flops() / 2, rel=0.004)
    params, macs = PAPER[arch]
    assert ours.params / 1e6 == pytest.approx(params, rel=0.002)
    assert ours.macs / 1e9 == pytest.approx(macs, rel=0.05)


def test_equations_by_hand():
    H, W, C, N, K = 4, 6, 8, 2, 3
    assert self_attention_macs(H * W, C) == 4 * H * W * C**2 + 2 * (H * W) ** 2 * C
    assert outlook_attention_macs(H * W, C, N, K, 1) == H * W * C * (2 * C + N * K**4) + H * W * K**2 * C


def test_table_compares_at_224_only():
    assert 'paper (G)' in table(224) and '+0.1%' in table(224)
    assert 'paper' not in table(512)
    with pytest.raises(ValueError, match='multiple of 16'):
        table(100)
