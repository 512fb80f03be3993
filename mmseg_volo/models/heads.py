"""UPerHead that convolves coarse maps before it upsamples them."""

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

    UPerHead upsamples pooled and coarse maps, concatenates them, and applies a 3 x 3 convolution. Both steps are
    linear, so this class applies each tap of the convolution to the coarse map, and upsamples and adds the nine results
    (:func:`conv_of_upsampled`). At half the resolution that takes a quarter of the multiply-adds; with VOLO's four maps
    of a 512 x 512 window, 34 G remain of 66 G. The loss needs no logits of the labels' size
    (:class:`~mmseg_volo.models.losses.BandedLoss`).

    Raises:
        ConfigError: in training, a batch norm gets one value per channel: one image per device, pooled to 1 x 1.
    """

    def psp_forward(self, inputs: list[Tensor]) -> Tensor:
        """Apply the pyramid pooling module, as UPerHead does."""
        finest = inputs[-1]
        if self.training and len(finest) == 1 and 1 in self.psp_modules.pool_scales:
            self._check_norms()
        return _conv_of_all(self.bottleneck, [finest], self.align_corners, self.pooled(finest))

    def pooled(self, finest: Tensor) -> list[Tensor]:
        """The maps of the pyramid pooling module, before upsampling."""
        scales = tuple(self.psp_modules.pool_scales)
        averages = _averages(finest, scales)
        maps, first = [], 0
        for scale, module in zip(scales, self.psp_modules, strict=True):
            block = slice(first, first + scale)
            maps.append(module[1:](averages[:, block, block].permute(0, 3, 1, 2)))  # module[0] is the pooling
            first += scale
        return maps

    def _check_norms(self) -> None:
        for norm in self.psp_modules.modules():
            is_synced = isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1
            if isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None) and not is_synced:
                raise ConfigError(
                    f'{type(norm).__name__} cannot train on one image per device, which UPerHead pools to 1 x 1: '
                    "set train_dataloader.batch_size=2 or more, or train on several GPUs with norm_cfg.type='SyncBN', "
                    "or set decode_head.norm_cfg to dict(type='GN', num_groups=32)"
                )

    def _forward_feature(self, inputs: list[Tensor]) -> Tensor:
        inputs = self._transform_inputs(inputs)
        maps = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=False)]
        maps.append(self.psp_forward(inputs))
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + upsampled(maps[i], maps[i - 1].shape[2:], self.align_corners)
        outs = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=False)]
        return _conv_of_all(self.fpn_bottleneck, [*outs, maps[-1]], self.align_corners)


def _conv_of_all(module: ConvModule, maps: list[Tensor], align_corners: bool, pooled: Sequence[Tensor] = ()) -> Tensor:
    """Apply ``module`` to all maps, upsampled to the first map's size and concatenated; ``pooled`` are tiny maps."""
    size = maps[0].shape[2:]
    if type(module.conv) is not nn.Conv2d:  # another type, set by conv_cfg
        whole = [resize(x, size, mode='bilinear', align_corners=align_corners) for x in (*maps, *pooled)]
        return module(torch.cat(whole, 1))
    groups = [maps[:1]]  # neighbours of the same size
    for x in maps[1:]:
        if _same(x.shape[2:], groups[-1][0].shape[2:]):
            groups[-1].append(x)
        else:
            groups.append([x])
    groups.append(list(pooled))
    weights = module.conv.weight.split([sum(x.shape[1] for x in group) for group in groups], dim=1)
    out = F.conv2d(_cat(groups[0], 1), weights[0], module.conv.bias, padding=1)
    # Autocast has chosen the dtype of `out`; the other weights are cast to it when they are reordered.
    for group, weight in zip(groups[1:-1], weights[1:-1], strict=True):
        out += conv_of_upsampled([x.to(out.dtype) for x in group], weight, size, align_corners)
    if pooled:
        out += conv_of_pooled([x.to(out.dtype) for x in pooled], weights[-1], size, align_corners)
    if module.with_norm:
        out = module.norm(out)
    return module.activate(out) if module.with_activation else out


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def _same(one: torch.Size, other: torch.Size) -> bool:
    """Whether two sizes are equal. Compares text, since torch.export may have symbols; torch.compile traces no text."""
    if torch.compiler.is_dynamo_compiling():
        return one == other
    return str(tuple(one)) == str(tuple(other))


def upsampled(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Resize a map (B, C, h, w) bilinearly to ``size``, like ``F.interpolate``, in the map's dtype."""
    if _same(x.shape[2:], size):
        return x
    with torch.autocast(x.device.type, enabled=False):  # autocast would return float32
        if x.is_cuda and not torch.compiler.is_compiling():
            return _upsampled_by_products(x, size, align_corners)
        return resize(x, size, mode='bilinear', align_corners=align_corners)


def _upsampled_by_products(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """On a GPU faster than ``F.interpolate``, and with a deterministic gradient."""
    B, C, h, w = x.shape
    H, W = size
    rows, columns = (_cached(_upsample, x, *lengths, align_corners) for lengths in ((h, H), (w, W)))
    x = torch.bmm(rows.expand(B, H, h), x.permute(0, 2, 3, 1).reshape(B, h, w * C))
    x = torch.bmm(columns.expand(B * H, W, w), x.view(B * H, w, C))
    return x.view(B, H, W, C).permute(0, 3, 1, 2)


def conv_of_upsampled(
    maps: Sequence[Tensor], weight: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """A padded 3 x 3 convolution of maps, concatenated and upsampled bilinearly, without the upsampled map.

    Args:
        maps: each (B, C_i, h, w).
        weight: (O, C, 3, 3), where C is the sum of all C_i.
        size: (H, W) of the output.
        align_corners: as in ``F.interpolate``.

    Returns:
        (B, O, H, W), equal to ``F.conv2d(F.interpolate(torch.cat(maps, 1), size, mode='bilinear'), weight, padding=1)``
        in the dtype of the maps.
    """
    B, _, h, w = maps[0].shape
    H, W = size
    O, C = weight.shape[:2]  # noqa: E741
    # With rows first, one matrix product serves the whole batch.
    x = _cat([x.permute(2, 0, 3, 1) for x in maps], 3).reshape(1, h, B * w, C).permute(0, 3, 1, 2)
    taps = weight.permute(2, 3, 0, 1).to(x.dtype, memory_format=torch.contiguous_format).reshape(3, 3 * O, C, 1, 1)
    rows = _cached(_upsample_rows, x, h, H, align_corners)
    columns = _cached(_upsample_columns, x, w, W, align_corners)
    # For each row i of taps: apply its three taps to the coarse map, then upsample the rows and add.
    summed = None  # (H, B w 3 O)
    for i in range(3):
        product = F.conv2d(x, taps[i]).permute(0, 2, 3, 1).reshape(h, B * w * 3 * O)
        summed = rows[i] @ product if summed is None else summed.addmm_(rows[i], product)
    # Upsample the columns: (W, w 3) times (w 3, O) for each row.
    summed = summed.view(H, B, -1).transpose(0, 1).reshape(B * H, w * 3, O)
    out = torch.bmm(columns.expand(B * H, W, w * 3), summed)
    return out.view(B, H, W, O).permute(0, 3, 1, 2)


def conv_of_pooled(
    maps: Sequence[Tensor], weight: Tensor, size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """Like :func:`conv_of_upsampled`, for tiny maps of different sizes: one matrix product upsamples all.

    Args:
        maps: each (B, C_i, h_i, w_i).
        weight, size, align_corners: as in :func:`conv_of_upsampled`.

    Returns:
        (B, O, H, W), equal to a padded convolution of all maps, upsampled and concatenated.
    """
    B, O = maps[0].shape[0], weight.shape[0]  # noqa: E741
    H, W = size
    channels, dtype = [x.shape[1] for x in maps], maps[0].dtype
    if weight.is_cuda:  # in one launch; on a CPU map by map, so that the weights stay in the cache
        taps = _rows_of_taps(weight, dtype).split(channels, 1)
    else:
        taps = [_rows_of_taps(part, dtype) for part in weight.split(channels, 1)]
    products = []  # nine taps applied to each point
    for x, tap in zip(maps, taps, strict=True):
        product = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) @ tap.T
        products.append(product.view(B, -1, O, 9).transpose(2, 3))
    shapes = tuple(tuple(x.shape[2:]) for x in maps)
    rows, columns = _cached(_upsample_points, maps[0], shapes, H, W, align_corners)
    matrix = (rows[:, None] * columns).view(1, H * W, -1)
    out = torch.bmm(matrix.expand(B, -1, -1), torch.cat(products, 1).flatten(1, 2))
    return out.view(B, H, W, O).permute(0, 3, 1, 2)


def _rows_of_taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Reorder the weight (O, C, 3, 3) of a convolution to (O 9, C)."""
    return weight.flatten(2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def _averages(x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Adaptive average pooling of a map (B, C, h, w) to several scales at once.

    Returns:
        (B, S, S, C), S the sum of the scales. The diagonal blocks are the pooled maps; other elements are meaningless.
    """
    B, C, h, w = x.shape
    S = sum(scales)
    with torch.autocast(x.device.type, enabled=False):  # in full precision, as pooling is
        rows, columns = (_cached(_average, x, scales, n) for n in (h, w))
        x = torch.bmm(rows.expand(B, S, h), x.permute(0, 2, 3, 1).reshape(B, h, w * C))
        return torch.bmm(columns.expand(B * S, S, w), x.view(B * S, w, C)).view(B, S, S, C)


# Cache of matrices: on a GPU, making one takes twenty launches and longer than its product.
_MATRICES: OrderedDict[tuple, Any] = OrderedDict()
_MATRICES_LIMIT = 256
_GRAPH_MATRICES: dict[tuple, Any] = {}
_LOCK = threading.Lock()


def _cached(make: Callable, like: Tensor, *arguments) -> Any:
    """``make(*arguments, dtype, device)`` with dtype and device of ``like``, cached.

    The cache holds the 256 results used last, and for ever those that a CUDA graph reads.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(like) is not Tensor:
        return make(*arguments, like.dtype, like.device)  # becomes part of the traced graph
    key = make, *arguments, like.dtype, like.device
    in_graph = like.is_cuda and torch.cuda.is_current_stream_capturing()
    with _LOCK:
        made = _MATRICES.get(key)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():  # a later call may need it for a backward pass
                made = make(*key[1:])
            if in_graph:
                return made  # not cached: it has values only after a replay
            if like.is_cuda:
                torch.cuda.current_stream(like.device).synchronize()  # the next call may use another stream
            _MATRICES[key] = made
            if len(_MATRICES) > _MATRICES_LIMIT:
                _MATRICES.popitem(last=False)
        _MATRICES.move_to_end(key)
        if in_graph:
            _GRAPH_MATRICES[key] = made
    return made


def _upsample(size: int, out: int, align_corners: bool, kind: torch.dtype, device: torch.device) -> Tensor:
    """Matrix (out, size) of a linear resize."""
    dtype = torch.promote_types(kind, torch.float32)
    place = torch.arange(out, dtype=dtype, device=device)
    if align_corners:
        position = place * ((size - 1) / max(out - 1, 1))
    else:
        position = ((place + 0.5) * (size / out) - 0.5).clamp(0, size - 1)
    # The weight of a source point falls from 1 to 0 over a distance of one point.
    distance = position[:, None] - torch.arange(size, dtype=dtype, device=device)
    return (1 - distance.abs()).clamp(0, 1).to(kind)


def _upsample_rows(size: int, out: int, *arguments) -> Tensor:
    """Matrices (3, out, size) that give the points before, at and after each point of a linear resize."""
    padded = F.pad(_upsample(size, out, *arguments), (0, 0, 1, 1))
    return torch.stack([padded[i : i + out] for i in range(3)])


def _upsample_columns(*arguments) -> Tensor:
    """:func:`_upsample_rows` as one matrix (out, size 3)."""
    return _upsample_rows(*arguments).permute(1, 2, 0).flatten(1)


def _upsample_points(
    shapes: tuple[tuple[int, int], ...], H: int, W: int, align_corners: bool, kind: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Matrices (H, K) and (W, K): weights of the K taps, nine for each point of each map, in each row and column."""
    rows, columns = [], []
    for h, w in shapes:
        # (H, h, 1, 3, 1) and (W, 1, w, 1, 3), in the order of points and taps
        row = _upsample_rows(h, H, align_corners, kind, device).permute(1, 2, 0)[:, :, None, :, None]
        column = _upsample_rows(w, W, align_corners, kind, device).permute(1, 2, 0)[:, None, :, None, :]
        rows.append(row.expand(-1, -1, w, -1, 3).flatten(1))
        columns.append(column.expand(-1, h, -1, 3, -1).flatten(1))
    return torch.cat(rows, 1), torch.cat(columns, 1)


def _average(scales: tuple[int, ...], size: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """Matrix (sum of scales, size) of ``F.adaptive_avg_pool1d`` to each scale."""
    dtype = torch.promote_types(kind, torch.float32)
    place = torch.arange(size, device=device)
    matrices = []
    for scale in scales:
        bins = torch.arange(scale, device=device)[:, None]
        first, last = bins * size // scale, ((bins + 1) * size + scale - 1) // scale
        matrices.append(((place >= first) & (place < last)).to(dtype) / (last - first))
    return torch.cat(matrices).to(kind)
