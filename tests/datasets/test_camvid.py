"""CamVid as mmseg reads it, and the model on its images."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import DATASETS
from torch import nn

from mmseg_volo import VOLO
from mmseg_volo.checkpoints.pretrained import CLASSIFIER
from mmseg_volo.datasets.camvid import CamVidDataset

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


def test_each_class_has_a_colour():
    meta = CamVidDataset.METAINFO
    assert len(meta['classes']) == len(meta['palette']) == len({tuple(c) for c in meta['palette']}) == 11


@pytest.mark.parametrize(('split', 'count'), [('train', 367), ('val', 101)])
def test_camvid_pairs_images_with_labels(camvid, split, count):
    prefix = dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}')
    dataset = DATASETS.build(dict(type='CamVidDataset', data_root=str(camvid), data_prefix=prefix))
    assert len(dataset) == count
    for index in range(0, count, 20):
        info = dataset.get_data_info(index)
        image, label = cv2.imread(info['img_path']), cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED)
        assert image.shape == (360, 480, 3) and label.shape == (360, 480)
        assert set(np.unique(label)) <= {*range(11), 255}


def test_camvid_config_makes_batches(camvid):
    config = Config.fromfile(CONFIGS / 'volo_d1_camvid.py')
    # Validation resizes the image to multiples of 16 and scores at the size of the ground truth.
    for loader, image, label in (
        (config.train_dataloader, config.crop_size, config.crop_size),
        (config.val_dataloader, (368, 480), (360, 480)),
    ):
        item = DATASETS.build(dict(loader.dataset, data_root=str(camvid)))[0]
        assert tuple(item['inputs'].shape) == (3, *image) and item['inputs'].dtype == torch.uint8
        assert tuple(item['data_samples'].gt_sem_seg.data.shape) == (1, *label)


def test_a_real_image_gives_the_features_of_timm(camvid):
    """360 is not a multiple of 16, so timm gets a padded image and a pos_embed of the padded grid."""
    theirs = timm.create_model('volo_d1_224', pretrained=False).eval()
    ours = VOLO('d1', out_norm=False).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith((*CLASSIFIER, 'norm.'))})
    grid = F.interpolate(theirs.pos_embed.permute(0, 3, 1, 2), (23, 30), mode='bicubic', align_corners=False)
    theirs.pos_embed = nn.Parameter(grid.permute(0, 2, 3, 1))
    image = cv2.imread(str(sorted((camvid / 'images/val').iterdir())[0]))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 58 - 2
    with torch.no_grad():
        expected = theirs.forward_intermediates(F.pad(x, (0, 0, 0, 8)), intermediates_only=True)
        for i, (a, b) in enumerate(zip(ours(x), expected, strict=True)):
            assert a.shape[2:] == ((23, 30) if i else (45, 60))
            b = b[:, :, : a.shape[2]]
            assert (a - b).norm() / b.norm() < 1e-4
