"""Put :func:`mmseg_volo.ops.outlook_attention` into models that have outlook attention of their own.

For timm's VOLO, MiVOLO and the official code, which use unfold and fold: those are slow, need the ONNX operator Col2Im,
which OpenVINO and TensorRT lack, and keep large tensors for the backward pass.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from . import outlook_attention

_NEEDED = 'num_heads', 'kernel_size', 'padding', 'stride', 'scale', 'v', 'attn', 'attn_drop', 'proj', 'proj_drop'


def use_fused_outlook(model: nn.Module, enabled: bool = True) -> int:
    """Compute the outlook attention of a model with this package's operation, or again with the model's own code.

    The model is changed in place. Its parameters, their names and its output stay the same. It can be trained, copied,
    compiled and exported. Attention that drops weights in training (``attn_drop``) keeps its own code there.

    Args:
        model: one with modules of timm's class ``OutlookAttention``, or of the official code's, such as
            ``timm.create_model('volo_d1_224')`` or a MiVOLO.
        enabled: False takes the change back.

    Returns:
        How many modules compute with this package's operation now.

    Raises:
        ValueError: the model has no such module.
    """
    found = [module for module in model.modules() if _is_outlook_attention(module)]
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no OutlookAttention of timm or of the official VOLO; VOLO of mmseg_volo needs '
            'no change'
        )
    for module in found:
        module.__dict__.pop('forward', None)
        if enabled:
            module.forward = functools.partial(_forward, module)  # which copy and pickle follow, unlike a method
    return len(found) if enabled else 0


def _is_outlook_attention(module: nn.Module) -> bool:
    """Whether a module is the OutlookAttention of timm or of the official code, or a subclass with the same forward."""
    forward = getattr(type(module), 'forward', None)
    owner = next((kind for kind in type(module).__mro__ if vars(kind).get('forward') is forward), object)
    return owner.__name__ == 'OutlookAttention' and all(hasattr(module, name) for name in _NEEDED)


def _forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Map (B, H, W, C) to (B, H, W, C), as ``OutlookAttention.forward`` of timm."""
    if module.training and module.attn_drop.p > 0:
        return type(module).forward(module, x)
    k, K = module.kernel_size, module.kernel_size**2
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), module.stride, module.stride, ceil_mode=True).permute(0, 2, 3, 1)
    logits = module.attn(pooled).unflatten(-1, (module.num_heads, K, K))  # B, h, w, heads, K, K
    out = outlook_attention(
        module.v(x), logits, scale=module.scale, kernel_size=k, stride=module.stride, padding=module.padding
    )
    return module.proj_drop(module.proj(out))
