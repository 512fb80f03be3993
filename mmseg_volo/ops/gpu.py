"""Fused outlook attention for GPUs: Triton kernels, k = 3, strides 1 and 2.

A softmax row belongs to one window and one of its nine tokens, so to one output token. A "cell" is the stride x stride
output tokens that the same windows reach; a program makes a row of cells of one head, takes the softmax in registers in
float32 and writes each token once. Nothing is added through memory, so results are the same bits in each run.

With a = softmax(scale * logits), out[p] = sum over windows and q of a[p, q] v[q]. Backward, in two kernels:

    grad_a[p, q]      = <grad[p], v[q]>
    grad_logits[p, q] = scale * a[p, q] (grad_a[p, q] - sum over n of a[p, n] grad_a[p, n])
    grad_v[q]         = sum over windows and p of a[p, q] grad[p]

The first goes window by window and leaves log2 of each softmax's denominator for the second, which is the forward with
the weights transposed. Triton cannot index registers, hence nine names for nine tokens. Importing this module imports
Triton.
"""

import math

import torch
import triton
import triton.language as tl

# Windows and cells of a program: least instructions without much spilling in what compiles for sm_80 and sm_90, which
# also gave the halves in _cells_kernel and the integers in _wide. Not timed yet.
_WINDOWS, _CELLS, _CELLS_16_BIT_SM_90, _WARPS = 32, 32, 64, 4


@triton.jit
def _wide(x):
    """float32; bfloat16 through integers, for which the compiler needs one instruction instead of two."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _load_nine(x, step: tl.constexpr, live, other):
    """Nine numbers at each place, (windows,) in float32 each, or ``other`` where there is no window."""
    x0 = _wide(tl.load(x, mask=live, other=other))
    x1 = _wide(tl.load(x + step, mask=live, other=other))
    x2 = _wide(tl.load(x + 2 * step, mask=live, other=other))
    x3 = _wide(tl.load(x + 3 * step, mask=live, other=other))
    x4 = _wide(tl.load(x + 4 * step, mask=live, other=other))
    x5 = _wide(tl.load(x + 5 * step, mask=live, other=other))
    x6 = _wide(tl.load(x + 6 * step, mask=live, other=other))
    x7 = _wide(tl.load(x + 7 * step, mask=live, other=other))
    x8 = _wide(tl.load(x + 8 * step, mask=live, other=other))
    return x0, x1, x2, x3, x4, x5, x6, x7, x8


@triton.jit
def _softmax(factor, x0, x1, x2, x3, x4, x5, x6, x7, x8):
    """exp(scale * x) / 2**top nine times, top, and the nine's sum; ``factor`` is scale * log2(e), above 0."""
    top = tl.maximum(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), tl.maximum(tl.maximum(x4, x5), x6))
    top = tl.maximum(tl.maximum(top, x7), x8) * factor
    x0, x1, x2 = tl.exp2(x0 * factor - top), tl.exp2(x1 * factor - top), tl.exp2(x2 * factor - top)
    x3, x4, x5 = tl.exp2(x3 * factor - top), tl.exp2(x4 * factor - top), tl.exp2(x5 * factor - top)
    x6, x7, x8 = tl.exp2(x6 * factor - top), tl.exp2(x7 * factor - top), tl.exp2(x8 * factor - top)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, top, x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8


@triton.jit
def _weights(logits, denominators, n: tl.constexpr, live, factor, REACHED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """a[n, 0...8], or transposed a[0...8, n], (windows,) in float32 each; zeros where there is no window."""
    x0 = live.to(tl.float32)  # of the right kind where no weights are asked for; never read
    x1, x2, x3, x4, x5, x6, x7, x8 = x0, x0, x0, x0, x0, x0, x0, x0
    if REACHED and TRANSPOSED:
        x0, x1, x2, x3, x4, x5, x6, x7, x8 = _load_nine(logits + n, 9, live, 0.0)
        d0, d1, d2, d3, d4, d5, d6, d7, d8 = _load_nine(denominators, 1, live, float('inf'))
        x0, x1, x2 = tl.exp2(x0 * factor - d0), tl.exp2(x1 * factor - d1), tl.exp2(x2 * factor - d2)
        x3, x4, x5 = tl.exp2(x3 * factor - d3), tl.exp2(x4 * factor - d4), tl.exp2(x5 * factor - d5)
        x6, x7, x8 = tl.exp2(x6 * factor - d6), tl.exp2(x7 * factor - d7), tl.exp2(x8 * factor - d8)
    elif REACHED:
        x0, x1, x2, x3, x4, x5, x6, x7, x8 = _load_nine(logits + 9 * n, 1, live, 0.0)
        x0, x1, x2, x3, x4, x5, x6, x7, x8, _top, total = _softmax(factor, x0, x1, x2, x3, x4, x5, x6, x7, x8)
        share = tl.where(live, 1.0 / total, 0.0)
        x0, x1, x2, x3, x4 = x0 * share, x1 * share, x2 * share, x3 * share, x4 * share
        x5, x6, x7, x8 = x5 * share, x6 * share, x7 * share, x8 * share
    return x0, x1, x2, x3, x4, x5, x6, x7, x8


@triton.jit
def _token(tokens, y, x, n: tl.constexpr, H, W, C, channels, in_head):
    """Token n of the windows whose corners are (y, x): (windows, channels) in float32, zeros outside."""
    row, column = y + n // 3, x + n % 3
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    places = tokens + (row * W + column)[:, None] * C + channels[None, :]
    return _wide(tl.load(places, mask=inside[:, None] & in_head[None, :], other=0.0))


@triton.jit
def _store_token(out, value, y, x, H, W, C, channels, in_head):
    inside = (y < H) & (x < W)
    places = out + (y * W + x)[:, None] * C + channels[None, :]
    tl.store(places, value.to(out.dtype.element_ty), mask=inside[:, None] & in_head[None, :])


@triton.jit
def _spread(
    a00,
    b00,
    a01,
    b01,
    a10,
    b10,
    a11,
    b11,
    a,
    b,
    w00,
    w01,
    w10,
    w11,
    R00: tl.constexpr,
    R01: tl.constexpr,
    R10: tl.constexpr,
    R11: tl.constexpr,
):
    """Add one token of the windows, weighed, to those tokens of the cells that the windows reach."""
    if R00:
        a00 += w00[:, None] * a
        b00 += w00[:, None] * b
    if R01:
        a01 += w01[:, None] * a
        b01 += w01[:, None] * b
    if R10:
        a10 += w10[:, None] * a
        b10 += w10[:, None] * b
    if R11:
        a11 += w11[:, None] * a
        b11 += w11[:, None] * b
    return a00, b00, a01, b01, a10, b10, a11, b11


@triton.jit
def _cells_kernel(
    tokens,  # (B, H, W, M, D)
    logits,  # (B, h, w, M, 9, 9)
    denominators,  # (B, h, w, M, 9) in float32; read if TRANSPOSED
    out,  # (B, H, W, M, D)
    factor,  # scale * log2(e)
    H,
    W,
    h,
    w,
    M,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CELLS: tl.constexpr,
    HALF: tl.constexpr,  # power of two that holds half the channels of a head
):
    """out = sum of a tokens, or with TRANSPOSED of a^T tokens, for a row of cells of one head.

    Channels come in two halves, a and b: a thread that holds more of them repeats less of the softmax.
    """
    head, batch = tl.program_id(0) % M, tl.program_id(2).to(tl.int64)
    # As long as cell_x: Triton's interpreter widens a single truth value that meets many.
    cell_y = tl.program_id(1) + tl.zeros((CELLS,), tl.int32)
    cell_x = tl.program_id(0) // M * CELLS + tl.arange(0, CELLS)
    C = M * D
    c_a = tl.arange(0, HALF)
    c_b = c_a + (D + 1) // 2
    in_a, in_b = c_a < (D + 1) // 2, c_b < D
    tokens += batch * H * W * C + head * D
    out += batch * H * W * C + head * D
    logits += (batch * h * w * M + head) * 81
    denominators += (batch * h * w * M + head) * 9

    a00 = tl.zeros((CELLS, HALF), tl.float32)
    b00, a01, b01, a10, b10, a11, b11 = a00, a00, a00, a00, a00, a00, a00
    # Window cell + d starts at token STRIDE * (cell + d) - PADDING: for these d it reaches the cell.
    FIRST: tl.constexpr = -((2 - PADDING) // STRIDE)
    LAST: tl.constexpr = (STRIDE - 1 + PADDING) // STRIDE
    for dy in tl.static_range(FIRST, LAST + 1):
        for dx in tl.static_range(FIRST, LAST + 1):
            y, x = cell_y + dy, cell_x + dx
            live = (y >= 0) & (y < h) & (x >= 0) & (x < w)
            of_window = logits + (y * w + x) * M * 81
            sums = denominators + (y * w + x) * M * 9
            y, x = y * STRIDE - PADDING, x * STRIDE - PADDING
            # The cell's first token is the window's token n, if i and j are within the window; then its neighbours.
            i, j = PADDING - STRIDE * dy, PADDING - STRIDE * dx
            n = 3 * i + j
            # Pairs in brackets: older Triton takes no longer chains.
            row0, row1 = i >= 0 and i < 3, STRIDE == 2 and (i >= -1 and i < 2)
            column0, column1 = j >= 0 and j < 3, STRIDE == 2 and (j >= -1 and j < 2)
            R00, R01, R10, R11 = row0 and column0, row0 and column1, row1 and column0, row1 and column1
            p0, p1, p2, p3, p4, p5, p6, p7, p8 = _weights(of_window, sums, n, live, factor, R00, TRANSPOSED)
            q0, q1, q2, q3, q4, q5, q6, q7, q8 = _weights(of_window, sums, n + 1, live, factor, R01, TRANSPOSED)
            r0, r1, r2, r3, r4, r5, r6, r7, r8 = _weights(of_window, sums, n + 3, live, factor, R10, TRANSPOSED)
            s0, s1, s2, s3, s4, s5, s6, s7, s8 = _weights(of_window, sums, n + 4, live, factor, R11, TRANSPOSED)
            a = _token(tokens, y, x, 0, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 0, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p0, q0, r0, s0, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 1, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 1, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p1, q1, r1, s1, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 2, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 2, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p2, q2, r2, s2, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 3, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 3, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p3, q3, r3, s3, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 4, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 4, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p4, q4, r4, s4, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 5, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 5, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p5, q5, r5, s5, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 6, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 6, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p6, q6, r6, s6, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 7, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 7, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p7, q7, r7, s7, R00, R01, R10, R11
            )
            a = _token(tokens, y, x, 8, H, W, C, c_a, in_a)
            b = _token(tokens, y, x, 8, H, W, C, c_b, in_b)
            a00, b00, a01, b01, a10, b10, a11, b11 = _spread(
                a00, b00, a01, b01, a10, b10, a11, b11, a, b, p8, q8, r8, s8, R00, R01, R10, R11
            )
    y, x = cell_y * STRIDE, cell_x * STRIDE
    _store_token(out, a00, y, x, H, W, C, c_a, in_a)
    _store_token(out, b00, y, x, H, W, C, c_b, in_b)
    if STRIDE == 2:
        _store_token(out, a01, y, x + 1, H, W, C, c_a, in_a)
        _store_token(out, b01, y, x + 1, H, W, C, c_b, in_b)
        _store_token(out, a10, y + 1, x, H, W, C, c_a, in_a)
        _store_token(out, b10, y + 1, x, H, W, C, c_b, in_b)
        _store_token(out, a11, y + 1, x + 1, H, W, C, c_a, in_a)
        _store_token(out, b11, y + 1, x + 1, H, W, C, c_b, in_b)


@triton.jit
def _windows_kernel(
    grad,  # (B, H, W, M, D)
    v,  # (B, H, W, M, D)
    logits,  # (B, h, w, M, 9, 9)
    grad_logits,  # (B, h, w, M, 9, 9)
    denominators,  # (B, h, w, M, 9) in float32: log2 of the sum of exp(scale * logits)
    scale,
    factor,  # scale * log2(e)
    H,
    W,
    h,
    w,
    M,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two that holds the channels of a head
):
    """Gradient of the logits for windows of one row and one head, and the denominators."""
    head, batch = tl.program_id(0) % M, tl.program_id(2).to(tl.int64)
    y = tl.program_id(1) + tl.zeros((WINDOWS,), tl.int32)
    x = tl.program_id(0) // M * WINDOWS + tl.arange(0, WINDOWS)
    live = x < w
    C = M * D
    c = tl.arange(0, BLOCK)
    in_head = c < D
    grad += batch * H * W * C + head * D
    v += batch * H * W * C + head * D
    windows = (batch * h * w + y * w + x) * M + head
    y, x = y * STRIDE - PADDING, x * STRIDE - PADDING
    t0 = _token(v, y, x, 0, H, W, C, c, in_head)
    t1 = _token(v, y, x, 1, H, W, C, c, in_head)
    t2 = _token(v, y, x, 2, H, W, C, c, in_head)
    t3 = _token(v, y, x, 3, H, W, C, c, in_head)
    t4 = _token(v, y, x, 4, H, W, C, c, in_head)
    t5 = _token(v, y, x, 5, H, W, C, c, in_head)
    t6 = _token(v, y, x, 6, H, W, C, c, in_head)
    t7 = _token(v, y, x, 7, H, W, C, c, in_head)
    t8 = _token(v, y, x, 8, H, W, C, c, in_head)
    n = tl.arange(0, 16)
    for p in tl.static_range(9):
        g = _token(grad, y, x, p, H, W, C, c, in_head)
        x0, x1, x2, x3, x4, x5, x6, x7, x8 = _load_nine(logits + windows * 81 + 9 * p, 1, live, 0.0)
        x0, x1, x2, x3, x4, x5, x6, x7, x8, top, total = _softmax(factor, x0, x1, x2, x3, x4, x5, x6, x7, x8)
        tl.store(denominators + windows * 9 + p, top + tl.log2(total), mask=live)
        g0, g1, g2 = tl.sum(g * t0, axis=1), tl.sum(g * t1, axis=1), tl.sum(g * t2, axis=1)
        g3, g4, g5 = tl.sum(g * t3, axis=1), tl.sum(g * t4, axis=1), tl.sum(g * t5, axis=1)
        g6, g7, g8 = tl.sum(g * t6, axis=1), tl.sum(g * t7, axis=1), tl.sum(g * t8, axis=1)
        mean = x0 * g0 + x1 * g1 + x2 * g2 + x3 * g3 + x4 * g4 + x5 * g5 + x6 * g6 + x7 * g7 + x8 * g8
        mean, f = mean / total, scale / total
        x0, x1, x2 = f * x0 * (g0 - mean), f * x1 * (g1 - mean), f * x2 * (g2 - mean)
        x3, x4, x5 = f * x3 * (g3 - mean), f * x4 * (g4 - mean), f * x5 * (g5 - mean)
        x6, x7, x8 = f * x6 * (g6 - mean), f * x7 * (g7 - mean), f * x8 * (g8 - mean)
        # One row of 16 for a store that writes neighbours together: each join adds the next lower bit of the place.
        o = tl.zeros_like(x0)
        j0, j1, j2, j3 = tl.join(x0, x8), tl.join(x1, o), tl.join(x2, o), tl.join(x3, o)
        j4, j5, j6, j7 = tl.join(x4, o), tl.join(x5, o), tl.join(x6, o), tl.join(x7, o)
        j0, j1, j2, j3 = tl.join(j0, j4), tl.join(j1, j5), tl.join(j2, j6), tl.join(j3, j7)
        row = tl.reshape(tl.join(tl.join(j0, j2), tl.join(j1, j3)), (WINDOWS, 16))
        places = grad_logits + (windows * 81 + 9 * p)[:, None] + n[None, :]
        tl.store(places, row.to(grad_logits.dtype.element_ty), mask=live[:, None] & (n < 9)[None, :])


def check() -> None:
    """Raise whatever Triton raises where it cannot launch kernels: it needs a driver, and to launch, a C compiler."""
    triton.runtime.driver.active.get_current_target()


def forward(v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int) -> torch.Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    return _cells(v.contiguous(), logits.contiguous(), None, scale, stride, padding)


def backward(
    grad: torch.Tensor, v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``v`` and ``logits`` from that of the output."""
    grad, v, logits = grad.contiguous(), v.contiguous(), logits.contiguous()
    grad_logits = torch.empty_like(logits)
    B, H, W, C = v.shape
    _, h, w, M = logits.shape[:4]
    denominators = torch.empty((B, h, w, M, 9), dtype=torch.float32, device=v.device)
    grid = M * triton.cdiv(w, _WINDOWS), h, B
    tensors, sizes = (grad, v, logits, grad_logits, denominators), (H, W, h, w, M, C // M, stride, padding)
    with _on(v):
        block = triton.next_power_of_2(C // M)
        _windows_kernel[grid](*tensors, scale, scale * math.log2(math.e), *sizes, _WINDOWS, block, num_warps=_WARPS)
    return _cells(grad, logits, denominators, scale, stride, padding), grad_logits


def _cells(tokens, logits, denominators, scale: float, stride: int, padding: int) -> torch.Tensor:
    """Sum of a tokens, or where denominators are given of a^T tokens."""
    B, H, W, C = tokens.shape
    _, h, w, M = logits.shape[:4]
    out = torch.empty_like(tokens)
    cells = _CELLS
    if tokens.is_cuda and tokens.element_size() == 2 and torch.cuda.get_device_capability(tokens.device)[0] >= 9:
        cells = _CELLS_16_BIT_SM_90
    transposed = denominators is not None
    # Without denominators any address will do: it is not read.
    tensors = tokens, logits, denominators if transposed else logits, out
    sizes = H, W, h, w, M, C // M, stride, padding
    grid = M * triton.cdiv(triton.cdiv(W, stride), cells), triton.cdiv(H, stride), B
    with _on(tokens):
        half = triton.next_power_of_2((C // M + 1) // 2)
        _cells_kernel[grid](*tensors, scale * math.log2(math.e), *sizes, transposed, cells, half, num_warps=_WARPS)
    return out


def _on(tensor: torch.Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
