"""The definition of outlook attention in plain PyTorch: unfold, softmax, product, fold."""

import torch
import torch.nn.functional as F


def outlook_attention_reference(
    v: torch.Tensor, logits: torch.Tensor, *, scale: float, kernel_size: int, stride: int, padding: int
) -> torch.Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`; any kernel size, stride, padding and floating dtype."""
    B, H, W, C = v.shape
    _, h, w, M, K, _ = logits.shape
    windows = F.unfold(v.permute(0, 3, 1, 2), kernel_size, padding=padding, stride=stride)
    windows = windows.reshape(B, M, C // M, K, h * w).permute(0, 1, 4, 3, 2)  # B, M, h*w, K, C/M
    attn = logits.reshape(B, h * w, M, K, K).transpose(1, 2)  # B, M, h*w, K, K
    attn = (attn * scale).softmax(dim=-1)
    # Autocast may run softmax in float32; the product has the precision of the values.
    mixed = attn.to(windows.dtype) @ windows
    mixed = mixed.permute(0, 1, 4, 3, 2).reshape(B, C * K, h * w)
    out = F.fold(mixed, (H, W), kernel_size, padding=padding, stride=stride)
    return out.permute(0, 2, 3, 1).to(v.dtype)
