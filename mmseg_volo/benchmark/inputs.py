"""Input images: drawn from random numbers, and prepared as mmseg's test pipelines prepare them.

The images are smooth random colours with curved edges between regions. They are fair: what both sides compute does not
depend on the values of the pixels, so times and memory are those of photographs of the same size. Values matter where
classes are compared, and there regions, edges and gradients give a random network many classes with borders between
them.
"""

import cv2
import numpy as np
import torch
from mmcv.transforms import RandomFlip, Resize, TestTimeAug
from mmengine.dataset import pseudo_collate
from mmengine.structures import PixelData
from mmseg.datasets.transforms import LoadImageFromNDArray, PackSegInputs
from mmseg.structures import SegDataSample
from torch import Tensor

SCALES = 0.75, 1.0, 1.25, 1.5, 1.75  # of the ten views, each with its mirror image: as configs/_base_ has them
VIEWS = 2 * len(SCALES)
IGNORE = 255  # in labels


def draw(size: tuple[int, int], seed: int = 0, classes: int = 19) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3), BGR, uint8, and its labels (H, W), uint8; the same for the same arguments.

    A smooth random field is cut into bands, which are the classes. Each has a colour, below a random gradient. A strip
    at the top is ignored. All arrays are of bytes, so that drawing takes little memory.
    """
    generator = np.random.default_rng(seed)
    width, height = size[::-1]
    field = cv2.resize(generator.integers(0, 256, (6, 8), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    bands = (np.arange(256) * classes // 256).astype(np.uint8)
    label = cv2.LUT(field, bands)
    colours = generator.integers(0, 256, (classes, 3), np.uint8)
    gradient = cv2.resize(generator.integers(0, 256, (3, 4, 3), np.uint8), (width, height))
    image = cv2.addWeighted(colours[label], 0.5, gradient, 0.5, 0)
    label[: max(height // 16, 1)] = IGNORE
    return image, label


def prepare(image: np.ndarray, views: int) -> dict:
    """What mmseg's test pipeline makes of an image, or for ten views its ``TestTimeAug``."""
    steps = [
        [dict(type=Resize, scale_factor=scale, keep_ratio=True) for scale in SCALES],
        [dict(type=RandomFlip, prob=p, direction='horizontal') for p in (0.0, 1.0)],
        [dict(type=PackSegInputs)],
    ]
    pack = PackSegInputs() if views == 1 else TestTimeAug(steps)
    return pseudo_collate([pack(LoadImageFromNDArray()(dict(img=image)))])


def view_pixels(size: tuple[int, int], views: int) -> int:
    """Pixels in all views of an image."""
    if views == 1:
        return size[0] * size[1]
    return sum(2 * int(size[0] * scale + 0.5) * int(size[1] * scale + 0.5) for scale in SCALES)


def training_batch(batch: int, size: tuple[int, int], classes: int = 19) -> dict:
    """Drawn images and labels as a data loader gives them to ``data_preprocessor``."""
    drawn = [draw(size, seed, classes) for seed in range(batch)]
    labels = [PixelData(data=torch.from_numpy(label)[None].long()) for _, label in drawn]
    return dict(
        inputs=[torch.from_numpy(image).permute(2, 0, 1) for image, _ in drawn],
        data_samples=[SegDataSample(gt_sem_seg=label) for label in labels],
    )


def noise(batch: int, size: tuple[int, int], device: str) -> Tensor:
    """Prepared images (B, 3, H, W) of noise on the device, always the same."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
