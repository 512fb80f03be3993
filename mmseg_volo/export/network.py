"""VOLO and UPerHead from operators that exporters support, for every input size, with the same weights."""

import copy

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmseg.models import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.heads import LeanUPerHead
from ..models.volo import VOLO, OutlookAttention
from ..utils.unwrap import class_of

OUTPUTS = 'logits', 'classes'


@MODELS.register_module()
class ExportVOLO(VOLO):
    """:class:`VOLO` that resizes its position embedding by two matrix products.

    ONNX has a bicubic Resize, but TensorRT does not support it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, OutlookAttention):
                module.impl = 'slices'  # do not rely on 'auto' to detect the exporter

    def _pos_embed_for(self, grid: tuple[int, int]) -> Tensor:
        pos_embed = self.pos_embed
        if all(isinstance(n, int) for n in grid) and tuple(pos_embed.shape[1:3]) == tuple(grid):
            return pos_embed  # only for ints: a comparison would fix an open size
        rows, columns = (_cubic(n, out) for n, out in zip(pos_embed.shape[1:3], grid, strict=True))
        resized = rows @ (columns @ pos_embed.float()).transpose(1, 2)  # 1, columns, rows, C
        return resized.transpose(1, 2).to(pos_embed.dtype)


@MODELS.register_module()
class ExportUPerHead(LeanUPerHead):
    """:class:`LeanUPerHead` whose pyramid pooling is matrix products, because ONNX has no adaptive pooling."""

    def pooled(self, finest: Tensor) -> list[Tensor]:
        """Return the maps of the pyramid pooling module, each of its own size, before they are upsampled."""
        maps = []
        for scale, module in zip(self.psp_modules.pool_scales, self.psp_modules, strict=True):
            rows, columns = (_pool(n, scale).to(finest.dtype) for n in finest.shape[2:])
            x = rows @ finest @ columns.T
            for layer in list(module)[1:]:  # the layers after the pooling
                x = layer(x)
            maps.append(x)
        return maps


def _pool(size: int, out: int) -> Tensor:
    """Return the matrix (out, size) of ``F.adaptive_avg_pool1d``."""
    position = torch.arange(size).float()
    # Exact: integers up to 2^24 have no rounding, and quotients that are no integers are at least 1/out away from one.
    edges = torch.arange(out + 1).float() * size / out
    first, last = edges[:-1].floor()[:, None], edges[1:].ceil()[:, None]
    return (torch.minimum(position + 1, last) - torch.maximum(position, first)).clamp(0, 1) / (last - first)


def _cubic(size: int, out: int) -> Tensor:
    """Return the matrix (out, size) of bicubic ``F.interpolate`` (a = -0.75, borders repeated)."""
    position = (torch.arange(out).float() + 0.5) * (size / out) - 0.5
    neighbours = position.floor()[:, None] + torch.arange(-1, 3).float()  # (out, 4)
    t = (position[:, None] - neighbours).abs()
    near = (1.25 * t - 2.25) * t * t + 1
    far = ((-0.75 * t + 3.75) * t - 6) * t + 3
    weight = torch.where(t <= 1, near, far)
    distance = neighbours.clamp(0, size - 1)[:, :, None] - torch.arange(size).float()  # (out, 4, size)
    return (weight[:, :, None] * (1 - distance.abs()).clamp(0, 1)).sum(1)


def exportable(config: Config) -> Config:
    """Return the config of a segmentor with the same weights from layers that exporters support.

    Raises:
        ConfigError: the model is no EncoderDecoder with one decode head.
    """
    config = copy.deepcopy(config)
    model = config.model
    kind = class_of(model, MODELS)
    if kind is None or not issubclass(kind, EncoderDecoder) or 'Cascade' in kind.__name__:
        raise ConfigError(
            f'model.type {model.type} cannot be exported: expected an EncoderDecoder with one decode head'
        )
    model.auxiliary_head = None
    if model.backbone.type == 'VOLO':
        model.backbone.type = 'ExportVOLO'
    if model.decode_head.type in ('LeanUPerHead', 'UPerHead'):
        model.decode_head.type = 'ExportUPerHead'
    return config


def swaps_channels(preprocessor: nn.Module) -> bool:
    """Return whether mmseg's preprocessor converts BGR to RGB; the attribute's name depends on the version of mmseg."""
    return bool(getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False)))


class ExportNetwork(nn.Module):
    """The network in an exported file.

    Takes normalised images (B, 3, H, W), float32; with ``preprocess`` images as OpenCV reads them, (B, H, W, 3), BGR,
    uint8. Returns two tensors:

    - logits (B, C, H, W), float32, or class ids (B, H, W), int32;
    - the logits of the decode head before upsampling (B, C, h, w), float32, for prediction in windows and views.

    Args:
        segmentor: built from the config of :func:`exportable`.
        output: 'logits' or 'classes', the first tensor.
        preprocess: normalise in the network.
        half: compute in float16.
    """

    def __init__(self, segmentor: EncoderDecoder, output: str, preprocess: bool, half: bool):
        super().__init__()
        pre = segmentor.data_preprocessor
        self.output, self.preprocess = output, preprocess
        self.align_corners = bool(segmentor.align_corners)
        self.threshold = segmentor.decode_head.threshold
        self.swap = swaps_channels(pre)
        self.register_buffer('mean', pre.mean.detach().clone(), persistent=False)
        self.register_buffer('std', pre.std.detach().clone(), persistent=False)
        self.dtype = torch.float16 if half else torch.float32
        self.segmentor = fuse_conv_bn(segmentor).to(self.dtype)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.preprocess:
            image = image.float().permute(0, 3, 1, 2)
            if self.swap:
                image = torch.cat((image[:, 2:3], image[:, 1:2], image[:, 0:1]), 1)
            image = (image - self.mean) / self.std
        coarse = self.segmentor.decode_head(self.segmentor.extract_feat(image.to(self.dtype))).float()
        size = image.shape[2:]
        logits = resize(coarse, size, mode='bilinear', align_corners=self.align_corners)
        if self.output == 'logits':
            return logits, coarse
        if logits.shape[1] == 1:
            return (logits[:, 0].sigmoid() > self.threshold).to(torch.int32), coarse
        return logits.argmax(1).to(torch.int32), coarse
