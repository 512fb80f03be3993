"""The two sides: this package's segmentor, and stock mmseg's with timm's VOLO, with the same weights."""

import copy

import timm
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmseg.models import EncoderDecoder, SegDataPreProcessor, SegTTAModel
from mmseg.models.decode_heads import FCNHead, UPerHead
from torch import Tensor, nn

from ..models.heads import LeanUPerHead
from ..models.losses import LeanFCNHead
from ..models.segmentors import StreamingEncoderDecoder
from ..models.volo import ARCHS, STRIDE, VOLO, resize_pos_embed

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
    """timm's VOLO as an mmseg backbone: four stages, each followed by the LayerNorm that our VOLO has there.

    Args:
        arch: 'd1'...'d5'.
        img_size: (height, width) or side, in pixels, that ``pos_embed`` is made for.
        out_norm: False gives the raw stage outputs, as in our VOLO.
    """

    def __init__(self, arch: str, img_size: int | tuple[int, int] = 224, out_norm: bool = True):
        super().__init__()
        self.volo = timm.create_model(f'volo_{arch}_224', num_classes=0, img_size=img_size)
        self.volo.post_network = self.volo.cls_token = None  # only for classification
        # timm adds pos_embed as it is, so it is replaced by one of the size of the input. This name keeps the original.
        self.pos_embed = self.volo.pos_embed
        self._grids: dict[tuple[int, int], nn.Parameter] = {}
        self.out_norm = out_norm
        if out_norm:
            for i, dim in enumerate(ARCHS[arch]['dims'][:-1]):
                self.add_module(f'norm{i}', nn.LayerNorm(dim))
        else:
            self.volo.norm = nn.Identity()

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Load the weights of our VOLO."""
        own = 'norm0', 'norm1', 'norm2', 'pos_embed'
        renamed = {name if name.split('.')[0] in own else f'volo.{name}': value for name, value in state.items()}
        self.load_state_dict({**renamed, 'volo.pos_embed': state['pos_embed']})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # torch.compile sees only `stages`: replacing a parameter would break the graph.
        self.volo.pos_embed = self._pos_embed_for((x.shape[2] // STRIDE, x.shape[3] // STRIDE))
        return self.stages(x)

    def stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """The stage maps of images whose size fits ``volo.pos_embed``."""
        maps = self.volo.forward_intermediates(x, intermediates_only=True)
        if not self.out_norm:
            return tuple(maps)
        norms = self.norm0, self.norm1, self.norm2, self.volo.norm
        return tuple(norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(norms, maps, strict=True))

    def _pos_embed_for(self, grid: tuple[int, int]) -> nn.Parameter:
        if tuple(self.pos_embed.shape[1:3]) == grid:
            return self.pos_embed  # the trainable one
        if grid not in self._grids:
            self._grids[grid] = nn.Parameter(resize_pos_embed(self.pos_embed, grid), requires_grad=False)
        return self._grids[grid]


def compiled(model: nn.Module) -> nn.Module:
    """A copy of a stock model whose networks go through ``torch.compile``, one graph for each network and input shape.

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
    for head in heads:  # mmseg calls head.forward by that name
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
    """The segmentor of one side on the CPU, with random weights from a fixed seed.

    Args:
        side: 'stock' or 'ours'.
        arch, classes: of the network.
        test_cfg: of the segmentor.
        crop: (height, width) of the images in training, which adds the auxiliary head of ``configs/``.
        checkpointing: ``with_cp`` of our backbone.
    """
    ours, dims = side == 'ours', list(ARCHS[arch]['dims'])
    head = dict(num_classes=classes, norm_cfg=dict(type='BN'), align_corners=False)
    parts = dict(
        backbone=dict(type=VOLO if ours else TimmVOLO, arch=arch),
        decode_head=dict(
            type=LeanUPerHead if ours else UPerHead,
            in_channels=dims,
            in_index=[0, 1, 2, 3],
            pool_scales=(1, 2, 3, 6),
            channels=512,
            loss_decode=dict(type='CrossEntropyLoss'),
            **head,
        ),
        data_preprocessor=dict(_PREPROCESSOR),
    )
    if crop:
        parts['backbone']['img_size'] = parts['data_preprocessor']['size'] = crop
        parts['auxiliary_head'] = dict(
            type=LeanFCNHead if ours else FCNHead,
            in_channels=dims[2],
            in_index=2,
            channels=256,
            num_convs=1,
            concat_input=False,
            loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4),
            **head,
        )
    if checkpointing and ours:
        parts['backbone']['with_cp'] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = StreamingEncoderDecoder if ours else EncoderDecoder
        model = kind(test_cfg=ConfigDict(test_cfg or dict(mode='whole')), **parts)
        nn.init.trunc_normal_(model.backbone.pos_embed, std=0.02)
    return model


def copy_weights(ours: EncoderDecoder, stock: EncoderDecoder) -> None:
    """Give the stock model the weights of ours."""
    stock.backbone.load_backbone(ours.backbone.state_dict())
    stock.decode_head.load_state_dict(ours.decode_head.state_dict())
    if ours.with_auxiliary_head:
        stock.auxiliary_head.load_state_dict(ours.auxiliary_head.state_dict())
