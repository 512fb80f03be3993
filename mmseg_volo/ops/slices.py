"""Outlook attention from strided slices, products and sums, which every exporter and inference engine supports."""

import torch
import torch.nn.functional as F


def outlook_attention_slices(
    v: torch.Tensor, logits: torch.Tensor, *, scale: float, kernel_size: int, stride: int, padding: int
) -> torch.Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`; any kernel size, stride, padding and floating dtype.

    It exports to ONNX opset 17 as pads, slices, matrix products and sums, without Im2Col and Col2Im.
    """
    _, H, W, C = v.shape
    B, h, w, M = logits.shape[:4]
    # A cell is stride x stride tokens; `reach` windows along each axis overlap it.
    k, reach = kernel_size, -(-kernel_size // stride)
    # Pad or cut the bottom and the right to the end of the last window.
    bottom, right = (h - 1) * stride + k - padding - H, (w - 1) * stride + k - padding - W
    padded = F.pad(v, (0, 0, padding, right, padding, bottom))
    tokens = [
        padded[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride]
        for i in range(k)
        for j in range(k)
    ]
    windows = torch.stack([token.unflatten(-1, (M, C // M)) for token in tokens], dim=-2)  # B, h, w, M, K, D
    attn = (logits * scale).softmax(dim=-1)
    # Autocast may run softmax in float32; the product has the precision of the values.
    mixed = attn.to(windows.dtype) @ windows

    # Fold: tokens i, i + stride, ... of a window have the same position within neighbouring cells.
    rows = []
    for a in range(stride):
        row = []
        for b in range(stride):
            parts = [
                F.pad(mixed[..., i * k + j, :].flatten(-2), (0, 0, dx, reach - 1 - dx, dy, reach - 1 - dy))
                for dy, i in enumerate(range(a, k, stride))
                for dx, j in enumerate(range(b, k, stride))
            ]
            row.append(sum(parts[1:], parts[0]) if parts else v.new_zeros(B, h + reach - 1, w + reach - 1, C))
        rows.append(torch.stack(row, dim=3))
    cells = torch.stack(rows, dim=2)  # B, cell rows, stride, cell columns, stride, C
    folded = cells.flatten(3, 4).flatten(1, 2)
    missing = max(0, padding + H - (h + reach - 1) * stride), max(0, padding + W - (w + reach - 1) * stride)
    if any(missing):
        folded = F.pad(folded, (0, 0, 0, missing[1], 0, missing[0]))
    return folded[:, padding : padding + H, padding : padding + W].to(v.dtype)
