"""No false alarms: all configs here and all of mmseg's model zoo pass, except those that mmseg itself cannot train."""

from pathlib import Path

import mmseg
import pytest
from mmengine.config import Config

from mmseg_volo.config_check import check_config, check_model
from mmseg_volo.errors import ConfigError

OURS = sorted(p for p in (Path(__file__).resolve().parents[2] / 'configs').rglob('*.py') if '_base_' not in p.parts)
ZOO = Path(mmseg.__file__).parent / '.mim/configs'
LEAVES = sorted(path for path in ZOO.rglob('*.py') if '_base_' not in path.parts)
NO_SIZE = 'neither of size and size_divisor set'  # stack_batch raises AssertionError
WRONG = {
    'bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024.py': NO_SIZE,  # it writes models = dict(...)
    'upernet_r18_4xb4-160k_ade20k-512x512.py': NO_SIZE,
    'upernet_r18_4xb4-80k_ade20k-512x512.py': NO_SIZE,
    'upernet_r18_4xb4-20k_voc12aug-512x512.py': NO_SIZE,
    'upernet_r18_4xb4-40k_voc12aug-512x512.py': NO_SIZE,
    'san-vit-b16_voc12aug-640x640.py': '20, but',  # it trains on labels of 21 classes
    'san-vit-l14_voc12aug-640x640.py': '20, but',
}


def check(path: Path) -> None:
    config = Config.fromfile(path, import_custom_modules=False)
    check_config(config, 'test')
    check_model(config)
    if path.name in WRONG:
        with pytest.raises(ConfigError, match=WRONG[path.name]):
            check_config(config, 'train')
    else:
        check_config(config)
        check_config(config, 'train')


@pytest.mark.parametrize('path', [*OURS, *LEAVES[::100]], ids=lambda path: path.stem)
def test_config(path):
    check(path)


@pytest.mark.slow
def test_the_whole_zoo():
    assert not LEAVES or len(LEAVES) > 600
    for path in LEAVES:
        check(path)
