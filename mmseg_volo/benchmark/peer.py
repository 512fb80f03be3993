"""The two sides: this package's segmentor, and its peer, timm's VOLO in mmseg's own, with the same weights."""

import copy

import numpy as np
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmseg.models import EncoderDecoder, SegDataPreProcessor, SegTTAModel
from mmseg.models.decode_heads import FCNHead, UPerHead
from torch import Tensor, nn

from ..models.heads import LeanUPerHead
from ..models.losses import LeanFCNHead
from ..models.segmentors import StreamingEncoderDecoder, StreamingTTAModel
from ..models.volo import ARCHS, STRIDE, VOLO, resize_pos_embed
from .cases import SIDES, Case
from .pictures import prepare

_PREPROCESSOR = dict(
    type=SegDataPreProcessor,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    test_cfg=dict(size_divisor=STRIDE),
)


class TimmVOLO(BaseModule):
    """timm's VOLO as an mmseg backbone: its four stages, each through the LayerNorm that our VOLO has there.

    Args:
        arch: 'd1'...'d5'.
        img_size: (height, width) or side, in pixels, that ``pos_embed`` is made for.
        out_norm: False gives the raw stage outputs, as in our VOLO.
    """

    def __init__(self, arch: str, img_size: int | tuple[int, int] = 224, out_norm: bool = True):
        super().__init__()
        self.volo = timm.create_model(f'volo_{arch}_224', num_classes=0, img_size=img_size)
        self.volo.post_network = self.volo.cls_token = None  # classification only
        # timm adds pos_embed as it is, so it is exchanged for one that fits. This name keeps the pretrained one.
        self.pos_embed = self.volo.pos_embed
        self._grids: dict[tuple[int, int], nn.Parameter] = {}
        self.out_norm = out_norm
        if out_norm:
            for i, dim in enumerate(ARCHS[arch]['dims'][:-1]):
                self.add_module(f'norm{i}', nn.LayerNorm(dim))
        else:
            self.volo.norm = nn.Identity()

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Take the weights of our VOLO."""
        own = 'norm0', 'norm1', 'norm2', 'pos_embed'
        renamed = {name if name.split('.')[0] in own else f'volo.{name}': value for name, value in state.items()}
        self.load_state_dict({**renamed, 'volo.pos_embed': state['pos_embed']})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # Outside of what torch.compile sees, where an exchanged parameter would break the graph.
        self.volo.pos_embed = self._pos_embed_for((x.shape[2] // STRIDE, x.shape[3] // STRIDE))
        return self.stages(x)

    def stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """The stage maps of pictures that ``volo.pos_embed`` fits."""
        maps = self.volo.forward_intermediates(x, intermediates_only=True)
        if not self.out_norm:
            return tuple(maps)
        norms = self.norm0, self.norm1, self.norm2, self.volo.norm
        return tuple(norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(norms, maps, strict=True))

    def _pos_embed_for(self, grid: tuple[int, int]) -> nn.Parameter:
        if tuple(self.pos_embed.shape[1:3]) == grid:
            return self.pos_embed  # which can learn
        if grid not in self._grids:
            self._grids[grid] = nn.Parameter(resize_pos_embed(self.pos_embed, grid), requires_grad=False)
        return self._grids[grid]


def compiled(model: nn.Module) -> nn.Module:
    """A copy of a stock model whose networks go through ``torch.compile``, one graph for each and each input shape.

    Args:
        model: a :class:`TimmVOLO`, a segmentor with one, or mmseg's model for test-time augmentation around it.
    """
    copied = copy.deepcopy(model)
    inner = copied.module if isinstance(copied, SegTTAModel) else copied
    if isinstance(inner, TimmVOLO):
        inner.stages = torch.compile(inner.stages, dynamic=False)
        return copied
    inner.backbone.stages = torch.compile(inner.backbone.stages, dynamic=False)
    heads = [inner.decode_head, *([inner.auxiliary_head] if inner.with_auxiliary_head else [])]
    for head in heads:  # mmseg calls their forward by its name
        head.forward = torch.compile(head.forward, dynamic=False)
    return copied


def segmentor(
    side: str,
    arch: str,
    classes: int,
    test_cfg: dict | None = None,
    crop: tuple[int, int] | None = None,
    checkpointing: bool = False,
) -> EncoderDecoder:
    """The segmentor of one side on the CPU, with random weights; of one seed, whatever ran before.

    Args:
        side: 'stock' or 'ours'.
        arch, classes: of the network.
        test_cfg: of the segmentor.
        crop: (height, width) of the pictures in training, where there is the auxiliary head of ``configs/`` too.
        checkpointing: ``with_cp`` of our backbone.
    """
    ours, dims = side == 'ours', ARCHS[arch]['dims']
    shared = dict(
        num_classes=classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'),
    )
    parts = dict(
        backbone=dict(type=VOLO if ours else TimmVOLO, arch=arch),
        decode_head=dict(
            type=LeanUPerHead if ours else UPerHead,
            in_channels=list(dims),
            in_index=[0, 1, 2, 3],
            pool_scales=(1, 2, 3, 6),
            channels=512,
            **shared,
        ),
        data_preprocessor=_PREPROCESSOR,
    )
    if crop:
        parts['backbone']['img_size'] = crop
        parts['data_preprocessor'] = dict(_PREPROCESSOR, size=crop)
        parts['auxiliary_head'] = dict(
            type=LeanFCNHead if side == 'ours' else FCNHead, in_channels=dims[2], in_index=2, channels=256, num_convs=1
        )
        parts['auxiliary_head'].update(shared, concat_input=False)
        parts['auxiliary_head']['loss_decode'] = dict(type='CrossEntropyLoss', loss_weight=0.4)
    if checkpointing and ours:
        parts['backbone']['with_cp'] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (StreamingEncoderDecoder if ours else EncoderDecoder)(
            test_cfg=ConfigDict(test_cfg or dict(mode='whole')), **parts
        )
        nn.init.trunc_normal_(model.backbone.pos_embed, std=0.02)
    return model


def build(case: Case, side: str) -> EncoderDecoder:
    """The segmentor of one side on the CPU, with random weights, in eval mode."""
    test_cfg = dict(mode='slide', crop_size=(case.window,) * 2, stride=(case.stride,) * 2)
    if side == 'ours':
        test_cfg.update(precision=case.precision, compile=case.compile, channels_last=case.channels_last)
        test_cfg.update(window_batch=case.window_batch)
    return segmentor(side, case.arch, case.classes, test_cfg).eval()


def ready(model: EncoderDecoder, case: Case, side: str) -> nn.Module:
    """The segmentor on its device, and inside the model for test-time augmentation where there are several views."""
    if case.views > 1:
        model = (StreamingTTAModel if side == 'ours' else SegTTAModel)(model)
    return model.to(case.device).eval()


def copy_weights(ours: EncoderDecoder, stock: EncoderDecoder) -> None:
    """Give the stock model the weights of ours."""
    stock.backbone.load_backbone(ours.backbone.state_dict())
    stock.decode_head.load_state_dict(ours.decode_head.state_dict())
    if ours.with_auxiliary_head:
        stock.auxiliary_head.load_state_dict(ours.auxiliary_head.state_dict())


@torch.no_grad()
def spread_classes(model: EncoderDecoder, picture: np.ndarray) -> None:
    """Scale the last layer so that the random network finds many classes: each one's logits get mean 0, deviation 3."""
    inputs = model.data_preprocessor(prepare(picture, 1), False)['inputs']
    logits = model(inputs[:, :, :256, :256], mode='tensor')
    last = model.decode_head.conv_seg
    scale = 3 / logits.std((0, 2, 3)).clamp_min(1e-6)
    last.weight *= scale[:, None, None, None]
    last.bias += (last.bias - logits.mean((0, 2, 3))) * scale - last.bias


def build_both(case: Case, picture: np.ndarray) -> dict[str, nn.Module]:
    """Both sides with the same weights, ready to predict."""
    models = {side: build(case, side) for side in SIDES}
    spread_classes(models['ours'], picture)
    copy_weights(models['ours'], models['stock'])
    return {side: ready(model, case, side) for side, model in models.items()}
