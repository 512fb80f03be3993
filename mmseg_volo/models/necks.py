"""Neck that makes a pyramid of VOLO's maps, which have strides 8, 16, 16 and 16."""

from collections.abc import Sequence

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from .volo import ARCHS


@MODELS.register_module()
class VOLOPyramid(BaseModule):
    """Resample VOLO's four maps to the strides of a pyramid, without changing their channels.

    ``scales=(2, 2, 1, 0.5)`` gives strides 4, 8, 16, 32 by transposed convolution and max pooling, like mmseg's
    Feature2Pyramid for ViT and BEiT. ``scales=(2, 2, 1, 1), project=True`` gives strides 4, 8, 16, 16 after a 1 x 1
    convolution with batch norm, like LV-ViT's segmentation (zihangJiang/TokenLabeling, ``seg/``).

    Takes a sequence of (B, C_i, H_i, W_i) and returns a tuple of (B, C_i, scale_i * H_i, scale_i * W_i).

    Args:
        arch: variant of the backbone, 'd1'...'d5', which sets the channels C_i; or a list of channels.
        scales: factor on the size of each map: 2, 1 or 0.5.
        project: apply a 1 x 1 convolution and a norm to each map first.
        norm_cfg: config of all norms.

    Raises:
        ValueError: an unknown arch, other scales, or a number of scales that is not the number of maps.
    """

    def __init__(
        self,
        arch: str | Sequence[int] = 'd1',
        scales: Sequence[float] = (2, 2, 1, 0.5),
        project: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if isinstance(arch, str) and arch not in ARCHS:
            raise ValueError(f'arch must be one of {", ".join(ARCHS)} or a list of widths, got {arch!r}')
        widths = ARCHS[arch]['dims'] if isinstance(arch, str) else tuple(arch)
        if len(widths) != len(scales):
            raise ValueError(f'{len(widths)} maps need as many scales, got {tuple(scales)}')
        norm_cfg = norm_cfg or dict(type='SyncBN', requires_grad=True)
        self.levels = nn.ModuleList(
            nn.Sequential(
                ConvModule(width, width, 1, norm_cfg=norm_cfg, act_cfg=None) if project else nn.Identity(),
                _resampler(width, scale, norm_cfg),
            )
            for width, scale in zip(widths, scales, strict=True)
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(inputs) != len(self.levels):
            raise ValueError(f'expected {len(self.levels)} maps, got {len(inputs)}')
        return tuple(level(x) for level, x in zip(self.levels, inputs, strict=True))


def _resampler(width: int, scale: float, norm_cfg: dict) -> nn.Module:
    if scale == 2:
        up = nn.ConvTranspose2d(width, width, 2, stride=2)
        return nn.Sequential(up, build_norm_layer(norm_cfg, width)[1], nn.GELU())
    if scale == 1:
        return nn.Identity()
    if scale == 0.5:
        return nn.MaxPool2d(2)
    raise ValueError(f'scales must be 2, 1 or 0.5, got {scale}')
