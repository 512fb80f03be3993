"""Overrides that would change nothing are refused with keys that do take effect."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg_volo.errors import ConfigError
from mmseg_volo.utils.config import READ_KEYS, load_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


@pytest.mark.parametrize(
    ('option', 'value', 'keys'),
    [
        ('train_pipeline.3.crop_size', (32, 32), ['train_dataloader.dataset.pipeline.3.crop_size']),
        ('crop_size', (32, 32), ['model.data_preprocessor.size', 'train_dataloader.dataset.pipeline.3.crop_size']),
        ('max_iters', 10, ['train_cfg.max_iters']),
        ('data_root', 'x/', ['train_dataloader.dataset.data_root', 'val_dataloader.dataset.data_root']),
        ('dataset_type', 'ADE20KDataset', ['train_dataloader.dataset.type']),
        ('warmup_iters', 3, ['param_scheduler.0.end', 'param_scheduler.1.begin']),
        ('norm_cfg.type', 'BN', ['model.backbone.norm_cfg.type']),
        ('vis_backends.0.type', 'TensorboardVisBackend', ['visualizer.vis_backends.0.type']),
    ],
)
def test_variables_of_the_file(option, value, keys):
    path = str(CONFIGS / 'volo_d1_camvid.py')
    plain = Config.fromfile(path)
    changed = Config.fromfile(path)
    changed.merge_from_dict({option: value})
    assert all(plain.get(key) == changed.get(key) for key in READ_KEYS)  # mmengine: nothing that is read has changed
    with pytest.raises(
        ConfigError, match=f'--cfg-options {option}: .* is a variable of the config file only; set '
    ) as e:
        load_config(path, {option: value})
    assert all(key in str(e.value) for key in keys), e.value
    taken = load_config(path, {keys[0]: value})
    assert any(taken.get(key) != plain.get(key) for key in READ_KEYS)


def test_a_config_that_was_dumped(tmp_path):
    """There a variable is only a copy, so no code uses it."""
    path = tmp_path / 'dumped.py'
    Config.fromfile(CONFIGS / 'volo_d1_camvid.py').dump(path)
    with pytest.raises(ConfigError, match=r'crop_size: .*data_preprocessor'):
        load_config(str(path), dict(crop_size=(32, 32)))


def test_several_options_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(str(CONFIGS / 'volo_d1_camvid.py'), dict(max_iters=3, crop_size=(3, 3)))
    assert len(str(error.value).splitlines()) == 2


def test_options_that_are_used_or_may_be(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr('mmseg_volo.utils.config.print_log', lambda message, **_: lines.append(message))
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {str(CONFIGS / "volo_d1_camvid.py")!r}\nmine = dict(rate=0.7)  # mine, for a hook\n')
    options = {
        'train_cfg.max_iters': 3,
        'watch_patience': 9,
        'tta_pipeline.1.transforms.0.0.keep_ratio': False,
        'experiment_name': 'x',
        'model_wrapper_cfg.type': 'X',
    }
    assert load_config(str(path), options).train_cfg.max_iters == 3 and not lines
    assert load_config(str(path), {'mine.rate': 1.5, 'other': 3}).mine.rate == 1.5
    assert len(lines) == 2 and 'nothing in mmengine, mmseg or this package reads other' in lines[1]


def test_files_and_options_that_cannot_be_read(tmp_path):
    path = tmp_path / 'wrong.py'
    for text in (
        'model = dict(',
        'model = dict(a=b)',
        'raise ValueError',
        'exit()',
        "a = {}['x']",
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r'wrong\.py: cannot be read \(\w+: ') as error:
            load_config(str(path))
        assert '\n' not in str(error.value)
    path.write_text("_base_ = './missing.py'")
    with pytest.raises(FileNotFoundError, match=r'missing\.py'):
        load_config(str(path))
    for option in (
        'train_dataloader.dataset.pipeline.99.type',
        'train_cfg.max_iters.x',
        'train_dataloader.dataset.pipeline.x',
    ):
        with pytest.raises(ConfigError, match='--cfg-options do not fit'):
            load_config(str(CONFIGS / 'volo_d1_camvid.py'), {option: 1})
