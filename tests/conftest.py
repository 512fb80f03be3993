"""What all tests share: seeds, the default scope, the real images where they are at hand."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope, init_default_scope

import mmseg_volo  # noqa: F401  (registers what the configs name)

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 'test_tools', 'test_resume', 'test_export', 'test_entries', 'test_volo', 'test_segmentors', 'test_record_hook'


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-xdist starts its processes: each of them gets one core."""
    if config.getoption('numprocesses', None):
        os.environ.setdefault('OMP_NUM_THREADS', '1')
        os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that at the end no process is left alone with one of them."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if DefaultScope.get_current_instance() is None:
        init_default_scope('mmseg')


@pytest.fixture(scope='session')
def camvid() -> Path:
    """CamVid-11 in the layout of ``tools/prepare_data.py``; it may not be copied, so it is not in the repository."""
    for place in (os.environ.get('CAMVID_ROOT'), ROOT / 'data/camvid', ROOT.parent / 'shared/data/camvid'):
        if place and (Path(place) / 'labels/val').is_dir():
            return Path(place)
    pytest.skip('needs CamVid-11 in data/camvid or CAMVID_ROOT: real images that the project may not ship')


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')
    return 'cuda'
