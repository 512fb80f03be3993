"""Images under 32 pixels a side are predicted as if mmseg's data preprocessor had padded them to 32."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from small_models import SLIDE, batch, build, picture, segmentor_config, views

from mmseg_volo import StreamingTTAModel
from mmseg_volo.inference import Predictor

WHOLE = dict(mode='whole')
SIZES = [(20, 304), (14, 160), (9, 7), (1, 1), (64, 3)]


def upwards(side: int) -> int:
    return max(-(-side // 16) * 16, 32)


def padded_by_mmseg(model, height: int, width: int):
    """Let mmseg's data preprocessor pad to this size; mmseg then crops the logits."""
    model.data_preprocessor.test_cfg = dict(size=(upwards(height), upwards(width)))
    return model


@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_predictions_equal_those_of_an_image_padded_by_hand(size, test_cfg):
    init_default_scope('mmseg')
    ours = build(test_cfg={**test_cfg, 'return_logits': True})
    stock = padded_by_mmseg(build(type='EncoderDecoder', test_cfg=test_cfg), *size)
    image = picture(64, 304)[:, : size[0], : size[1]]
    for flip in (None, 'horizontal', 'vertical'):
        with torch.no_grad():
            expected, found = (one.test_step(batch(image, flip=flip))[0] for one in (stock, ours))
        torch.testing.assert_close(found.seg_logits.data, expected.seg_logits.data, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.pred_sem_seg.data, expected.pred_sem_seg.data) and found.seg_logits.shape == size
    if size[1] % 16 == 0:  # without any padding in the config
        ours.data_preprocessor.test_cfg = None
        again = ours.test_step(batch(image))[0].seg_logits.data
        with torch.no_grad():
            torch.testing.assert_close(again, stock.test_step(batch(image))[0].seg_logits.data, rtol=1e-4, atol=1e-4)


def test_small_views_of_an_image():
    init_default_scope('mmseg')
    ours = build(test_cfg={**WHOLE, 'return_logits': True})
    image = picture(40, 48)
    small = torch.from_numpy(cv2.resize(image.permute(1, 2, 0).numpy(), (24, 20))).permute(2, 0, 1)
    both = [batch(image), batch(small, ori_shape=(40, 48), flip='horizontal')]
    merged = StreamingTTAModel(module=ours, sigmoid_twice=False).eval().test_step(views(*both))[0].seg_logits.data
    single = []
    for height, width, data in ((40, 48, batch(image)), (20, 24, batch(small, ori_shape=(40, 48), flip='horizontal'))):
        stock = padded_by_mmseg(build(type='EncoderDecoder', test_cfg=WHOLE), height, width)
        stock.data_preprocessor.test_cfg = dict(size=(upwards(height) if height < 32 else 48, upwards(width)))
        with torch.no_grad():
            single.append(stock.test_step(data)[0].seg_logits.data.softmax(0))
    torch.testing.assert_close(merged, sum(single) / 2, rtol=1e-4, atol=1e-4)


def test_other_segmentors_and_backbones_take_small_images(tmp_path):
    init_default_scope('mmseg')
    stock = build(type='EncoderDecoder')  # the backbone pads
    assert stock.test_step(batch(picture(5, 200)))[0].pred_sem_seg.data.shape == (1, 5, 200)
    assert stock.backbone(torch.zeros(1, 3, 5, 200))[0].shape[2:] == (1, 25)


def test_a_strip_is_predicted(tmp_path):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(200, 100), keep_ratio=True),
        dict(type='PackSegInputs'),
    ]
    names = [f'class {i}' for i in range(7)]
    data = dict(
        type='BaseSegDataset', pipeline=pipeline, metainfo=dict(classes=names, palette=[[i] * 3 for i in range(7)])
    )
    config = Config(
        dict(
            model=segmentor_config(), test_dataloader=dict(dataset=data), test_pipeline=pipeline, default_scope='mmseg'
        )
    )
    cv2.imwrite(str(tmp_path / 'strip.png'), np.full((20, 3000, 3), 90, np.uint8))
    torch.save(build().state_dict(), tmp_path / 'x.pth')
    assert Predictor(config, str(tmp_path / 'x.pth'), 'cpu')(tmp_path / 'strip.png').shape == (20, 3000)
