"""Configs that are written for a data set: they fit it, the checks of the package accept them, and a model trains."""

import runpy
import sys

import numpy as np
import pytest
from commands import ROOT, miou, tool
from drawn_polygons import CLASSES as POLYGON_CLASSES
from drawn_polygons import write_labelme
from faulty_data import CLASSES, random_image, random_label, write, write_data
from mmengine.config import Config

from mmseg_volo.cli import run_tool
from mmseg_volo.config_check import check_config
from mmseg_volo.datasets.checks.check import check_config as check_files
from mmseg_volo.datasets.new_config import write_config
from mmseg_volo.errors import ConfigError, DataError

PALETTE = [(0, 0, 0), (1, 2, 3), (4, 5, 6), (7, 8, 9)]


def written(path, root, memory: float = 0, classes=CLASSES, palette=PALETTE) -> Config:
    write_config(path, root, classes, palette, ROOT / 'configs', memory)
    lines = path.read_text().replace(str(root), 'data').replace(str(path), 'new.py').splitlines()
    assert max(map(len, lines)) <= 120
    return Config.fromfile(path)


def sized(root, width: int, height: int, suffix: str = '.png'):
    for split in ('train', 'val'):
        write(root / f'images/{split}/0{suffix}', np.zeros((height, width, 3), np.uint8))
        write(root / f'labels/{split}/0.png', np.zeros((height, width), np.uint8))
    return root


@pytest.mark.parametrize('memory', [0, 24])
def test_the_config_passes_all_checks(tmp_path, memory):
    config = written(tmp_path / 'new.py', write_data(tmp_path / 'data'), memory)
    check_config(config, 'train')
    for report in check_files(config, workers=1):
        assert not report.findings and report.classes == CLASSES and report.labels
    assert config.train_dataloader.dataset.metainfo.palette == PALETTE


@pytest.mark.parametrize(
    'width, height, memory, size, crop, batch, mode',
    [
        (1280, 960, 80, (1280, 960), (512, 512), 16, 'slide'),
        (1280, 960, 12, (1280, 960), (512, 512), 8, 'slide'),
        (1280, 960, 6, (1280, 960), (512, 512), 2, 'slide'),
        (4096, 1024, 24, (2048, 512), (512, 512), 16, 'slide'),
        (500, 375, 8, (500, 375), (384, 512), 4, 'whole'),
        (20, 20, 8, (32, 32), (32, 32), 16, 'whole'),
        (480, 360, 0, (320, 240), (176, 240), 4, 'whole'),
        (960, 1280, 0, (240, 320), (240, 176), 4, 'whole'),
    ],
)
def test_sizes_fit_the_images_and_the_gpu(tmp_path, width, height, memory, size, crop, batch, mode):
    config = written(tmp_path / 'new.py', sized(tmp_path / 'data', width, height), memory)
    loader = config.train_dataloader
    steps = {step.type: step for step in loader.dataset.pipeline}
    assert (steps['RandomResize'].scale, steps['RandomCrop'].crop_size) == (size, crop)
    assert config.model.data_preprocessor.size == config.model.backbone.img_size == crop
    assert (loader.batch_size, config.model.test_cfg.mode) == (batch, mode)
    assert config.val_dataloader.dataset.pipeline[1].scale == size


def test_images_of_several_formats_and_a_test_split(tmp_path):
    root = write_data(tmp_path / 'data')
    for split in ('train', 'val'):
        write(root / f'images/{split}/x.jpg', random_image(50 + len(split)))
        write(root / f'labels/{split}/x.png', random_label(50))
    write(root / 'images/test/y.jpg', random_image(70))
    write(root / 'labels/test/y.png', random_label(70))
    config = written(tmp_path / 'new.py', root)
    check_config(config, 'train')
    reports = {report.split: report for report in check_files(config, workers=1)}
    assert {split: report.labels for split, report in reports.items()} == {'train': 7, 'val': 4, 'test': 1}
    assert not any(report.findings for report in reports.values())


def test_many_classes_and_quotes(tmp_path):
    names = ['farmer\'s "field"', *(f'a class with a long name {index}' for index in range(199))]
    root = sized(tmp_path / 'data', 64, 64)
    config = written(tmp_path / 'new.py', root, classes=names, palette=[(index, 0, 0) for index in range(200)])
    assert config.train_dataloader.dataset.metainfo.classes == tuple(names)
    assert config.model.decode_head.num_classes == 200


def test_what_is_missing_or_in_the_way_is_named(tmp_path):
    root = sized(tmp_path / 'data', 64, 64)
    (tmp_path / 'there.py').write_text('mine')
    with pytest.raises(ConfigError, match=r'there.py exists; nothing was changed'):
        written(tmp_path / 'there.py', root)
    assert (tmp_path / 'there.py').read_text() == 'mine'
    with pytest.raises(ConfigError, match='letters, digits and _'):
        written(tmp_path / 'a.b.py', root)
    (root / 'images/train/0.png').write_bytes(b'no image')
    with pytest.raises(DataError, match=r'images/train/0.png: the image cannot be read'):
        written(tmp_path / 'new.py', root)
    (root / 'images/val/0.png').unlink()
    with pytest.raises(DataError, match=r'images/val: no image; expected'):
        written(tmp_path / 'new.py', root)
    assert not (tmp_path / 'new.py').exists()


def prepare(monkeypatch, *arguments) -> str | int:
    """Run tools/prepare_data.py in this process; its status, 0 or the error that it ends with."""
    module = runpy.run_path(str(ROOT / 'tools/prepare_data.py'))
    monkeypatch.setattr(sys, 'argv', ['prepare_data.py', *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_tool(module['main'])
    return caught.value.code


def test_from_a_folder_to_a_config_in_one_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip('pycocotools', reason='needs pycocotools: pip install -e ".[import]"')
    src, dst, config = write_labelme(tmp_path / 'src'), tmp_path / 'fields', tmp_path / 'fields.py'
    arguments = ['import', src, dst, '--classes', *POLYGON_CLASSES, '--config', config, '--workers', 1]
    assert prepare(monkeypatch, *arguments, '--gpu-memory', 0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        f'config: {config}; next:',
        f'  python tools/check_data.py {config}',
        f'  python tools/train.py {config} --amp',
        f'  python tools/test.py {config} work_dirs/fields/iter_2950.pth',
    ]
    read = Config.fromfile(config)
    check_config(read)
    assert not any(report.findings for report in check_files(read, workers=1))
    assert f'error: {config} exists; nothing was changed' in prepare(monkeypatch, *arguments)
    assert prepare(monkeypatch, 'config', dst, '--classes', 'a', 'b', '--config', tmp_path / 'other.py') == 0
    assert f'  python tools/check_data.py {tmp_path}/other.py' in capsys.readouterr().out
    for wrong in (['--val', '1.5'], ['--format', 'xml'], ['--gpu-memory', '-1']):
        assert prepare(monkeypatch, 'import', src, tmp_path / 'no', *wrong) == 2


@pytest.mark.slow
def test_a_model_trains_with_the_config(tmp_path):
    root = write_data(tmp_path / 'data')
    for split in ('train', 'val'):
        write(root / f'images/{split}/x.jpg', random_image(50 + len(split)))
        write(root / f'labels/{split}/x.png', random_label(50))
    config = tmp_path / 'new.py'
    arguments = ['config', root, '--classes', *CLASSES, '--config', config, '--gpu-memory', 0]
    assert f'python tools/train.py {config} --amp' in tool('prepare_data.py', *arguments)
    assert '0 faults, 0 warnings' in tool('check_data.py', config)
    limits = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2']
    tool('train.py', config, '--amp', '--work-dir', tmp_path / 'run', '--cfg-options', *limits)
    output = tool('test.py', config, tmp_path / 'run/iter_2.pth', '--work-dir', tmp_path / 'run', '--aug-test')
    assert float(miou(output)) >= 0
