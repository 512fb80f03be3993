"""What is measured: one configuration of a network, its input and the machine."""

from dataclasses import dataclass, fields

import torch

from ..models.volo import STRIDE

SIDES = 'stock', 'ours'
COMPILED = 'compiled'  # stock through torch.compile: the third side, where it was asked for and a compiler is there
VIEWS = 10  # five scales, each with its mirror image: as configs/_base_ has them
MIN_SIDE = 64  # of a picture that can be drawn; its views then have the 32 pixels that VOLO needs


@dataclass(frozen=True)
class Case:
    """A network, a picture and how it is predicted.

    Args:
        arch, classes: of the network.
        size: (height, width) of the picture.
        window, stride: of the sliding windows, in pixels.
        views: 10, or 1 for a plain prediction.
        precision: 'fp32', 'bf16' or 'fp16'.
        device: 'cpu', 'cuda', 'cuda:1', ...
        threads: of PyTorch on a CPU; None leaves them.
        window_batch, compile, channels_last: options of our side only, see
            :class:`~mmseg_volo.models.segmentors.StreamingEncoderDecoder`.

    Raises:
        ValueError: numbers that do not go together, or a device that is not there.
    """

    arch: str = 'd1'
    classes: int = 150
    size: tuple[int, int] = (512, 1024)
    window: int = 512
    stride: int = 341
    views: int = VIEWS
    precision: str = 'fp32'
    device: str = 'cpu'
    threads: int | None = None
    window_batch: int | None = None
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self):
        check_device(self.device)
        if self.views not in (1, VIEWS):
            raise ValueError(f'views must be 1 or {VIEWS}, got {self.views}')
        _check_size(self.size)
        if self.window < 2 * STRIDE or self.window % STRIDE:
            raise ValueError(f'window must be a multiple of {STRIDE}, {2 * STRIDE} or more, got {self.window}')
        if not 0 < self.stride <= self.window:
            raise ValueError(f'stride must be within 1...window, got stride {self.stride} with window {self.window}')
        if self.classes < 2:
            raise ValueError(f'classes must be 2 or more, got {self.classes}')


@dataclass(frozen=True)
class BatchCase:
    """A batch of pictures, through one network or another at once.

    Args:
        size: (height, width) of the pictures.
        batch: how many.
        precision: 'fp32', 'bf16' or 'fp16'.
        device: 'cpu', 'cuda', 'cuda:1', ...
        threads: of PyTorch on a CPU; None leaves them.

    Raises:
        ValueError: a size that timm's VOLO would cut off, or a device that is not there.
    """

    size: tuple[int, int] = (512, 512)
    batch: int = 1
    precision: str = 'fp32'
    device: str = 'cpu'
    threads: int | None = None

    def __post_init__(self):
        check_device(self.device)
        _check_size(self.size)
        if any(side % STRIDE for side in self.size):
            raise ValueError(f'size must be multiples of {STRIDE}, got {self.size[0]} x {self.size[1]}')


def check_device(device: str) -> None:
    """Raise ValueError where there is no such device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA asserts
        raise ValueError(f'device {device} cannot be used: {str(error).splitlines()[0]}') from error


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < MIN_SIDE:
        raise ValueError(f'pictures need at least {MIN_SIDE} pixels a side, got {size[0]} x {size[1]}')


def columns_of(case: Case | BatchCase) -> dict:
    """Columns for a case, without its machine: that is in :func:`~mmseg_volo.benchmark.measuring.environment`."""
    columns = {}
    for field in fields(case):
        value = getattr(case, field.name)
        if field.name == 'size':
            columns.update(height=value[0], width=value[1])
        elif field.name not in ('device', 'threads'):
            columns[field.name] = value
    return columns
