"""Fused outlook attention for CPUs, k = 3: Numba kernels, compiled at the first call and cached on disk.

Both directions read ``v``, the logits and the output gradient from memory once and write each result once, except for
the window rows that two bands of the backward share. The window at work is a float32 copy in the L1 cache; bfloat16
tensors are converted element by element.

Forward: each softmax row belongs to one window and one of its nine tokens, so it contributes to one output token. One
task computes a row of output tokens from all windows that overlap it.

Backward, with a = softmax(scale * logits):

    grad_v[q]         = sum over p of a[p, q] grad[p]
    grad_a[p, q]      = <grad[p], v[q]>
    grad_logits[p, q] = scale * a[p, q] (grad_a[p, q] - sum over n of a[p, n] grad_a[p, n])

One task computes the logits' gradient of a band of window rows, and the rows of ``grad_v`` that start in the band; for
the latter it also visits the window rows just above the band.

The order of additions does not depend on the number of threads: results are bitwise reproducible. Kernels take
addresses. Importing this module imports Numba.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_SIDE = 3
_K = _SIDE**2
_BAND = 4  # minimum of window rows in a backward task, since the row above each band is visited twice
_TASKS = 4  # backward tasks per thread, so that one slow core does not delay the others
# Fields of a job, int64 each, followed by up to five addresses of tensors.
_NEXT, _THREAD, _TASK_COUNT, _SCRATCH, _SCRATCH_SIZE, _SCALE, _FACTOR, _BANDS = range(8)
_BATCH, _H, _W, _C, _GRID_H, _GRID_W, _HEADS, _STRIDE, _PADDING = range(8, 17)
_TENSORS = 17
_FIELDS = _TENSORS + 5
# LLVM may fuse products with sums, and with _REORDERED reorder sums over channels. NaN and infinity are preserved.
_FAST = {'contract', 'nsz'}
_REORDERED = {*_FAST, 'reassoc'}

_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _HALVES, _LONGS = (types.CPointer(t) for t in (types.float32, types.uint16, types.int64))


# Intrinsics that Numba lacks: bits of a float, memory at an address, bfloat16, an atomic counter


@intrinsic
def _bits(typing, x):
    """Reinterpret a float32 as int32, or an int32 as float32."""
    if x == types.float32:
        return types.int32(x), lambda context, build, signature, args: build.bitcast(args[0], _INT)
    return types.float32(types.int32), lambda context, build, signature, args: build.bitcast(args[0], _FLOAT)


def _pointer_to(kind: types.CPointer, element: ir.Type) -> Callable:
    @intrinsic
    def pointer(typing, address):
        def generate(context, build, signature, args):
            return build.inttoptr(args[0], element.as_pointer())

        return kind(types.int64), generate

    return pointer


_floats, _halves = _pointer_to(_FLOATS, _FLOAT), _pointer_to(_HALVES, ir.IntType(16))


@intrinsic
def _get(typing, pointer, index):
    """Load an element of a float32 or bfloat16 array as float32."""

    def generate(context, build, signature, args):
        value = build.load(build.gep(args[0], [args[1]]))
        if pointer == _FLOATS:
            return value
        return build.bitcast(build.shl(build.zext(value, _INT), ir.Constant(_INT, 16)), _FLOAT)

    return types.float32(pointer, types.int64), generate


@intrinsic
def _put(typing, pointer, index, value):
    """Store a float32 in a float32 or bfloat16 array, rounding to nearest, ties to even."""

    def generate(context, build, signature, args):
        address, value = build.gep(args[0], [args[1]]), args[2]
        if pointer == _HALVES:
            bits, high = build.bitcast(value, _INT), ir.Constant(_INT, 16)
            odd = build.and_(build.lshr(bits, high), ir.Constant(_INT, 1))
            rounded = build.add(bits, build.add(odd, ir.Constant(_INT, 0x7FFF)))
            nan = build.fcmp_unordered('uno', value, value)
            rounded = build.select(nan, ir.Constant(_INT, 0x7FC00000), rounded)
            value = build.trunc(build.lshr(rounded, high), ir.IntType(16))
        build.store(value, address)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


@intrinsic
def _offset(typing, pointer, count):
    """Advance a pointer by ``count`` elements."""

    def generate(context, build, signature, args):
        return build.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), generate


@intrinsic
def _fetch_add(typing, longs, index):
    """Add one to a counter that threads share and return its previous value."""

    def generate(context, build, signature, args):
        return build.atomic_rmw('add', build.gep(args[0], [args[1]]), ir.Constant(_LONG, 1), 'monotonic')

    return types.int64(_LONGS, types.int64), generate


@numba.njit(fastmath=_FAST)
def _exp2(x):
    """2**x for x in [-126, 0] with an error of at most 2 ulp; NaN for NaN.

    Adding 1.5 * 2**23 rounds x to an integer n and puts n into the low bits; the polynomial approximates 2**(x - n).
    """
    shifted = x + np.float32(12582912.0)
    r = x - (shifted - np.float32(12582912.0))
    p = np.float32(1.5403530393381609954e-4)
    p = p * r + np.float32(1.3333558146428443423e-3)
    p = p * r + np.float32(9.6181291076284771619e-3)
    p = p * r + np.float32(5.5504108664821579953e-2)
    p = p * r + np.float32(2.4022650695910071233e-1)
    p = p * r + np.float32(6.9314718055994530942e-1)
    p = p * r + np.float32(1.0)
    return p * _bits((_bits(shifted) + np.int32(127)) << np.int32(23))


# Shared by both directions


@numba.njit(fastmath=_FAST)
def _softmax(logits, start, step, heads, rows, scale, attn):
    """Write the softmax of ``rows`` rows of each head to ``attn``, row after row; ``scale`` includes log2(e)."""
    low = np.float32(-126)
    for m in range(heads):
        for r in range(rows):
            source, to = start + m * step + r * _K, (m * rows + r) * _K
            top = _get(logits, source)
            for q in range(1, _K):
                x = _get(logits, source + q)
                top = x if x > top else top
            for q in range(_K):
                x = (_get(logits, source + q) - top) * scale
                _put(attn, to + q, low if x < low else x)
    for i in range(heads * rows * _K):
        _put(attn, i, _exp2(_get(attn, i)))
    for r in range(heads * rows):
        total = np.float32(0)
        for q in range(_K):
            total += _get(attn, r * _K + q)
        total = np.float32(1) / total
        for q in range(_K):
            _put(attn, r * _K + q, _get(attn, r * _K + q) * total)


@numba.njit(fastmath=_FAST)
def _window(tokens, start, height, width, channels, y, x, window):
    """Copy the tokens of the window with corner (y, x), and zeros for tokens outside the map."""
    for i in range(_SIDE):
        for j in range(_SIDE):
            to = (i * _SIDE + j) * channels
            if 0 <= y + i < height and 0 <= x + j < width:
                source = start + ((y + i) * width + x + j) * channels
                for c in range(channels):
                    _put(window, to + c, _get(tokens, source + c))
            else:
                for c in range(channels):
                    _put(window, to + c, np.float32(0))


@numba.njit(fastmath=_FAST)
def _add_mix(attn, row, step, window, first, channels, count, out, to):
    """out[to + d] += sum over q of attn[row + q * step] * window[q, first + d] for d < ``count``."""
    a0, a1, a2 = _get(attn, row), _get(attn, row + step), _get(attn, row + 2 * step)
    a3, a4, a5 = _get(attn, row + 3 * step), _get(attn, row + 4 * step), _get(attn, row + 5 * step)
    a6, a7, a8 = _get(attn, row + 6 * step), _get(attn, row + 7 * step), _get(attn, row + 8 * step)
    for d in range(count):
        w, t = first + d, to + d
        mixed = _get(out, t) + a0 * _get(window, w) + a1 * _get(window, w + channels)
        mixed += a2 * _get(window, w + 2 * channels) + a3 * _get(window, w + 3 * channels)
        mixed += a4 * _get(window, w + 4 * channels) + a5 * _get(window, w + 5 * channels)
        mixed += a6 * _get(window, w + 6 * channels) + a7 * _get(window, w + 7 * channels)
        _put(out, t, mixed + a8 * _get(window, w + 8 * channels))


@numba.njit(fastmath=_FAST)
def _mix(attn, row, step, window, first, channels, count, out, to):
    """:func:`_add_mix`, with a loop length known at compile time for VOLO's heads of 32 channels."""
    if count == 32:
        _add_mix(attn, row, step, window, first, channels, 32, out, to)
    else:
        _add_mix(attn, row, step, window, first, channels, count, out, to)


@numba.njit(fastmath=_FAST)
def _zero(row, count):
    for c in range(count):
        _put(row, c, np.float32(0))


@numba.njit(fastmath=_FAST)
def _flush(row, count, out, to):
    """Write a float32 row to ``out`` and reset it to zeros."""
    for c in range(count):
        _put(out, to + c, _get(row, c))
        _put(row, c, np.float32(0))


@numba.njit
def _sizes(job):
    return job[_H], job[_W], job[_C], job[_GRID_H], job[_GRID_W], job[_HEADS], job[_STRIDE], job[_PADDING]


# Forward


@numba.njit(fastmath=_FAST)
def _forward_row(v, logits, out, scratch, batch, row, scale, sizes):
    """Compute one row of output tokens from all windows that overlap it."""
    H, W, C, h, w, M, stride, padding = sizes
    D = C // M
    sums, window, attn = scratch, _offset(scratch, W * C), _offset(scratch, (W + _K) * C)
    for i in range(_SIDE):
        top = row - i
        y = (top + padding) // stride
        if top + padding < 0 or (top + padding) % stride or y >= h:
            continue
        for x in range(w):
            left = x * stride - padding
            _window(v, batch * H * W * C, H, W, C, top, left, window)
            start = ((batch * h + y) * w + x) * M * _K * _K
            _softmax(logits, start + i * _SIDE * _K, _K * _K, M, _SIDE, scale, attn)
            for j in range(_SIDE):
                if 0 <= left + j < W:
                    for m in range(M):
                        _mix(attn, (m * _SIDE + j) * _K, 1, window, m * D, C, D, sums, (left + j) * C + m * D)
    _flush(sums, W * C, out, (batch * H + row) * W * C)


@numba.njit(fastmath=_FAST)
def _forward(address, job, v, logits, out):
    sizes = _sizes(job)
    scratch = _floats(job[_SCRATCH] + 4 * job[_SCRATCH_SIZE] * _fetch_add(address, _THREAD))
    scale = _bits(np.int32(job[_SCALE]))
    _zero(scratch, sizes[1] * sizes[2])
    while True:
        task = _fetch_add(address, _NEXT)
        if task >= job[_TASK_COUNT]:
            return
        _forward_row(v, logits, out, scratch, task // sizes[0], task % sizes[0], scale, sizes)


# Backward


@numba.njit(fastmath=_REORDERED)
def _products(grad, p, window, first, channels, count, out):
    """out[q] = <grad[p], window[q]> over the channels of one head."""
    g = p * channels + first
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = np.float32(0)
    for d in range(count):
        x, o = _get(grad, g + d), first + d
        s0 += x * _get(window, o)
        s1 += x * _get(window, o + channels)
        s2 += x * _get(window, o + 2 * channels)
        s3 += x * _get(window, o + 3 * channels)
        s4 += x * _get(window, o + 4 * channels)
        s5 += x * _get(window, o + 5 * channels)
        s6 += x * _get(window, o + 6 * channels)
        s7 += x * _get(window, o + 7 * channels)
        s8 += x * _get(window, o + 8 * channels)
    _put(out, 0, s0)
    _put(out, 1, s1)
    _put(out, 2, s2)
    _put(out, 3, s3)
    _put(out, 4, s4)
    _put(out, 5, s5)
    _put(out, 6, s6)
    _put(out, 7, s7)
    _put(out, 8, s8)


@numba.njit(fastmath=_FAST)
def _logits_grad(attn, grad, window, first, channels, count, factor, row, out, to):
    """Write the gradient of the nine logit rows of one window and head."""
    for p in range(_K):
        if count == 32:
            _products(grad, p, window, first, channels, 32, row)
        else:
            _products(grad, p, window, first, channels, count, row)
        mean = np.float32(0)
        for q in range(_K):
            mean += _get(attn, p * _K + q) * _get(row, q)
        for q in range(_K):
            _put(out, to + p * _K + q, factor * _get(attn, p * _K + q) * (_get(row, q) - mean))


@numba.njit(fastmath=_FAST)
def _backward_band(grad, v, logits, grad_v, grad_logits, scratch, batch, first, last, scale, factor, sizes):
    """Compute ``grad_logits`` of window rows ``first`` to ``last`` - 1, and ``grad_v`` of the band's token rows."""
    H, W, C, h, w, M, stride, padding = sizes
    D = C // M
    # `scratch` holds three rows of grad_v in float32, indexed modulo 3: a window row covers no more.
    window = _offset(scratch, _SIDE * W * C)
    grads = _offset(window, _K * C)
    attn = _offset(grads, _K * C)
    row = _offset(attn, M * _K * _K)
    begin = 0 if first == 0 else first * stride - padding
    end = H if last == h else last * stride - padding
    for y in range(max(0, first - (_SIDE - 1) // stride), last):
        top = y * stride - padding
        for x in range(w):
            left = x * stride - padding
            _window(v, batch * H * W * C, H, W, C, top, left, window)
            _window(grad, batch * H * W * C, H, W, C, top, left, grads)
            start = ((batch * h + y) * w + x) * M * _K * _K
            _softmax(logits, start, _K * _K, M, _K, scale, attn)
            for m in range(M):
                a = _offset(attn, m * _K * _K)
                if y >= first:
                    _logits_grad(a, grads, window, m * D, C, D, factor, row, grad_logits, start + m * _K * _K)
                for q in range(_K):
                    Y, X = top + q // _SIDE, left + q % _SIDE
                    if 0 <= Y < H and 0 <= X < W:
                        _mix(a, q, _K, grads, m * D, C, D, scratch, (Y % _SIDE * W + X) * C + m * D)
        # Rows that no later window covers are complete. Write those of this band; drop those of others.
        for Y in range(max(top, 0), min(H, end if y + 1 == last else top + stride)):
            of_row = _offset(scratch, Y % _SIDE * W * C)
            if begin <= Y:
                _flush(of_row, W * C, grad_v, (batch * H + Y) * W * C)
            else:
                _zero(of_row, W * C)
    # The last window row may have left contributions to the next band's rows.
    _zero(scratch, _SIDE * W * C)


@numba.njit(fastmath=_FAST)
def _backward(address, job, grad, v, logits, grad_v, grad_logits):
    sizes, bands = _sizes(job), job[_BANDS]
    h = sizes[3]
    scratch = _floats(job[_SCRATCH] + 4 * job[_SCRATCH_SIZE] * _fetch_add(address, _THREAD))
    scale, factor = _bits(np.int32(job[_SCALE])), _bits(np.int32(job[_FACTOR]))
    _zero(scratch, _SIDE * sizes[1] * sizes[2])
    while True:
        task = _fetch_add(address, _NEXT)
        if task >= job[_TASK_COUNT]:
            return
        band = task % bands
        first, last = band * h // bands, (band + 1) * h // bands
        _backward_band(grad, v, logits, grad_v, grad_logits, scratch, task // bands, first, last, scale, factor, sizes)


# Entry points: each thread calls one with the address of the job


def _forward_float32(address):
    job = numba.carray(address, _FIELDS)
    _forward(address, job, _floats(job[_TENSORS]), _floats(job[_TENSORS + 1]), _floats(job[_TENSORS + 2]))


def _forward_bfloat16(address):
    job = numba.carray(address, _FIELDS)
    _forward(address, job, _halves(job[_TENSORS]), _halves(job[_TENSORS + 1]), _halves(job[_TENSORS + 2]))


def _backward_float32(address):
    job = numba.carray(address, _FIELDS)
    grad, v, logits = _floats(job[_TENSORS]), _floats(job[_TENSORS + 1]), _floats(job[_TENSORS + 2])
    _backward(address, job, grad, v, logits, _floats(job[_TENSORS + 3]), _floats(job[_TENSORS + 4]))


def _backward_bfloat16(address):
    job = numba.carray(address, _FIELDS)
    grad, v, logits = _halves(job[_TENSORS]), _halves(job[_TENSORS + 1]), _halves(job[_TENSORS + 2])
    _backward(address, job, grad, v, logits, _halves(job[_TENSORS + 3]), _halves(job[_TENSORS + 4]))


_ENTRIES = {
    ('forward', torch.float32): _forward_float32,
    ('forward', torch.bfloat16): _forward_bfloat16,
    ('backward', torch.float32): _backward_float32,
    ('backward', torch.bfloat16): _backward_bfloat16,
}


@functools.cache
def _compiled(direction: str, dtype: torch.dtype):
    function, signature = _ENTRIES[direction, dtype], types.void(_LONGS)
    try:
        return numba.cfunc(signature, cache=True)(function)
    except RuntimeError:  # no cache folder is writable
        return numba.cfunc(signature)(function)


def check() -> None:
    """Compile one kernel; raises Numba's error if that fails."""
    _compiled('forward', torch.float32)


# Threads


@functools.cache
def _openmp() -> Callable | None:
    """``GOMP_parallel`` of PyTorch's OpenMP library, or None if PyTorch has none.

    Other threads would compete with PyTorch's, which spin for a while after each operation: 2.3 times slower on two
    cores.
    """
    library = next((Path(torch.__file__).parent / 'lib').glob('libtorch_cpu.*'), None)
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, 'outlook_attention')


def _run(entry, job: np.ndarray, threads: int) -> None:
    """Call the entry point in each thread. Threads share the job's tasks, so fewer threads than asked for suffice."""
    address = job.ctypes.data
    if threads > 1 and _openmp():
        _openmp()(entry.address, address, threads, 0)
        return
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry.address)  # releases the GIL
    others = [_pool(threads - 1).submit(call, address) for _ in range(threads - 1)]
    call(address)
    for other in others:
        other.result()


def _job(tensors: list[torch.Tensor], v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int):
    job = np.zeros(_FIELDS, np.int64)
    job[[_SCALE, _FACTOR]] = np.array([scale * math.log2(math.e), scale], np.float32).view(np.int32)
    job[_BATCH:_TENSORS] = *v.shape, *logits.shape[1:4], stride, padding
    job[_TENSORS : _TENSORS + len(tensors)] = [tensor.data_ptr() for tensor in tensors]
    return job


def _start(direction: str, job: np.ndarray, dtype: torch.dtype, tasks: int, floats: int) -> None:
    """Run a job; each thread gets ``floats`` float32 elements of scratch memory."""
    threads = max(1, min(torch.get_num_threads(), tasks))
    floats = -(-floats // 16) * 16 + 16  # threads do not share a cache line
    scratch = torch.empty(threads * floats, dtype=torch.float32)
    job[_TASK_COUNT], job[_SCRATCH], job[_SCRATCH_SIZE] = tasks, scratch.data_ptr(), floats
    _run(_compiled(direction, dtype), job, threads)


def forward(v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int) -> torch.Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`; both tensors on the CPU, in float32 or bfloat16."""
    v, logits = v.contiguous(), logits.contiguous()
    out = torch.empty_like(v)
    B, H, W, C = v.shape
    job = _job([v, logits, out], v, logits, scale, stride, padding)
    _start('forward', job, v.dtype, B * H, (W + _K) * C + logits.shape[3] * _SIDE * _K)
    return out


def backward(
    grad: torch.Tensor, v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``v`` and ``logits`` from the output gradient, all of one dtype."""
    grad, v, logits = grad.contiguous(), v.contiguous(), logits.contiguous()
    grad_v, grad_logits = torch.empty_like(v), torch.empty_like(logits)
    B, _, W, C = v.shape
    h, M = logits.shape[1], logits.shape[3]
    job = _job([grad, v, logits, grad_v, grad_logits], v, logits, scale, stride, padding)
    bands = job[_BANDS] = min(-(-_TASKS * torch.get_num_threads() // B), max(1, h // _BAND))
    floats = (_SIDE * W + 2 * _K) * C + M * _K * _K + _K
    _start('backward', job, v.dtype, int(B * bands), floats)
    return grad_v, grad_logits
