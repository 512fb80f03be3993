"""Losses by bands of rows and by the kernel, against mmseg's heads and against float64."""

import importlib.util
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_volo.models import losses
from mmseg_volo.ops import upsampled_cross_entropy as kernel


def heads(loss=None, **changes) -> list:
    """mmseg's head and ours."""
    config = dict(in_channels=8, channels=8, num_convs=0, concat_input=False, num_classes=5, norm_cfg=dict(type='BN'))
    loss = dict(dict(type='CrossEntropyLoss'), **(loss or {}))
    return [MODELS.build(dict(config, type=kind, loss_decode=loss, **changes)) for kind in ('FCNHead', 'LeanFCNHead')]


def samples(size, ignored=0.2, batch=2, device='cpu') -> list[SegDataSample]:
    labels = torch.randint(0, 5, (batch, 1, *size))
    labels[torch.rand(labels.shape) < ignored] = 255
    return [SegDataSample(gt_sem_seg=PixelData(data=label.to(device))) for label in labels]


def run(head, logits, data):
    logits = logits.clone().requires_grad_()
    try:
        found = head.loss_by_feat(logits, data)
    except IndexError:
        if isinstance(head, losses.LeanFCNHead):
            raise
        pytest.skip('mmsegmentation 1.2 fails on class weights with ignored pixels')
    (name,) = (name for name in found if name.startswith('loss'))
    (3 * found[name]).backward()
    return name, found[name].detach(), found['acc_seg'], logits.grad


OPTIONS = {
    'plain': {},
    'named and weighted': dict(loss_weight=0.4, loss_name='loss_aux'),
    'not ignored': dict(avg_non_ignore=True),
    'class weights': dict(class_weight=[1.0, 0.5, 2.0, 0.0, 1.5]),
}


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('sizes', [((4, 6), (32, 48)), ((5, 7), (33, 50)), ((9, 4), (9, 4)), ((8, 8), (5, 3))], ids=str)
@pytest.mark.parametrize('option', OPTIONS)
def test_loss_accuracy_and_gradient_equal_mmseg(option, sizes, align_corners, monkeypatch):
    monkeypatch.setattr(losses, '_BAND', 2 * 5 * sizes[1][1] * 7)  # seven rows
    stock, lean = heads(OPTIONS[option], align_corners=align_corners)
    logits, data = 3 * torch.randn(2, 5, *sizes[0], dtype=torch.float64), samples(sizes[1])
    expected, found = run(stock, logits, data), run(lean, logits, data)
    assert found[0] == expected[0]
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-9)


def test_columns_by_a_matrix_product(monkeypatch):
    """As on a GPU where the kernel cannot run."""
    monkeypatch.setattr(losses, '_INTERPOLATES', ())
    test_loss_accuracy_and_gradient_equal_mmseg('named and weighted', ((5, 7), (33, 50)), False, monkeypatch)
    test_loss_accuracy_and_gradient_equal_mmseg('plain', ((8, 8), (5, 3)), True, monkeypatch)


def test_all_ignored_and_no_gradient():
    stock, lean = heads()
    logits, data = torch.randn(2, 5, 4, 4), samples((16, 16), ignored=1.1)
    for one, other in zip(run(lean, logits, data)[1:], run(stock, logits, data)[1:], strict=True):
        torch.testing.assert_close(one, other)
    data = samples((16, 16))
    with torch.no_grad():
        found, expected = (head.loss_by_feat(logits, data)['loss_ce'] for head in (lean, stock))
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_class_weights_without_ignored_pixels():
    """mmseg raises an IndexError for class weights with avg_non_ignore; without ignored pixels the mean is the same."""
    weights = OPTIONS['class weights']
    stock, _ = heads(weights)
    _, lean = heads(dict(weights, avg_non_ignore=True))
    logits, data = torch.randn(2, 5, 4, 4), samples((16, 16))
    torch.testing.assert_close(run(lean, logits, data)[1], run(stock, logits, data)[1])


@pytest.mark.parametrize(
    ('loss', 'changes'),
    [
        (dict(use_sigmoid=True), {}),
        (dict(reduction='sum'), {}),
        (dict(type='DiceLoss'), {}),
        ({}, dict(sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=10))),
    ],
    ids=str,
)
def test_other_losses_are_left_to_mmseg(loss, changes, monkeypatch):
    monkeypatch.setattr(losses, '_BandedCrossEntropy', None)
    stock, lean = heads(loss, **changes)
    logits, data = torch.randn(2, 5, 4, 4), samples((16, 16))
    for one, other in zip(run(lean, logits, data)[1:], run(stock, logits, data)[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_precision_under_autocast_is_at_least_that_of_mmseg():
    stock, lean = heads()
    logits, data = 3 * torch.randn(2, 5, 4, 4), samples((64, 64))
    exact = run(stock, logits.bfloat16().double(), data)
    with torch.autocast('cpu', torch.bfloat16):
        plain, ours = (run(head, logits.bfloat16(), data) for head in (stock, lean))
    assert ours[3].dtype == torch.bfloat16
    assert (ours[1] - exact[1]).abs() <= (plain[1] - exact[1]).abs() + 1e-6
    assert (ours[3] - exact[3]).norm() <= 1.1 * (plain[3] - exact[3]).norm()


def test_no_tensor_of_the_labels_size_is_kept():
    logits, data, size = torch.randn(2, 5, 4, 4, requires_grad=True), samples((64, 64)), 2 * 5 * 64 * 64
    for head, least, most in zip(heads(), (size, 0), (float('inf'), size / 10), strict=True):
        saved = []

        def pack(x, saved=saved):
            saved.append((weakref.ref(x), x.numel()))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = head.loss_by_feat(logits, data)
        kept = sum(count for reference, count in saved if reference() is not None)
        assert least <= kept <= most and found['loss_ce'].requires_grad


# By the kernel

SHAPES = [  # batch, classes, size of the logits, size of the labels, align_corners, ignored label
    (2, 5, (4, 6), (32, 48), False, 255),
    (1, 19, (5, 7), (33, 50), True, 255),
    (2, 3, (9, 4), (9, 4), False, 0),
    (1, 10, (8, 8), (5, 3), False, 255),
    (1, 10, (8, 8), (5, 3), True, 255),
    (1, 2, (1, 1), (7, 9), False, -100),
    (1, 3, (3, 1), (1, 9), True, 255),
    (1, 4, (2, 2), (2, 140), False, 255),
    (1, 3, (18, 70), (18, 71), False, 255),
]


def drawn(batch, classes, size, out, align_corners, ignore_index, dtype=torch.float32, weighted=False):
    """Random logits, labels, class weights in float32, and options."""
    logits, labels = 3 * torch.randn(batch, classes, *size), torch.randint(0, classes, (batch, *out))
    labels[torch.rand(labels.shape) < 0.2] = ignore_index
    weights = torch.rand(classes) if weighted else None
    return logits.to(dtype), labels, weights, dict(align_corners=align_corners, ignore_index=ignore_index)


def defined(logits, labels, weights, align_corners, ignore_index):
    """The sum and the number of correct pixels in plain PyTorch."""
    large = F.interpolate(logits, labels.shape[1:], mode='bilinear', align_corners=align_corners)
    weights = weights if weights is None else weights.to(logits.dtype)
    total = F.cross_entropy(large, labels, weights, reduction='sum', ignore_index=ignore_index)
    return total, ((large.argmax(1) == labels) & (labels != ignore_index)).sum()


def found(function, logits, labels, weights, options):
    """The sum, the number of correct pixels and a multiple of the gradient."""
    logits = logits.detach().clone().requires_grad_()
    total, right = function(logits, labels, weights, **options)
    (total * 0.3).backward()
    return total.detach(), right, logits.grad


def check_kernel(shape, dtype, weighted, device='cpu'):
    logits, labels, weights, options = drawn(*shape, dtype=dtype, weighted=weighted)
    logits, labels = logits.to(device), labels.to(device)
    weights = weights.to(device) if weighted else None
    total, right, grad = found(defined, logits.double(), labels, weights, options)
    ours = found(kernel.upsampled_cross_entropy, logits, labels, weights, options)
    assert ours[0].dtype == torch.float32 and ours[2].dtype == dtype
    assert (ours[0] - total).abs() <= 2e-6 * total
    assert (ours[1] - right).abs() <= 1 + labels.numel() / 1e4  # two logits may be equal in float32
    assert (ours[2] - grad).norm() <= (1e-6 + torch.finfo(dtype).eps / 2) * grad.norm()
    if device != 'cpu':
        again = found(kernel.upsampled_cross_entropy, logits, labels, weights, options)
        assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    with torch.no_grad():
        assert torch.equal(kernel.upsampled_cross_entropy(logits, labels, weights, **options)[0], ours[0])


def check_broken_numbers(device='cpu'):
    """The kernel returns NaN where PyTorch does."""
    for value in (float('nan'), float('inf'), float('-inf')):
        logits, labels = torch.randn(1, 3, 5, 5, device=device), torch.randint(0, 3, (1, 20, 20), device=device)
        logits[0, 1, 2, 2] = value
        labels[0, 9:11] = 255
        numbers = logits, labels, None, dict(ignore_index=255, align_corners=False)
        total, _, grad = found(defined, *numbers)
        ours, _, our_grad = found(kernel.upsampled_cross_entropy, *numbers)
        torch.testing.assert_close(ours, total, rtol=1e-5, atol=0, equal_nan=True)
        torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-5, equal_nan=True)
    for label in (3, -1, 2**40):
        logits, labels = torch.randn(1, 3, 5, 5, device=device), torch.zeros(1, 20, 20, dtype=torch.long, device=device)
        labels[0, 0, 0] = label
        ours, right, grad = found(kernel.upsampled_cross_entropy, logits, labels, None, {})
        assert ours.isnan() and grad[0, :, 0, 0].isnan().all() and grad[0, :, 2:, 2:].isfinite().all() and right < 400


def check_head(device='cpu'):
    """The losses of the whole head equal mmseg's."""
    for option in ('plain', 'named and weighted', 'not ignored', 'class weights'):
        stock, lean = heads(OPTIONS[option])
        ignored = 0.0 if option == 'class weights' else 0.2  # mmsegmentation 1.2 fails on both
        logits, data = 3 * torch.randn(2, 5, 8, 8, device=device), samples((64, 64), ignored, device=device)
        names, *numbers = zip(run(stock, logits.double(), data), run(lean, logits, data), strict=True)
        assert names[0] == names[1]
        for one, other in numbers:
            assert one.shape == other.shape
            torch.testing.assert_close(other.double(), one.double(), rtol=2e-6, atol=1e-8)


INTERPRETED = """
import sys
import torch
from mmengine.registry import init_default_scope
sys.path.insert(0, sys.argv[1])
import test_losses as t

torch.set_num_threads(1)
torch.manual_seed(0)
init_default_scope('mmseg')
for shape in t.SHAPES:
    t.check_kernel(shape, torch.float32, weighted=shape[1] == 10)
for dtype in torch.float16, torch.bfloat16:
    t.check_kernel(t.SHAPES[0], dtype, weighted=True)
t.check_broken_numbers()
logits, labels, weights, options = t.drawn(*t.SHAPES[0], weighted=True)
for arguments in (weights, 255, False, True), (None, 255, True, False):
    torch.library.opcheck(t.kernel._forward_op, (logits.requires_grad_(arguments[-1]), labels, *arguments))
t.losses.why_not = lambda *_: None
t.losses._BandedCrossEntropy = None
t.check_head()
print('all passed')
"""


@pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='Triton is not installed')
def test_kernel_under_tritons_interpreter():
    command = [sys.executable, '-W', 'ignore', '-c', INTERPRETED, str(Path(__file__).parent)]
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and 'all passed' in done.stdout, done.stderr


def test_limits_of_the_kernel(monkeypatch):
    class Cuda:
        """The attributes that the checks read."""

        def __init__(self, shape, dtype):
            self.shape, self.dtype, self.device = shape, dtype, torch.device('cuda', 0)

        def __len__(self):
            return self.shape[0]

    def why(logits=(16, 150, 64, 64), labels=(16, 512, 512), dtype=torch.bfloat16, kind=torch.int64, align=False):
        return kernel.why_not(Cuda(logits, dtype), Cuda(labels, kind), align)

    monkeypatch.setattr(kernel, 'what_is_missing', lambda device, index: None)
    assert why() is None and why(dtype=torch.float32) is None and why((2, 2, 1, 1), (2, 99, 256)) is None
    assert 'float64' in why(dtype=torch.float64) and 'uint8' in why(kind=torch.uint8)
    assert 'no elements' in why(logits=(0, 150, 64, 64), labels=(0, 512, 512))
    assert 'too large' in why((1, 2**15, 2, 2), (1, 8, 8)) and 'too large' in why((1, 5, 400, 400), (1, 2**16, 2**15))
    assert '128 times the width' in why((1, 5, 4, 4), (1, 512, 512)) and why((1, 5, 2, 4), (1, 512, 508)) is None
    assert why((1, 5, 4, 5), (1, 512, 512), align=True) is not None
    assert 'run on CUDA' in kernel.why_not(torch.ones(1, 5, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long), False)


def test_inconsistent_shapes_raise_clear_errors():
    logits, labels = torch.ones(2, 5, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r'labels must be \(2, H, W\)'):
        kernel.upsampled_cross_entropy(logits, labels)
    with pytest.raises(ValueError, match='got 4 class weights for 5 classes'):
        kernel.upsampled_cross_entropy(logits[:1], labels, torch.ones(4))


def spilled(cubin: bytes, path: Path) -> int:
    """Bytes of stack and local memory that a kernel uses for spilled registers."""
    triton = pytest.importorskip('triton')
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    listed = subprocess.run([tool, '--dump-resource-usage', path], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.search(r'STACK:(\d+).*LOCAL:(\d+)', listed).groups()))


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_kernel_compiles_without_spills(capability, dtype, tmp_path, monkeypatch):
    """Compile to machine code, which needs no GPU: the interpreter accepts invalid code."""
    triton = pytest.importorskip('triton', minversion='3.3')
    from triton.backends.compiler import GPUTarget

    from mmseg_volo.ops import gpu_loss

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    kinds = dict(labels='*i64', targets='*i16', logits=f'*{dtype}', grad=f'*{dtype}')
    integers = 'right_ones', 'index_y', 'index_x', 'starts', 'first_y', 'begin_x', 'end_x'
    kinds |= dict.fromkeys(integers, '*i32')
    kinds |= dict.fromkeys(('weights', 'fraction_y', 'fraction_x', 'sums', 'logsumexp', 'factor'), '*fp32')

    def compiled(kernel, warps, limit=None, **constants):
        names = kernel.arg_names
        signature = {name: 'constexpr' if name in constants else kinds.get(name, 'i32') for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names) if name in kinds}
        source = triton.compiler.ASTSource(kernel, signature, places, aligned)
        options = dict(num_warps=warps, **({'maxnreg': limit} if limit else {}))
        return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)

    forward, backward = gpu_loss._forward_kernel, gpu_loss._backward_kernel
    of_backward = dict(ROWS=gpu_loss._ROWS)
    made = [
        compiled(forward, 4, WEIGHTED=weighted, KEEP=True, ROWS=gpu_loss._PIXEL_ROWS, COLUMNS=gpu_loss._COLUMNS)
        for weighted in (False, True)
    ]
    made += [
        compiled(
            backward, lanes // 32, WEIGHTED=span > 16, COLUMNS=lanes // span, SPAN=span, CLASSES=classes, **of_backward
        )
        for lanes, span, classes in ((128, 16, 4), (128, 32, 4), (256, 256, 8))  # as backward() chooses them
    ]
    for one in made:
        assert spilled(one.asm['cubin'], tmp_path / 'kernel') == 0 and 'atom' not in one.asm['ptx']
    tight = compiled(backward, 4, 32, WEIGHTED=False, COLUMNS=8, SPAN=16, CLASSES=8, **of_backward)
    assert spilled(tight.asm['cubin'], tmp_path / 'kernel') > 0  # shows that spilled() sees spills


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [
        *[(shape, torch.float32) for shape in SHAPES],
        *[((2, 150, (32, 32), (256, 256), False, 255), dtype) for dtype in (torch.float32, torch.bfloat16)],
        (SHAPES[0], torch.float16),
    ],
    ids=str,
)
def test_kernel_on_a_gpu(gpu, shape, dtype):
    check_kernel(shape, dtype, weighted=shape[1] in (10, 150), device=gpu)


@pytest.mark.gpu
def test_kernel_on_a_gpu_in_odd_cases(gpu):
    check_broken_numbers(gpu)
    check_head(gpu)
    logits, labels, weights, _ = drawn(*SHAPES[0], weighted=True)
    numbers = logits.to(gpu).requires_grad_(), labels.to(gpu), weights.to(gpu), 255, False, True
    torch.library.opcheck(kernel._forward_op, numbers)
    shifted = torch.randn(2, 6, 5, 9, device=gpu)[:, 1:, :, 1:]  # neither contiguous nor aligned
    labels = torch.randint(0, 5, (2, 40, 64), device=gpu)
    numbers = labels, None, dict(ignore_index=255, align_corners=False)
    for logits in (shifted, shifted.contiguous(memory_format=torch.channels_last)):
        one, other = (found(f, logits, *numbers) for f in (kernel.upsampled_cross_entropy, defined))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_bands_on_a_gpu_equal_mmseg(gpu):
    stock, lean = heads(OPTIONS['named and weighted'])
    logits, data = 3 * torch.randn(2, 5, 8, 8, dtype=torch.float64, device=gpu), samples((64, 64), device=gpu)
    expected, ours, again = (run(head, logits, data)[1:] for head in (stock, lean, lean))
    for one, other, third in zip(ours, expected, again, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-9)
        assert torch.equal(one, third)


@pytest.mark.gpu
def test_kernel_under_autocast_with_a_scaler_and_without_waiting(gpu):
    _, lean = heads(OPTIONS['class weights'])
    data = samples((128, 128), device=gpu)
    weight = torch.randn(5, 5, 1, 1, device=gpu, requires_grad=True)
    x, results = torch.randn(2, 5, 16, 16, device=gpu), []
    for dtype in (None, torch.bfloat16, torch.float16):
        scaler = torch.amp.GradScaler(gpu, init_scale=64.0, enabled=dtype == torch.float16)
        try:
            for _ in range(2):
                weight.grad = None
                with torch.autocast(gpu, dtype, enabled=dtype is not None):
                    loss = lean.loss_by_feat(F.conv2d(x, weight), data)['loss_ce']
                scaler.scale(loss).backward()
                torch.cuda.set_sync_debug_mode('error')  # from the second round on, when the caches are filled
        finally:
            torch.cuda.set_sync_debug_mode('default')
        results.append((loss.detach(), weight.grad / scaler.get_scale()))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0.01, atol=0)
        assert (grad - results[0][1]).norm() < 0.02 * results[0][1].norm()


@pytest.mark.gpu
def test_memory_of_the_kernel(gpu):
    logits = torch.randn(4, 150, 64, 64, device=gpu, requires_grad=True)
    labels = torch.randint(0, 150, (4, 512, 512), device=gpu)
    kernel.upsampled_cross_entropy(logits, labels)[0].backward()
    logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel.upsampled_cross_entropy(logits, labels)[0].backward()
    coarse, pixels = 4 * logits.numel(), labels.numel()
    # The gradient, perhaps a copy of it, and two numbers per pixel; upsampled logits would take 600 MB.
    assert torch.cuda.max_memory_allocated() - before < 2 * coarse + 6 * pixels + 2**21


@pytest.mark.gpu
def test_more_than_2_31_logits(gpu):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip('needs 12 GB of GPU memory')
    logits = torch.randn(1, 256, 512, 512, device=gpu, dtype=torch.bfloat16).repeat(33, 1, 1, 1).requires_grad_()
    labels = torch.randint(0, 256, (1, 64, 64), device=gpu).repeat(33, 1, 1)
    total, _ = kernel.upsampled_cross_entropy(logits, labels)
    total.backward()
    one, _, grad = found(kernel.upsampled_cross_entropy, logits[-1:], labels[-1:], None, {})
    torch.testing.assert_close(total, 33 * one, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad[-1:].float() * 0.3, grad.float(), rtol=0.02, atol=1e-4)
