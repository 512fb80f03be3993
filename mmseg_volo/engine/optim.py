"""Optimizers: layer-wise learning-rate decay, and mixed precision in bfloat16."""

from contextlib import contextmanager
from numbers import Real

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict
from mmengine.runner.amp import autocast
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import nn

from ..errors import ConfigError


def should_update(wrapper: OptimWrapper | OptimWrapperDict) -> bool:
    """Whether the iteration that just ended was one at whose end the optimizer steps, by gradient accumulation."""
    return all(one.should_update() for one in wrappers_of(wrapper))


def wrappers_of(wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    return [wrapper] if isinstance(wrapper, OptimWrapper) else list(wrapper.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VOLOLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with layer-wise learning-rate decay (BEiT, arXiv:2106.08254) for the backbone.

    A parameter of depth d out of n has ``lr * layer_decay_rate ** (n - 1 - d)``: the heads, the neck and the out norms
    the whole rate, each block one factor less than the block above it. The rule and the option's name are those of
    mmpretrain's ``LearningRateDecayOptimWrapperConstructor``. All of mmengine's ``paramwise_cfg`` stays as it is
    (``custom_keys``, ``norm_decay_mult``, ...); the decay multiplies whatever learning rate it gives. Parameters of the
    same options share one parameter group.

    A schedule with a lowest rate, as PolyLR's ``eta_min``, holds for every group: set it to 0, or the lowest layers end
    with more than they began with.

    Args:
        optim_wrapper_cfg: as in mmengine; ``optimizer.lr`` must be given.
        paramwise_cfg: mmengine's options, and ``layer_decay_rate``, above 0 and at most 1; 1 decays nothing.

    Raises:
        ConfigError: no rate, one out of its range, no ``optimizer.lr``, or a model whose backbone has no
            ``get_layer_depth(name, prefix)``, which gives a parameter's depth and the number of depths.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate <= 1:
            raise ConfigError(f'paramwise_cfg.layer_decay_rate must be a number above 0 and at most 1, got {rate!r}')
        if self.base_lr is None:
            raise ConfigError('layer decay multiplies optimizer.lr, and the config gives none')

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Append the parameter groups of ``module`` to ``params``."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # mmengine comes here again for each child; the whole model's groups are complete at the end
            return
        depth_of = getattr(getattr(module, 'backbone', None), 'get_layer_depth', None)
        if depth_of is None:
            backbone = type(getattr(module, 'backbone', module)).__name__
            raise ConfigError(f'layer decay needs a backbone with get_layer_depth, as VOLO has; {backbone} has none')
        names = {parameter: name for name, parameter in module.named_parameters()}
        rate, groups = self.paramwise_cfg['layer_decay_rate'], []
        for single in params:  # one parameter each
            depth, depths = depth_of(names[single['params'][0]], prefix='backbone.')
            # Both multipliers are in lr and weight_decay already: they tell no groups apart.
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
    """Mixed precision in bfloat16, on a GPU or a CPU. Its exponents are float32's, so the loss needs no scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Run the forward pass under autocast, besides what :class:`OptimWrapper` does."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def use_amp(config: Config) -> None:
    """Switch training to mixed precision: bfloat16, or float16 with loss scaling on a GPU that has no bfloat16.

    A config that names its own wrapper keeps it, and one with ``optim_wrapper.loss_scale`` gets float16 on a GPU.
    """
    optim = config.optim_wrapper
    if optim.get('type', 'OptimWrapper') == 'OptimWrapper':
        if get_device() == 'cpu' or ('loss_scale' not in optim and _has_bfloat16()):
            optim.type = 'BFloat16OptimWrapper'
        else:
            optim.type = 'AmpOptimWrapper'
            optim.setdefault('loss_scale', 'dynamic')


def _has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16; older ones emulate it, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
