"""Fused outlook attention for GPUs: Triton kernels, k = 3, strides 1 and 2.

With a = softmax(scale * logits), out[p] = sum over windows and q of a[p, q] v[q]. The backward uses two kernels:

    grad_a[p, q]      = <grad[p], v[q]>
    grad_logits[p, q] = scale * a[p, q] (grad_a[p, q] - sum over n of a[p, n] grad_a[p, n])
    grad_v[q]         = sum over windows and p of a[p, q] grad[p]

Each softmax row belongs to one window and one of its nine tokens, so it contributes to one output token. A "cell" is a
block of stride x stride output tokens that the same windows cover. A thread of :func:`_cells_kernel` computes one cell
of one head, for half of the head's channels. It computes the softmax rows of the cell in float32, adds up the weights
that different windows give to the same pair of output and input token, and reads each input token once.
:func:`_windows_kernel` computes the gradient of the logits window by window, and writes the transposed attention, from
which the first kernel computes grad_v. There are no atomic additions: results are bitwise reproducible.

16-bit elements are read in pairs, as 4-byte words, since rows of nine begin at odd offsets. docs/benchmarks.md measures
what limits the speed. Importing this module imports Triton.
"""

import math

import torch
import triton
import triton.language as tl

# Three warps fit on each scheduler, with a few spilled registers; with the 255 that some compilers use, only two would.
_REGISTERS = {} if torch.version.hip else dict(maxnreg=168)
_SIZES = ['H', 'W', 'h', 'w']  # not specialised, which would compile again for sizes divisible by 16


@triton.jit
def _wide(x):
    """Convert to float32; for bfloat16 through integers, which takes one instruction instead of two."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _two(below, above, odd, dtype: tl.constexpr):
    """Two neighbouring 16-bit elements as float32, from two words; if odd, the first is the upper half of ``below``."""
    both = tl.where(odd == 1, (above << 16) | (below >> 16), below)
    if dtype == tl.bfloat16:
        return (both << 16).to(tl.float32, bitcast=True), (both & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low, high = (both & 0xFFFF).to(tl.uint16), (both >> 16).to(tl.uint16)
        return low.to(dtype, bitcast=True).to(tl.float32), high.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _columns(x, ROWS: tl.constexpr, LOG_N: tl.constexpr):
    """Split x (ROWS, 2**LOG_N) into its columns (ROWS,)."""
    parts = (x,)  # part i has the columns whose index is i modulo the number of parts
    for level in tl.static_range(LOG_N):
        evens = ()
        odds = ()
        for i in tl.static_range(1 << level):
            even, odd = tl.split(tl.reshape(parts[i], (ROWS, 1 << (LOG_N - level - 1), 2)))
            evens = evens + (even,)
            odds = odds + (odd,)
        parts = evens + odds
    out = ()
    for i in tl.static_range(1 << LOG_N):
        out = out + (tl.reshape(parts[i], (ROWS,)),)
    return out


@triton.jit
def _in_words(numbers, start):
    """Pointer to the word of element ``start``, and 1 if that element is the word's upper half, else 0."""
    if numbers.dtype.element_ty == tl.float32:
        return numbers + start, 0
    else:
        return numbers.to(tl.pointer_type(tl.uint32), bitcast=True) + (start >> 1), (start & 1).to(tl.int32)


@triton.jit
def _numbers(words, at, live, COUNT: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr):
    """Load COUNT elements, or one more, from each offset; (ROWS,) in float32 each, zeros where there is no window."""
    if dtype == tl.float32:
        LOG_N: tl.constexpr = 4 if COUNT <= 16 else 5
        n = tl.arange(0, 1 << LOG_N)
        x = tl.load(words + at[:, None] + n[None, :], mask=live[:, None] & (n < COUNT)[None, :], other=0.0)
        out = _columns(x, ROWS, LOG_N)
    else:
        LOG_N: tl.constexpr = 3 if COUNT <= 15 else 4
        n = tl.arange(0, 1 << LOG_N)
        # Never read further than needed: the last word of a tensor may be the last of its allocation.
        used = live[:, None] & (n[None, :] < ((COUNT + 1 + (at & 1)) >> 1)[:, None])
        x = _columns(tl.load(words + (at >> 1)[:, None] + n[None, :], mask=used, other=0), ROWS, LOG_N)
        out = ()
        for i in tl.static_range(0, COUNT, 2):
            out = out + _two(x[i // 2], x[i // 2 + 1], at & 1, dtype)
    return out


@triton.jit
def _softmax(x, FIRST: tl.constexpr, live, factor):
    """Softmax of nine elements of ``x``; ``factor`` is scale * log2(e), above 0. Zeros where there is no window."""
    x0, x1, x2, x3, x4 = x[FIRST], x[FIRST + 1], x[FIRST + 2], x[FIRST + 3], x[FIRST + 4]
    x5, x6, x7, x8 = x[FIRST + 5], x[FIRST + 6], x[FIRST + 7], x[FIRST + 8]
    top = tl.maximum(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), tl.maximum(tl.maximum(x4, x5), x6))
    top = tl.maximum(tl.maximum(top, x7), x8) * factor
    x0, x1, x2 = tl.exp2(x0 * factor - top), tl.exp2(x1 * factor - top), tl.exp2(x2 * factor - top)
    x3, x4, x5 = tl.exp2(x3 * factor - top), tl.exp2(x4 * factor - top), tl.exp2(x5 * factor - top)
    x6, x7, x8 = tl.exp2(x6 * factor - top), tl.exp2(x7 * factor - top), tl.exp2(x8 * factor - top)
    share = tl.where(live, 1.0 / (x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7 + x8), 0.0)
    x0, x1, x2, x3, x4 = x0 * share, x1 * share, x2 * share, x3 * share, x4 * share
    return x0, x1, x2, x3, x4, x5 * share, x6 * share, x7 * share, x8 * share


@triton.jit
def _weights(
    words, at, live, factor, TWO: tl.constexpr, TRANSPOSED: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr
):
    """The nine weights of an output token in a window, and if TWO those of the next token; (ROWS,) in float32 each."""
    if TRANSPOSED:  # weights instead of logits, ten to a row
        x = _numbers(words, at, live, 20 if TWO else 10, dtype, ROWS)
        out = (x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8])
        if TWO:
            out = out + (x[10], x[11], x[12], x[13], x[14], x[15], x[16], x[17], x[18])
    else:
        x = _numbers(words, at, live, 18 if TWO else 9, dtype, ROWS)
        out = _softmax(x, 0, live, factor)
        if TWO:
            out = out + _softmax(x, 9, live, factor)
    return out


@triton.jit(do_not_specialize=_SIZES)
def _cells_kernel(
    tokens,  # (B, H, W, M, D)
    weights,  # logits (B, h, w, M, 9, 9); if TRANSPOSED a^T (B, h, w, M, 9, 10), the last element of each row unused
    out,  # (B, H, W, M, D)
    factor,  # scale * log2(e)
    H,
    W,
    h,
    w,
    M: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,  # power of two that holds half the channels of a head
):
    """out = sum of a tokens, or if TRANSPOSED of a^T tokens, for neighbouring (cell, head) of one row of cells.

    Channels are processed in two halves, a and b: the more of them a thread has, the less of the softmax is repeated.
    """
    C: tl.constexpr = M * D
    LINE: tl.constexpr = 10 if TRANSPOSED else 9
    dtype: tl.constexpr = weights.dtype.element_ty
    # Window cell + d starts at token STRIDE * (cell + d) - PADDING; it covers the cell for FIRST <= d <= LAST.
    FIRST: tl.constexpr = -((2 - PADDING) // STRIDE)
    LAST: tl.constexpr = (STRIDE - 1 + PADDING) // STRIDE
    SPAN: tl.constexpr = LAST - FIRST + 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cell_x, head = row // M, row % M
    cell_y, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    words, odd = _in_words(weights, batch * h * w * (M * 9 * LINE))

    # Token (i, j) of the cell is at row i + PADDING - STRIDE dy and column j + PADDING - STRIDE dx of window (dy, dx).
    # The table has 18 weights for each i, dy and dx: nine for j = 0 and nine for j = 1.
    zero = tl.zeros((ROWS,), tl.float32)
    none = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    table = ()
    for i in tl.static_range(STRIDE):
        for dy in tl.static_range(FIRST, LAST + 1):
            for dx in tl.static_range(FIRST, LAST + 1):
                y, x = cell_y + dy, cell_x + dx
                live = (y >= 0) & (y < h) & (x >= 0) & (x < w)
                at = ((y * w + x) * M + head) * (9 * LINE) + odd
                at += LINE * (3 * (i + PADDING - STRIDE * dy) + PADDING - STRIDE * dx)
                if i + PADDING - STRIDE * dy < 0 or i + PADDING - STRIDE * dy > 2:
                    table = table + none + none
                elif STRIDE == 2 and (PADDING - STRIDE * dx >= 0 and PADDING - STRIDE * dx < 2):
                    table = table + _weights(words, at, live, factor, True, TRANSPOSED, dtype, ROWS)
                elif PADDING - STRIDE * dx >= 0 and PADDING - STRIDE * dx < 3:
                    table = table + _weights(words, at, live, factor, False, TRANSPOSED, dtype, ROWS) + none
                elif STRIDE == 2 and PADDING - STRIDE * dx == -1:
                    table = table + none + _weights(words, at + LINE, live, factor, False, TRANSPOSED, dtype, ROWS)
                else:
                    table = table + none + none
    if dtype != tl.float32:  # two fit in a register; weights are at most 1, so float16 is more precise than bfloat16
        packed = ()
        for n in tl.static_range(STRIDE * SPAN * SPAN * 18):
            packed = packed + (table[n].to(tl.float16),)
        table = packed

    c_a = tl.arange(0, HALF)
    c_b = c_a + (D + 1) // 2
    in_a, in_b = c_a < (D + 1) // 2, c_b < D
    tokens += batch * H * W * C
    out += batch * H * W * C
    y, x = cell_y * STRIDE, cell_x * STRIDE
    place = (y * W + x) * C + head * D
    a00 = tl.zeros((ROWS, HALF), tl.float32)
    b00, a01, b01, a10, b10, a11, b11 = a00, a00, a00, a00, a00, a00, a00
    for m in tl.static_range(STRIDE * FIRST - PADDING, STRIDE * LAST - PADDING + 3):
        for n in tl.static_range(STRIDE * FIRST - PADDING, STRIDE * LAST - PADDING + 3):
            inside = (y + m >= 0) & (y + m < H) & (x + n >= 0) & (x + n < W)
            places = (tokens + (place + (m * W + n) * C))[:, None]  # this order takes fewer registers
            a = _wide(tl.load(places + c_a[None, :], mask=inside[:, None] & in_a[None, :], other=0.0))
            b = _wide(tl.load(places + c_b[None, :], mask=inside[:, None] & in_b[None, :], other=0.0))
            for i in tl.static_range(STRIDE):
                for j in tl.static_range(STRIDE):
                    # A window contains both tokens if max(i, m) + PADDING - 2 <= STRIDE d <= min(i, m) + PADDING.
                    if ((i if i < m else m) + PADDING) // STRIDE * STRIDE >= (m if i < m else i) + PADDING - 2 and (
                        ((j if j < n else n) + PADDING) // STRIDE * STRIDE >= (n if j < n else j) + PADDING - 2
                    ):
                        weight = tl.full((ROWS,), -0.0, tl.float32)  # the compiler removes an addition to -0.0
                        for dy in tl.static_range(FIRST, LAST + 1):
                            for dx in tl.static_range(FIRST, LAST + 1):
                                if (
                                    STRIDE * dy <= (i if i < m else m) + PADDING
                                    and STRIDE * dy >= (m if i < m else i) + PADDING - 2
                                ) and (
                                    STRIDE * dx <= (j if j < n else n) + PADDING
                                    and STRIDE * dx >= (n if j < n else j) + PADDING - 2
                                ):
                                    weight += table[
                                        ((i * SPAN + dy - FIRST) * SPAN + dx - FIRST) * 18
                                        + 9 * j
                                        + 3 * (m + PADDING - STRIDE * dy)
                                        + n
                                        + PADDING
                                        - STRIDE * dx
                                    ].to(tl.float32)
                        if i == 0 and j == 0:
                            a00 += weight[:, None] * a
                            b00 += weight[:, None] * b
                        elif i == 0:
                            a01 += weight[:, None] * a
                            b01 += weight[:, None] * b
                        elif j == 0:
                            a10 += weight[:, None] * a
                            b10 += weight[:, None] * b
                        else:
                            a11 += weight[:, None] * a
                            b11 += weight[:, None] * b
    of_a, of_b = (a00, a01, a10, a11), (b00, b01, b10, b11)
    for i in tl.static_range(STRIDE):
        for j in tl.static_range(STRIDE):
            inside = (y + i < H) & (x + j < W)
            places = (out + place + (i * W + j) * C)[:, None]
            a, b = of_a[2 * i + j].to(out.dtype.element_ty), of_b[2 * i + j].to(out.dtype.element_ty)
            tl.store(places + c_a[None, :], a, mask=inside[:, None] & in_a[None, :])
            tl.store(places + c_b[None, :], b, mask=inside[:, None] & in_b[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _windows_kernel(
    grad,  # (B, H, W, M, D)
    v,  # (B, H, W, M, D)
    logits,  # (B, h, w, M, 9, 9)
    grad_logits,  # (B, h, w, M, 9, 9)
    transposed,  # a^T (B, h, w, M, 9, 10), the last element of each row is not written
    scale,
    factor,  # scale * log2(e)
    H,
    W,
    h,
    w,
    M: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two that holds the channels of a head
):
    """Gradient of the logits and the transposed attention, for neighbouring (window, head) of one row of windows.

    The nine gradients times the nine tokens of a window are one matrix product, padded to 16 x 16. Then each thread
    processes one softmax row.
    """
    C: tl.constexpr = M * D
    dtype: tl.constexpr = logits.dtype.element_ty
    y, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x, head = row // M, row % M
    n, c = tl.arange(0, 16), tl.arange(0, BLOCK)
    token_y, token_x = y * STRIDE - PADDING + n // 3, x[:, None] * STRIDE - PADDING + (n % 3)[None, :]
    inside = ((token_y >= 0) & (token_y < H) & (n < 9))[None, :] & (token_x >= 0) & (token_x < W) & (x < w)[:, None]
    places = ((token_y[None, :] * W + token_x) * C + (head * D)[:, None])[:, :, None] + c[None, None, :]
    inside = inside[:, :, None] & (c < D)[None, None, :]
    image = batch * H * W * C
    of_v = tl.load(v + image + places, mask=inside, other=0.0)
    of_grad = tl.load(grad + image + places, mask=inside, other=0.0)
    grad_a = tl.dot(of_grad, tl.permute(of_v, (0, 2, 1)), input_precision='ieee')
    grad_a = _columns(tl.reshape(grad_a, (ROWS * 16, 16)), ROWS * 16, 4)  # by q; the rows are (window, head, p)

    row = tl.program_id(0) * ROWS * 16 + tl.arange(0, ROWS * 16)
    row, p = row // 16, row % 16
    live = (row < w * M) & (p < 9)
    first = (batch * h + y) * w * M  # (window, head)
    words, odd = _in_words(logits, first * 81)
    grad_words, _odd = _in_words(grad_logits, first * 81)
    at = row * 81 + p * 9 + odd
    a = ()
    if dtype == tl.float32:
        for q in tl.static_range(9):
            a = a + (tl.load(words + at + q, mask=live, other=0.0),)
    else:
        below = tl.load(words + (at >> 1), mask=live, other=0)
        for i in tl.static_range(4):
            above = tl.load(words + (at >> 1) + i + 1, mask=live, other=0)
            a = a + _two(below, above, at & 1, dtype)
            below = above
        a = a + (_two(below, below, at & 1, dtype)[0],)
    a = _softmax(a, 0, live, factor)
    mean = tl.full((ROWS * 16,), -0.0, tl.float32)
    for q in tl.static_range(9):
        mean += a[q] * grad_a[q]
        tl.store(transposed + first * 90 + row * 90 + q * 10 + p, a[q].to(transposed.dtype.element_ty), mask=live)
    found = ()
    for q in tl.static_range(9):
        found = found + ((scale * a[q] * (grad_a[q] - mean)).to(dtype),)
    if dtype == tl.float32:
        for q in tl.static_range(9):
            tl.store(grad_words + at + q, found[q], mask=live)
    else:  # four whole words, and one half word, whose other half a neighbour writes
        is_odd = (at & 1) == 1
        bits = ()
        for q in tl.static_range(9):
            bits = bits + (found[q].to(tl.uint16, bitcast=True).to(tl.uint32),)
        for i in tl.static_range(4):
            low, high = (
                tl.where(is_odd, bits[2 * i + 1], bits[2 * i]),
                tl.where(is_odd, bits[2 * i + 2], bits[2 * i + 1]),
            )
            tl.store(grad_words + ((at + 1) >> 1) + i, low | (high << 16), mask=live)
        rest = tl.where(is_odd, bits[0], bits[8]).to(tl.uint16).to(dtype, bitcast=True)
        tl.store(grad_logits + first * 81 + (at - odd) + tl.where(is_odd, 0, 8), rest, mask=live)


def check() -> None:
    """Check that Triton can launch kernels, which takes a driver and a C compiler; raises Triton's error if not.

    Raises:
        RuntimeError: Triton is too old to have tuples in kernels.
    """
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
        raise RuntimeError(f'the kernels need Triton 3.3 (it comes with PyTorch 2.7), found {triton.__version__}')
    triton.runtime.driver.active.get_current_target()


def forward(v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int) -> torch.Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    return _cells(_aligned(v), _aligned(logits), False, scale, stride, padding)


def backward(
    grad: torch.Tensor, v: torch.Tensor, logits: torch.Tensor, scale: float, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``v`` and ``logits`` from the output gradient."""
    grad, v, logits = _aligned(grad), _aligned(v), _aligned(logits)
    grad_logits = torch.empty_like(logits)
    B, H, W, C = v.shape
    _, h, w, M = logits.shape[:4]
    # Between 0 and 1, float16 is more precise than bfloat16.
    kept = torch.float32 if logits.dtype == torch.float32 else torch.float16
    transposed = torch.empty((B, h, w, M, 9, 10), dtype=kept, device=v.device)
    block = max(triton.next_power_of_2(C // M), 16)
    rows = min(max(128 // block, 1), 8)
    grid = triton.cdiv(w * M, rows), h, B
    tensors, sizes = (grad, v, logits, grad_logits, transposed), (H, W, h, w, M, C // M, stride, padding)
    with on_device(v):
        _windows_kernel[grid](
            *tensors, scale, scale * math.log2(math.e), *sizes, rows, block, num_warps=max(rows // 2, 1)
        )
    return _cells(grad, transposed, True, scale, stride, padding), grad_logits


def _cells(tokens, weights, transposed: bool, scale: float, stride: int, padding: int) -> torch.Tensor:
    """Sum of a tokens, where ``weights`` are the logits; or of a^T tokens, where ``weights`` are a^T."""
    B, H, W, C = tokens.shape
    _, h, w, M = weights.shape[:4]
    out = torch.empty_like(tokens)
    half = triton.next_power_of_2((C // M + 1) // 2)
    rows = min(max(512 // half, 8), 64)  # a thread processes 8 channels of each half
    if tokens.element_size() == 4:
        rows //= 2  # 4 channels
    grid = triton.cdiv(triton.cdiv(W, stride) * M, rows), triton.cdiv(H, stride), B
    sizes = H, W, h, w, M, C // M, stride, padding
    with on_device(tokens):
        tensors, options = (tokens, weights, out), dict(num_warps=2, **_REGISTERS)
        _cells_kernel[grid](*tensors, scale * math.log2(math.e), *sizes, transposed, rows, half, **options)
    return out


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor whose address is a multiple of 16 bytes, for which the kernels are compiled."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def on_device(tensor: torch.Tensor):
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
