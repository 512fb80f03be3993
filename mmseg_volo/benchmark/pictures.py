"""Pictures, drawn or of noise, and what mmseg's test pipelines make of them."""

import cv2
import numpy as np
import torch
from mmcv.transforms import RandomFlip, Resize, TestTimeAug
from mmengine.dataset import pseudo_collate
from mmseg.datasets.transforms import LoadImageFromNDArray, PackSegInputs
from torch import Tensor

from ..datasets.street_drawing import draw_scene
from .cases import MIN_SIDE, BatchCase

SCALES = 0.75, 1.0, 1.25, 1.5, 1.75  # of the ten views, each with its mirror image: as configs/_base_ has them
_DRAWN = 1024, 2048  # larger pictures are enlarged ones


def draw(size: tuple[int, int]) -> np.ndarray:
    """A street scene (H, W, 3), uint8, always the same."""
    scale = min(1, *(limit / length for limit, length in zip(_DRAWN, size, strict=True)))
    drawn = draw_scene(0, tuple(max(round(length * scale), MIN_SIDE) for length in size))[0]
    return cv2.resize(drawn, size[::-1]) if drawn.shape[:2] != tuple(size) else drawn


def prepare(picture: np.ndarray, views: int) -> dict:
    """What mmseg's test pipeline gives for a picture, or with ten views its ``TestTimeAug``."""
    steps = [
        [dict(type=Resize, scale_factor=scale, keep_ratio=True) for scale in SCALES],
        [dict(type=RandomFlip, prob=p, direction='horizontal') for p in (0.0, 1.0)],
        [dict(type=PackSegInputs)],
    ]
    pack = PackSegInputs() if views == 1 else TestTimeAug(steps)
    return pseudo_collate([pack(LoadImageFromNDArray()(dict(img=picture)))])


def view_pixels(size: tuple[int, int], views: int) -> int:
    """Pixels in all views of a picture."""
    if views == 1:
        return size[0] * size[1]
    return sum(2 * int(size[0] * scale + 0.5) * int(size[1] * scale + 0.5) for scale in SCALES)


def noise(case: BatchCase) -> Tensor:
    """Prepared pictures (B, 3, H, W) of noise on the case's device, always the same."""
    return torch.randn(case.batch, 3, *case.size, generator=torch.Generator().manual_seed(0)).to(case.device)
