"""Images are judged by the channels, the mean and the std of the model."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from small_models import segmentor_config

from mmseg_volo.models import inputs
from mmseg_volo.models.inputs import check_images, expected_by


def model(mean: float | list = 110, std: float | list = 60, channels: int = 3):
    config = segmentor_config()
    config.backbone.in_channels = channels
    values = [[value] * 3 if channels == 3 else [value] for value in (mean, std)]
    config.data_preprocessor.update(mean=values[0], std=values[1], bgr_to_rgb=False)
    return MODELS.build(config).eval()


@pytest.fixture(scope='module')
def models():
    init_default_scope('mmseg')
    return {
        '8 bits': model(),
        'scaled': model(0, 255),
        'centred': model(127.5, 127.5),
        'unit': model(0.45, 0.22),
        'identity': model(0, 1),
        '12 bits': model(900, 600),
        '16 bits': model(25000, 14000),
        'dark 16 bits': model(200, 150),
        'grey 16 bits': model(25000, 14000, 1),
        'bands': model(900, 600, 4),
    }


@pytest.fixture
def told(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(inputs, '_told', set())
    monkeypatch.setattr(inputs, 'print_log', lambda text, **_: lines.append(text))
    return lines


def image(top: float, channels: int = 3, dtype=np.float32) -> torch.Tensor:
    values = np.random.default_rng(0).random((channels, 20, 30)) ** 2
    values[:, 0, 0] = 1
    return torch.from_numpy((values * top).astype(dtype))


def check(segmentor, image: torch.Tensor, path: str | None = 'folder/a.tif') -> None:
    check_images(segmentor, [image], [SegDataSample(metainfo=dict(img_path=path))])


FITTING = [
    ('8 bits', 255, np.uint8), ('8 bits', 255, np.float32), ('8 bits', 3, np.uint8), ('scaled', 255, np.float32),
    ('centred', 255, np.float32), ('unit', 1, np.float32), ('identity', 255, np.uint8), ('identity', 60000, np.float32),
    ('12 bits', 4095, np.uint16), ('12 bits', 4095, np.float32), ('16 bits', 65535, np.uint16),
    ('16 bits', 0, np.uint16), ('dark 16 bits', 1500, np.uint16),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'top', 'dtype'), FITTING)
def test_images_that_fit_mean_and_std_pass_in_silence(name, top, dtype, models, told):
    for path in ('folder/a.tif', '', None):
        if path is not None or dtype != np.uint8:
            check(models[name], image(top, dtype=dtype), path)
    assert not told


@pytest.mark.parametrize(
    ('name', 'top', 'message'),
    [
        ('8 bits', 65535, 'values from .* to 6.554e.04, expected 0 to 255; set the model.s mean and std'),
        ('8 bits', 4095, 'values from .* to 4095, expected 0 to 255'),
        ('scaled', 65535, 'expected 0 to 255'),
        ('16 bits', float('nan'), 'has values that are not finite'),
        ('unit', float('inf'), 'has values that are not finite'),
    ],
)
def test_files_of_another_range_are_refused(name, top, message, models):
    with pytest.raises(ValueError, match=message):
        check(models[name], image(top))


@pytest.mark.parametrize(
    ('name', 'top', 'message'),
    [
        ('8 bits', 1, 'expected 0 to 255; mmseg_volo.inference.Predictor converts'),
        ('16 bits', 1, 'expected about 0 to 5.3e.04'),
        ('16 bits', 255, 'expected about 0 to 5.3e.04'),
        ('unit', 255, 'expected about 0 to 1'),
    ],
)
def test_arrays_of_another_range_are_refused(name, top, message, models):
    check(models['identity'], image(top), None)
    with pytest.raises(ValueError, match=message):
        check(models[name], image(top), None)


def test_numbers_of_channels(models):
    check(models['bands'], image(4000, 4))
    check(models['grey 16 bits'], image(60000, 1))
    check(models['8 bits'], image(255, 1))  # the mean makes three of it
    for name, channels in (('bands', 3), ('bands', 6), ('grey 16 bits', 3), ('8 bits', 4), ('identity', 2)):
        takes = expected_by(models[name]).channels
        with pytest.raises(ValueError, match=rf'shape \({channels}, 20, 30\).*: expected \({takes}, H, W\)'):
            check(models[name], image(100, channels))


def test_what_may_be_wrong_is_told_once_for_each_folder(models, told):
    check(models['8 bits'], image(1023))
    check(models['8 bits'], image(1100))
    assert (
        len(told) == 1 and told[0].startswith('folder/a.tif: values from') and '(110 and 60) are those of 0' in told[0]
    )
    for path in ('one/a.png', 'one/b.png', 'two/a.png'):
        check(models['16 bits'], image(255, dtype=np.uint8), path)
    assert len(told) == 3 and 'one/a.png: 8 bits, but the mean and std of the model (2.5e+04 and 1.4e+04)' in told[1]


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_12_bits_in_a_file_of_16_bits_are_told(suffix, models, told, tmp_path):
    pixels = np.random.default_rng(0).integers(5, 4096, (40, 50, 3)).astype(np.uint16)
    path, full, dark = (str(tmp_path / f'{name}.{suffix}') for name in ('a', 'full', 'dark'))
    for name, values in ((path, pixels), (full, pixels * 16), (dark, (pixels >> 8).astype(np.uint8))):
        cv2.imwrite(name, values)
    load = lambda name: torch.from_numpy(cv2.imread(name)).permute(2, 0, 1)  # noqa: E731
    for step in (models['8 bits'].test_step, models['8 bits'].val_step):
        for name in (full, dark):
            step(dict(inputs=[load(name)], data_samples=[SegDataSample(metainfo=dict(img_path=name))]))
    assert not told
    models['8 bits'].val_step(dict(inputs=[load(path)], data_samples=[SegDataSample(metainfo=dict(img_path=path))]))
    assert len(told) == 1 and told[0].startswith(f'{path}: the file has 16 bits and values from 5 to 409')
    assert 'which leaves 0 to 15 of 255. If these are values of 12 bits, multiply them by 16, or' in told[0]
