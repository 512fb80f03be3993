"""Parameters and multiply-adds, against the paper's tables and equations."""

import pytest

from mmseg_volo import ARCHS
from mmseg_volo.benchmark import complexity
from mmseg_volo.benchmark.complexity import PAPER, count, table
from mmseg_volo.models.volo import OUTLOOK


@pytest.mark.parametrize('arch', ARCHS)
def test_counts(arch):
    found = count(arch)
    params, macs = PAPER[arch]
    assert found.params / 1e6 == pytest.approx(params, rel=0.002)
    assert found.macs / 1e9 == pytest.approx(macs, rel=0.05)


@pytest.mark.parametrize('arch', ['d1', 'd5'])
def test_multiply_adds_are_those_of_the_equations(arch):
    """Equations 6 and 8 for the attention of the backbone, and the layers around it by hand."""
    spec = ARCHS[arch]
    depths, dims, heads, ratio, stem = (spec[k] for k in ('depths', 'dims', 'heads', 'mlp_ratios', 'stem_width'))
    fine, coarse, K = (224 // 8) ** 2, (224 // 16) ** 2, OUTLOOK['kernel_size'] ** 2
    macs = (
        112**2 * stem * (7 * 7 * 3 + 2 * 3 * 3 * stem) + fine * 4**2 * stem * dims[0] + coarse * 4 * dims[0] * dims[1]
    )
    C, windows = dims[0], fine // OUTLOOK['stride'] ** 2
    # HWC(2C + NK^4) + HWK^2C, where N are the heads; the paper's K is the side of the window, here its square.
    outlook = 2 * fine * C**2 + windows * C * heads[0] * K**2 + windows * K * C
    macs += depths[0] * (outlook + 2 * fine * C * int(C * ratio))
    for depth, C in zip(depths[1:], dims[1:], strict=True):
        macs += depth * (4 * coarse * C**2 + 2 * coarse**2 * C + 2 * coarse * C * int(C * ratio))
    # The weighted sum takes K^4 products, where equation 8 counts K^2.
    assert count(arch).backbone_macs == pytest.approx(macs, rel=0.004)


def test_table_compares_at_224_only(monkeypatch):
    monkeypatch.setattr(complexity, 'ARCHS', {'d1': ARCHS['d1']})
    assert 'paper (G)' in table(224) and '+0.1%' in table(224)
    assert 'paper' not in table(32)
    with pytest.raises(ValueError, match='multiple of 16'):
        table(100)


@pytest.mark.parametrize('name', complexity.ABLATIONS)
def test_ablations_have_the_papers_parameters(name):
    row = next(line for line in complexity.ablations().splitlines() if f' {name} ' in line)
    found, told = (cell.strip() for cell in row.split('|')[4:6])
    assert round(float(found), len(told.partition('.')[2])) == float(told)
