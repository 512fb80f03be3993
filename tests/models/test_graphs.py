"""CUDA graphs of windows: when they are captured, which changes they follow, and that they predict like the network.

On a CPU, a fake graph runs the network with the memory that the network had at "capture".
"""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from mmseg.models import EncoderDecoder
from small_models import SLIDE, batch, build, picture, views
from torch import nn

from mmseg_volo import StreamingTTAModel
from mmseg_volo.models import graphs
from mmseg_volo.models import windows as windows_module
from mmseg_volo.models.graphs import Graph, Graphs, HalfWeights, _Reads, mark_of
from mmseg_volo.models.volo import PatchEmbed

LOGITS = dict(return_logits=True)


@pytest.fixture
def captured(monkeypatch):
    """Fake graphs on a CPU; returns the captured shapes and the number of replays."""
    log = dict(captured=[], replayed=0)

    def capture(windows, forward, *_):
        network = forward.__self__
        log['captured'].append(tuple(windows.shape))
        held = [
            (tensors, name, tensor.detach())
            for module in network.segmentor.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        state = dict(_weights=network._weights, _autocast=network._autocast, _uses_graphs=True)
        static, output = windows.clone(), forward(windows).clone()

        def replay():
            log['replayed'] += 1
            now = dict(vars(network))
            own = [(tensors, name, tensors[name]) for tensors, name, _ in held if name in tensors]
            vars(network).update(state)
            for tensors, name, tensor in held:
                tensors[name] = tensor
            output.copy_(forward(static))
            for tensors, name, tensor in own:
                tensors[name] = tensor
            vars(network).update({name: now[name] for name in state})

        return Graph(replay, static, output, [])

    monkeypatch.setattr(windows_module, 'can_capture', lambda device: True)
    monkeypatch.setattr(graphs, 'new_stream_and_pool', lambda device: (None, None))
    monkeypatch.setattr(graphs, 'capture', capture)
    return log


def logits(model: nn.Module, seed: int = 0, **options) -> torch.Tensor:
    model.test_cfg.update(options)
    return model.test_step(batch(picture(107, 160, seed)))[0].seg_logits.data


def eager(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """Logits of a fresh copy without graphs."""
    fresh = build(test_cfg={**model.test_cfg, 'cuda_graph': False})
    fresh.load_state_dict(model.state_dict())
    return fresh.test_step(batch(picture(107, 160, seed)))[0].seg_logits.data


def model_in_windows(**options) -> nn.Module:
    return build(test_cfg={**SLIDE, **LOGITS, 'window_batch': 2, **options})  # six windows per image


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_third_batch_of_a_shape_is_captured_and_later_ones_are_replayed(captured, precision):
    model = model_in_windows(precision=precision)
    for seed in range(3):
        torch.testing.assert_close(logits(model, seed), eager(model, seed), rtol=1e-5, atol=1e-5)
    assert captured == dict(captured=[(2, 3, 64, 96)], replayed=6)


def test_a_smaller_last_batch_gets_its_own_graph(captured):
    model = model_in_windows(window_batch=4)
    for seed in range(4):
        torch.testing.assert_close(logits(model, seed), eager(model, seed), rtol=1e-5, atol=1e-5)
    assert captured == dict(captured=[(4, 3, 64, 96), (2, 3, 64, 96)], replayed=2)


def test_test_time_augmentation_shares_the_graphs_of_its_segmentor(captured):
    model = model_in_windows()
    for _ in range(2):
        logits(model)
    merged = StreamingTTAModel(module=model).eval()  # which clears the graphs
    data = views(batch(picture(107, 160)), batch(picture(107, 160).flip(2), flip='horizontal'))
    found = [merged.test_step(copy.deepcopy(data))[0].seg_logits.data for _ in range(2)]
    before = captured['replayed']
    logits(model)
    assert captured['replayed'] == before + 3
    model.test_cfg.cuda_graph = False
    expected = merged.test_step(data)[0].seg_logits.data
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def other_state(model: nn.Module) -> dict:
    generator = torch.Generator().manual_seed(5)
    return {
        key: value * (1 + 0.2 * torch.rand(value.shape, generator=generator)) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


def by_data(model):
    for parameter in model.parameters():
        if parameter is not model.backbone.pos_embed:  # its cache follows versions, which .data does not change
            parameter.data.mul_(1.1)


def by_optimizer(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    model.train()
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    model.eval()


def exchanged_layer(model):
    model.decode_head.conv_seg = copy.deepcopy(model.decode_head.conv_seg)
    nn.init.normal_(model.decode_head.conv_seg.weight)


def exchanged_head(model):
    model.decode_head = copy.deepcopy(model.decode_head)
    nn.init.normal_(model.decode_head.conv_seg.weight)


CHANGES = {
    'load_state_dict': lambda model: model.load_state_dict(other_state(model)),
    'of a part': lambda model: model.backbone.load_state_dict(
        {k[9:]: v for k, v in other_state(model).items() if k.startswith('backbone.')}
    ),
    'assign': lambda model: model.load_state_dict(other_state(model), assign=True),
    'in place': lambda model: [t.mul_(1.1) for t in model.state_dict().values() if t.is_floating_point()],
    'data': by_data,
    'new data': lambda model: [setattr(p, 'data', p.data * 1.1) for p in model.parameters()],
    'optimizer': by_optimizer,
    'fused optimizer': lambda model: by_optimizer(model, fused=True),  # does not change versions
    'layer': exchanged_layer,
    'head': exchanged_head,
    'channels_last': lambda model: model.test_cfg.update(channels_last=True),
    'there and back': lambda model: model.to(torch.float64).to(torch.float32).load_state_dict(other_state(model)),
    'other precision': lambda model: model.test_cfg.update(
        precision='fp16' if 'precision' in model.test_cfg else 'bf16'
    ),
    'nothing': lambda model: None,
}


@pytest.mark.parametrize('precision', [None, 'bf16'])
@pytest.mark.parametrize('change', CHANGES)
def test_predictions_follow_every_change_of_the_weights(captured, change, precision):
    model = model_in_windows(**({} if precision is None else dict(precision=precision)))
    for _ in range(2):
        before = logits(model)
    assert captured['replayed'] == 3
    with torch.no_grad() if 'optimizer' not in change else torch.enable_grad():
        CHANGES[change](model)
    expected = eager(model)
    if change not in ('nothing', 'channels_last'):
        assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
    tolerance = 1e-4 if precision is None and change != 'other precision' else 2e-2
    for _ in range(3):
        torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)
    assert captured['replayed'] > 3


@pytest.mark.parametrize(
    'case', ['off', 'compile', 'gradients', 'training', 'hook', 'inference tensors', 'mmseg', 'large', 'forced']
)
def test_where_graphs_are_used(captured, monkeypatch, case):
    model = model_in_windows()
    if case in ('off', 'compile', 'forced'):
        monkeypatch.setattr(torch, 'compile', lambda function, dynamic: function)
        more = dict(off=dict(cuda_graph=False), compile=dict(compile=True), forced=dict(cuda_graph=True, compile=True))
        model.test_cfg.update(more[case])
    elif case == 'training':
        model.decode_head.conv_seg.train()
    elif case == 'hook':
        model.backbone.network[2].register_forward_hook(lambda *_: None)
    elif case == 'inference tensors':
        with torch.inference_mode():
            model.decode_head.conv_seg.weight = nn.Parameter(model.decode_head.conv_seg.weight + 0)
    elif case == 'large':
        monkeypatch.setattr(windows_module, '_GRAPH_PIXELS', 2 * 64 * 96 - 1)
    for _ in range(3):
        if case == 'gradients':
            meta = dict(ori_shape=(107, 160), img_shape=(107, 160), pad_shape=(107, 160))
            model.inference(torch.randn(1, 3, 107, 160), [meta])
        elif case == 'mmseg':
            stock = build(type='EncoderDecoder', test_cfg=SLIDE)
            assert type(stock) is EncoderDecoder
            StreamingTTAModel(module=stock).eval().test_step(views(batch(picture(107, 160))))
        else:
            logits(model)
    assert captured['captured'] == ([(2, 3, 64, 96)] if case == 'forced' else [])
    assert captured['replayed'] == (8 if case == 'forced' else 0)


def test_network_that_cannot_be_captured_runs_without_graphs(captured, monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        raise RuntimeError('operation not permitted when stream is capturing\nmore')

    lines = []
    monkeypatch.setattr(graphs, 'capture', fail)
    monkeypatch.setattr(graphs, 'print_log', lambda text, logger, level: lines.append((text, level)))
    model = model_in_windows(precision='bf16')
    expected = eager(model)
    for _ in range(3):
        torch.testing.assert_close(logits(model), expected)
    assert len(tries) == 1
    told = 'no CUDA graph of (2, 3, 64, 96): operation not permitted when stream is capturing'
    assert lines == [(told, logging.WARNING)]


def test_out_of_memory_drops_graphs_before_it_halves_batches(captured):
    model = model_in_windows()
    expected = eager(model)
    for _ in range(2):
        logits(model)
    network, sizes = model.network, []
    (graph,) = network.graphs._graphs.values()

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    network.graphs._graphs = {key: graph._replace(replay=out_of_memory) for key in network.graphs._graphs}
    network._forward, forward = lambda windows: sizes.append(len(windows)) or forward(windows), network._forward
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 2] and not network.graphs._graphs
    for _ in range(3):
        logits(model)
    assert sizes == [2] * 12  # no graphs any more


def test_copies_have_no_graphs(captured):
    model = model_in_windows()
    for _ in range(2):
        logits(model)
    assert model.network.graphs._graphs
    other = copy.deepcopy(model)
    assert not other.network.graphs._graphs and other.network.segmentor is other
    with torch.no_grad():
        other.decode_head.conv_seg.weight.mul_(2)
    torch.testing.assert_close(logits(other), eager(other), rtol=1e-5, atol=1e-5)
    model.train()
    assert not model.network.graphs._graphs  # training gets their memory


def test_number_of_graphs_is_limited_and_alternating_shapes_do_not_thrash(captured):
    def run(cache, size, times=1):
        for _ in range(times):
            windows = [torch.full((3, size), float(size)) for _ in range(2)]
            doubled = Doubling().forward
            assert torch.equal(cache.run((), windows, doubled, doubled, 3), torch.stack(windows) * 2)

    class Doubling:
        def __init__(self):
            self.segmentor = nn.Identity()
            self._weights = self._autocast = self._uses_graphs = None

        def forward(self, x):
            return x * 2

    cache = Graphs()
    for _ in range(20):
        for size in range(1, 13):
            run(cache, size)
    assert [shape[-1] for shape in captured['captured']] == list(range(1, 9))
    run(cache, 9, 100)  # by then the others are idle
    assert [shape[-1] for shape in captured['captured']] == list(range(1, 10)) and len(cache._graphs) == 8
    for size in range(20, 2000):
        run(cache, size)
    assert len(cache._uses) <= 256


def test_reads_are_weights_and_cached_tensors():
    layer, kept = nn.Linear(4, 4), torch.randn(4, 4)
    x = torch.randn(2, 4)
    with torch.no_grad(), _Reads(x) as reads:
        y = layer(x)
        (y.relu() @ kept.T).add_(torch.stack([y, y]).sum(0))
    found = {storage.data_ptr() for storage in reads.storages()}
    assert found == {t.data_ptr() for t in (layer.weight, layer.bias, kept)}


def test_half_weights_give_the_same_result_as_autocast():
    model = model_in_windows()
    x = torch.randn(1, 3, 64, 96)
    weights = HalfWeights(model, torch.bfloat16, without=(PatchEmbed,))
    own = {name: parameter for name, parameter in model.named_parameters()}
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = model(x)
        weights.refresh()
        with weights:
            exchanged = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
            assert torch.equal(model(x), expected)
        with pytest.raises(RuntimeError), weights:
            raise RuntimeError
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and 'patch_embed' not in n}
    assert exchanged == {name for name in own if name.rsplit('.', 1)[0] in layers}


def test_mark_changes_with_every_write():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    first = mark_of(model)
    assert mark_of(model) == first
    with torch.no_grad():
        model[1].running_mean.add_(1)
    assert mark_of(model) not in (None, first)
    assert mark_of(model.train()) is None


@pytest.mark.parametrize('backbone', ['VOLO', 'other'])
def test_uncompiled_pass_calls_no_compiled_parts(monkeypatch, backbone):
    called = []
    monkeypatch.setattr(
        torch, 'compile', lambda function, dynamic: lambda *inputs: called.append(1) or function(*inputs)
    )
    model = model_in_windows(compile=True)
    if backbone == 'other':
        monkeypatch.setattr(windows_module, 'VOLO', EncoderDecoder)
    with torch.no_grad(), model.network.running():
        x = torch.randn(1, 3, 64, 96)
        expected = model.network._pass(x)
        times = len(called)
        assert times == (1 if backbone == 'other' else 5)
        assert torch.equal(model.network._uncompiled_pass(x), expected) and len(called) == times
        model.network._pass(x)
        assert len(called) == 2 * times


@pytest.fixture
def on_gpu(gpu):
    def make(head: str = 'UPerHead', **options) -> nn.Module:
        return build(head=head, test_cfg={**SLIDE, **LOGITS, 'window_batch': 4, **options}).to(gpu)

    return make


@pytest.mark.parametrize('head', ['UPerHead', 'LeanUPerHead'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_gpu_graphs_predict_like_the_network(on_gpu, precision, head):
    model = on_gpu(head, precision=precision)
    tolerance = dict(rtol=1e-3, atol=1e-3) if precision == 'fp32' else dict(rtol=0.05, atol=0.1)
    for round in range(2):
        for seed in range(5):
            found = logits(model, seed, cuda_graph=None)
            torch.cuda.empty_cache()
            junk = [torch.full((2**20,), float('nan'), device='cuda') for _ in range(64)]  # overwrites free memory
            del junk
            if seed > 3:
                used = model.network.graphs._used
                assert len(used) == 2 and max(used.values()) == model.network.graphs._passes
            graphs_then = model.network.graphs
            model.network.graphs = Graphs()
            expected = logits(model, seed, cuda_graph=False)
            model.network.graphs = graphs_then
            torch.testing.assert_close(found, expected, **tolerance)
        if not round:
            model.load_state_dict(other_state_on_gpu(model))


def other_state_on_gpu(model: nn.Module) -> dict:
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    with torch.no_grad():
        return {k: v * (1 + 0.2 * torch.rand(v.shape)) if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize('change', ['load_state_dict', 'assign', 'in place', 'data', 'there and back'])
def test_gpu_graphs_follow_the_weights(on_gpu, change):
    model = on_gpu(precision='bf16')
    for _ in range(4):
        before = logits(model)
    assert model.network.graphs._graphs
    if change in ('load_state_dict', 'assign'):
        state = {key: value.to('cuda') for key, value in other_state_on_gpu(model).items()}
        model.load_state_dict(state, assign=change == 'assign')
    elif change == 'there and back':
        model.cpu().load_state_dict(other_state_on_gpu(model))
        model.to('cuda')
    else:
        with torch.no_grad():
            CHANGES[change](model)
    for _ in range(5):
        found = logits(model)
    model.test_cfg.cuda_graph = False
    expected = logits(model)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_gpu_graphs_outlive_caches_of_modules(on_gpu):
    """A head frees a cached tensor, whose memory must not be reused."""
    model = on_gpu(precision='fp32')
    kept = {}

    def forward(inputs, own=model.decode_head.forward):
        if 'factor' not in kept:
            kept['factor'] = torch.full((2**20,), 2.0, device='cuda')
        return own(inputs) * kept['factor'][0]

    model.decode_head.forward = forward
    for _ in range(4):
        expected = logits(model)
    kept.clear()
    junk = [torch.full((2**20,), float('nan'), device='cuda') for _ in range(16)]
    assert model.network.graphs._graphs
    torch.testing.assert_close(logits(model), expected)
    del junk


def test_gpu_graphs_of_compiled_blocks(on_gpu):
    model = on_gpu(precision='bf16')
    expected = logits(model, cuda_graph=False)
    for _ in range(3):
        found = logits(model, cuda_graph=True, compile=True)
    assert model.network.graphs._graphs and not model.network.graphs.refused
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_gpu_network_that_synchronises_runs_without_graphs(on_gpu):
    model = on_gpu(precision='fp32')
    expected = logits(model, cuda_graph=False)
    own = model.decode_head.forward
    model.decode_head.forward = lambda inputs: own(inputs) * float(inputs[0].new_ones(()).item())
    for _ in range(4):
        torch.testing.assert_close(logits(model, cuda_graph=None), expected, rtol=1e-3, atol=1e-3)
    assert model.network.graphs.refused
    assert F.relu(torch.ones(1, device='cuda')).item() == 1  # the device still works
