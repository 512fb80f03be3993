"""UPerHead that convolves coarse maps before it enlarges them."""

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.dist import get_world_size
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import ConfigError
from .losses import BandedLoss


@MODELS.register_module()
class LeanUPerHead(BandedLoss, UPerHead):
    """mmseg's :class:`UPerHead` (UPerNet, arXiv:1807.10221): same arguments, weights and output, less arithmetic.

    UPerHead enlarges the pooled maps and the maps of the coarse levels, joins them, and convolves the result 3 x 3.
    Both steps are linear, so here each tap of the convolution is applied to the coarse map and the nine results are
    enlarged and added (:func:`conv_of_enlarged`): at half the resolution a quarter of the multiply-adds. The joined
    maps are never made. With VOLO's four maps on a 512 x 512 window that leaves 34 of 66 G multiply-adds. The loss
    needs no logits in the size of the labels (:class:`~mmseg_volo.losses.BandedLoss`).

    Raises:
        ConfigError: in training, a batch norm that sees one value per channel: one picture per device, pooled to 1 x 1.
    """

    def psp_forward(self, inputs: list[Tensor]) -> Tensor:
        """The pyramid pooling module: as in UPerHead."""
        finest = inputs[-1]
        if self.training and len(finest) == 1 and 1 in self.psp_modules.pool_scales:
            self._check_norms()
        return _joined_conv(self.bottleneck, [finest, *self.pooled(finest)], self.align_corners)

    def pooled(self, finest: Tensor) -> list[Tensor]:
        """The maps of the pyramid pooling module, in sizes of their own."""
        return [pool(finest) for pool in self.psp_modules]

    def _check_norms(self) -> None:
        for norm in self.psp_modules.modules():
            is_synced = isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1
            if isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None) and not is_synced:
                raise ConfigError(
                    f'{type(norm).__name__} cannot train on one picture per device, which UPerHead pools to 1 x 1: '
                    "set train_dataloader.batch_size=2 or more, or train on several GPUs with norm_cfg.type='SyncBN', "
                    "or set decode_head.norm_cfg to dict(type='GN', num_groups=32)"
                )

    def _forward_feature(self, inputs: list[Tensor]) -> Tensor:
        inputs = self._transform_inputs(inputs)
        maps = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=False)]
        maps.append(self.psp_forward(inputs))
        for i in range(len(maps) - 1, 0, -1):
            enlarged = resize(maps[i], maps[i - 1].shape[2:], mode='bilinear', align_corners=self.align_corners)
            maps[i - 1] = maps[i - 1] + enlarged
        outs = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=False)]
        return _joined_conv(self.fpn_bottleneck, [*outs, maps[-1]], self.align_corners)


def _joined_conv(module: ConvModule, maps: list[Tensor], align_corners: bool) -> Tensor:
    """``module`` on the channels of all maps, enlarged to the first one's size."""
    size = maps[0].shape[2:]
    if type(module.conv) is not nn.Conv2d:  # some other kind, by conv_cfg
        enlarged = [resize(x, size, mode='bilinear', align_corners=align_corners) for x in maps]
        return module(torch.cat(enlarged, 1))
    weights = module.conv.weight.split([x.shape[1] for x in maps], dim=1)
    by_size: dict[str, list[int]] = {}
    for i, x in enumerate(maps):  # by their names: the sizes of a graph that is exported may be open
        by_size.setdefault(str(tuple(x.shape[2:])), []).append(i)
    out = None
    for shape, members in by_size.items():
        x, weight = (torch.cat([of[i] for i in members], 1) for of in (maps, weights))
        if shape == str(tuple(size)):
            part = F.conv2d(x, weight, module.conv.bias, padding=1)
        else:
            part = conv_of_enlarged(x, weight, size, align_corners)
        out = part if out is None else out + part
    if module.with_norm:
        out = module.norm(out)
    return module.activate(out) if module.with_activation else out


def conv_of_enlarged(x: Tensor, weight: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """A padded 3 x 3 convolution of a map enlarged bilinearly, without making the enlarged map.

    Args:
        x: (B, C, h, w).
        weight: (O, C, 3, 3).
        size: (H, W) to enlarge to.
        align_corners: as in ``F.interpolate``.

    Returns:
        (B, O, H, W), equal to ``F.conv2d(F.interpolate(x, size, mode='bilinear', ...), weight, padding=1)``.
    """
    B, C, h, w = x.shape
    H, W = size
    O = len(weight)  # noqa: E741
    rows, columns = _enlarge_and_shift(h, H, align_corners, x), _enlarge_and_shift(w, W, align_corners, x)
    # For each row i of taps: the products of its three taps with the coarse map, then the sum along the rows.
    summed = None  # (B, H, w 3 O)
    for i in range(3):
        taps = weight[:, :, i].permute(2, 0, 1).reshape(3 * O, C, 1, 1)
        product = F.conv2d(x, taps).permute(0, 2, 3, 1).reshape(B, h, w * 3 * O)
        matrix = rows[i].expand(B, H, h)
        summed = matrix @ product if summed is None else torch.baddbmm(summed, matrix, product)
    # Columns: (W, w 3) times (w 3, O) for each row.
    matrix = columns.permute(1, 2, 0).reshape(W, w * 3)
    return (matrix @ summed.view(B * H, w * 3, O)).view(B, H, W, O).permute(0, 3, 1, 2)


def _enlarge_and_shift(size: int, out: int, align_corners: bool, like: Tensor) -> Tensor:
    """(3, out, size): the neighbours before, at and after each point of an enlarged line, from the line's points."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    place = torch.arange(out, dtype=dtype, device=like.device)
    if align_corners:
        position = place * ((size - 1) / max(out - 1, 1))
    else:
        position = ((place + 0.5) * (size / out) - 0.5).clamp(0, size - 1)
    # The weight of a neighbour falls from 1 to 0 over the distance to the next one.
    distance = position[:, None] - torch.arange(size, dtype=dtype, device=like.device)
    enlarged = (1 - distance.abs()).clamp(0, 1)
    padded = F.pad(enlarged, (0, 0, 1, 1))
    return torch.stack([padded[i : i + out] for i in range(3)]).to(like.dtype)
