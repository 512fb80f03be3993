"""Tests of results on a device, which ``tools/benchmark.py suite`` runs too, and whose docstrings its report shows.

Everything is compared with something else: float64, timm's VOLO, mmseg's heads, losses and segmentor. They run on a GPU
if there is one; on a CPU tensors are smaller, and what needs CUDA is skipped.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from mmengine.device import get_device


@pytest.fixture(scope='session')
def device(request) -> str:
    return request.config.getoption('device', None) or get_device()


@pytest.fixture(scope='session')
def cuda(device) -> bool:
    return torch.device(device).type == 'cuda'


@pytest.fixture
def needs_cuda(cuda) -> None:
    if not cuda:
        pytest.skip('needs a GPU')


@pytest.fixture
def say(record_property) -> Callable[[str], None]:
    """Say what was found, for the report of the suite."""
    return partial(record_property, 'found')


@pytest.fixture(autouse=True)
def _full_float32(cuda) -> Iterator[None]:
    """Switch TF32 off, whose errors are larger than those that are looked for; free memory afterwards."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value
    if cuda:
        torch.cuda.empty_cache()
