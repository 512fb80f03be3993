"""Optimizers: layer-wise learning-rate decay, and mixed precision in bfloat16."""

from contextlib import contextmanager
from numbers import Real

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict
from mmengine.runner.amp import autocast
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import nn

from ..errors import ConfigError


def should_update(wrapper: OptimWrapper | OptimWrapperDict) -> bool:
    """Whether the iteration that just ended includes an optimizer step; with gradient accumulation, some do not."""
    return all(one.should_update() for one in wrappers_of(wrapper))


def wrappers_of(wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    """The wrappers in an OptimWrapperDict, or the only one."""
    return [one for _, one in wrapper.items()] if isinstance(wrapper, OptimWrapperDict) else [wrapper]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VOLOLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with layer-wise learning-rate decay (BEiT, arXiv:2106.08254) for the backbone.

    A parameter at depth d of n depths gets ``lr * layer_decay_rate ** (n - 1 - d)``. Heads, neck and output norms get
    the full rate; each block gets the rate of the block above it times ``layer_decay_rate``. Rule and option name are
    those of mmpretrain's ``LearningRateDecayOptimWrapperConstructor``. All other options of mmengine's
    ``paramwise_cfg`` (``custom_keys``, ``norm_decay_mult``, ...) still apply; the decay multiplies their learning rate.
    Parameters with equal options share a parameter group.

    A schedule's minimum, such as PolyLR's ``eta_min``, holds for every group. Set it to 0, or the lowest layers end at
    a higher rate than they began with.

    Args:
        optim_wrapper_cfg: as in mmengine; ``optimizer.lr`` is required.
        paramwise_cfg: mmengine's options, and ``layer_decay_rate``, above 0 and at most 1; 1 means no decay.

    Raises:
        ConfigError: ``layer_decay_rate`` is missing or out of range, ``optimizer.lr`` is missing, or the backbone has
            no ``get_layer_depth(name, prefix)`` that returns a parameter's depth and the number of depths.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate <= 1:
            raise ConfigError(f'paramwise_cfg.layer_decay_rate must be a number above 0 and at most 1, got {rate!r}')
        if self.base_lr is None:
            raise ConfigError('layer decay multiplies optimizer.lr, but the config has none')

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Append the parameter groups of ``module`` to ``params``."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # mmengine calls this for each child too; only the outermost call has all groups
            return
        depth_of = getattr(getattr(module, 'backbone', None), 'get_layer_depth', None)
        if depth_of is None:
            backbone = type(getattr(module, 'backbone', module)).__name__
            raise ConfigError(f'layer decay needs a backbone with get_layer_depth, as VOLO has; {backbone} has none')
        names = {parameter: name for name, parameter in module.named_parameters()}
        rate, groups = self.paramwise_cfg['layer_decay_rate'], []
        for single in params:  # one parameter each
            depth, depths = depth_of(names[single['params'][0]], prefix='backbone.')
            # lr and weight_decay include both multipliers already.
            options = {k: v for k, v in single.items() if k not in ('params', 'lr_mult', 'decay_mult')}
            options['lr'] = options.get('lr', self.base_lr) * rate ** (depths - 1 - depth)
            if self.base_wd is not None:
                options.setdefault('weight_decay', self.base_wd)
            group = next((g for g in groups if {k: v for k, v in g.items() if k != 'params'} == options), None)
            if group is None:
                groups.append(group := dict(params=[], **options))
            group['params'] += single['params']
        params[:] = groups
        rates = [group['lr'] for group in groups] or [0.0]
        print_log(
            f'Layer decay {rate}: {len(names)} parameters in {len(groups)} groups, '
            f'learning rates {min(rates):.3g} to {max(rates):.3g}',
            logger='current',
        )


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16, on a GPU or a CPU. It has the range of float32, so the loss needs no scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module):
        """As in :class:`OptimWrapper`, with the forward pass under autocast."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def use_amp(config: Config) -> None:
    """Switch training to mixed precision: bfloat16, or float16 with loss scaling on a GPU without bfloat16.

    A config with another wrapper type keeps it. A config with ``optim_wrapper.loss_scale`` gets float16 on a GPU.
    """
    optim = config.optim_wrapper
    if optim.get('type', 'OptimWrapper') == 'OptimWrapper':
        if get_device() == 'cpu' or ('loss_scale' not in optim and _has_bfloat16()):
            optim.type = 'BFloat16OptimWrapper'
        else:
            optim.type = 'AmpOptimWrapper'
            optim.setdefault('loss_scale', 'dynamic')


def _has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16; older GPUs emulate it slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
