"""VOLO backbone for MMSegmentation, in one file.

Paper: VOLO: Vision Outlooker for Visual Recognition (arXiv:2106.13112). Parameter names are those of sail-sg/volo.
Differences from the official code: no class token, classification head or token mixing; inputs of any size (padded
inside, ``pos_embed`` resized); fast layers and outlook attention from :mod:`mmseg_volo.ops`. As in the official code,
the Outlooker stage has no stochastic depth.

Shapes: B batch, H x W grid, C channels, M heads, D = C/M, k window, K = k*k, h x w window grid after the stride.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmseg.registry import MODELS
from torch import nn
from torch.nn.init import trunc_normal_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoints.pretrained import load_backbone
from ..ops.layers import ConvNormReLU, DropPath, LayerNorm, Linear
from ..ops.sizes import attend, padded, resize_pos_embed, without_padding
from .mixers import Convolution, LocalAttention

# `depths` and `dims`: table 2 of the paper. `heads`, `mlp_ratios` and `stem_width`: models/volo.py of sail-sg/volo.
ARCHS = {
    'd1': dict(depths=(4, 4, 8, 2), dims=(192, 384, 384, 384), heads=(6, 12, 12, 12), mlp_ratios=3, stem_width=64),
    'd2': dict(depths=(6, 4, 10, 4), dims=(256, 512, 512, 512), heads=(8, 16, 16, 16), mlp_ratios=3, stem_width=64),
    'd3': dict(depths=(8, 8, 16, 4), dims=(256, 512, 512, 512), heads=(8, 16, 16, 16), mlp_ratios=3, stem_width=64),
    'd4': dict(depths=(8, 8, 16, 4), dims=(384, 768, 768, 768), heads=(12, 16, 16, 16), mlp_ratios=3, stem_width=64),
    'd5': dict(depths=(12, 12, 20, 4), dims=(384, 768, 768, 768), heads=(12, 16, 16, 16), mlp_ratios=4, stem_width=128),
}
OUTLOOK = dict(kernel_size=3, stride=2, padding=1)
PATCH = 8  # pixels per token in the Outlooker stage
STRIDE = 16  # pixels per token in the transformer stages

# A graph of `torch.fx` calls these functions and does not look inside, so that it takes images of any size.
for _name in ('attend', 'padded', 'resize_pos_embed', 'without_padding'):
    torch.fx.wrap(_name)


class OutlookAttention(nn.Module):
    """Outlook attention (section 3.1): each pooled token predicts the K x K weights that mix its k x k window.

    Maps (B, H, W, C) to (B, H, W, C).
    """

    def __init__(self, dim: int, heads: int, kernel_size: int, stride: int, padding: int):
        super().__init__()
        self.heads, self.kernel_size, self.stride, self.padding = heads, kernel_size, stride, padding
        self.scale = (dim // heads) ** -0.5
        self.impl = 'auto'
        self.v = Linear(dim, dim, bias=False)
        self.attn = Linear(dim, kernel_size**4 * heads)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        K = self.kernel_size**2
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, self.stride, ceil_mode=True).permute(0, 2, 3, 1)
        logits = self.attn(pooled).unflatten(-1, (self.heads, K, K))  # B, h, w, M, K, K
        x = attend(self.v(x), logits, self.scale, self.kernel_size, self.stride, self.padding, self.impl)
        return self.proj(x)


# What `VOLO(mixer=...)` names, by (dim, heads).
MIXERS: dict[str, Callable[[int, int], nn.Module]] = dict(
    outlook=partial(OutlookAttention, **OUTLOOK),
    local_attention=partial(LocalAttention, kernel_size=OUTLOOK['kernel_size']),
    convolution=partial(Convolution, kernel_size=OUTLOOK['kernel_size']),
)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a (B, H, W, C) grid."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, dim * 3, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).reshape(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # B, M, H*W, D
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, on the last axis."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = Linear(dim, int(dim * ratio))
        self.fc2 = Linear(int(dim * ratio), dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block: an attention module, then an MLP (equations 1-2). Maps (B, H, W, C) to the same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Three convolutions and a patch projection: (B, in_channels, H, W) to (B, H/patch, W/patch, dim)."""

    def __init__(self, in_channels: int, width: int, dim: int, norm_cfg: dict, patch: int = PATCH):
        super().__init__()
        layers = []
        for i in range(3):
            conv = (
                nn.Conv2d(width, width, 3, padding=1, bias=False)
                if i
                else nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            )
            layers += [conv, build_norm_layer(norm_cfg, width)[1], nn.ReLU(inplace=True)]
        self.conv = ConvNormReLU(*layers)
        self.proj = nn.Conv2d(width, dim, patch // 2, stride=patch // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.conv(x)).permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """2 x 2 convolution of stride 2 on (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


def call_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Call a block; compiling this function compiles all blocks at once."""
    return block(x)


def call_stem(stem: PatchEmbed, x: torch.Tensor) -> torch.Tensor:
    """Call the stem; not :func:`call_block`, since PyTorch limits how often it recompiles one function."""
    return stem(x)


class _ScriptTracer(torch.fx.Tracer):
    """Keep stochastic depth as a module, since TorchScript can switch it with ``train()`` and ``eval()``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DropPath) or super().is_leaf_module(m, module_qualified_name)


@MODELS.register_module()
class VOLO(BaseModule):
    """VOLO backbone: an Outlooker stage at stride 8, then transformer stages at stride 16.

    Takes (B, in_channels, H, W); zeros are added at the right and the bottom up to multiples of 16, and to at least 32.
    Returns a tuple of (B, C_i, H_i, W_i), one for each of ``out_indices``: H_i = ceil(H / 8) for index 0 and
    ceil(H / 16) for the others.

    Args:
        arch: 'd1'...'d5', or a dict with the keys of :data:`ARCHS`: ``depths``, ``dims``, ``heads`` (one number per
            stage), ``mlp_ratios`` (one number, or one per stage) and ``stem_width``. A first depth of 0 means no
            Outlookers: patches of 16 go straight to the transformer, as in LV-ViT, and there is no map of index 0.
        in_channels: channels of the image.
        img_size: side in pixels, or (height, width), of the images that ``pos_embed`` is made for. For other sizes each
            forward resizes it.
        out_indices: stages to return, ascending, or the one stage to return; -1 is the last stage, -2 the one before.
            Stages after the last one returned are not built.
        out_norm: apply a LayerNorm to each returned map. The last stage has the pretrained ``norm``; the others
            (``norm0``, ...) start as identity. False returns the raw stage outputs.
        drop_path_rate: stochastic depth of the last block; it grows linearly over all blocks and skips the Outlookers.
        mixer: what mixes the tokens of an Outlooker's 3 x 3 window: 'outlook', or for ablations 'local_attention' or
            'convolution' (Table 6), for which there are no pretrained weights.
        norm_cfg: norm of the stem. Without a CUDA device SyncBN becomes BN.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages; frozen parts stay in eval
            mode. The downsample and ``pos_embed`` belong to the second stage.
        norm_eval: keep the stem's batch norms in eval mode during training.
        with_cp: use activation checkpointing in each block when gradients are recorded.
        pretrained: a file for ``init_cfg``; mmseg sets it to the segmentor's argument ``pretrained``.
        init_cfg: None for random weights, or ``dict(type='Pretrained', checkpoint=...)``; see
            :func:`mmseg_volo.checkpoints.pretrained.load_backbone`. As in mmengine, it may also be another initializer,
            or a list, of which the pretrained weights are loaded last.

    Raises:
        ValueError: unknown ``arch``, or inconsistent arguments.
    """

    arch_settings = ARCHS
    smallest = 2 * STRIDE  # side in pixels that smaller inputs are padded to

    def __init__(
        self,
        arch: str | dict = 'd1',
        in_channels: int = 3,
        img_size: int | tuple[int, int] = 224,
        out_indices: Sequence[int] | int = (0, 1, 2, 3),
        out_norm: bool = True,
        drop_path_rate: float = 0.0,
        mixer: str = 'outlook',
        norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ):
        if pretrained is not None and init_cfg:
            raise ValueError('pretrained and init_cfg cannot both be given: pretrained means a Pretrained init_cfg')
        super().__init__(init_cfg if pretrained is None else dict(type='Pretrained', checkpoint=pretrained))
        self.arch = arch if isinstance(arch, str) else 'custom'
        spec = _arch_numbers(arch)
        depths, dims, heads, ratios = spec['depths'], spec['dims'], spec['heads'], spec['mlp_ratios']
        self.out_indices = _checked_indices(out_indices, len(depths), 0 if depths[0] else 1)
        stages = self.out_indices[-1] + 1
        if not -1 <= frozen_stages <= stages:
            raise ValueError(f'frozen_stages must be between -1 and the {stages} stages built, got {frozen_stages}')
        self.dims, self.out_norm = dims, out_norm
        self.frozen_stages, self.norm_eval, self.with_cp = frozen_stages, norm_eval, with_cp
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < 32:
            raise ValueError(f'img_size must be at least 32 pixels a side, got {img_size}')

        if mixer not in MIXERS:
            raise ValueError(f'mixer must be one of {", ".join(MIXERS)}, got {mixer!r}')
        patch = PATCH if depths[0] else STRIDE
        first = dims[0] if depths[0] else dims[1]
        self.patch_embed = PatchEmbed(in_channels, spec['stem_width'], first, _usable_norm(norm_cfg), patch)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        outlookers = [Block(dims[0], MIXERS[mixer](dims[0], heads[0]), ratios[0], 0.0) for _ in range(depths[0])]
        # As in the official code, `network` contains the downsample too: stage i > 0 is network[i + 1].
        self.network = nn.ModuleList([nn.Sequential(*outlookers)])
        if stages > 1:
            self.network.append(Downsample(dims[0], dims[1]) if depths[0] else nn.Identity())
            self.pos_embed = nn.Parameter(torch.zeros(1, -(-height // STRIDE), -(-width // STRIDE), dims[1]))
        for i in range(1, stages):
            of_stage = rates[sum(depths[:i]) : sum(depths[: i + 1])]
            blocks = [Block(dims[i], Attention(dims[i], heads[i]), ratios[i], rate) for rate in of_stage]
            self.network.append(nn.Sequential(*blocks))
        if out_norm:
            for i in self.out_indices:
                self.add_module(self._norm_name(i), nn.LayerNorm(dims[i]))
        # Compiled :func:`call_block` and :func:`call_stem`, by module type; empty: modules are called directly.
        self.calls: dict[type, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {}
        self._freeze()

    def _norm_name(self, index: int) -> str:
        return 'norm' if index == len(self.dims) - 1 else f'norm{index}'

    def _stage(self, index: int) -> nn.Sequential:
        return self.network[index + 1 if index else 0]

    def init_weights(self) -> None:
        """Load the pretrained weights of ``init_cfg``, or initialise randomly as the official code does.

        As in mmengine, only the first call does so.

        Raises:
            CheckpointError, FileNotFoundError: see :func:`mmseg_volo.checkpoints.pretrained.load_backbone`.
        """
        if self.is_init:
            super().init_weights()  # warns
            return
        given = self.init_cfg
        configs = [given] if isinstance(given, dict) else list(given or ())
        pretrained = [one for one in configs if one['type'] in ('Pretrained', PretrainedInit)]
        if others := [one for one in configs if one not in pretrained]:
            self.init_cfg = others
            super().init_weights()
            self.init_cfg = given
        elif not pretrained:
            self._init_randomly()
        for one in pretrained:
            load_backbone(self, one['checkpoint'], one.get('prefix'))
        self._is_init = True

    def _init_randomly(self) -> None:
        print_log('VOLO starts from random weights: no pretrained checkpoint is configured', logger='current')
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if hasattr(self, 'pos_embed'):
            trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        H, W = x.shape[-2], x.shape[-1]
        x = self._run(self.patch_embed, padded(x, STRIDE, self.smallest))
        outs = []
        for i in range(self.out_indices[-1] + 1):
            if i == 1:  # from stride 8 to stride 16
                x = self.network[1](x)
                # As in the official code, autocast makes the residual stream float32 from here on.
                x = x + self._pos_embed_for((x.shape[1], x.shape[2]))
            for block in self._stage(i):
                x = self._run(block, x)
            if i in self.out_indices:
                out = without_padding(x, H, W, STRIDE if i else PATCH, STRIDE, self.smallest)
                if self.out_norm:
                    out = getattr(self, self._norm_name(i))(out)
                outs.append(out.permute(0, 3, 1, 2))
        return tuple(outs)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: a graph of plain layers with the same parameters, for any image size."""
        graph = _ScriptTracer().trace(self)
        next(iter(reversed(graph.nodes))).type = None  # TorchScript knows no tuples of any length
        return torch.fx.GraphModule(self, graph)

    def _run(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.with_cp and torch.is_grad_enabled() and isinstance(part, Block):
            return checkpoint(part, x, use_reentrant=False)
        call = self.calls.get(type(part))
        return call(part, x) if call else part(x)

    def _pos_embed_for(self, grid: tuple[int, int]) -> torch.Tensor:
        return resize_pos_embed(self.pos_embed, grid)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning-rate decay.

        ``patch_embed`` has depth 0; the blocks have 1, 2, ... in order. The downsample and ``pos_embed`` have the depth
        of the last Outlooker, like Swin's downsamples in mmpretrain. Output norms, most of which are not pretrained,
        and parameters outside the backbone have the last depth.

        Args:
            param_name: name of the parameter in the model.
            prefix: prefix of the backbone's parameters, for example 'backbone.'.

        Returns:
            The depth, and the number of depths, which is the number of blocks plus two.
        """
        stages = self.out_indices[-1] + 1
        blocks = [len(self._stage(i)) for i in range(stages)]
        last = sum(blocks) + 1
        part, *numbers = param_name.removeprefix(prefix).split('.') if param_name.startswith(prefix) else ['']
        if part == 'patch_embed':
            return 0, last + 1
        if part == 'pos_embed' or (part == 'network' and numbers[0] == '1'):
            return blocks[0], last + 1
        if part == 'network':
            stage = max(int(numbers[0]) - 1, 0)
            return sum(blocks[:stage]) + int(numbers[1]) + 1, last + 1
        return last, last + 1

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Accept weights that were trained for another image size.
        key = f'{prefix}pos_embed'
        given = state_dict.get(key)
        if isinstance(given, torch.Tensor) and hasattr(self, 'pos_embed') and given.dim() == 4:
            state_dict[key] = resize_pos_embed(given, self.pos_embed.shape[1:3])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _frozen_modules(self) -> list[nn.Module]:
        frozen = [self.patch_embed] if self.frozen_stages >= 0 else []
        frozen += [self._stage(i) for i in range(self.frozen_stages)]
        if self.frozen_stages >= 2:
            frozen.append(self.network[1])
        return frozen

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)
        if self.frozen_stages >= 2:
            self.pos_embed.requires_grad_(False)

    def train(self, mode: bool = True) -> 'VOLO':
        """Set training mode; parts named by ``frozen_stages`` and ``norm_eval`` stay in eval mode."""
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.patch_embed.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self


def _arch_numbers(arch: str | dict) -> dict:
    """Check the numbers of a variant and return each as a tuple with one entry per stage."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch must be one of {", ".join(ARCHS)} or a dict of numbers, got {arch!r}')
        arch = ARCHS[arch]
    needed = set(ARCHS['d1'])
    if set(arch) != needed:
        raise ValueError(f'an arch dict needs exactly the keys {sorted(needed)}, got {sorted(arch)}')
    spec = dict(arch)
    stages = len(spec['depths'])
    if isinstance(spec['mlp_ratios'], (int, float)):
        spec['mlp_ratios'] = (spec['mlp_ratios'],) * stages
    for key in ('depths', 'dims', 'heads', 'mlp_ratios'):
        spec[key] = tuple(spec[key])
        if len(spec[key]) != stages or stages < 2:
            raise ValueError(f'arch needs two stages or more and as many {key} as depths, got {key}={spec[key]}')
    if len(set(spec['dims'][1:])) > 1:
        raise ValueError(f'the transformer stages share one width, got dims={spec["dims"]}')
    for dim, heads in zip(spec['dims'], spec['heads'], strict=True):
        if dim % heads:
            raise ValueError(f'width {dim} cannot be split into {heads} heads')
    return spec


def _checked_indices(out_indices: Sequence[int] | int, stages: int, first: int) -> tuple[int, ...]:
    given = out_indices if isinstance(out_indices, Iterable) else [out_indices]
    try:
        indices = [operator.index(None if isinstance(index, bool) else index) for index in given]
    except TypeError as error:
        raise ValueError(f'out_indices must be integers; got {out_indices!r}') from error
    indices = [index + stages if index < 0 else index for index in indices]
    if not indices or indices != sorted(set(indices)) or indices[0] < first or indices[-1] >= stages:
        raise ValueError(
            f'out_indices must be ascending, without repeats, within {first}..{stages - 1}; got {out_indices}'
        )
    return tuple(indices)


def _usable_norm(norm_cfg: dict | None) -> dict:
    norm_cfg = dict(norm_cfg or dict(type='BN'))
    if norm_cfg['type'] in ('SyncBN', 'MMSyncBN') and not torch.cuda.is_available():
        norm_cfg['type'] = 'BN'
    return norm_cfg
