"""Parameters and multiply-adds of the five variants, counted as the paper's Tables 2 and 7 count them.

Both include the classifier, two class-attention blocks with the head and the token-labelling head for 1,000 classes,
which the segmentation backbone does not have. Norms, activations and softmax are not counted as multiply-adds.
"""

from dataclasses import dataclass

from prettytable import PrettyTable

from .models.volo import ARCHS, OUTLOOK, PATCH, STRIDE, VOLO

# Tables 2 and 7: parameters in millions, multiply-adds in billions at 224 x 224.
PAPER = {'d1': (26.6, 6.8), 'd2': (58.7, 14.1), 'd3': (86.3, 20.6), 'd4': (193.0, 43.8), 'd5': (296.0, 69.0)}
CLASSES = 1000
CLASS_BLOCKS = 2


@dataclass(frozen=True)
class Complexity:
    """Counts of one variant: parameters, and multiply-adds for one image, with and without the classifier."""

    params: int
    macs: int
    backbone_params: int
    backbone_macs: int


def outlook_attention_macs(tokens: int, dim: int, heads: int, kernel_size: int, stride: int) -> int:
    """Equation 8, HWC(2C + NK^4) + HWK^2C, where N are the heads and the attention terms run on the pooled grid.

    The weighted sum takes K^4 rather than K^2 products for each window and channel; the paper's count is kept, the
    difference is under 0.4 % of any variant.
    """
    windows = tokens // stride**2
    return 2 * tokens * dim**2 + windows * dim * heads * kernel_size**4 + windows * kernel_size**2 * dim


def self_attention_macs(tokens: int, dim: int) -> int:
    """Equation 6: 4HWC^2 + 2(HW)^2C."""
    return 4 * tokens * dim**2 + 2 * tokens**2 * dim


def mlp_macs(tokens: int, dim: int, ratio: float) -> int:
    """Two linear layers, C to ``ratio`` C and back."""
    return 2 * tokens * dim * int(dim * ratio)


def count(arch: str, size: int = 224) -> Complexity:
    """Count one variant.

    Args:
        arch: 'd1'...'d5'.
        size: side of the square image in pixels, a multiple of 16.

    Raises:
        ValueError: an unknown arch or another size.
    """
    if size % STRIDE or size < 2 * STRIDE:
        raise ValueError(f'size must be a multiple of {STRIDE}, 32 or more, got {size}')
    backbone = VOLO(arch, img_size=size, out_indices=(3,))  # with the pretrained `norm`, without level norms
    spec = ARCHS[arch]
    depths, dims, heads, ratio, stem = (spec[k] for k in ('depths', 'dims', 'heads', 'mlp_ratios', 'stem_width'))
    fine, coarse = (size // PATCH) ** 2, (size // STRIDE) ** 2

    macs = (size // 2) ** 2 * stem * (7 * 7 * 3 + 2 * 3 * 3 * stem)
    macs += fine * (PATCH // 2) ** 2 * stem * dims[0]
    outlook = outlook_attention_macs(fine, dims[0], heads[0], OUTLOOK['kernel_size'], OUTLOOK['stride'])
    macs += depths[0] * (outlook + mlp_macs(fine, dims[0], ratio))
    macs += coarse * 4 * dims[0] * dims[1]
    for depth, dim in zip(depths[1:], dims[1:], strict=True):
        macs += depth * (self_attention_macs(coarse, dim) + mlp_macs(coarse, dim, ratio))

    dim, hidden, tokens = dims[-1], int(dims[-1] * ratio), coarse + 1
    class_block_macs = 2 * tokens * dim**2 + 2 * dim**2 + 2 * tokens * dim + mlp_macs(1, dim, ratio)
    class_macs = CLASS_BLOCKS * class_block_macs + (1 + coarse) * dim * CLASSES
    norms, attention, mlp = 4 * dim, 4 * dim**2 + dim, 2 * dim * hidden + hidden + dim
    class_params = CLASS_BLOCKS * (norms + attention + mlp) + dim + 2 * (dim * CLASSES + CLASSES)
    params = sum(p.numel() for p in backbone.parameters())
    return Complexity(params + class_params, macs + class_macs, params, macs)


def table(size: int = 224) -> str:
    """All five variants beside the paper's numbers; the comparison stands for 224 only."""
    out = PrettyTable()
    paper = size == 224
    out.field_names = [
        'variant',
        'backbone (M)',
        'with classifier (M)',
        *(['paper (M)', 'difference'] if paper else []),
        'backbone (GMACs)',
        'with classifier (GMACs)',
        *(['paper (G)', 'difference '] if paper else []),
    ]
    for arch in ARCHS:
        c = count(arch, size)
        row = [f'VOLO-{arch.upper()}']
        for part, total, told in zip(
            (c.backbone_params / 1e6, c.backbone_macs / 1e9),
            (c.params / 1e6, c.macs / 1e9),
            PAPER[arch],
            strict=True,
        ):
            row += [f'{part:.1f}', f'{total:.1f}', *([f'{told:g}', f'{total / told - 1:+.1%}'] if paper else [])]
        out.add_row(row)
    return out.get_string()
