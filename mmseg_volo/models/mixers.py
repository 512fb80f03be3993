"""What an ablation puts in the place of outlook attention: plain mixers with the same window (Table 6 of the paper)."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.layers import Linear


class LocalAttention(nn.Module):
    """Multi-head self-attention of each token to its ``kernel_size`` x ``kernel_size`` window.

    Tokens outside the map take no part. Maps (B, H, W, C) to (B, H, W, C). The windows of keys and values are copied,
    which takes ``kernel_size``² times their memory.
    """

    def __init__(self, dim: int, heads: int, kernel_size: int):
        super().__init__()
        self.heads, self.kernel_size = heads, kernel_size
        self.qkv = Linear(dim, dim * 3, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        M, D, k = self.heads, C // self.heads, self.kernel_size
        q, keys_and_values = self.qkv(x).split([C, 2 * C], -1)
        windows = F.unfold(keys_and_values.permute(0, 3, 1, 2), k, padding=k // 2)  # B, 2C * k * k, H * W
        keys, values = windows.view(B, 2, M, D, k * k, H * W).unbind(1)
        inside = F.unfold(x.new_ones(1, 1, H, W), k, padding=k // 2) > 0  # 1, k * k, H * W
        q = q.reshape(B, H * W, M, D).permute(0, 2, 3, 1) * D**-0.5  # B, M, D, H * W
        scores = (q[:, :, :, None] * keys).sum(2).masked_fill(~inside, -torch.inf)
        x = (scores.softmax(2)[:, :, None] * values).sum(3)  # B, M, D, H * W
        return self.proj(x.reshape(B, C, H * W).transpose(1, 2).reshape(B, H, W, C))


class Convolution(nn.Module):
    """A convolution over all channels, with zeros outside the map. Maps (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
