"""PyTorch layers that take the fastest path of their device, with the same weights and results."""

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import drop
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights


def is_symbolic(value: object) -> bool:
    """Whether ``torch.fx`` traces with this value in place of a tensor or a number, so that it cannot be looked at."""
    return isinstance(value, torch.fx.Proxy)


def is_traced(value: object) -> bool:
    """Whether PyTorch records the operations on this value; plain ones are then best."""
    return is_symbolic(value) or torch.compiler.is_compiling() or torch.jit.is_tracing()


class Linear(nn.Linear):
    """``nn.Linear``, computed as a 1 x 1 convolution in float32 on a CPU.

    On CPUs PyTorch multiplies matrices with MKL and convolves with oneDNN. Measured on an AMD EPYC, forward and
    backward, oneDNN is 1.8 to 2.2 times faster with two threads and equally fast with one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_traced(x) or x.device.type != 'cpu' or x.dtype != torch.float32 or torch.is_autocast_enabled('cpu'):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        out = F.conv2d(rows, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that keeps half-precision inputs in half precision under autocast.

    Autocast on a GPU converts them to float32, and the next layer converts the result back. This class avoids both
    conversions when gradients are off; on a CPU PyTorch has none. Statistics are float32 in any case; weight and bias
    are rounded.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = is_symbolic(x) or not x.is_cuda or x.dtype == torch.float32 or torch.is_grad_enabled()
        if plain or not torch.is_autocast_enabled('cuda'):
            return super().forward(x)
        with torch.autocast('cuda', enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class DropPath(drop.DropPath):
    """mmcv's stochastic depth with the same random numbers, for maps (B, H, W, C); TorchScript can compile it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = (keep + x.new_empty((x.shape[0], 1, 1, 1)).uniform_()).floor()
        return x.div(keep) * kept


class ConvNormReLU(nn.Sequential):
    """``nn.Sequential`` of convolution, norm and ReLU in turns, computed with channels last.

    On a CPU, without gradients, batch norms in eval mode are folded into the convolutions, where oneDNN adds the bias
    for free. With cuDNN, PyTorch adds the bias in a separate pass that takes as long as the batch norm.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_tracing():  # ONNX has no memory formats
            # 1.4 times faster or more on a CPU, and tokens (B, H, W, C) then need no copy.
            x = x.contiguous(memory_format=torch.channels_last)
        if not self._can_fold(x):
            return super().forward(x)
        for conv, norm, relu in zip(self[::3], self[1::3], self[2::3], strict=True):
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            weight, bias = (t.detach() for t in fuse_conv_bn_weights(conv.weight, conv.bias, *statistics))
            x = relu(F.conv2d(x, weight, bias, conv.stride, conv.padding))
        return x

    def _can_fold(self, x: torch.Tensor) -> bool:
        if is_traced(x) or x.device.type != 'cpu' or torch.is_grad_enabled():
            return False
        return all(isinstance(n, _BatchNorm) and not n.training and n.track_running_stats for n in self[1::3])
