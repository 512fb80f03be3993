"""Check that images have the channels and the range of values that a model was made for."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from mmseg.models import EncoderDecoder, SegDataPreProcessor
from mmseg.utils import SampleList
from torch import Tensor, nn

from ..datasets.checks.depth import DARK, lost_bits
from .volo import VOLO

_told: set[str] = set()  # what was said once


class Expected(NamedTuple):
    """What a segmentor takes: channels, and the largest mean and std of its preprocessor; each None if unknown."""

    channels: int | None
    mean: float | None
    std: float | None

    @property
    def is_8_bit(self) -> bool:
        """Whether mean and std fit values from 0 to 255."""
        return self.mean is not None and self.mean <= 255 and self.std <= 255 and (self.mean > 1 or self.std > 64)

    @property
    def is_unit(self) -> bool:
        """Whether mean and std fit values from 0 to 1."""
        return self.mean is not None and 0 < self.mean <= 1 and self.std <= 1


def expected_by(segmentor: EncoderDecoder) -> Expected:
    """Return what the segmentor's backbone and preprocessor take."""
    pre, backbone = segmentor.data_preprocessor, segmentor.backbone
    if getattr(type(pre), 'forward', None) is not SegDataPreProcessor.forward:  # it may change channels and values
        return Expected(None, None, None)
    channels = backbone.patch_embed.conv[0].in_channels if isinstance(backbone, VOLO) else None
    if not pre._enable_normalize:
        return Expected(channels, None, None)
    # The numbers stay with the module, since reading them from a GPU would wait for it.
    if not hasattr(pre, '_largest'):
        pre._largest = pre.mean.max().item(), pre.std.max().item()
    if channels is None and pre.mean.numel() > 1:
        channels = pre.mean.numel()
    return Expected(channels, *pre._largest)


def check_images(segmentor: EncoderDecoder, images: Sequence[Tensor], samples: SampleList | None) -> None:
    """Reject images that the model cannot have been trained on; warn of those that look so.

    Args:
        segmentor: its preprocessor's mean and std, and its backbone, say what it takes.
        images: (C, H, W) each, before the preprocessor.
        samples: their data samples; ``img_path`` is None for an image that was given as an array.

    Raises:
        ValueError: another number of channels, or another range of values.
    """
    expected = expected_by(segmentor)
    if expected == (None, None, None):
        return
    for image, sample in zip(images, samples or [None] * len(images), strict=False):
        path = '' if sample is None else sample.metainfo.get('img_path', '')
        _check_channels(segmentor, expected, image)
        if expected.mean is None:
            continue
        if image.dtype != torch.uint8 or expected.mean > 255 or (path is None and expected.is_unit):
            _check_range(expected, image, path)
        elif path and image[:, ::8, ::8].max() < DARK and image.max() < DARK:
            _tell_of_lost_bits(path)


def _what(image: Tensor) -> str:
    return f'an image of shape {tuple(image.shape)}, {str(image.dtype).removeprefix("torch.")}'


def _check_channels(segmentor: nn.Module, expected: Expected, image: Tensor) -> None:
    pre, takes = segmentor.data_preprocessor, expected.channels
    given = len(image) if image.dim() == 3 else None
    if given == 1 and expected.mean is not None:
        given = pre.mean.numel()  # the mean makes one channel three
    if given is None or takes not in (None, given):
        raise ValueError(
            f'{_what(image)}: expected ({takes or "C"}, H, W); mmseg takes arrays as (H, W, 3), BGR, uint8, and files '
            "as the loader of the config's pipeline returns them"
        )


def _check_range(expected: Expected, image: Tensor, path: str | None) -> None:
    values = image.float()
    low, high = values.min().item(), values.max().item()
    what = f'{_what(image)}: values from {low:.4g} to {high:.4g}'
    if not math.isfinite(low + high):
        raise ValueError(f'{_what(image)}: has values that are not finite')
    if expected.is_8_bit:
        # A resize may overshoot 255.
        if high > 510 and values.mean() > max(255, expected.mean + 5 * expected.std):
            raise ValueError(f'{what}, expected 0 to 255; {_remedy(path)}')
        if high > max(510, expected.mean + 10 * expected.std):
            _tell(
                path,
                f'values from {low:.4g} to {high:.4g}, but the mean and std of the model '
                f'({expected.mean:.4g} and {expected.std:.4g}) are those of 0 to 255',
            )
        # A small range is an error only in an array; in a file the image may be dark.
        if path is None and 0 < high <= (16 if low < 0 else 1):
            raise ValueError(f'{what}, expected 0 to 255; {_remedy(path)}')
    elif expected.mean > 255:
        if 0 < high < 0.02 * expected.std and path is None:
            raise ValueError(
                f'{what}, expected about {max(0, expected.mean - 2 * expected.std):.4g} to '
                f'{expected.mean + 2 * expected.std:.4g}; {_remedy(path)}'
            )
        if image.dtype == torch.uint8:
            _tell(
                path,
                f'8 bits, but the mean and std of the model ({expected.mean:.4g} and {expected.std:.4g}) are those '
                'of more; check the file, and color_type in the config',
            )
    elif path is None and expected.is_unit and values.mean() > 10:
        raise ValueError(f'{what}, expected about 0 to 1; {_remedy(path)}')


def _remedy(path: str | None) -> str:
    if path is None:
        return 'mmseg_volo.inference.Predictor converts images of 16 bits or of 0 to 1'
    return "set the model's mean and std for these values, or color_type='color' in the loader, which reads 8 bits"


def _tell_of_lost_bits(path: str) -> None:
    if (os.path.dirname(path), 'bits') not in _told and (lost := lost_bits(path)):
        _tell(path, lost, 'bits')


def _tell(path: str | None, problem: str, kind: str = 'range') -> None:
    """Warn once for each folder."""
    key = os.path.dirname(path or ''), kind
    if key not in _told:
        _told.add(key)
        print_log(f'{path or "an array"}: {problem} (said once for this folder)', logger='current', level=30)
