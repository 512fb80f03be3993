"""Checks of images that LoadBands reads, and the statistics of their channels, against loops in float64."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from band_files import scene, write_tiff
from faulty_data import CLASSES, dataset_config, random_label, write
from mmengine.config import Config

from mmseg_volo.datasets.checks import bands as bands_module
from mmseg_volo.datasets.checks.bands import check_bands
from mmseg_volo.datasets.checks.check import check_config, quick_check
from mmseg_volo.datasets.checks.images import check_image
from mmseg_volo.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
PIPELINE = [dict(type='LoadBands'), dict(type='LoadCheckedAnnotations'), dict(type='PackSegInputs')]
SHAPE = 24, 40


@pytest.fixture
def images(tmp_path) -> dict[str, np.ndarray]:
    """Images of four bands with labels in ``tmp_path``, six for training and three for validation."""
    written = {}
    for split, count, first in (('train', 6, 0), ('val', 3, 100)):
        for i in range(count):
            written[f'{split}/{i}'] = scene(first + i, (4, *SHAPE))
            write_tiff(tmp_path / f'images/{split}/{i}.tif', written[f'{split}/{i}'], crs='EPSG:32633')
            write(tmp_path / f'labels/{split}/{i}.png', random_label(first + i))
    return written


def config(
    root: Path, pipeline=PIPELINE, channels: int = 4, mean: list | None = None, std: list | None = None
) -> Config:
    mean, std = mean or [1.0] * channels, std or [1.0] * channels
    loaders = {
        f'{split}_dataloader': dict(dataset=dataset_config(root, split, img_suffix='.tif', pipeline=pipeline))
        for split in ('train', 'val')
    }
    head = dict(type='FCNHead', num_classes=len(CLASSES), in_channels=8, channels=8)
    pre = dict(type='BandsDataPreProcessor', mean=mean, std=std, size=(32, 32))
    backbone = dict(type='VOLO', in_channels=channels)
    return Config(
        dict(
            default_scope='mmseg',
            model=dict(type='EncoderDecoder', backbone=backbone, decode_head=head, data_preprocessor=pre),
            work_dir=str(root / 'work'),
            **loaders,
        )
    )


def by_loops(channels) -> tuple[list[float], list[float]]:
    """Mean and deviation of lists of values, one after the other, in Python's float64."""
    means, deviations = [], []
    for values in channels:
        total = squares = 0.0
        for value in values:
            total += float(value)
        mean = total / len(values)
        for value in values:
            squares += (float(value) - mean) ** 2
        means.append(mean)
        deviations.append((squares / len(values)) ** 0.5)
    return means, deviations


@pytest.mark.parametrize('dtype, low, high', [('uint8', 0, 250), ('uint16', 60000, 5000), ('float32', 300, 0.5)])
@pytest.mark.parametrize('pixels', [2**21, 700])
def test_statistics_equal_those_of_a_loop(dtype, low, high, pixels, tmp_path, monkeypatch):
    """Also of values with a large offset, of nodata values, and over several windows."""
    monkeypatch.setattr(bands_module, '_PIXELS', pixels)
    bands = (low + scene(0, (3, 50, 70), 'float64', high)).astype(dtype)
    bands[:, 3:9] = 0
    bands[1, 20:22] = 0
    path = write_tiff(tmp_path / 'a.tif', bands, nodata=0, tiled=True, blockxsize=16, blockysize=16)
    found = check_bands(str(path), None, 0).statistics
    means, deviations = by_loops([band[band != 0].tolist() for band in bands])
    assert found.count.tolist() == [(band != 0).sum() for band in bands]
    assert found.mean == pytest.approx(means, rel=1e-12) and found.deviation == pytest.approx(deviations, rel=1e-7)


def kinds(reports) -> list[tuple]:
    return [(f.split, f.kind, Path(f.path).name, f.fault) for report in reports for f in report.findings]


def test_statistics_of_all_training_images(images, tmp_path):
    reports = check_config(config(tmp_path), ['train'], workers=1)
    means, deviations = by_loops(
        [np.concatenate([images[f'train/{i}'][c].ravel() for i in range(6)]).tolist() for c in range(4)]
    )
    found = reports[0].statistics
    assert found.mean == pytest.approx(means, rel=1e-12) and reports[0].measured == 6
    assert found.deviation == pytest.approx(deviations, rel=1e-9)
    assert kinds(reports) == [('train', 'mean and deviation', 'train', False)]
    right = config(tmp_path, mean=found.mean.round(1).tolist(), std=found.deviation.round(1).tolist())
    assert kinds(check_config(right, ['train'], workers=1)) == []


def test_channels_that_the_model_does_not_take(images, tmp_path):
    reports = check_config(config(tmp_path, channels=3), workers=1)
    assert {(split, kind) for split, kind, *_ in kinds(reports)} == {('train', 'channels'), ('val', 'channels')}
    texts = ' '.join(str(f) for f in reports[0].findings)
    assert 'images of 4 channels are read, but model.backbone.in_channels is 3; set it to' in texts
    assert 'data_preprocessor has 3 numbers in mean' in texts
    chosen = [dict(type='LoadBands', bands=(3, 2, 1)), *PIPELINE[1:]]
    reports = check_config(config(tmp_path, chosen, 3), ['train'], workers=1)
    assert {kind for _, kind, *_ in kinds(reports)} <= {'mean and deviation'}


def test_files_of_other_kinds(images, tmp_path):
    write_tiff(tmp_path / 'images/train/2.tif', scene(9, (3, *SHAPE)))
    write_tiff(tmp_path / 'images/train/4.tif', scene(9, (4, *SHAPE), 'uint8', 250))
    reports = check_config(config(tmp_path), ['train'], workers=1)
    assert ('train', 'bands of an image', '2.tif', True) in kinds(reports)
    assert ('train', 'values of an image', '4.tif', False) in kinds(reports)
    assert 'it has 3 bands, and 5 other images have 4; choose bands' in ' '.join(map(str, reports[0].findings))
    with pytest.raises(DataError, match='it has 3 bands, and 5 other images have 4'):
        quick_check(config(tmp_path).train_dataloader.dataset)
    chosen = [dict(type='LoadBands', bands=(1, 2, 3)), *PIPELINE[1:]]
    assert not [
        one for one in kinds(check_config(config(tmp_path, chosen, 3), ['train'], workers=1)) if 'bands' in one[1]
    ]


def test_broken_files_and_labels_of_another_size(images, tmp_path):
    path = tmp_path / 'images/train/1.tif'
    path.write_bytes(path.read_bytes()[:3000])
    broken = scene(3, (4, *SHAPE), 'float32')
    broken[2, 3, 4] = np.inf
    write_tiff(tmp_path / 'images/train/2.tif', broken)
    write(tmp_path / 'labels/train/3.png', np.zeros((9, 9), np.uint8))
    with pytest.raises(DataError) as caught:
        quick_check(config(tmp_path).train_dataloader.dataset)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and '1.tif: it cannot be read as a TIFF, or is damaged' in lines[1]
    assert '2.tif: band 3 has values that are not finite' in lines[2] and '9 x 9 pixels, its image' in lines[3]


def test_the_tool_prints_numbers_to_copy(images, tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / 'tools/check_data.py'))['main']
    (tmp_path / 'config.py').write_text(config(tmp_path).pretty_text)
    monkeypatch.setattr(
        'sys.argv', ['check_data.py', str(tmp_path / 'config.py'), '--workers', '1', '--split', 'train']
    )
    assert main() == 0
    printed = capsys.readouterr().out
    assert 'mean and deviation of 4 channels over 6 images (5,760 pixels with data):' in printed
    text = printed[printed.index('data_preprocessor=') :].split('])\n')[0] + '])'
    pre = eval(f'dict({text})')['data_preprocessor']  # as a user would paste it
    assert pre['mean'] == pytest.approx(
        [np.mean([images[f'train/{i}'][c] for i in range(6)]) for c in range(4)], rel=1e-5
    )
    assert (tmp_path / 'work').is_dir() and 'warning: train: mean and deviation (1)' in printed


def test_bands_that_other_loaders_drop_are_told(images, tmp_path):
    data = (tmp_path / 'images/train/0.tif').read_bytes()
    assert check_image(data, 'color', 'cv2').shape == SHAPE
    assert bands_module.dropped_bands(data, 'color').startswith('the file has 4 bands, but the loader gives 3')
    assert not bands_module.dropped_bands(data, 'unchanged')
    plain = [dict(type='LoadCheckedImage'), *PIPELINE[1:]]
    found = kinds(check_config(config(tmp_path, plain, 3), ['train'], workers=1))
    assert ('train', 'bands of an image', '0.tif', False) in found
