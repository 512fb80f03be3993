"""mmseg's other heads on VOLO, as configs/README.md writes them, against mmseg's own segmentor."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from small_models import batch, picture

from mmseg_volo.config_check import check_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
ROWS = re.findall(r'^\| ([\w+ ]+) \| `(dict\(_delete_.*)` \|$', (CONFIGS / 'README.md').read_text(), re.MULTILINE)


def config_of(folder: Path, head: str) -> Config:
    path = folder / 'head.py'
    path.write_text(f"""
_base_ = '{CONFIGS}/volo_d1_camvid.py'
arch = dict(depths=(1, 1, 1, 1), dims=(192, 384, 384, 384), heads=(6, 12, 12, 12), mlp_ratios=1, stem_width=8)
model = dict(
    data_preprocessor=dict(size=(64, 96)),
    backbone=dict(arch=dict(_delete_=True, **arch), img_size=(64, 96), drop_path_rate=0.0, init_cfg=None),
    decode_head={head},
    auxiliary_head=None,
    test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(32, 48)),
)
""")
    return Config.fromfile(path)


def test_all_rows_are_found():
    assert [name for name, _ in ROWS] == ['SegFormer', 'Semantic FPN', 'Segmenter', 'DeepLabV3+', 'PSPNet']


@pytest.mark.parametrize(('name', 'head'), ROWS, ids=[name for name, _ in ROWS])
def test_losses_and_predictions_are_those_of_mmseg(tmp_path, name, head):
    config = config_of(tmp_path, head)
    init_default_scope('mmseg')
    config.train_dataloader.dataset.pipeline[3].crop_size = (64, 96)
    check_config(config, 'train')
    models = []
    for kind in ('StreamingEncoderDecoder', 'EncoderDecoder'):
        torch.manual_seed(0)
        models.append(revert_sync_batchnorm(MODELS.build(dict(config.model, type=kind))))
    ours, theirs = models
    theirs.load_state_dict(ours.state_dict())
    data = batch(picture(64, 96), picture(64, 96, seed=1))
    for sample in data['data_samples']:
        sample.gt_sem_seg = PixelData(data=torch.randint(11, (1, 64, 96)))
    losses = []
    for model in models:
        torch.manual_seed(1)  # for dropout
        found = model.train()(**model.data_preprocessor(data, True), mode='loss')
        found['decode.loss_ce'].backward()
        losses.append(float(found['decode.loss_ce'].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    grads = [torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]) for model in models]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        one, other = (model.eval().test_step(batch(picture(64, 112)))[0].pred_sem_seg.data for model in models)
    assert (one == other).float().mean() > 0.999
