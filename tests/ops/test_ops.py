"""Outlook attention against four loops in float64, timm's module, gradcheck, onnxruntime and its plain definition."""

import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models.volo import OutlookAttention as TimmOutlookAttention
from torch.nn.parallel import DistributedDataParallel

from mmseg_volo import VOLO, ops
from mmseg_volo.models.volo import OutlookAttention
from mmseg_volo.ops import fused, outlook_attention

needs_numba = pytest.mark.skipif(not importlib.util.find_spec('numba'), reason='Numba is not installed')
ROOT = Path(__file__).resolve().parents[2]


def four_loops(v, logits, scale, kernel_size, stride, padding):
    """Equations 3-5 of the paper, token by token."""
    B, H, W, C = v.shape
    _, h, w, M = logits.shape[:4]
    out, D = torch.zeros_like(v), C // M
    offsets = [(i, j) for i in range(kernel_size) for j in range(kernel_size)]
    for b in range(B):
        for y in range(h):
            for x in range(w):
                for m in range(M):
                    attn = torch.softmax(logits[b, y, x, m] * scale, dim=-1)
                    head = slice(m * D, (m + 1) * D)
                    for p, (i, j) in enumerate(offsets):
                        for q, (k, n) in enumerate(offsets):
                            to = (y * stride + i - padding, x * stride + j - padding)
                            of = (y * stride + k - padding, x * stride + n - padding)
                            if 0 <= to[0] < H and 0 <= to[1] < W and 0 <= of[0] < H and 0 <= of[1] < W:
                                out[b, to[0], to[1], head] += attn[p, q] * v[b, of[0], of[1], head]
    return out


CASES = [  # height, width, kernel, stride, padding
    (6, 8, 3, 2, 1),
    (5, 7, 3, 2, 1),
    (4, 5, 3, 1, 1),
    (1, 1, 3, 2, 1),
    (6, 6, 3, 3, 0),
    (5, 6, 3, 2, 0),
    (8, 7, 3, 3, 2),
    (8, 9, 3, 4, 1),
    (5, 6, 2, 1, 0),
    (7, 5, 5, 2, 2),
]


def inputs(height, width, kernel, stride, padding, dtype=torch.float64, batch=2, heads=2, dim=3):
    grid = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
    v = torch.randn(batch, height, width, heads * dim, dtype=dtype)
    logits = 3 * torch.randn(batch, *grid, heads, kernel**2, kernel**2, dtype=dtype)
    return v, logits, dict(scale=0.7, kernel_size=kernel, stride=stride, padding=padding)


@pytest.mark.parametrize('impl', ['reference', 'slices', 'auto'])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_equals_four_loops(case, impl):
    v, logits, kwargs = inputs(*case)
    torch.testing.assert_close(outlook_attention(v, logits, **kwargs, impl=impl), four_loops(v, logits, **kwargs))


@needs_numba
@pytest.mark.parametrize('dim', [3, 32])
@pytest.mark.parametrize('case', [case for case in CASES if case[2] == 3], ids=str)
def test_fused_equals_four_loops(case, dim):
    v, logits, kwargs = inputs(*case, dim=dim)
    out = outlook_attention(v.float(), logits.float(), **kwargs, impl='fused')
    torch.testing.assert_close(out, four_loops(v, logits, **kwargs).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('impl', ['reference', 'slices'])
@pytest.mark.parametrize('case', CASES[:4], ids=str)
def test_gradcheck(case, impl):
    v, logits, kwargs = inputs(min(case[0], 4), min(case[1], 4), *case[2:], batch=1)
    v.requires_grad_(), logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: outlook_attention(a, b, **kwargs, impl=impl), (v, logits))


@pytest.mark.parametrize('size', [(8, 8), (7, 9)], ids=str)
@pytest.mark.parametrize('stride', [1, 2])
def test_module_equals_timms(size, stride):
    theirs = TimmOutlookAttention(48, 2, kernel_size=3, padding=1, stride=stride)
    ours = OutlookAttention(48, 2, kernel_size=3, padding=1, stride=stride)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 48)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize('impl', ['reference', 'slices', 'auto'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_output_has_the_dtype_of_v_and_its_precision(dtype, impl):
    v, logits, kwargs = inputs(6, 8, 3, 2, 1)
    exact = outlook_attention(v, logits, **kwargs)
    out = outlook_attention(v.to(dtype), logits.to(dtype), **kwargs, impl=impl)
    assert out.dtype == dtype and out.shape == v.shape
    assert (out.double() - exact).norm() / exact.norm() < 20 * math.sqrt(9) * torch.finfo(dtype).eps


# Fused against plain, by the error to float64

SHAPES = [  # batch, height, width, heads, channels of a head, stride, padding
    (1, 64, 64, 6, 32, 2, 1),  # VOLO-D1, 512 x 512 pixels
    (2, 28, 28, 12, 32, 2, 1),  # VOLO-D4, 224 x 224
    (1, 31, 45, 8, 32, 2, 1),
    (2, 7, 9, 2, 24, 1, 1),
    (1, 10, 6, 3, 64, 2, 1),
    (3, 1, 1, 2, 32, 2, 1),
    (1, 1, 40, 1, 40, 1, 1),
    (1, 9, 11, 2, 25, 2, 0),
    (1, 12, 8, 2, 32, 2, 2),
]


def drawn(batch, height, width, heads, dim, stride, padding):
    """v, logits and the gradient of the output in float64, and the options."""
    v, logits, kwargs = inputs(height, width, 3, stride, padding, batch=batch, heads=heads, dim=dim)
    return (v, logits, torch.randn_like(v)), {**kwargs, 'scale': dim**-0.5}


def run(impl, tensors, kwargs):
    """Output and both gradients."""
    v, logits, grad = tensors
    v, logits = v.detach().requires_grad_(), logits.detach().requires_grad_()
    out = outlook_attention(v, logits, **kwargs, impl=impl)
    out.backward(grad)
    return out.detach(), v.grad, logits.grad


def check_accuracy(tensors, kwargs, dtype):
    # Both are compared with the exact result for the rounded inputs.
    low = [tensor.to(dtype) for tensor in tensors]
    exact = run('reference', [tensor.double() for tensor in low], kwargs)
    for x, plain, ours in zip(exact, run('reference', low, kwargs), run('fused', low, kwargs), strict=True):
        assert ours.dtype == dtype and ours.shape == x.shape
        rounding = torch.finfo(dtype).eps / 8 * x.norm()  # in case the plain path happens to be exact
        assert (ours - x).norm() <= 2 * (plain - x).norm() + rounding


@needs_numba
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_fused_is_as_accurate_as_plain(shape, dtype):
    torch.manual_seed(0)
    check_accuracy(*drawn(*shape), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_on_a_gpu_is_as_accurate_as_plain(gpu, shape, dtype):
    torch.manual_seed(0)
    tensors, kwargs = drawn(*shape)
    tensors = [tensor.to(gpu) for tensor in tensors]
    check_accuracy(tensors, kwargs, dtype)
    low = [tensor.to(dtype) for tensor in tensors]
    for one, other in zip(run('fused', low, kwargs), run('fused', low, kwargs), strict=True):
        assert torch.equal(one, other)


INTERPRETED = """
import json, sys
import torch
from mmseg_volo.ops import gpu, outlook_attention

torch.set_num_threads(1)
torch.manual_seed(0)
for batch, height, width, heads, dim, stride, padding in json.loads(sys.argv[1]):
    h, w = ((side + 2 * padding - 3) // stride + 1 for side in (height, width))
    v, grad = torch.randn(2, batch, height, width, heads * dim)
    logits = 3 * torch.randn(batch, h, w, heads, 9, 9)
    for dtype in torch.float32, torch.float16, torch.bfloat16:
        low = v.to(dtype), logits.to(dtype)
        a, b = (tensor.double().requires_grad_() for tensor in low)
        exact = outlook_attention(a, b, scale=0.2, stride=stride, padding=padding)
        exact.backward(grad.to(dtype).double())
        out = gpu.forward(*low, 0.2, stride, padding)
        found = out, *gpu.backward(grad.to(dtype), *low, 0.2, stride, padding)
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, (exact.detach(), a.grad, b.grad))]
        if dtype == torch.bfloat16:
            errors.pop()  # the interpreter multiplies bfloat16 matrices as integers
        print(json.dumps([torch.finfo(dtype).eps, *errors]))
"""


@pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='Triton is not installed')
def test_gpu_kernels_under_tritons_interpreter():
    shapes = [(2, 3, 5, 2, 24, 2, 1), (1, 2, 35, 1, 33, 1, 1), (1, 3, 5, 1, 64, 2, 0)]
    command = [sys.executable, '-W', 'ignore', '-c', INTERPRETED, json.dumps(shapes)]
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[')]
    assert len(lines) == 9
    for eps, *errors in lines:
        assert max(errors) < 3 * eps, lines  # the interpreter truncates to bfloat16, a GPU rounds


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('dtype', ['fp32', 'fp16', 'bf16'])
def test_gpu_kernels_compile(capability, dtype, tmp_path, monkeypatch):
    """Compile to machine code, which needs no GPU, with few spilled registers: the interpreter accepts invalid code."""
    triton = pytest.importorskip('triton', minversion='3.3')
    from triton.backends.compiler import GPUTarget

    from mmseg_volo.ops import gpu

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    sizes, kept = dict(M=12, D=32, STRIDE=2, PADDING=1), 'fp32' if dtype == 'fp32' else 'fp16'
    for kernel, constants, of_weights in [
        (gpu._cells_kernel, dict(TRANSPOSED=False, ROWS=16 if dtype == 'fp32' else 32, HALF=16), dtype),
        (gpu._cells_kernel, dict(TRANSPOSED=True, ROWS=16 if dtype == 'fp32' else 32, HALF=16), kept),
        (gpu._windows_kernel, dict(ROWS=4, BLOCK=32), None),
    ]:
        kinds = dict(weights=f'*{of_weights}', transposed=f'*{kept}', scale='fp32', factor='fp32')
        kinds |= dict.fromkeys(('tokens', 'grad', 'v', 'logits', 'grad_logits', 'out'), f'*{dtype}')
        constants = {**sizes, **constants}
        signature = {name: 'constexpr' if name in constants else kinds.get(name, 'i32') for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = {(i,): [['tt.divisibility', 16]] for i, kind in enumerate(signature.values()) if kind[0] == '*'}
        source = triton.compiler.ASTSource(kernel, signature, places, aligned)
        options = dict(num_warps=2, **({} if kernel is gpu._windows_kernel else gpu._REGISTERS))
        compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
        assert 'atom' not in compiled.asm['ptx']
        cubin = tmp_path / 'kernel.cubin'
        cubin.write_bytes(compiled.asm['cubin'])
        tools = Path(triton.__file__).parent / 'backends/nvidia/bin'
        command = [tools / 'cuobjdump', '--dump-resource-usage', cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Registers are spilled to the stack: up to 128 bytes with the compilers tried.
        assert int(re.search(r'STACK:(\d+) ', usage)[1]) <= (160 if kernel is gpu._cells_kernel else 0), usage


@needs_numba
def test_results_are_bitwise_equal_in_each_run_and_with_any_number_of_threads(monkeypatch):
    from mmseg_volo.ops import cpu

    tensors, kwargs = drawn(2, 30, 22, 6, 32, 2, 1)
    tensors = [tensor.float() for tensor in tensors]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [run('fused', tensors, kwargs), run('fused', tensors, kwargs)]
        monkeypatch.setattr(cpu, '_openmp', lambda: None)  # as on systems without PyTorch's OpenMP
        results.append(run('fused', tensors, kwargs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@needs_numba
def test_large_logits_nan_and_infinity():
    v, logits, kwargs = inputs(6, 8, 3, 2, 1, dtype=torch.float32, dim=32)
    logits[0, 0, 0] = 1e4 * torch.randn_like(logits[0, 0, 0])
    logits[0, 1, 1, 0, 0] = torch.tensor([0.0] * 4 + [float('-inf')] * 5)
    torch.testing.assert_close(
        outlook_attention(v, logits, **kwargs, impl='fused'), outlook_attention(v, logits, **kwargs, impl='reference')
    )
    for value in (float('nan'), float('inf')):
        broken = logits.clone()
        broken[1, 1, 2, 0, 4, 3] = value
        plain, ours = (outlook_attention(v, broken, **kwargs, impl=impl).isnan() for impl in ('reference', 'fused'))
        assert plain.any() and torch.equal(plain, ours)
    broken = v.clone()
    broken[0, 3, 3, 5] = float('nan')
    plain, ours = (outlook_attention(broken, logits, **kwargs, impl=impl).isnan() for impl in ('reference', 'fused'))
    assert torch.equal(plain, ours)


@needs_numba
@pytest.mark.parametrize('impl', ['auto', 'fused', 'slices', 'reference'])
def test_inputs_need_not_be_contiguous(impl):
    v, logits, kwargs = inputs(6, 8, 3, 2, 1, dtype=torch.float32)
    permuted = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    strided = torch.stack([logits, logits], dim=-1)[..., 0]
    assert not permuted.is_contiguous() and not strided.is_contiguous()
    expected = outlook_attention(v, logits, **kwargs, impl=impl)
    torch.testing.assert_close(outlook_attention(permuted, strided, **kwargs, impl=impl), expected, rtol=0, atol=1e-6)


# As a PyTorch operator


@needs_numba
def test_operator_passes_opcheck():
    (v, logits, _), _ = drawn(1, 6, 8, 2, 8, 2, 1)
    tensors = [tensor.float().requires_grad_() for tensor in (v, logits)]
    torch.library.opcheck(fused.outlook_attention_fused, (*tensors, 0.4, 2, 1))


@needs_numba
def test_torch_compile_sees_one_node():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    module = OutlookAttention(64, 2, kernel_size=3, stride=2, padding=1)
    x = torch.randn(1, 6, 8, 64)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    (graph,) = graphs
    nodes = [str(node.target) for node in graph.graph.nodes if node.op == 'call_function']
    assert sum('outlook_attention' in name for name in nodes) == 1
    assert not any(name in str(nodes) for name in ('unfold', 'softmax'))


@needs_numba
def test_autocast():
    module = OutlookAttention(64, 2, kernel_size=3, stride=2, padding=1)
    x = torch.randn(2, 6, 8, 64)
    with torch.autocast('cpu', torch.bfloat16):
        out = module(x)
    out.float().square().sum().backward()
    gradient = module.v.weight.grad.clone()
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    module.zero_grad()
    exact = module(x)
    exact.square().sum().backward()
    assert (out - exact).norm() < 0.02 * exact.norm()
    assert (gradient - module.v.weight.grad).norm() < 0.02 * gradient.norm()


def tiny(**options) -> VOLO:
    torch.manual_seed(0)
    arch = dict(depths=(2, 1), dims=(64, 64), heads=(2, 2), mlp_ratios=2, stem_width=8)
    model = VOLO(arch, img_size=64, out_indices=(0, 1), **options)
    model.init_weights()
    return model


def trained(model, steps=2) -> list[torch.Tensor]:
    """The parameters after some steps of AdamW."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(out.square().mean() for out in model(torch.randn(2, 3, 64, 96))).backward()
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


@needs_numba
def test_two_training_steps_equal_those_of_the_plain_path(monkeypatch):
    ours = trained(tiny(out_norm=False))
    monkeypatch.setattr(fused, 'why_not', lambda *args, **kwargs: 'disabled by the test')
    plain = trained(tiny(out_norm=False))
    start = [p.detach() for p in tiny(out_norm=False).parameters()]
    moved = max((p - s).abs().max() for p, s in zip(plain, start, strict=True))
    assert moved > 1e-3
    for one, other in zip(ours, plain, strict=True):
        # Adam normalises gradients, so a parameter whose gradient is rounding error may move by a full step.
        assert (one - other).abs().quantile(0.99) < 1e-5


@needs_numba
def test_checkpointing_and_ddp(tmp_path):
    plain = trained(tiny())
    torch.testing.assert_close(trained(tiny(with_cp=True)), plain, rtol=0, atol=0)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny())
        torch.testing.assert_close(trained(model), plain, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


# The choice of 'auto'


@needs_numba
def test_auto_picks_an_implementation_that_can_run(caplog):
    v, logits, kwargs = inputs(6, 8, 3, 2, 1, dtype=torch.float32)
    choice = lambda a, b, **other: ops._choose(a, b, {**kwargs, **other})  # noqa: E731
    assert choice(v, logits)[0] == 'fused' and choice(v.bfloat16(), logits.bfloat16())[0] == 'fused'
    for a, b, other, reason in [
        (v.double(), logits.double(), {}, 'float64'),
        (v.half(), logits.half(), {}, 'float16'),
        (v.bfloat16(), logits, {}, 'the same for both'),
        (v, logits, dict(kernel_size=5), 'kernel_size=3'),
        (v, logits, dict(scale=-1.0), 'scale above 0'),
        (v, logits, dict(padding=3), 'padding of 0, 1 or 2'),
        (v[:0], logits[:0], {}, 'no elements'),
    ]:
        found, why = choice(a, b, **other)
        assert found == 'slices' and reason in why
        with pytest.raises(ValueError, match=r"impl='fused' cannot run|logits must be"):
            outlook_attention(a, b, **{**kwargs, **other}, impl='fused')
    meta = v.to('meta'), logits.to('meta')
    assert choice(*meta) == ('reference', 'not fused: there is no kernel for meta devices')
    assert outlook_attention(*meta, **kwargs).shape == v.shape

    ops._log.cache_clear()
    with caplog.at_level(logging.DEBUG, 'mmseg_volo.ops'):
        for _ in range(3):
            outlook_attention(v.half(), logits.half(), **kwargs)
    ((_, level, line),) = caplog.record_tuples
    assert level == logging.DEBUG and 'slices, not fused: the CPU kernels take float32 or bfloat16' in line


def test_limits_of_the_gpu_kernels(monkeypatch):
    monkeypatch.setattr(fused, 'what_is_missing', lambda device, index: None)

    class Cuda:
        """The attributes that the checks read."""

        def __init__(self, shape, dtype=torch.bfloat16):
            self.shape, self.dtype, self.device = shape, dtype, torch.device('cuda', 0)

    def why(v=(4, 128, 128, 384), logits=(4, 64, 64, 12, 9, 9), dtype=torch.bfloat16, **other):
        return fused.why_not(
            Cuda(v, dtype), Cuda(logits), **{**dict(scale=0.2, kernel_size=3, stride=2, padding=1), **other}
        )

    assert why() is None and why(dtype=torch.float32) is None
    assert 'float64' in why(dtype=torch.float64)
    assert 'strides 1 and 2' in why(stride=3)
    assert 'heads of 8 to 128' in why((1, 8, 8, 4), (1, 4, 4, 1, 9, 9))
    assert 'less than 2**31' in why((1, 4096, 4096, 384), (1, 2048, 2048, 12, 9, 9))


WITHOUT = """
import sys
import torch
sys.modules['numba'] = sys.modules['triton'] = None  # as if not installed
import mmseg_volo
v, logits = torch.randn(1, 4, 4, 32), torch.randn(1, 2, 2, 1, 9, 9)
mmseg_volo.ops.outlook_attention(v, logits, scale=1.0, stride=2)
try:
    mmseg_volo.ops.outlook_attention(v, logits, scale=1.0, stride=2, impl='fused')
except ValueError as error:
    print(error)
"""


def test_works_without_numba_and_triton():
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "impl='fused' cannot run: Numba cannot be used: " in done.stdout


def test_bad_input_is_named():
    v, logits, kwargs = inputs(6, 8, 3, 2, 1)
    with pytest.raises(ValueError, match='impl must be'):
        outlook_attention(v, logits, **kwargs, impl='fast')
    with pytest.raises(ValueError, match=r'logits must be \(2, 6, 8, 2, 9, 9\)'):
        outlook_attention(v, logits, **{**kwargs, 'stride': 1})
    with pytest.raises(ValueError, match=r'v must be \(B, H, W, C\)'):
        outlook_attention(v[0], logits, **kwargs)
    with pytest.raises(ValueError, match='5 channels of v cannot be split into the 2 heads'):
        outlook_attention(v[..., :5], logits, **kwargs)


# Export

PLAIN = {'Unfold', 'Col2Im', 'im2col', 'col2im', 'Scatter', 'unfold'}


@pytest.mark.parametrize('size', [(8, 8), (6, 10)], ids=str)
def test_exports_to_onnx_without_unfold(tmp_path, size):
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    module, x = OutlookAttention(64, 2, kernel_size=3, stride=2, padding=1).eval(), torch.randn(2, *size, 64)
    path = str(tmp_path / 'outlook.onnx')
    torch.onnx.export(module, (x,), path, opset_version=17, dynamo=False)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [17]
    operators = {node.op_type for node in model.graph.node}
    assert not any(word in name for word in PLAIN for name in operators) and 'Slice' in operators
    assert not any(node.domain for node in model.graph.node)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), module(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='PyTorch 2.6 has no is_exporting')
def test_torch_export_sees_plain_operators():
    module, x = OutlookAttention(64, 2, kernel_size=3, stride=2, padding=1).eval(), torch.randn(2, 8, 8, 64)
    program = torch.export.export(module, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert not any(word in name for word in (*PLAIN, 'mmseg_volo') for name in names)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)
