"""Steps of VOLO that depend on the size of the image; TorchScript can compile them."""

import torch
import torch.nn.functional as F

from . import outlook_attention
from .layers import is_traced
from .reference import outlook_attention_reference


def attend(
    v: torch.Tensor, logits: torch.Tensor, scale: float, kernel_size: int, stride: int, padding: int, impl: str
) -> torch.Tensor:
    """Call :func:`mmseg_volo.ops.outlook_attention`, or in TorchScript the definition, which it can compile."""
    if torch.jit.is_scripting():
        return outlook_attention_reference(
            v, logits, scale=scale, kernel_size=kernel_size, stride=stride, padding=padding
        )
    else:
        return outlook_attention(
            v, logits, scale=scale, kernel_size=kernel_size, stride=stride, padding=padding, impl=impl
        )


def resize_pos_embed(pos_embed: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resize a position embedding (1, h, w, C) to ``grid`` bicubically; return it unchanged if it has that size."""
    if pos_embed.shape[1] == grid[0] and pos_embed.shape[2] == grid[1]:
        return pos_embed
    # In float32: not every device has a half-precision kernel, and half precision would lose pretrained digits.
    values = pos_embed.float()
    if torch.jit.is_scripting():
        resized = _interpolate(values, grid)
    else:
        resized = (_interpolate if is_traced(grid[0]) or values.is_meta else _multiply)(values, grid)
    return resized.to(pos_embed.dtype)


def _interpolate(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    size = [grid[0], grid[1]]
    return F.interpolate(values.permute(0, 3, 1, 2), size, mode='bicubic', align_corners=False).permute(0, 2, 3, 1)


def _multiply(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """:func:`_interpolate` by two matrix products.

    PyTorch's CUDA kernel has one thread for each output position, which loops over the channels: it took 1.9 ms for
    VOLO-D1 at 512 x 512 on an H200, as long as the network. On a CPU the products take a fifth of its time.
    """
    h, w, channels = values.shape[1:]
    with torch.autocast(values.device.type, enabled=False):
        resized = _bicubic_matrix(h, grid[0], values) @ values.reshape(h, w * channels)
        return (_bicubic_matrix(w, grid[1], values) @ resized.view(grid[0], w, channels))[None]


def _bicubic_matrix(size: int, out: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix (out, size) by which ``F.interpolate`` resizes an axis bicubically."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None, None], (out, size), mode='bicubic', align_corners=False)[0, 0]


def padding_of(side: int, multiple: int, smallest: int) -> int:
    """Zeros to add to a side of an image: up to ``smallest``, or up to a multiple."""
    return smallest - side if side < smallest else (multiple - side % multiple) % multiple


def padded(x: torch.Tensor, multiple: int, smallest: int) -> torch.Tensor:
    """Add zeros to an image (B, C, H, W) at the right and the bottom; see :func:`padding_of`."""
    bottom = padding_of(x.shape[-2], multiple, smallest)
    right = padding_of(x.shape[-1], multiple, smallest)
    return F.pad(x, (0, right, 0, bottom)) if bottom != 0 or right != 0 else x


def without_padding(x: torch.Tensor, H: int, W: int, stride: int, multiple: int, smallest: int) -> torch.Tensor:
    """Drop the rows and columns of a map (B, h, w, C) that hold padding of the image (H, W) only."""
    if padding_of(H, multiple, smallest) == 0 and padding_of(W, multiple, smallest) == 0:
        return x
    return x[:, : (H + stride - 1) // stride, : (W + stride - 1) // stride]
