"""Whole predictions on a device, against stock mmseg and against other options."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmseg_volo.benchmark import InferenceCase
from mmseg_volo.benchmark.inputs import draw, prepare

pytestmark = pytest.mark.slow  # on a CPU


@pytest.fixture(scope='module')
def case(device, cuda) -> InferenceCase:
    size, window, stride = ((384, 640), 256, 171) if cuda else ((64, 64), 64, 43)
    return InferenceCase(classes=19, size=size, window=window, stride=stride, device=device)


@pytest.fixture(scope='module')
def models(case) -> dict[str, nn.Module]:
    """Stock and ours with the same weights, for ten views; their ``module`` predicts one."""
    return case.build()


@pytest.fixture
def predict(case, models) -> Callable[..., Tensor]:
    """Class ids of the case's image, or of one of another size; options of ``test_cfg`` are undone afterwards."""

    def run(side: str, views: int, size: tuple[int, int] | None = None) -> Tensor:
        model = models[side] if views == 10 else models[side].module
        return case.run(model, side, prepare(draw(size or case.size)[0], views))

    test_cfg = models['ours'].module.test_cfg
    before = dict(test_cfg)
    yield run
    test_cfg.clear()
    test_cfg.update(before)


def equal(found: Tensor, wanted: Tensor) -> float:
    """The share of pixels with the same class."""
    return (found == wanted).double().mean().item()


@pytest.mark.parametrize('views', [10, 1])
def test_against_stock(predict, views, say):
    """prediction: against stock mmseg"""
    stock, ours, again = (predict(side, views) for side in ('stock', 'ours', 'ours'))
    share, classes = equal(stock, ours), len(stock.unique())
    say(f'views: {views}, {share:.3%} equal, {classes} classes')
    assert share > 0.9995 and classes > 5 and torch.equal(ours, again)


def test_options(cuda, models, predict, say):
    """prediction: precision, channels_last and window_batch against float32"""
    views = 10 if cuda else 1
    wanted = predict('ours', views)
    options = {
        'bf16': (dict(precision='bf16'), 0.93),
        'fp16': (dict(precision='fp16'), 0.99),
        'window_batch 1': (dict(window_batch=1), 0.9995),
        'window_batch 7': (dict(window_batch=7), 0.9995),
        'channels_last': (dict(channels_last=True), 0.9995),  # last, since the weights stay in this format
    }
    if not cuda:
        options.pop('fp16')
    test_cfg, shares = models['ours'].module.test_cfg, {}
    plain = dict(test_cfg)
    for name, (option, _) in options.items():
        test_cfg.clear()
        test_cfg.update({**plain, **option})
        shares[name] = equal(predict('ours', views), wanted)
    say('equal pixels: ' + ', '.join(f'{name} {share:.3%}' for name, share in shares.items()))
    assert all(shares[name] > least for name, (_, least) in options.items()), shares


def test_graphs(needs_cuda, models, predict, say):
    """prediction: CUDA graphs, as without them, also after the weights have changed"""
    model = models['ours'].module
    last, shares = model.decode_head.conv_seg.weight.data, []
    weights = last.clone()
    model.test_cfg.precision = 'bf16'
    try:
        for factor in (1.0, -1.0):
            last.mul_(factor)
            model.test_cfg.cuda_graph = False
            wanted = predict('ours', 1)
            model.test_cfg.cuda_graph = True
            shares += [equal(predict('ours', 1), wanted) for _ in range(4)]
    finally:
        last.copy_(weights)
    say(f'{len(shares)} predictions, {min(shares):.3%} or more of the pixels equal')
    assert min(shares) > 0.9995


def test_sizes(cuda, case, models, say):
    """prediction: images of several sizes in a row, the same bits again"""
    sizes = ((384, 640), (300, 420), (512, 333), (256, 256)) if cuda else ((64, 128), (70, 90))
    data, model = [prepare(draw(size)[0], 1) for size in sizes], models['ours'].module
    first = [case.run(model, 'ours', one) for one in data]
    again = [case.run(model, 'ours', one) for _ in range(2) for one in data]  # without waiting in between
    say(f'{len(again)} predictions')
    assert all(torch.equal(a, b) for a, b in zip([*first, *first], again, strict=True))
    assert [tuple(ids.shape) for ids in first] == list(sizes)


def test_halved(device, needs_cuda, models, predict, say):
    """prediction: a batch of windows that does not fit is halved"""
    model = models['ours'].module
    wanted = predict('ours', 1)
    _, total = torch.cuda.mem_get_info(device)
    before = model.network

    def fresh() -> int:
        """A network with nothing compiled, captured or remembered; the bytes that are reserved then."""
        model.network = type(before)(model)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)

    model.test_cfg.window_batch = 12
    try:
        base = fresh()
        torch.cuda.reset_peak_memory_stats(device)
        predict('ours', 1)
        growth = torch.cuda.max_memory_reserved(device) - base
        limit = (fresh() + 0.6 * growth) / total
        torch.cuda.set_per_process_memory_fraction(min(limit, 1.0))
        found = predict('ours', 1)
        fitted = dict(model.network._fits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        model.network = before
    share = equal(found, wanted)
    say(f'12 windows took {growth / 1e6:.0f} MB; fitted {fitted}, {share:.3%} equal')
    assert fitted and share > 0.9995
