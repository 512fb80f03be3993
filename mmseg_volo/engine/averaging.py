"""Exponential moving average (EMA) of the weights, also of a fully sharded model."""

from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import BaseLoop, Runner
from mmseg.registry import HOOKS, MODELS
from torch import nn

from ..utils.unwrap import class_of
from .sharding import VOLOFullyShardedDataParallel, full_state, whole_parameters

_MEMORY = 1 / 32  # of the run: the mean age of the weights in an average


@HOOKS.register_module()
class VOLOEMAHook(EMAHook):
    """mmengine's :class:`EMAHook`, which follows the length of the run and also averages sharded weights.

    Validations use the averaged weights, and a checkpoint's ``state_dict`` holds them, so tests, predictions and
    published files use them too. Its ``ema_state_dict`` holds the weights that are trained, from which a run resumes.

    Args:
        momentum: share of the newest weights in each new average. Default: 32 / (iterations of the run), so that the
            average looks back over a thirty-second of any run: 0.0002 for 160,000 iterations, which is mmengine's.
        kwargs: the other arguments of EMAHook.
    """

    _sharded: VOLOFullyShardedDataParallel | None = None
    _whole: dict | None = None

    def __init__(self, momentum: float | None = None, **kwargs):
        super().__init__(**kwargs)
        if momentum is not None:
            self.ema_cfg['momentum'] = momentum

    def before_run(self, runner: Runner) -> None:
        """Copy the model."""
        kind = class_of(self.ema_cfg, MODELS)
        if isinstance(kind, type) and issubclass(kind, ExponentialMovingAverage) and _trains(runner):
            self.ema_cfg.setdefault('momentum', min(0.5, 1 / (_MEMORY * runner.max_iters)))
        if not isinstance(runner.model, VOLOFullyShardedDataParallel):
            super().before_run(runner)
            return
        self._sharded = runner.model
        self._sharded.reshard()
        self.src_model = runner.model.module
        self.ema_model = MODELS.build(self.ema_cfg, default_args=dict(model=_weights_of(self.src_model)))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Load the average of a run that resumes. Else an average of shards starts with the first iteration."""
        if self._sharded is None:
            super().after_load_checkpoint(runner, checkpoint)
        elif runner._resume:
            with whole_parameters(self.ema_model):
                super().after_load_checkpoint(runner, checkpoint)

    def gather(self) -> None:
        """Gather the averaged shards for a checkpoint; all ranks call it together."""
        if self._sharded is not None:
            self._whole = full_state(self.ema_model)[0]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the averaged weights in the place of those that are trained."""
        if self._sharded is None:
            super().before_save_checkpoint(runner, checkpoint)
            return
        checkpoint['ema_state_dict'], self._whole = self._whole, None
        self._swap_ema_state_dict(checkpoint)

    def _swap_ema_parameters(self) -> None:
        if self._sharded is not None:
            if self.ema_model.steps == 0:  # there is no average yet
                return
            self._sharded.reshard()
        super()._swap_ema_parameters()


def _trains(runner: Runner) -> bool:
    return isinstance(runner._train_loop, BaseLoop)


def _weights_of(module: nn.Module) -> nn.Module:
    """A module with copies of all parameters and buffers under their names, and no code: FSDP's cannot be copied."""
    copy = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        copy.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        copy.register_buffer(name, buffer.clone(), name not in module._non_persistent_buffers_set)
    for name, child in module.named_children():
        copy.add_module(name, _weights_of(child))
    return copy


def use_ema(config: Config) -> None:
    """Add a :class:`VOLOEMAHook` to a config that has no EMAHook yet."""
    hooks = list(config.get('custom_hooks') or [])
    kinds = [class_of(hook, HOOKS) for hook in hooks if isinstance(hook, dict)]
    if not any(isinstance(kind, type) and issubclass(kind, EMAHook) for kind in kinds):
        config.custom_hooks = [*hooks, dict(type='VOLOEMAHook')]
