"""Whatever stands in a config, the check says so in a ConfigError or passes; it never fails itself."""

import copy
import random
from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg_volo.config_check import check_config, check_model, settle
from mmseg_volo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
ODD = (
    None,
    3,
    -1,
    0.5,
    True,
    'x',
    '',
    [],
    {},
    [None],
    [[]],
    dict(type=None),
    dict(type=3),
    dict(type='X', x=1),
    ('a', 'b'),
)


def keys_of(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [at for name, inner in items for at in keys_of(inner, (*path, name))]


def replace(config: Config, path: tuple, value: object) -> None:
    inner = config
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value


def try_all(count: int | None, seed: int) -> int:
    config = Config.fromfile(CONFIGS / 'volo_d1_ade20k.py')
    config.val_dataloader.dataset.metainfo = dict(classes=['wall', 'sky'], palette=[[0, 0, 0], [1, 1, 1]])
    config.model.decode_head.loss_decode.class_weight = [1.0] * 150
    cases = [(path, value) for path in keys_of(config._cfg_dict.to_dict()) for value in ODD]
    chosen = cases if count is None else random.Random(seed).sample(cases, count)
    for path, value in chosen:
        changed = copy.deepcopy(config)
        replace(changed, path, copy.deepcopy(value))
        for check in (settle, check_config, lambda cfg: check_config(cfg, 'data'), check_model):
            try:
                check(changed)
            except ConfigError as error:
                assert str(error)
            except Exception as error:
                raise AssertionError(f'{".".join(map(str, path))} = {value!r}: {error!r}') from error
    return len(chosen)


def test_some_values():
    try_all(60, seed=0)


@pytest.mark.slow
def test_all_values():
    assert try_all(None, seed=0) > 2000
