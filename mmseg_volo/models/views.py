"""Views of images: which windows they have, and how these are cut out and preprocessed."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmseg.models import EncoderDecoder, SegDataPreProcessor
from mmseg.structures import SegDataSample
from torch import Tensor

from .streaming import View, axis


def view_of(
    segmentor: EncoderDecoder,
    sample: SegDataSample,
    image: Tensor | Callable,
    shape: tuple[int, int] | None = None,
    padding: Sequence[int] | None = None,
    mode: str | None = None,
) -> View:
    """The view that a data sample describes; of a preprocessed image (3, H, W), or of a crop function and a shape.

    ``mode`` is 'slide' or 'whole', by default that of ``test_cfg``.
    """
    if isinstance(image, Tensor):
        shape = tuple(image.shape[-2:])
        crop = lambda top, left, height, width: image[:, top : top + height, left : left + width]  # noqa: E731
    else:
        crop = image
    meta = sample.metainfo
    if padding is None:
        padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    left, right, top, bottom = map(int, padding)
    out = tuple(map(int, meta.get('ori_shape', shape)[:2]))
    flip = meta.get('flip_direction') if meta.get('flip') else None
    if flip not in (None, 'horizontal', 'vertical'):
        raise ValueError(f"flip_direction must be 'horizontal' or 'vertical', got {flip!r}")
    shape, right, bottom, crop = _enlarged(segmentor, shape, right, bottom, crop)
    window, stride = _windows(segmentor, shape, mode)
    align = bool(segmentor.align_corners)
    rows = axis(shape[0], window[0], stride[0], out[0], top, bottom, flip == 'vertical', align)
    columns = axis(shape[1], window[1], stride[1], out[1], left, right, flip == 'horizontal', align)
    return View(crop, rows, columns)


def _enlarged(
    segmentor: EncoderDecoder, shape: tuple[int, int], right: int, bottom: int, crop: Callable
) -> tuple[tuple[int, int], int, int, Callable]:
    """Pad a view at the right and the bottom to the smallest input of the backbone, as the data preprocessor pads."""
    smallest = getattr(segmentor.backbone, 'smallest', 1)
    beside, below = max(smallest - shape[1], 0), max(smallest - shape[0], 0)
    if not beside and not below:
        return shape, right, bottom, crop

    def enlarged(top: int, left: int, height: int, width: int) -> Tensor:
        window = crop(top, left, min(height, shape[0] - top), min(width, shape[1] - left))
        missing = 0, width - window.shape[2], 0, height - window.shape[1]
        return F.pad(window, missing, value=getattr(segmentor.data_preprocessor, 'pad_val', 0))

    return (shape[0] + below, shape[1] + beside), right + beside, bottom + below, enlarged


def _windows(
    segmentor: EncoderDecoder, shape: tuple[int, int], mode: str | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size and stride of the windows in a view of this shape; one window in mode 'whole'."""
    cfg = segmentor.test_cfg
    mode = mode or cfg.get('mode', 'whole')
    if mode == 'whole':
        return shape, shape
    if mode != 'slide':
        raise ValueError(f"test_cfg.mode must be 'slide' or 'whole', got {mode!r}")
    crop, stride = tuple(cfg['crop_size']), tuple(cfg['stride'])
    if any(not 0 < s <= c for c, s in zip(crop, stride, strict=True)):
        raise ValueError(f'test_cfg.stride must be within 1...crop_size, got stride {stride} with crop_size {crop}')
    return crop, stride


def prepared_crops(
    pre: SegDataPreProcessor, size: tuple[int, int], read: Callable[[int, int, int, int], Tensor]
) -> tuple[Callable, tuple[int, int], tuple]:
    """A function that preprocesses a window of an image; the image's padded shape; the padding.

    Args:
        pre: changes each pixel alone, see :func:`~mmseg_volo.models.overrides.is_plain_preprocessor`.
        size: (height, width) of the image.
        read: returns the image's pixels (C, rows, columns) at ``(top, left, rows, columns)``, on any device.
    """
    height, width = size
    cfg = pre.test_cfg or {}
    if cfg.get('size') is not None:
        shape = max(height, cfg['size'][-2]), max(width, cfg['size'][-1])
    else:
        divisor = cfg.get('size_divisor') or 1
        shape = -(-height // divisor) * divisor, -(-width // divisor) * divisor

    # The first name is onedl-mmsegmentation's, the second that of mmsegmentation 1.2.2.
    swap = pre._channel_conversion if hasattr(pre, '_channel_conversion') else pre.channel_conversion

    def crop(top: int, left: int, rows: int, columns: int) -> Tensor:
        window = read(top, left, max(min(rows, height - top), 0), max(min(columns, width - left), 0))
        window = window.to(pre.device)
        if swap and len(window) == 3:
            window = window.flip(0)
        window = window.float()
        if pre._enable_normalize:
            window = (window - pre.mean) / pre.std
        return F.pad(window, (0, columns - window.shape[2], 0, rows - window.shape[1]), value=pre.pad_val)

    return crop, shape, (0, shape[1] - width, 0, shape[0] - height)


def windows_of(image: Tensor, device: torch.device) -> Callable[[int, int, int, int], Tensor]:
    """A function that gives the windows of an image (C, H, W), for :func:`prepared_crops`."""

    def read(top: int, left: int, rows: int, columns: int) -> Tensor:
        nonlocal image
        # Uploaded with the first window, while the device computes other views. To a GPU asynchronously, which needs
        # pinned memory.
        if image.device.type == 'cpu' and torch.device(device).type == 'cuda':
            image = image.pin_memory()
        image = image.to(device, non_blocking=True)
        return image[:, top : top + rows, left : left + columns]

    return read
