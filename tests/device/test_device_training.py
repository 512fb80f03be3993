"""Training and export on a device, with a small VOLO on drawn images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from device_errors import relative_error
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS
from small_camvid import small_config
from torch import nn

from mmseg_volo.benchmark.inputs import training_batch
from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.engine.sharding import VOLOFullyShardedDataParallel
from mmseg_volo.export.formats import trace
from mmseg_volo.export.network import ExportNetwork, exportable

pytestmark = pytest.mark.slow  # on a CPU


@pytest.fixture
def runs_here(device) -> None:
    if torch.device(get_device()).type != torch.device(device).type:
        pytest.skip(f'runs of mmengine take {get_device()}')


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_low_precision(runs_here, cuda, tmp_path, precision, say):
    """training: bfloat16, or float16 with a loss scaler"""
    wrapper = dict(optim_wrapper__type='BFloat16OptimWrapper')
    if precision == 'fp16':
        if not cuda:
            pytest.skip('needs a GPU')
        wrapper = dict(optim_wrapper__type='AmpOptimWrapper', optim_wrapper__loss_scale='dynamic')
    runner = build_runner(small_config(tmp_path, large=cuda, **wrapper))
    before = {key: value.detach().clone() for key, value in runner.model.named_parameters()}
    runner.train()
    loss = runner.message_hub.get_scalar('train/loss').current()
    moved = sum(not torch.equal(before[key], value) for key, value in runner.model.named_parameters())
    say(f'{precision}: loss {loss:.3f}, {moved} of {len(before)} parameters moved')
    assert np.isfinite(loss) and moved > 0.9 * len(before)
    assert all(value.isfinite().all() for value in runner.model.parameters())


def test_resumed(runs_here, cuda, tmp_path, say):
    """training: a resumed run against one that was not interrupted"""
    states, whole = {}, dict(train_cfg__max_iters=8)
    for run, steps in {'whole': [whole], 'again': [whole], 'cut': [{}, dict(whole, resume=True)]}.items():
        for options in steps:
            build_runner(small_config(tmp_path, run, cuda, **options)).train()
        state = load_from_local(str(tmp_path / run / 'iter_8.pth'))['state_dict']
        states[run] = {key: value for key, value in state.items() if value.is_floating_point()}
    again, cut = (
        max((state[key].double() - value.double()).abs().max().item() for key, value in states['whole'].items())
        for state in (states['again'], states['cut'])
    )
    say(f'weights differ by {cut:.1e}, those of the same run twice by {again:.1e}')
    # CUDA adds some numbers in a varying order: the same run twice tells how much results vary.
    assert cut <= 10 * again + 1e-5 if cuda else cut == 0


def small_segmentor(folder: Path, norm: str = 'BN') -> nn.Module:
    config = small_config(folder).model
    config.backbone.norm_cfg.type = config.decode_head.norm_cfg.type = norm
    torch.manual_seed(0)
    return MODELS.build(config)


def batch() -> dict:
    return training_batch(2, (64, 64), 11)


def losses(model: nn.Module, steps: int = 3) -> list[float]:
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)))
    model.train()
    return [float(model.train_step(batch(), wrapper)['loss']) for _ in range(steps)]


def difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative one."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


@contextmanager
def one_process(backend: str) -> Iterator[None]:
    """A process group of this process alone."""
    if dist.is_initialized():
        pytest.skip('torch.distributed is in use')
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def test_sync_bn(device, needs_cuda, tmp_path, say):
    """training: SyncBN in one process"""
    with one_process('nccl'):
        found = losses(small_segmentor(tmp_path, 'SyncBN').to(device))
    apart = difference(found, losses(small_segmentor(tmp_path).to(device)))
    say(f'losses of 3 steps differ from those with BN by {apart:.1e}')
    assert apart < 1e-3


def test_sharded(runs_here, device, cuda, tmp_path, say):
    """training: sharded (FSDP), one process"""
    wanted = losses(small_segmentor(tmp_path).to(device))
    old = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 8)
    with one_process('nccl' if cuda else 'gloo'):
        options = dict(reshard_after_forward=False) if old else {}
        model = VOLOFullyShardedDataParallel(small_segmentor(tmp_path).to(device), **options)
        found = losses(model)
        model.eval()
        shape = tuple(model.val_step(batch())[0].pred_sem_seg.data.shape)
    apart = difference(found, wanted)
    say(f'losses of 3 steps differ from those of one without by {apart:.1e}')
    assert apart < 1e-3 and shape == (1, 64, 64)


@torch.no_grad()
def test_moved_program(device, tmp_path, say):
    """export: a pt2 program, traced on the CPU and moved to the device"""
    passes = pytest.importorskip('torch.export.passes', reason='this PyTorch cannot move exported programs')
    config = small_config(tmp_path)
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    twin = MODELS.build(exportable(config).model)
    twin.load_state_dict(model.state_dict())
    program = trace(ExportNetwork(twin, 'logits', False, False).eval(), (64, 96), False)
    x = torch.randn(2, 3, 64, 96)
    found = passes.move_to_device_pass(program, device).module()(x.to(device))[1]
    error = relative_error(found.cpu(), model(x, mode='tensor'))
    say(f'error {error:.1e} on {found.device}')
    assert error < 1e-4 and found.device.type == torch.device(device).type
