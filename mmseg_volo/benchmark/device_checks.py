"""Whether results on a device are right: what only shows on the device itself, each check small and by itself.

Everything is held against something else: float64, timm's VOLO, mmseg's heads, losses and segmentor. On a CPU the same
checks run on smaller tensors; what needs CUDA is skipped.
"""

import copy
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead, UPerHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..checkpoints.reading import load_from_local
from ..datasets.street_drawing import draw_scene
from ..engine.runner import build_runner
from ..export.formats import trace
from ..export.network import ExportNetwork, exportable
from ..models.heads import LeanUPerHead
from ..models.losses import LeanFCNHead
from ..models.volo import ARCHS, OutlookAttention
from ..ops import IMPLEMENTATIONS, outlook_attention
from ..utils.config import load_config
from .backbone import BackboneCase, build_backbones
from .cases import SIDES, Case
from .measuring import autocast
from .peer import build_both
from .pictures import draw, prepare
from .prediction import predict

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# Not 16 in the stem: with AMX oneDNN then gets the 4 x 4 projection wrong in bfloat16.
_ARCH = dict(depths=(1, 1, 1, 1), dims=(64, 64, 64, 64), heads=(2, 2, 2, 2), mlp_ratios=2, stem_width=8)


class Skipped(Exception):
    """A check that cannot run here; its text says why."""


class Finding(NamedTuple):
    """What a check found: 'ok', 'BAD' or 'skipped', a line about it, and the seconds that it took."""

    name: str
    verdict: str
    what: str
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where the checks run."""

    device: str

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == 'cuda'

    @cached_property
    def pair(self) -> tuple[Case, dict[str, nn.Module]]:
        """Stock and ours with the same weights, for ten views; their ``module`` predicts one."""
        size, window, stride = ((384, 640), 256, 171) if self.cuda else ((64, 64), 64, 43)
        case = Case(arch='d1', classes=19, size=size, window=window, stride=stride, device=self.device)
        return case, build_both(case, draw(size))

    def need_cuda(self) -> None:
        if not self.cuda:
            raise Skipped('needs a GPU')

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


Check = Callable[[Place], tuple[bool, str]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check, which returns whether all is well and a line about it, or raises :class:`Skipped`."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def run_checks(
    device: str,
    report: Callable[[Finding], None],
    seconds_left: Callable[[], float] = lambda: float('inf'),
    names: Sequence[str] | None = None,
) -> list[Finding]:
    """Run the checks one after the other; one that raises is BAD and stops nothing.

    Args:
        device: where.
        report: called with each finding.
        seconds_left: asked before each check; without time it is skipped.
        names: of the checks to run; all by default.
    """
    place, findings = Place(device), []
    with _full_float32():
        for name in CHECKS if names is None else names:
            start = time.perf_counter()
            try:
                if seconds_left() <= 0:
                    raise Skipped('no time left')
                fine, what = CHECKS[name](place)
                verdict = 'ok' if fine else 'BAD'
            except Skipped as reason:
                verdict, what = 'skipped', str(reason)
            except Exception as error:
                traceback.print_exc()
                verdict, what = 'BAD', f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
            findings.append(Finding(name, verdict, what, time.perf_counter() - start))
            report(findings[-1])
            if place.cuda:
                torch.cuda.empty_cache()
    return findings


@contextmanager
def _full_float32():
    """Without TF32, which would hide what is looked for."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative, over the whole tensor."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


# Outlook attention


def _op_inputs(place: Place, shape: tuple[int, int, int, int], dtype: torch.dtype, stride: int = 2):
    """v, logits and the gradient of the result for (B, H, W, M), with 32 channels a head."""
    generator = torch.Generator(place.device).manual_seed(0)
    batch, height, width, heads = shape
    grid = (height - 1) // stride + 1, (width - 1) // stride + 1
    sizes = (batch, height, width, 32 * heads), (batch, *grid, heads, 9, 9), (batch, height, width, 32 * heads)
    v, logits, grad = (torch.randn(size, generator=generator, device=place.device) for size in sizes)
    return v.to(dtype), (3 * logits).to(dtype), grad.to(dtype)


def _op(v: Tensor, logits: Tensor, grad: Tensor, impl: str, stride: int = 2) -> list[Tensor]:
    """The result and both gradients."""
    v, logits = v.detach().requires_grad_(), logits.detach().requires_grad_()
    out = outlook_attention(v, logits, scale=0.4, stride=stride, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (v, logits), grad)]


def _need_fused(place: Place) -> None:
    try:
        outlook_attention(*_op_inputs(place, (1, 4, 4, 1), torch.float32)[:2], scale=1.0, stride=2, impl='fused')
    except ValueError as error:
        if place.cuda:  # there it is what the package is for
            raise
        raise Skipped(str(error)) from error


@check('operation: result and gradients in bfloat16, float16 and float32')
def _dtypes(place: Place) -> tuple[bool, str]:
    _need_fused(place)
    fine, texts = True, []
    for dtype in (torch.bfloat16, torch.float32, *[torch.float16] * place.cuda):
        inputs = _op_inputs(place, (2, 32, 32, 6) if place.cuda else (1, 8, 8, 2), dtype)
        exact = _op(*(t.double() for t in inputs), 'reference')
        plain, fused = (
            [_error(a, b) for a, b in zip(_op(*inputs, i), exact, strict=True)] for i in ('reference', 'fused')
        )
        fine &= all(ours <= 2 * theirs + 1e-6 for ours, theirs in zip(fused, plain, strict=True))
        texts.append(f'{str(dtype).removeprefix("torch.")} {max(fused):.1e} (unfold/fold {max(plain):.1e})')
    return fine, 'errors: ' + ', '.join(texts)


@check('operation: odd sizes, one row, stride 1')
def _odd_sizes(place: Place) -> tuple[bool, str]:
    _need_fused(place)
    shapes = [((2, 33, 47, 3), 2), ((1, 1, 5, 1), 2), ((3, 7, 2, 2), 1), ((1, 18, 31, 6), 1)]
    worst = 0.0
    for shape, stride in shapes:
        inputs = _op_inputs(place, shape, torch.float32, stride)
        exact = _op(*(t.double() for t in inputs), 'reference', stride)
        found = _op(*inputs, 'fused', stride)
        worst = max(worst, *(_error(a, b) for a, b in zip(found, exact, strict=True)))
    return worst < 1e-5, f'{len(shapes)} shapes, error {worst:.1e}'


@check('operation: inputs that are not contiguous, or begin in the middle of a tensor')
def _strides(place: Place) -> tuple[bool, str]:
    _need_fused(place)
    v, logits, grad = _op_inputs(place, (2, 16, 20, 2), torch.float32)
    wanted = _op(v.double(), logits.double(), grad.double(), 'reference')
    shifted = torch.cat([v.new_zeros(1), v.flatten()])[1:].view_as(v)
    kinds = {
        'transposed': (v.transpose(1, 2).contiguous().transpose(1, 2), logits, grad),
        'channels first': (v, logits, grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)),
        'logits with heads first': (v, logits.permute(0, 3, 1, 2, 4, 5).contiguous().permute(0, 2, 3, 1, 4, 5), grad),
        'shifted by one number': (shifted, logits, grad),
    }
    wrong = [
        name
        for name, inputs in kinds.items()
        if max(_error(a, b) for a, b in zip(_op(*inputs, 'fused'), wanted, strict=True)) > 1e-5
    ]
    return not wrong, f'wrong: {", ".join(wrong)}' if wrong else f'{len(kinds)} kinds as in float64'


@check('operation: NaN and infinity spread as in the definition')
def _not_finite(place: Place) -> tuple[bool, str]:
    _need_fused(place)
    v, logits, _ = _op_inputs(place, (2, 16, 16, 2), torch.float32)
    logits[0, 0, 0] *= 1e4
    call = partial(outlook_attention, scale=0.7, stride=2)
    large = _error(call(v, logits, impl='fused'), call(v, logits, impl='reference'))
    same = []
    for value in (float('nan'), float('inf')):
        bad = logits.clone()
        bad[1, 1, 2, 0, 4, 3] = value
        same.append(torch.equal(*(call(v, bad, impl=impl).isnan() for impl in ('fused', 'reference'))))
    bad = v.clone()
    bad[0, 3, 3, 5] = float('nan')
    same.append(torch.equal(*(call(bad, logits, impl=impl).isnan() for impl in ('fused', 'reference'))))
    return all(same) and large < 1e-5, f'logits of 30,000: error {large:.1e}; NaN as wanted: {all(same)}'


@check('operation: more than 2**31 numbers in all, and just less in one image')
def _large(place: Place) -> tuple[bool, str]:
    place.need_cuda()
    free, _ = torch.cuda.mem_get_info(place.device)
    fine, texts = True, []
    for batch, height, width, heads in ((3, 1024, 2048, 12), (1, 2048, 2560, 12)):
        numbers = batch * height * width * heads * 32
        need = 2 * (4 * numbers + 2 * numbers * 81 // 128) + 2e9  # v, result, two gradients; logits and theirs
        if need > free:
            raise Skipped(f'needs {need / 1e9:.0f} GB of free memory')
        made = partial(torch.empty, device=place.device, dtype=torch.bfloat16)
        v = made(batch, height, width, heads * 32).normal_()
        logits = made(batch, height // 2, width // 2, heads, 9, 9).normal_(std=3)
        grad = torch.zeros_like(v)
        grad[-1, -32:, -32:].normal_()
        found = _op(v, logits, grad, 'fused')
        # The last corner of the last image by itself; its first rows and columns lack windows of their neighbours.
        corner = [t[-1:, -n:, -n:].double() for t, n in ((v, 32), (logits, 16), (grad, 32))]
        wanted = _op(*corner, 'reference')
        errors = [
            _error(found[0][-1:, -30:, -30:], wanted[0][:, 2:, 2:]),
            _error(found[1][-1:, -30:, -30:], wanted[1][:, 2:, 2:]),
            _error(found[2][-1:, -15:, -15:], wanted[2][:, 1:, 1:]),
        ]
        fine &= max(errors) < 0.01
        texts.append(f'{numbers / 2**31:.2f} x 2**31: errors {", ".join(f"{e:.1e}" for e in errors)}')
        del v, logits, grad, found
        torch.cuda.empty_cache()
    return fine, '; '.join(texts)


def _attention(place: Place) -> tuple[OutlookAttention, Tensor]:
    torch.manual_seed(0)
    module = OutlookAttention(64, 2, kernel_size=3, stride=2, padding=1).to(place.device)
    side = 32 if place.cuda else 8
    return module, torch.randn(2, side, side, 64, device=place.device)


@check('operation: in a stream of its own, the same bits again')
def _stream(place: Place) -> tuple[bool, str]:
    place.need_cuda()
    module, x = _attention(place)
    with torch.no_grad():
        wanted = module(x)
        stream = torch.cuda.Stream(place.device)
        stream.wait_stream(torch.cuda.current_stream(place.device))
        with torch.cuda.stream(stream):
            found = [module(x) for _ in range(3)]
        place.synchronise()
    same = all(torch.equal(one, wanted) for one in found)
    return same, f'same: {same}'


@check('operation: in a CUDA graph, replayed on other numbers')
def _graph(place: Place) -> tuple[bool, str]:
    place.need_cuda()
    v, logits, _ = _op_inputs(place, (1, 64, 64, 6), torch.bfloat16)
    call = partial(outlook_attention, v, logits, scale=0.2, stride=2, impl='fused')
    with torch.no_grad():
        first = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        v.mul_(2)
        graph.replay()
        same, other = torch.equal(out, call()), not torch.equal(out, first)
    return same and other, f'as called: {same}; changes with its input: {other}'


@check('operation: under autocast, with gradients in float32')
def _autocast(place: Place) -> tuple[bool, str]:
    module, x = _attention(place)
    exact = copy.deepcopy(module).double()
    exact.impl = 'reference'
    with autocast('bf16', place.device):
        found = module(x)
    found.float().square().sum().backward()
    error = _error(found, exact(x.double()))
    kind = module.v.weight.grad.dtype
    return error < 0.02 and kind == torch.float32, f'error {error:.1e}, gradients in {kind}'


@check('operation: torch.compile, one graph')
def _compile(place: Place) -> tuple[bool, str]:
    module, x = _attention(place)
    # Without Inductor on a CPU, whose C++ compiler takes long.
    compiled = torch.compile(module, fullgraph=True, backend='inductor' if place.cuda else 'aot_eager')
    grads = []
    for call in (module, compiled):
        module.zero_grad()
        out = call(x)
        out.square().sum().backward()
        grads.append((out.detach(), module.attn.weight.grad.clone()))
    errors = [_error(a, b) for a, b in zip(*grads, strict=True)]
    return max(errors) < 1e-5, f'errors: result {errors[0]:.1e}, gradient {errors[1]:.1e}'


@check("operation: 'auto' takes the fused kernels")
def _auto(place: Place) -> tuple[bool, str]:
    _need_fused(place)
    v, logits, _ = _op_inputs(place, (1, 16, 16, 2), torch.float32)
    results = {impl: outlook_attention(v, logits, scale=0.4, stride=2, impl=impl) for impl in IMPLEMENTATIONS}
    same = [impl for impl in IMPLEMENTATIONS if impl != 'auto' and torch.equal(results[impl], results['auto'])]
    return same == ['fused'], f'same bits as: {", ".join(same)}'


# Networks


@check("backbone: against timm's, float32 and bfloat16")
@torch.no_grad()
def _backbone(place: Place) -> tuple[bool, str]:
    size = (512, 256) if place.cuda else (64, 96)
    models = build_backbones(BackboneCase(size=size, device=place.device))
    x = torch.randn(2, 3, *size, device=place.device)
    wanted, found = (models[side](x) for side in SIDES)
    full = max(_error(a, b) for a, b in zip(found, wanted, strict=True))
    with autocast('bf16', place.device):
        stock, ours = (max(_error(a, b) for a, b in zip(models[s](x), wanted, strict=True)) for s in SIDES)
    fine = full < 1e-4 and ours < 1.5 * stock + 1e-3
    return fine, f'errors: float32 {full:.1e}; bfloat16 {ours:.1e} (stock {stock:.1e})'


@check("backbone: gradients against timm's, float32")
def _backbone_gradients(place: Place) -> tuple[bool, str]:
    size = (256, 256) if place.cuda else (64, 64)
    models = build_backbones(BackboneCase(size=size, device=place.device))
    x, grads = torch.randn(2, 3, *size, device=place.device), {}
    for side, model in models.items():
        sum(m.square().mean() for m in model.train()(x)).backward()
        named = model.named_parameters()
        grads[side] = {name.removeprefix('volo.'): p.grad for name, p in named if p.grad is not None}
    names = grads['ours'].keys() & grads['stock'].keys()
    errors = {name: _error(grads['ours'][name], grads['stock'][name]) for name in names}
    worst = max(errors, key=errors.get)
    fine = len(names) > 100 and errors[worst] < 5e-3
    return fine, f'{len(names)} parameters, worst {worst} {errors[worst]:.1e}'


@check("head: against mmseg's UPerHead, float32 and bfloat16")
@torch.no_grad()
def _head(place: Place) -> tuple[bool, str]:
    dims, n = ARCHS['d1']['dims'][:4], 64 if place.cuda else 8
    config = dict(in_channels=list(dims), in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), num_classes=150)
    config.update(channels=512 if place.cuda else 16, norm_cfg=dict(type='BN'), align_corners=False)
    torch.manual_seed(0)
    stock, ours = (kind(**config).to(place.device).eval() for kind in (UPerHead, LeanUPerHead))
    ours.load_state_dict(stock.state_dict())
    sides = (n, n // 2, n // 2, n // 2)
    maps = [torch.randn(2, dim, side, side, device=place.device) for dim, side in zip(dims, sides, strict=True)]
    wanted = stock(maps)
    full = _error(ours(maps), wanted)
    with autocast('bf16', place.device):
        low = [_error(head(maps), wanted) for head in (stock, ours)]
    fine = full < 1e-4 and low[1] < 2 * low[0] + 1e-3
    return fine, f'errors: float32 {full:.1e}; bfloat16 {low[1]:.1e} (stock {low[0]:.1e})'


@check("loss: value, accuracy and gradient against mmseg's, class weights, ignored pixels")
def _loss(place: Place) -> tuple[bool, str]:
    classes, coarse, size = (150, (64, 64), (512, 512)) if place.cuda else (19, (12, 16), (96, 128))
    generator = torch.Generator(place.device).manual_seed(0)
    labels = torch.randint(classes, (2, 1, *size), generator=generator, device=place.device)
    labels[torch.rand(labels.shape, generator=generator, device=place.device) < 0.2] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in labels]
    logits = 3 * torch.randn(2, classes, *coarse, generator=generator, device=place.device)
    weights = (0.5 + torch.arange(classes) % 3).tolist()
    options = {}, dict(avg_non_ignore=True), dict(class_weight=weights, loss_weight=0.4)
    fine, worst = True, 0.0
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        for option in options:
            results = []
            for kind in (FCNHead, LeanFCNHead):
                head = kind(
                    in_channels=8, channels=8, num_convs=0, concat_input=False, num_classes=classes,
                    norm_cfg=dict(type='BN'), align_corners=False, loss_decode=dict(type='CrossEntropyLoss', **option),
                ).to(place.device)  # fmt: skip
                x = logits.to(dtype)  # mmseg's loss of the same numbers in float32
                x = (x.float() if kind is FCNHead else x).clone().requires_grad_()
                found = head.loss_by_feat(x, samples)
                found['loss_ce'].backward()
                results.append((found['loss_ce'].detach(), found['acc_seg'], x.grad))
            value, accuracy, gradient = (_error(b, a) for a, b in zip(*results, strict=True))
            fine &= value < 1e-5 and accuracy < 1e-3 and gradient < limit
            worst = max(worst, gradient / limit)
    return fine, f'{2 * len(options)} kinds, gradients at {worst:.0%} of what is allowed'


# Prediction


def _predict(place: Place, side: str, views: int, case: Case | None = None) -> Tensor:
    own, models = place.pair
    model = models[side] if views == 10 else models[side].module
    return predict(model, case or own, side, prepare(draw(own.size), views))


@check('prediction: ten views and one against stock mmseg')
def _predictions(place: Place) -> tuple[bool, str]:
    fine, texts = True, []
    for views in (10, 1):
        stock, ours, again = (_predict(place, side, views) for side in ('stock', 'ours', 'ours'))
        equal, found = (stock == ours).double().mean().item(), len(stock.unique())
        fine &= equal > 0.9995 and found > 5 and torch.equal(ours, again)
        texts.append(f'{views} view{"s" * (views > 1)}: {equal:.3%} equal, {found} classes')
    return fine, '; '.join(texts)


@check('prediction: precision, channels_last and window_batch against float32')
def _options(place: Place) -> tuple[bool, str]:
    views = 10 if place.cuda else 1
    wanted, (_, models) = _predict(place, 'ours', views), place.pair
    options = {
        'bf16': (dict(precision='bf16'), 0.93),
        'fp16': (dict(precision='fp16'), 0.99),
        'window_batch 1': (dict(window_batch=1), 0.9995),
        'window_batch 7': (dict(window_batch=7), 0.9995),
        'channels_last': (dict(channels_last=True), 0.9995),  # stays
    }
    if not place.cuda:
        options.pop('fp16')
    test_cfg, fine, texts = models['ours'].module.test_cfg, True, []
    before = dict(test_cfg)
    for name, (option, least) in options.items():
        test_cfg.update(option)
        try:
            equal = (_predict(place, 'ours', views) == wanted).double().mean().item()
        finally:
            test_cfg.clear()
            test_cfg.update(before)
        fine &= equal > least
        texts.append(f'{name} {equal:.3%}')
    return fine, 'equal pixels: ' + ', '.join(texts)


@check('prediction: CUDA graphs, as without them, also after the weights have changed')
def _graphs(place: Place) -> tuple[bool, str]:
    place.need_cuda()
    case, models = place.pair
    model, data = models['ours'].module, prepare(draw(case.size), 1)
    call = partial(predict, model, case, 'ours', data)
    before = dict(model.test_cfg)
    model.test_cfg.precision = 'bf16'
    last, equal = model.decode_head.conv_seg.weight.data, []
    weights = last.clone()
    try:
        for factor in (1.0, -1.0):
            last.mul_(factor)
            model.test_cfg.cuda_graph = False
            wanted = call()
            model.test_cfg.cuda_graph = True
            equal += [(call() == wanted).double().mean().item() for _ in range(4)]
    finally:
        last.copy_(weights)
        model.test_cfg.clear()
        model.test_cfg.update(before)
    return min(equal) > 0.9995, f'{len(equal)} predictions, {min(equal):.3%} or more of the pixels equal'


@check('prediction: pictures of several sizes in a row, the same bits again')
def _sizes(place: Place) -> tuple[bool, str]:
    sizes = ((384, 640), (300, 420), (512, 333), (256, 256)) if place.cuda else ((64, 128), (70, 90))
    case, models = place.pair
    data = [prepare(draw(size), 1) for size in sizes]
    model = models['ours'].module
    first = [predict(model, case, 'ours', one) for one in data]
    again = [predict(model, case, 'ours', one) for _ in range(2) for one in data]  # nobody waits in between
    same = all(torch.equal(a, b) for a, b in zip([*first, *first], again, strict=True))
    shapes = [tuple(ids.shape) for ids in first] == list(sizes)
    return same and shapes, f'{len(again)} predictions, same: {same}'


@check('prediction: a batch of windows that does not fit is halved')
def _halved(place: Place) -> tuple[bool, str]:
    place.need_cuda()
    case, models = place.pair
    model, data = models['ours'].module, prepare(draw(case.size), 1)
    wanted = predict(model, case, 'ours', data)
    model.test_cfg.window_batch = 12
    _, total = torch.cuda.mem_get_info(place.device)
    network = type(model.network)(model)  # nothing compiled, captured or remembered
    before_network, model.network = model.network, network
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(place.device)
    base = torch.cuda.memory_reserved(place.device)
    try:
        predict(model, case, 'ours', data)
        growth = torch.cuda.max_memory_reserved(place.device) - base
        model.network = type(model.network)(model)
        torch.cuda.empty_cache()
        base = torch.cuda.memory_reserved(place.device)
        torch.cuda.set_per_process_memory_fraction(min((base + 0.6 * growth) / total, 1.0), place.device)
        found = predict(model, case, 'ours', data)
        fitted = dict(model.network._fits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)
        model.network = before_network
        del model.test_cfg['window_batch']
    equal = (found == wanted).double().mean().item()
    return bool(fitted) and equal > 0.9995, f'12 windows took {growth / 1e6:.0f} MB; fitted {fitted}, {equal:.3%} equal'


# Training


def _training_config(place: Place, folder: Path, name: str, **options) -> Config:
    """``configs/volo_d1_quickstart.py``, smaller; ``options`` with __ for the dots."""
    path = CONFIGS / 'volo_d1_quickstart.py'
    if not path.is_file():
        raise Skipped('needs configs/ of a clone of the repository')
    crop, scene = ((256, 256), (256, 512)) if place.cuda else ((64, 64), (64, 128))
    config = load_config(str(path), None, str(folder / name))
    config.model.backbone.arch = dict(_ARCH)
    data = dict(data_root=str(folder / 'scenes'), train=6, val=2, size=scene)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.update(data)
        loader.batch_size = 2 if loader is config.train_dataloader else 1
    changes = dict(
        model__backbone__img_size=crop, model__data_preprocessor__size=crop,
        model__decode_head__in_channels=list(_ARCH['dims']), model__decode_head__channels=32,
        train_dataloader__dataset__pipeline__2__scale=scene[::-1],
        train_dataloader__dataset__pipeline__3__crop_size=crop,
        train_cfg__max_iters=4, train_cfg__val_interval=100, default_hooks__checkpoint__interval=4,
        param_scheduler=[dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=0, end=8)],
        default_hooks__logger__interval=1, env_cfg__cudnn_benchmark=False, log_level='WARNING',
    )  # fmt: skip
    config.merge_from_dict({key.replace('__', '.'): value for key, value in {**changes, **options}.items()})
    # mmengine keeps message hubs and visualizers by name, for all runs of a process.
    config.experiment_name = config.visualizer.name = f'{folder.name}_{name}_{time.monotonic_ns()}'
    return config


def _need_this_device(place: Place) -> None:
    if torch.device(get_device()).type != torch.device(place.device).type:
        raise Skipped(f'runs of mmengine take {get_device()}')


@check('training: bfloat16, and float16 with a loss scaler')
def _training(place: Place) -> tuple[bool, str]:
    _need_this_device(place)
    fine, texts = True, []
    wrappers = {'bf16': dict(optim_wrapper__type='BFloat16OptimWrapper')}
    if place.cuda:
        scaled = dict(optim_wrapper__type='AmpOptimWrapper', optim_wrapper__loss_scale='dynamic')
        wrappers['fp16'] = scaled
    with tempfile.TemporaryDirectory() as folder:
        for name, options in wrappers.items():
            runner = build_runner(_training_config(place, Path(folder), name, **options))
            before = {key: value.detach().clone() for key, value in runner.model.named_parameters()}
            runner.train()
            loss = runner.message_hub.get_scalar('train/loss').current()
            moved = sum(not torch.equal(before[key], value) for key, value in runner.model.named_parameters())
            finite = all(value.isfinite().all() for value in runner.model.parameters())
            fine &= bool(np.isfinite(loss)) and finite and moved > 0.9 * len(before)
            texts.append(f'{name}: loss {loss:.3f}, {moved} of {len(before)} parameters moved')
    return fine, '; '.join(texts)


@check('training: a resumed run against one that was not interrupted')
def _resumed(place: Place) -> tuple[bool, str]:
    _need_this_device(place)
    with tempfile.TemporaryDirectory() as name:
        folder, states = Path(name), {}
        whole = dict(train_cfg__max_iters=8)
        for run, steps in {'whole': [whole], 'again': [whole], 'cut': [{}, dict(whole, resume=True)]}.items():
            for options in steps:
                build_runner(_training_config(place, folder, run, **options)).train()
            state = load_from_local(str(folder / run / 'iter_8.pth'))['state_dict']
            states[run] = {key: value for key, value in state.items() if value.is_floating_point()}
    again, cut = (
        max((state[key].double() - value.double()).abs().max().item() for key, value in states['whole'].items())
        for state in (states['again'], states['cut'])
    )
    # Some of CUDA's sums are not in one order: two runs alike tell how far apart they come to be.
    fine = cut <= 10 * again + 1e-5 if place.cuda else cut == 0
    return fine, f'weights differ by {cut:.1e}, those of the same run twice by {again:.1e}'


def _small_config(norm: str = 'BN') -> ConfigDict:
    norm_cfg = dict(type=norm, requires_grad=True)
    config = dict(
        type='StreamingEncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[120.0] * 3, std=[60.0] * 3, size=(64, 64)),
        backbone=dict(type='VOLO', arch=_ARCH, img_size=64, norm_cfg=norm_cfg),
        decode_head=dict(
            type='LeanUPerHead',
            in_channels=list(_ARCH['dims']),
            in_index=[0, 1, 2, 3],
            channels=32,
            num_classes=19,
            norm_cfg=norm_cfg,
            align_corners=False,
            dropout_ratio=0.0,
            loss_decode=dict(type='CrossEntropyLoss'),
        ),
        test_cfg=dict(mode='whole'),
    )
    return ConfigDict(config)


def _small_segmentor(device: str, norm: str = 'BN') -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build(_small_config(norm)).to(device)


def _small_batch() -> dict:
    scenes = [draw_scene(seed, (64, 64)) for seed in range(2)]
    return dict(
        inputs=[torch.from_numpy(picture).permute(2, 0, 1) for picture, _ in scenes],
        data_samples=[
            SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(label)[None].long())) for _, label in scenes
        ],
    )


def _losses(model: nn.Module, steps: int = 3) -> list[float]:
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)))
    model.train()
    return [float(model.train_step(_small_batch(), wrapper)['loss']) for _ in range(steps)]


@contextmanager
def _one_process(backend: str):
    if dist.is_initialized():
        raise Skipped('torch.distributed is in use')
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _apart(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))


@check('training: SyncBN in one process')
def _sync_bn(place: Place) -> tuple[bool, str]:
    if not place.cuda:
        raise Skipped('gloo has no SyncBN')
    with _one_process('nccl'):
        found = _losses(_small_segmentor(place.device, 'SyncBN'))
    apart = _apart(found, _losses(_small_segmentor(place.device)))
    return apart < 1e-3, f'losses of 3 steps differ from those with BN by {apart:.1e}'


@check('training: sharded (FSDP), one process')
def _sharded(place: Place) -> tuple[bool, str]:
    _need_this_device(place)
    from ..engine.sharding import VOLOFullyShardedDataParallel  # PyTorch's FSDP is slow to import

    wanted = _losses(_small_segmentor(place.device))
    with _one_process('nccl' if place.cuda else 'gloo'):
        options = (
            {} if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 8) else dict(reshard_after_forward=False)
        )
        model = VOLOFullyShardedDataParallel(_small_segmentor(place.device), **options)
        found = _losses(model)
        model.eval()
        shape = tuple(model.val_step(_small_batch())[0].pred_sem_seg.data.shape)
    apart = _apart(found, wanted)
    return apart < 1e-3 and shape == (1, 64, 64), f'losses of 3 steps differ from those of one without by {apart:.1e}'


# Export


@check('export: a pt2 program, traced on the CPU and moved to the device')
@torch.no_grad()
def _moved_program(place: Place) -> tuple[bool, str]:
    try:
        from torch.export.passes import move_to_device_pass
    except ImportError as error:
        raise Skipped(f'torch {torch.__version__} cannot move exported programs') from error
    model = _small_segmentor('cpu').eval()
    twin = MODELS.build(exportable(Config(dict(model=_small_config()))).model)
    twin.load_state_dict(model.state_dict())
    program = trace(ExportNetwork(twin, 'logits', False, False).eval(), (64, 96), False)
    x = torch.randn(2, 3, 64, 96)
    wanted = model(x, mode='tensor')
    found = move_to_device_pass(program, place.device).module()(x.to(place.device))[1]
    error = _error(found.cpu(), wanted)
    return error < 1e-4 and found.device.type == torch.device(place.device).type, f'error {error:.1e} on {found.device}'
