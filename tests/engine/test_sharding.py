"""Compare fully sharded training with plain data parallelism, on two ranks over gloo.

The fixture starts two ranks once. They run all cases that need two ranks; the tests check the files that they write.
"""

import copy
import os
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from commands import miou, run, tool
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODEL_WRAPPERS, init_default_scope
from mmengine.structures import PixelData
from small_models import ARCH, BN, SLIDE, batch, picture, segmentor_config
from small_models import build as build_segmentor
from small_runs import differences, write_config
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mmseg_volo import VOLOEMAHook, VOLOFullyShardedDataParallel
from mmseg_volo.engine.sharding import full_state, shard_optimizer_state, whole_parameters
from mmseg_volo.errors import ConfigError

SHARDED, PLAIN = VOLOFullyShardedDataParallel, MMDistributedDataParallel
# Fused as in the configs. The large eps keeps AdamW from amplifying gradients that are rounding error alone, such as
# that of a bias before a batch norm: they differ from run to run.
ADAMW = dict(type='AdamW', lr=1e-3, eps=1e-3, weight_decay=0.05, fused=True)
SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.01)
PARAMWISE = dict(norm_decay_mult=0.0, custom_keys={'pos_embed': dict(decay_mult=0.0)})
STEPS = 4
LOGITS = dict(mode='whole', return_logits=True)
BACKBONE = dict(type='VOLO', arch=ARCH, img_size=64, norm_cfg=BN)
VARIANTS = dict(
    simple={},
    # The gradient norm is summed in another order; SGD does not amplify that difference.
    clip=dict(optim=dict(clip_grad=dict(max_norm=0.1), optimizer=SGD)),
    accumulated=dict(optim=dict(accumulative_counts=2)),
    checkpointed=dict(backbone=dict(with_cp=True, **BACKBONE)),
    frozen=dict(backbone=dict(frozen_stages=2, **BACKBONE)),
    layers=dict(optim=dict(constructor='VOLOLayerDecayConstructor', paramwise_cfg=dict(layer_decay_rate=0.5))),
    bfloat16=dict(optim=dict(type='BFloat16OptimWrapper')),
)


def build(**model) -> nn.Module:
    preprocessor = dict(segmentor_config()['data_preprocessor'], size=(64, 64))
    return build_segmentor(data_preprocessor=preprocessor, **model)


def samples(step: int, rank: int, size: tuple[int, int] = (64, 64)) -> dict:
    """Two labelled images, different for each step and rank."""
    seeds = [10 * step + 2 * rank, 10 * step + 2 * rank + 1]
    data = batch(*(picture(*size, seed=seed) for seed in seeds))
    for seed, sample in zip(seeds, data['data_samples'], strict=True):
        labels = torch.randint(7, (1, *size), generator=torch.Generator().manual_seed(seed))
        sample.gt_sem_seg = PixelData(data=labels)
    return data


def optimiser(model: nn.Module, **options) -> OptimWrapper:
    return build_optim_wrapper(model, {**dict(optimizer=ADAMW, paramwise_cfg=PARAMWISE), **options})


def load_full_state(model: nn.Module, optimizer: OptimWrapper, state: dict, optimizer_state: dict) -> None:
    """Load what :func:`full_state` returned, as :class:`VOLORunner` does; all ranks call it together."""
    with whole_parameters(model):
        (model.module if is_model_wrapper(model) else model).load_state_dict(state)
    optimizer.load_state_dict(shard_optimizer_state(optimizer, optimizer_state))


def trained(
    wrap: type, steps: range = range(STEPS), start: tuple[dict, dict] | None = None, optim=None, **model
) -> dict:
    """Train; return the losses of this rank, and the full state of model and optimizer on rank 0."""
    wrapped = wrap(module=build(**model))
    wrapper = optimiser(wrapped, **(optim or {}))
    wrapper.initialize_count_status(wrapped, steps.start, STEPS)
    if start:
        load_full_state(wrapped, wrapper, *start)
    wrapped.train()
    losses = []
    for step in steps:
        torch.manual_seed(step)  # for dropout
        losses.append(float(wrapped.train_step(samples(step, dist.get_rank()), wrapper)['loss']))
    state, optimizer = full_state(wrapped, wrapper)
    return dict(losses=losses, state=state, optimizer=optimizer, wrapped=wrapped, wrapper=wrapper)


def shard_sizes(run: dict) -> dict:
    """Number of elements that this rank holds, and that there are in all."""
    model, optimizer = run['wrapped'].module, run['wrapper'].optimizer
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    assert not any(isinstance(p.grad, torch.Tensor) and not isinstance(p.grad, DTensor) for p in parameters)
    states = [state['exp_avg'] for state in optimizer.state.values()]
    assert all(isinstance(s, DTensor) for s in states) and len(states) == len(parameters)
    return dict(
        parameters=sum(p.to_local().numel() for p in parameters),
        states=sum(s.to_local().numel() for s in states),
        all=sum(p.numel() for p in parameters),
        units=sum(isinstance(m, FSDPModule) for m in model.modules()),
    )


def predictions(rank: int) -> dict:
    """Predict with sliding windows between training steps: a large image on one rank, a small one on the other."""
    sizes = [(96, 160), (64, 96)][rank]
    plain = build(test_cfg=SLIDE)
    expected = plain.val_step(batch(picture(*sizes)))[0].pred_sem_seg.data
    wrapped = SHARDED(build(test_cfg=SLIDE))
    wrapper = optimiser(wrapped)
    wrapped.eval()  # before any training step, as with val_begin=0
    before = wrapped.val_step(batch(picture(*sizes)))[0].pred_sem_seg.data
    whole = not any(isinstance(p, DTensor) for p in wrapped.parameters())
    wrapped.train()
    again = all(isinstance(p, DTensor) for p in wrapped.parameters())
    wrapped.train_step(samples(0, rank), wrapper)
    state, _ = full_state(wrapped)
    wrapped.eval()
    if rank:  # rank 0 predicts more images than rank 1
        after = wrapped.val_step(batch(picture(*sizes)))[0].pred_sem_seg.data
    else:
        after = [wrapped.val_step(batch(picture(*sizes, seed=s)))[0].pred_sem_seg.data for s in (1, 2, 0)][-1]
    everywhere = [state]
    dist.broadcast_object_list(everywhere)
    plain.load_state_dict(everywhere[0])  # includes the running statistics of rank 0
    moved = plain.val_step(batch(picture(*sizes)))[0].pred_sem_seg.data
    wrapped.train()
    loss = float(wrapped.train_step(samples(1, rank), wrapper)['loss'])
    equal = torch.equal(before, expected), torch.equal(after, moved)
    return dict(equal=equal, whole=whole, again=again, loss=loss)


def initialised(folder: Path, rank: int) -> dict:
    """Initialise and load weights after sharding, as mmengine's Runner does."""
    torch.save(build(seed=3).backbone.state_dict(), folder / f'pretrained{rank}.pth')
    results = {}
    for name in ('random', 'pretrained'):
        backbone = dict(BACKBONE)
        if name == 'pretrained':
            backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(folder / f'pretrained{rank}.pth'))
        wrapped, plain = SHARDED(build(backbone=backbone)), build(backbone=backbone)
        # Ranks with different seeds still start from the same weights.
        torch.manual_seed(5 + rank)
        with whole_parameters(wrapped):
            assert not any(isinstance(p, DTensor) for p in wrapped.parameters())
            wrapped.module.init_weights()
        torch.manual_seed(5 + rank)
        plain.init_weights()
        sharded = all(isinstance(p, DTensor) for p in wrapped.parameters())
        results[name] = dict(state=full_state(wrapped)[0], plain=plain.state_dict(), sharded=sharded)
    before = full_state(wrapped)[0]
    with pytest.raises(RuntimeError, match='stop'), whole_parameters(wrapped):
        nn.init.zeros_(wrapped.module.decode_head.conv_seg.weight)
        raise RuntimeError('stop')
    results['stopped'] = dict(state=full_state(wrapped)[0], plain=before)
    return results


def averaged(wrap: type) -> dict:
    """Train with an average of the weights; return checkpoints before, in and after a validation, and one resumed."""
    wrapped = wrap(module=build(test_cfg=LOGITS))
    wrapper = optimiser(wrapped)
    wrapper.initialize_count_status(wrapped, 0, STEPS)
    runner = SimpleNamespace(model=wrapped, hooks=[], iter=0, _train_loop=None, _resume=True)

    def hook() -> VOLOEMAHook:
        made = VOLOEMAHook(momentum=0.3)
        made.before_run(runner)
        return made

    def checkpoint(ema: VOLOEMAHook) -> dict:
        state = full_state(wrapped)[0]
        ema.gather()
        saved = dict(state_dict={name: value.clone() for name, value in state.items()})
        if dist.get_rank() == 0:  # as a run saves
            ema.before_save_checkpoint(runner, saved)
        return copy.deepcopy(saved)

    ema, results = hook(), {}
    wrapped.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        wrapped.train_step(samples(step, dist.get_rank()), wrapper)
        ema.after_train_iter(runner, step)
    results['before'] = saved = checkpoint(ema)
    ema.before_val_epoch(runner)
    wrapped.eval()
    results['predictions'] = wrapped.val_step(batch(picture(64, 64)))[0].seg_logits.data
    ema.after_val_epoch(runner)
    wrapped.train()
    results['after'] = checkpoint(ema)
    shared = [saved]
    dist.broadcast_object_list(shared)  # as if every rank read the file
    resumed = hook()
    resumed.after_load_checkpoint(runner, copy.deepcopy(shared[0]))
    results['resumed'] = checkpoint(resumed)
    return results


def overflow(rank: int) -> dict:
    """With loss scaling, an overflow on one rank skips the step on all ranks."""
    wrapped = SHARDED(build())
    wrapper = optimiser(wrapped, optimizer=SGD)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    moved = []
    for bad in (False, True):
        wrapper.zero_grad()
        before = full_state(wrapped)[0]
        data = wrapped.module.data_preprocessor(samples(0, rank), training=True)
        scaler.scale(wrapped.module.parse_losses(wrapped(**data, mode='loss'))[0]).backward()
        if bad and rank:
            wrapped.module.decode_head.conv_seg.weight.grad.to_local()[0, 0] = float('inf')
        scaler.step(wrapper.optimizer)
        scaler.update()
        after = full_state(wrapped)[0]
        moved.append([name for name in before if 'running' not in name and not torch.equal(before[name], after[name])])
    return dict(good=moved[0], bad=moved[1], scale=scaler.get_scale())


def work(rank: int, folder: Path, port: int) -> None:
    """Run all cases on one rank and save the results."""
    torch.set_num_threads(1)
    init_default_scope('mmseg')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
    dist.init_process_group('gloo', rank=rank, world_size=2)
    results = {}
    for name, options in VARIANTS.items():
        for kind in (PLAIN, SHARDED):
            results[name, kind.__name__] = run = trained(kind, **options)
            if name == 'simple' and kind is SHARDED:
                results['shards'] = shard_sizes(run)
    results['kept'] = trained(partial(SHARDED, reshard_after_forward=False))
    for first, second in ((PLAIN, SHARDED), (SHARDED, PLAIN), (SHARDED, SHARDED)):
        half = trained(first, range(STEPS // 2))
        start = [(half['state'], half['optimizer'])]
        dist.broadcast_object_list(start)  # as if every rank read the file
        results[first.__name__, 'then', second.__name__] = trained(second, range(STEPS // 2, STEPS), start[0], seed=1)
    results['predictions'] = predictions(rank)
    results['overflow'] = overflow(rank)
    for kind in (PLAIN, SHARDED):
        results['averaged', kind.__name__] = averaged(kind)
    results['initialised'] = initialised(folder, rank)
    for run in results.values():
        run.pop('wrapped', None)
        run.pop('wrapper', None)
    torch.save(results, folder / f'rank{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> list[dict]:
    """The results of the two ranks."""
    folder = tmp_path_factory.mktemp('sharding')
    torch.multiprocessing.spawn(work, (folder, free_port()), nprocs=2)
    return [torch.load(folder / f'rank{rank}.pth', weights_only=False) for rank in (0, 1)]


def assert_same(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), **tolerance), name


def assert_same_run(found: list[dict], expected: list[dict], steps: slice = slice(None)) -> None:
    """Two ranks sum gradients in the same order, so runs agree; only the norm for clipping is summed differently."""
    for one, other in zip(found, expected, strict=True):
        assert one['losses'] == pytest.approx(other['losses'][steps], rel=1e-5) and one['losses']
    assert_same(found[0]['state'], expected[0]['state'], rtol=1e-5, atol=1e-6)
    assert found[0]['optimizer'].keys() == expected[0]['optimizer'].keys()
    assert found[0]['optimizer']['param_groups'] == expected[0]['optimizer']['param_groups']
    states, others = (run[0]['optimizer']['state'] for run in (found, expected))
    assert states.keys() == others.keys() and len(others) > 10
    for number, other in others.items():
        assert_same(states[number], other, rtol=1e-4, atol=1e-6)
    assert found[1]['state'] == found[1]['optimizer'] == {}  # only rank 0 gets the full state


@pytest.mark.parametrize('name', VARIANTS)
def test_trains_as_plain_data_parallelism(runs, name):
    plain, sharded = ([run[name, kind.__name__] for run in runs] for kind in (PLAIN, SHARDED))
    assert len(plain[0]['losses']) == STEPS and plain[0]['losses'] != plain[1]['losses']
    assert_same_run(sharded, plain)
    simple = runs[0]['simple', PLAIN.__name__]['state']['decode_head.conv_seg.weight']
    if name not in ('simple', 'checkpointed'):  # the option has an effect
        assert not torch.equal(plain[0]['state']['decode_head.conv_seg.weight'], simple)


def test_without_reshard_after_forward(runs):
    assert_same_run([run['kept'] for run in runs], [run['simple', PLAIN.__name__] for run in runs])


def test_each_rank_holds_about_half(runs):
    one, other = (run['shards'] for run in runs)
    assert one['parameters'] + other['parameters'] == one['states'] + other['states'] == one['all'] == other['all']
    # Rank 0 gets the odd row of uneven tensors, and all of pos_embed, which has one row.
    assert 0.4 < other['states'] / one['all'] <= one['states'] / one['all'] < 0.6
    assert one['units'] == 4 + 1


@pytest.mark.parametrize(('first', 'second'), [(PLAIN, SHARDED), (SHARDED, PLAIN), (SHARDED, SHARDED)])
def test_sharded_and_plain_runs_resume_each_other(runs, first, second):
    rest = [run[first.__name__, 'then', second.__name__] for run in runs]
    assert_same_run(rest, [run['simple', PLAIN.__name__] for run in runs], slice(STEPS // 2, None))


def test_ranks_predict_different_numbers_of_windows(runs):
    for found in (one['predictions'] for one in runs):
        assert found['equal'] == (True, True)
        assert found['whole'] and found['again'] and found['loss'] > 0


def test_initial_weights_are_those_of_rank_0(runs):
    for name in ('random', 'pretrained', 'stopped'):
        found = runs[0]['initialised'][name]
        assert_same(found['state'], found['plain'], rtol=0, atol=0)
    assert runs[0]['initialised']['random']['sharded'] and runs[0]['initialised']['pretrained']['sharded']
    # Rank 1 drew other weights, which were not used.
    other = runs[1]['initialised']['random']['plain']['backbone.pos_embed']
    assert not torch.equal(other, runs[0]['initialised']['random']['plain']['backbone.pos_embed'])


def test_overflow_on_one_rank_skips_the_step_on_all(runs):
    assert [one['overflow']['scale'] for one in runs] == [2.0, 2.0]
    assert len(runs[0]['overflow']['good']) > 10 and not runs[0]['overflow']['bad']


def test_averaged_weights(runs):
    """Sharded weights are averaged as mmengine's EMAHook averages plain ones; a validation uses and keeps them."""
    plain, sharded = (runs[0]['averaged', kind.__name__] for kind in (PLAIN, SHARDED))
    for name in ('before', 'after', 'resumed'):
        for part in ('state_dict', 'ema_state_dict'):
            assert_same(sharded[name][part], plain['before'][part], rtol=1e-5, atol=1e-6)
    weight = plain['before']['state_dict']['decode_head.conv_seg.weight']
    assert not torch.allclose(weight, plain['before']['ema_state_dict']['module.decode_head.conv_seg.weight'])
    assert plain['before']['ema_state_dict']['steps'] == STEPS
    model = build(test_cfg=LOGITS)
    model.load_state_dict(plain['before']['state_dict'])  # what test.py and publish.py use
    expected = model.val_step(batch(picture(64, 64)))[0].seg_logits.data
    assert torch.allclose(plain['predictions'], expected, atol=1e-5)
    assert torch.allclose(sharded['predictions'], expected, atol=1e-4)


def test_the_state_functions_on_an_unsharded_model():
    model = build()
    wrapper = optimiser(model)
    model.train().train_step(samples(0, 0), wrapper)
    state, optimizer = full_state(model, wrapper)
    assert_same(state, model.state_dict(), rtol=0, atol=0)
    other = build(seed=1)
    restored = optimiser(other)
    load_full_state(other, restored, state, optimizer)
    assert_same(other.state_dict(), state, rtol=0, atol=0)
    assert restored.state_dict()['state'].keys() == optimizer['state'].keys()
    with pytest.raises(ValueError, match=r'the optimizer has 1 parameters, the saved state has \d+'):
        shard_optimizer_state(torch.optim.AdamW([nn.Parameter(torch.ones(1))]), optimizer)


def test_models_that_cannot_be_sharded(monkeypatch):
    with pytest.raises(ConfigError, match='sharding needs a VOLO as backbone, and Linear has none'):
        SHARDED(nn.Linear(2, 2))
    monkeypatch.delattr(FSDPModule, 'set_reshard_after_forward', raising=False)
    with pytest.raises(ConfigError, match=r'can only shard with model_wrapper_cfg\.reshard_after_forward=False'):
        SHARDED(build())


def test_mmengine_knows_it_as_a_model_wrapper():
    assert MODEL_WRAPPERS.get('VOLOFullyShardedDataParallel') is SHARDED
    assert is_model_wrapper(SHARDED.__new__(SHARDED))


@pytest.mark.slow
def test_sharding_by_command_line_option(tmp_path):
    """A sharded run writes the same bits as a plain run; either resumes the other's file; test.py reads it."""
    off = ['model.backbone.drop_path_rate=0', 'model.decode_head.dropout_ratio=0', 'train_cfg.val_interval=5']
    switch = 'model_wrapper_cfg.type=VOLOFullyShardedDataParallel'
    config = write_config(tmp_path)

    def train(name: str, *options: str, start: str | None = None) -> Path:
        resume = ['--resume', tmp_path / start] if start else []
        more = '--ema', '--work-dir', tmp_path / name, *resume, '--cfg-options', *off, *options
        run('bash', 'tools/dist_train.sh', config, '2', *more, PORT=str(free_port()), OMP_NUM_THREADS='1')
        return tmp_path / name / 'iter_8.pth'

    # No clipping: its gradient norm is summed in another order. On a CPU, PyTorch's fused AdamW rounds the end of a
    # tensor in another way, and shards end elsewhere.
    off += ['optim_wrapper.clip_grad=None', 'optim_wrapper.optimizer.fused=False']
    plain, sharded = train('plain'), train('sharded', switch)
    assert not differences(sharded, plain)
    assert not differences(train('plain_sharded', switch, start='plain/iter_6.pth'), plain)
    assert not differences(train('sharded_plain', start='sharded/iter_6.pth'), plain)
    logged = next((tmp_path / 'sharded').glob('*/*.log')).read_text()
    assert f'mIoU: {miou(tool("test.py", config, sharded, "--work-dir", tmp_path / "test"))}' in logged
