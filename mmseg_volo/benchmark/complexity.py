"""Parameters and multiply-adds of the five variants, beside the paper's Tables 2 and 7; parameters of its ablations.

The paper counts the classifier too: two class-attention blocks with the head and the token-labelling head for 1,000
classes, which the segmentation backbone does not have. PyTorch's counter runs timm's model, which is the official one;
norms, activations and softmax are not counted as multiply-adds. The paper's equation 8 takes K^2 rather than K^4
products for the weighted sum of outlook attention, a difference under 0.4 % of any variant.
"""

from dataclasses import dataclass
from functools import cache

import timm
import torch
from prettytable import PrettyTable
from torch.utils.flop_counter import FlopCounterMode

from ..models.volo import ARCHS, STRIDE, VOLO

# Tables 2 and 7: parameters in millions, multiply-adds in billions at 224 x 224.
PAPER = {'d1': (26.6, 6.8), 'd2': (58.7, 14.1), 'd3': (86.3, 20.6), 'd4': (193.0, 43.8), 'd5': (296.0, 69.0)}

_D1 = ARCHS['d1']
_HEADS = _D1['heads'][1:]
# What the paper changes of VOLO-D1, its table, and its parameters in millions.
ABLATIONS = {
    'no Outlookers, 16 transformers': (dict(depths=(0, 4, 10, 2)), 'outlook', 5, '29.1'),
    '2 Outlookers, 14 transformers': (dict(depths=(2, 4, 8, 2)), 'outlook', 5, '25.9'),
    '4 Outlookers, 14 transformers': ({}, 'outlook', 5, '26.6'),
    '6 Outlookers, 12 transformers': (dict(depths=(6, 4, 6, 2)), 'outlook', 5, '24.5'),
    '2 heads in Outlookers': (dict(heads=(2, *_HEADS)), 'outlook', 8, '26.4'),
    '4 heads in Outlookers': (dict(heads=(4, *_HEADS)), 'outlook', 8, '26.5'),
    '6 heads in Outlookers': ({}, 'outlook', 8, '26.6'),
    '8 heads in Outlookers': (dict(heads=(8, *_HEADS)), 'outlook', 8, '26.8'),
    '6 heads in transformers': (dict(heads=(_D1['heads'][0], 6, 6, 6)), 'outlook', 8, '26.6'),
    'convolution': ({}, 'convolution', 6, '27'),
    'local attention': ({}, 'local_attention', 6, '27'),
    'outlook attention': ({}, 'outlook', 6, '27'),
}


@dataclass(frozen=True)
class Complexity:
    """Counts of one variant: parameters, and multiply-adds for one image, with and without the classifier."""

    params: int
    macs: int
    backbone_params: int
    backbone_macs: int


@cache
def count(arch: str, size: int = 224) -> Complexity:
    """Count one variant.

    Args:
        arch: 'd1'...'d5'.
        size: side of the square image in pixels, a multiple of 16.

    Raises:
        ValueError: another size.
    """
    if size % STRIDE or size < 2 * STRIDE:
        raise ValueError(f'size must be a multiple of {STRIDE}, 32 or more, got {size}')
    with torch.device('meta'):  # shapes only
        backbone = VOLO(arch, img_size=size, out_indices=(3,))  # with the pretrained `norm`, without level norms
        model = timm.create_model(f'volo_{arch}_224', pretrained=False, img_size=size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    params, backbone_params = (sum(p.numel() for p in network.parameters()) for network in (model, backbone))
    macs = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    classifier = [*(f'VOLO.post_network.{i}' for i in range(len(model.post_network))), 'VOLO.head', 'VOLO.aux_head']
    return Complexity(params, macs['Global'], backbone_params, macs['Global'] - sum(macs[name] for name in classifier))


def table(size: int = 224) -> str:
    """All five variants beside the paper's numbers; the comparison stands for 224 only."""
    paper = size == 224
    columns = []
    for unit, name in (('M', 'parameters'), ('G', 'multiply-adds')):
        columns += [f'backbone {name} ({unit})', f'with classifier ({unit})']
        columns += [f'paper ({unit})', f'difference ({unit})'] * paper
    out = PrettyTable(['variant', *columns])
    for arch in ARCHS:
        c = count(arch, size)
        row = [f'VOLO-{arch.upper()}']
        found = (c.backbone_params / 1e6, c.params / 1e6), (c.backbone_macs / 1e9, c.macs / 1e9)
        for (backbone, whole), told in zip(found, PAPER[arch], strict=True):
            row += [f'{backbone:.1f}', f'{whole:.1f}', *[f'{told:g}', f'{whole / told - 1:+.1%}'] * paper]
        out.add_row(row)
    return out.get_string()


def ablations() -> str:
    """The paper's ablations of VOLO-D1: parameters beside the paper's, which have the classifier."""
    whole = count('d1')
    classifier = whole.params - whole.backbone_params
    out = PrettyTable(['ablation', 'table', 'backbone parameters (M)', 'with classifier (M)', 'paper (M)'])
    for name, (changes, mixer, number, told) in ABLATIONS.items():
        with torch.device('meta'):
            backbone = VOLO({**_D1, **changes}, mixer=mixer, out_indices=(3,))
        params = sum(p.numel() for p in backbone.parameters())
        out.add_row([name, number, f'{params / 1e6:.1f}', f'{(params + classifier) / 1e6:.1f}', told])
    return out.get_string()
