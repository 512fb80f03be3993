"""UPerHead that convolves coarse maps before it enlarges them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.dist import get_world_size
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError
from .losses import BandedLoss


@MODELS.register_module()
class LeanUPerHead(BandedLoss, UPerHead):
    """mmseg's :class:`UPerHead` (UPerNet, arXiv:1807.10221): same arguments, weights and output, less arithmetic.

    UPerHead enlarges the pooled maps and the maps of the coarse levels, joins them, and convolves the result 3 x 3.
    Both steps are linear, so here each tap of the convolution is applied to the coarse map and the nine results are
    enlarged and added (:func:`conv_of_enlarged`): at half the resolution a quarter of the multiply-adds. The joined
    maps are never made. With VOLO's four maps on a 512 x 512 window that leaves 34 of 66 G multiply-adds. The loss
    needs no logits in the size of the labels (:class:`~mmseg_volo.models.losses.BandedLoss`).

    Raises:
        ConfigError: in training, a batch norm that sees one value per channel: one picture per device, pooled to 1 x 1.
    """

    def psp_forward(self, inputs: list[Tensor]) -> Tensor:
        """The pyramid pooling module: as in UPerHead."""
        finest = inputs[-1]
        if self.training and len(finest) == 1 and 1 in self.psp_modules.pool_scales:
            self._check_norms()
        return _joined_conv(self.bottleneck, [finest], self.align_corners, self.pooled(finest))

    def pooled(self, finest: Tensor) -> list[Tensor]:
        """The maps of the pyramid pooling module, in sizes of their own."""
        scales = tuple(self.psp_modules.pool_scales)
        averages = _averages(finest, scales)
        maps, first = [], 0
        for scale, module in zip(scales, self.psp_modules, strict=True):
            own = slice(first, first + scale)
            maps.append(module[1:](averages[:, own, own].permute(0, 3, 1, 2)))  # what follows the pool
            first += scale
        return maps

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
            maps[i - 1] = maps[i - 1] + enlarged(maps[i], maps[i - 1].shape[2:], self.align_corners)
        outs = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=False)]
        return _joined_conv(self.fpn_bottleneck, [*outs, maps[-1]], self.align_corners)


def _joined_conv(module: ConvModule, maps: list[Tensor], align_corners: bool, pooled: Sequence[Tensor] = ()) -> Tensor:
    """``module`` on the channels of all maps, enlarged to the first one's size; ``pooled`` have a few points each."""
    size = maps[0].shape[2:]
    if type(module.conv) is not nn.Conv2d:  # some other kind, by conv_cfg
        whole = [resize(x, size, mode='bilinear', align_corners=align_corners) for x in (*maps, *pooled)]
        return module(torch.cat(whole, 1))
    groups = [maps[:1]]  # of neighbours of one size
    for x in maps[1:]:
        if _same(x.shape[2:], groups[-1][0].shape[2:]):
            groups[-1].append(x)
        else:
            groups.append([x])
    groups.append(list(pooled))
    weights = module.conv.weight.split([sum(x.shape[1] for x in group) for group in groups], dim=1)
    out = F.conv2d(_cat(groups[0], 1), weights[0], module.conv.bias, padding=1)
    # Autocast has chosen the precision of that; the other weights are cast while they are put in order.
    for group, weight in zip(groups[1:-1], weights[1:-1], strict=True):
        out += conv_of_enlarged([x.to(out.dtype) for x in group], weight, size, align_corners)
    if pooled:
        out += conv_of_pooled([x.to(out.dtype) for x in pooled], weights[-1], size, align_corners)
    if module.with_norm:
        out = module.norm(out)
    return module.activate(out) if module.with_activation else out


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def _same(one: torch.Size, other: torch.Size) -> bool:
    """By their names: the sizes of a graph that is exported may be open. torch.compile, though, traces no names."""
    if torch.compiler.is_dynamo_compiling():
        return one == other
    return str(tuple(one)) == str(tuple(other))


def enlarged(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """A map (B, C, h, w) enlarged bilinearly to ``size``, in its own dtype, as by ``F.interpolate``."""
    if _same(x.shape[2:], size):
        return x
    with torch.autocast(x.device.type, enabled=False):  # which would make it float32
        if x.is_cuda and not torch.compiler.is_compiling():
            return _enlarged_by_products(x, size, align_corners)
        return resize(x, size, mode='bilinear', align_corners=align_corners)


def _enlarged_by_products(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """On a GPU faster than ``F.interpolate``, whose gradient is besides added up in any order."""
    B, C, h, w = x.shape
    H, W = size
    rows, columns = (_kept(_enlarge, x, *lengths, align_corners) for lengths in ((h, H), (w, W)))
    x = torch.bmm(rows.expand(B, H, h), x.permute(0, 2, 3, 1).reshape(B, h, w * C))
    x = torch.bmm(columns.expand(B * H, W, w), x.view(B * H, w, C))
    return x.view(B, H, W, C).permute(0, 3, 1, 2)


def conv_of_enlarged(
    maps: Sequence[Tensor], weight: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """A padded 3 x 3 convolution of maps joined and enlarged bilinearly, without making the enlarged map.

    Args:
        maps: each (B, C_i, h, w).
        weight: (O, C, 3, 3), where C is the sum of all C_i.
        size: (H, W) to enlarge to.
        align_corners: as in ``F.interpolate``.

    Returns:
        (B, O, H, W), equal to ``F.conv2d(F.interpolate(torch.cat(maps, 1), size, mode='bilinear'), weight, padding=1)``
        in the dtype of the maps.
    """
    B, _, h, w = maps[0].shape
    H, W = size
    O, C = weight.shape[:2]  # noqa: E741
    # With the rows first, all that a step adds up lies side by side, for a whole batch.
    x = _cat([x.permute(2, 0, 3, 1) for x in maps], 3).reshape(1, h, B * w, C).permute(0, 3, 1, 2)
    taps = weight.permute(2, 3, 0, 1).to(x.dtype, memory_format=torch.contiguous_format).reshape(3, 3 * O, C, 1, 1)
    rows = _kept(_enlarge_rows, x, h, H, align_corners)
    columns = _kept(_enlarge_columns, x, w, W, align_corners)
    # For each row i of taps: the products of its three taps with the coarse map, then the sum along the rows.
    summed = None  # (H, B w 3 O)
    for i in range(3):
        product = F.conv2d(x, taps[i]).permute(0, 2, 3, 1).reshape(h, B * w * 3 * O)
        summed = rows[i] @ product if summed is None else summed.addmm_(rows[i], product)
    # Columns: (W, w 3) times (w 3, O) for each row.
    summed = summed.view(H, B, -1).transpose(0, 1).reshape(B * H, w * 3, O)
    out = torch.bmm(columns.expand(B * H, W, w * 3), summed)
    return out.view(B, H, W, O).permute(0, 3, 1, 2)


def conv_of_pooled(
    maps: Sequence[Tensor], weight: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """As :func:`conv_of_enlarged`, for maps that have sizes of their own, of a few points: one product enlarges all.

    Args:
        maps: each (B, C_i, h_i, w_i).
        weight, size, align_corners: as there.

    Returns:
        (B, O, H, W), equal to a padded convolution of all maps, enlarged and joined.
    """
    B, O = maps[0].shape[0], weight.shape[0]  # noqa: E741
    H, W = size
    channels, dtype = [x.shape[1] for x in maps], maps[0].dtype
    if weight.is_cuda:  # in one launch; a CPU's caches hold the weights of one map
        taps = _side_by_side(weight, dtype).split(channels, 1)
    else:
        taps = [_side_by_side(part, dtype) for part in weight.split(channels, 1)]
    products = []  # of each point with the nine taps
    for x, tap in zip(maps, taps, strict=True):
        product = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) @ tap.T
        products.append(product.view(B, -1, O, 9).transpose(2, 3))
    shapes = tuple(tuple(x.shape[2:]) for x in maps)
    rows, columns = _kept(_enlarge_points, maps[0], shapes, H, W, align_corners)
    matrix = (rows[:, None] * columns).view(1, H * W, -1)
    out = torch.bmm(matrix.expand(B, -1, -1), torch.cat(products, 1).flatten(1, 2))
    return out.view(B, H, W, O).permute(0, 3, 1, 2)


def _side_by_side(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(O 9, C): the nine taps of each output of a convolution (O, C, 3, 3)."""
    return weight.flatten(2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def _averages(x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Adaptive average pooling of a map (B, C, h, w) to several scales at once.

    Returns:
        (B, S, S, C) with S the sum of the scales, where those of each scale lie on the diagonal; the rest says nothing.
    """
    B, C, h, w = x.shape
    S = sum(scales)
    with torch.autocast(x.device.type, enabled=False):  # as pooling is, in full precision
        rows, columns = (_kept(_average, x, scales, n) for n in (h, w))
        x = torch.bmm(rows.expand(B, S, h), x.permute(0, 2, 3, 1).reshape(B, h, w * C))
        return torch.bmm(columns.expand(B * S, S, w), x.view(B * S, w, C)).view(B, S, S, C)


# Matrices made once: on a GPU making one takes twenty launches, longer than what it is for.
_MATRICES: OrderedDict[tuple, Any] = OrderedDict()
_MATRICES_KEPT = 256
_OF_GRAPHS: dict[tuple, Any] = {}
_LOCK = threading.Lock()


def _kept(make: Callable, like: Tensor, *arguments) -> Any:
    """``make(*arguments, dtype, device)`` with those of ``like``, kept for the next call with the same arguments.

    The latest 256 are kept, and those that a CUDA graph reads, for good.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(like) is not Tensor:
        return make(*arguments, like.dtype, like.device)  # part of the graph
    key = make, *arguments, like.dtype, like.device
    in_graph = like.is_cuda and torch.cuda.is_current_stream_capturing()
    with _LOCK:
        made = _MATRICES.get(key)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():  # a backward pass may need it later
                made = make(*key[1:])
            if in_graph:
                return made  # it has its values only where the graph is replayed
            if like.is_cuda:
                torch.cuda.current_stream(like.device).synchronize()  # the next call may be on another stream
            _MATRICES[key] = made
            if len(_MATRICES) > _MATRICES_KEPT:
                _MATRICES.popitem(last=False)
        _MATRICES.move_to_end(key)
        if in_graph:
            _OF_GRAPHS[key] = made
    return made


def _enlarge(size: int, out: int, align_corners: bool, kind: torch.dtype, device: torch.device) -> Tensor:
    """(out, size): the points of a line enlarged linearly, from the line's points."""
    dtype = torch.promote_types(kind, torch.float32)
    place = torch.arange(out, dtype=dtype, device=device)
    if align_corners:
        position = place * ((size - 1) / max(out - 1, 1))
    else:
        position = ((place + 0.5) * (size / out) - 0.5).clamp(0, size - 1)
    # The weight of a neighbour falls from 1 to 0 over the distance to the next one.
    distance = position[:, None] - torch.arange(size, dtype=dtype, device=device)
    return (1 - distance.abs()).clamp(0, 1).to(kind)


def _enlarge_rows(size: int, out: int, *arguments) -> Tensor:
    """(3, out, size): the neighbours before, at and after each point of an enlarged line, from the line's points."""
    padded = F.pad(_enlarge(size, out, *arguments), (0, 0, 1, 1))
    return torch.stack([padded[i : i + out] for i in range(3)])


def _enlarge_columns(*arguments) -> Tensor:
    """(out, size 3): the same, for one point after the other."""
    return _enlarge_rows(*arguments).permute(1, 2, 0).flatten(1)


def _enlarge_points(
    shapes: tuple[tuple[int, int], ...], H: int, W: int, align_corners: bool, kind: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(H, K) and (W, K), with K nine taps for each point of each map: what an enlarged row and column take of them."""
    rows, columns = [], []
    for h, w in shapes:
        # (H, h, 1, 3, 1) and (W, 1, w, 1, 3), as the points and their taps lie
        row = _enlarge_rows(h, H, align_corners, kind, device).permute(1, 2, 0)[:, :, None, :, None]
        column = _enlarge_rows(w, W, align_corners, kind, device).permute(1, 2, 0)[:, None, :, None, :]
        rows.append(row.expand(-1, -1, w, -1, 3).flatten(1))
        columns.append(column.expand(-1, h, -1, 3, -1).flatten(1))
    return torch.cat(rows, 1), torch.cat(columns, 1)


def _average(scales: tuple[int, ...], size: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """(sum of scales, size): adaptive average pooling of a line to each scale, as ``F.adaptive_avg_pool1d`` has it."""
    dtype = torch.promote_types(kind, torch.float32)
    place = torch.arange(size, device=device)
    matrices = []
    for scale in scales:
        bins = torch.arange(scale, device=device)[:, None]
        first, last = bins * size // scale, ((bins + 1) * size + scale - 1) // scale
        matrices.append(((place >= first) & (place < last)).to(dtype) / (last - first))
    return torch.cat(matrices).to(kind)
