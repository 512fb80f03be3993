"""Fully sharded training: each process keeps its share of the parameters, the gradients and the optimizer's state.

PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``), for models too large for plain data parallelism. A checkpoint
is the same as without it: whole tensors by their official names, so each kind of run goes on from the other's.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..models.volo import Block


@MODEL_WRAPPERS.register_module()
class VOLOFullyShardedDataParallel(nn.Module):
    """A segmentor whose parameters are shared out among all processes; takes the place of MMDistributedDataParallel.

    Each VOLO block gathers its parameters for its forward and its backward pass and lets them go; what is left, stem,
    norms and heads, is gathered as one. While the model is in eval mode everything stays gathered, because processes
    may predict different numbers of windows and could not gather in step: ``eval()`` and ``train()`` have to be called
    by all processes, as mmengine's loops do. ``eval()`` also gives all the first process's buffers. On a CPU SyncBN
    becomes BN.

    Args:
        module: the segmentor, on its device; sharded in place, after taking the first process's weights.
        reshard_after_forward: let a block's parameters go between its forward and its backward pass, too; False
            gathers once a step and keeps the whole parameters through it, but neither gradients nor optimizer state.

    Raises:
        ConfigError: no VOLO in the model, or a torch before 2.8 with ``reshard_after_forward``, which such a version
            cannot switch off for evaluation.
    """

    def __init__(self, module: nn.Module, reshard_after_forward: bool = True):
        super().__init__()
        if reshard_after_forward and not hasattr(FSDPModule, 'set_reshard_after_forward'):
            raise ConfigError(
                f'torch {torch.__version__} can only shard with model_wrapper_cfg.reshard_after_forward=False; '
                'True needs torch 2.8'
            )
        device = get_device()
        self.module = revert_sync_batchnorm(module) if device == 'cpu' else module
        self._units = [part for part in module.modules() if isinstance(part, Block)]
        if not self._units:
            raise ConfigError(f'sharding needs a VOLO as backbone, and {type(module).__name__} has none')
        self._reshard_after_forward = reshard_after_forward
        _broadcast([*module.parameters(), *module.buffers()])
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for unit in self._units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
        fully_shard(module, mesh=mesh)

    def forward(self, *args, **kwargs):
        """What the segmentor gives."""
        return self.module(*args, **kwargs)

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """One step of the segmentor; gradients are exchanged where the optimizer is going to use them."""
        self.module.set_requires_gradient_sync(optim_wrapper.should_sync())
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: dict) -> list:
        """The segmentor's predictions."""
        return self.module.val_step(data)

    def test_step(self, data: dict) -> list:
        """The segmentor's predictions."""
        return self.module.test_step(data)

    def train(self, mode: bool = True) -> 'VOLOFullyShardedDataParallel':
        """Set training or eval mode; see the class for what it does to the parameters."""
        if mode:
            self.reshard()
        else:
            if self._reshard_after_forward:
                self.module.set_reshard_after_forward(False)
            for part in (self.module, *self._units):
                part.unshard()
            _broadcast(list(self.module.buffers()))
        return super().train(mode)

    def reshard(self) -> None:
        """Let the gathered parameters go."""
        for part in (self.module, *self._units):
            part.reshard()
        if self._reshard_after_forward:
            for unit in self._units:
                unit.set_reshard_after_forward(True, recurse=False)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Plain whole parameters in place of the shards, to be initialised or loaded; all processes enter together.

    At the end the shards take the first process's values; after an exception they keep their own. Does nothing to a
    model that is not sharded. The model cannot run meanwhile, and the optimizer keeps to the shards.
    """
    if isinstance(model, VOLOFullyShardedDataParallel):
        model.reshard()
    shards = [
        (module, name, shard)
        for module in model.modules()
        for name, shard in module._parameters.items()
        if isinstance(shard, DTensor)
    ]
    # FSDP's own hooks take whatever load_state_dict leaves for shards.
    hooks = {module: module._load_state_dict_post_hooks for module, _, _ in shards}
    try:
        for module in hooks:
            module._load_state_dict_post_hooks = OrderedDict()
        for module, name, shard in shards:
            # A process alone would get its shard itself.
            whole = shard.detach().full_tensor().clone()
            module._parameters[name] = nn.Parameter(whole, requires_grad=shard.requires_grad)
        yield
        for module, name, shard in shards:
            shard.detach().copy_(_share(module._parameters[name].detach(), shard))
    finally:
        for module, name, shard in shards:
            module._parameters[name] = shard
        for module, own in hooks.items():
            module._load_state_dict_post_hooks = own


def full_state(model: nn.Module, optimizer: Optimizer | OptimWrapper | None = None) -> tuple[dict, dict]:
    """The state dicts of model and optimizer as a run without sharding has them; all processes call it together.

    Args:
        model: sharded or not, wrapped or not.
        optimizer: the optimizer of ``model``, or mmengine's wrapper of it.

    Returns:
        Both state dicts in the first process, two empty ones in the others; the second is empty without an optimizer.
        Shards are gathered one tensor at a time and put on the CPU; what is whole already is neither copied nor moved.
    """
    if isinstance(model, VOLOFullyShardedDataParallel):
        model.reshard()
    bare = model.module if is_model_wrapper(model) else model
    keep = not dist.is_initialized() or dist.get_rank() == 0
    states = _gathered(dict(bare.state_dict()), keep), _gathered(optimizer.state_dict() if optimizer else {}, keep)
    return states if keep else ({}, {})


def load_full_state(
    model: nn.Module,
    optimizer: Optimizer | OptimWrapper | None,
    state: dict,
    optimizer_state: dict | None = None,
    strict: bool = True,
) -> None:
    """Load what :func:`full_state` or a run without sharding has saved; all processes call it together, with the same.

    Args:
        model: sharded or not, wrapped or not.
        optimizer: the optimizer of ``model``, or mmengine's wrapper of it; may be None without ``optimizer_state``.
        state: whole tensors by name, on any device.
        optimizer_state: the optimizer's state dict, not changed.
        strict: as in ``load_state_dict``.
    """
    with whole_parameters(model):
        (model.module if is_model_wrapper(model) else model).load_state_dict(state, strict=strict)
    if optimizer_state is not None:
        optimizer.load_state_dict(share_optimizer_state(optimizer, optimizer_state))


def share_optimizer_state(optimizer: Optimizer | OptimWrapper, state: dict) -> dict:
    """A whole optimizer state dict as ``optimizer.load_state_dict`` needs it: shards where its parameters are shards.

    All processes call it together. Tensors of other shapes than their parameter's, as step counts, stay as they are.

    Raises:
        ValueError: the state is of another number of parameters.
    """
    groups = (optimizer.optimizer if isinstance(optimizer, OptimWrapper) else optimizer).param_groups
    parameters = [parameter for group in groups for parameter in group['params']]
    numbers = [number for group in state['param_groups'] for number in group['params']]
    if len(parameters) != len(numbers):
        raise ValueError(f'the optimizer has {len(parameters)} parameters, its saved state is of {len(numbers)}')
    shared = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state['state']:
            shared[number] = {
                key: _share(value, parameter) if _is_like(value, parameter) else value
                for key, value in state['state'][number].items()
            }
    return {**state, 'state': shared}


def _is_like(value: object, parameter: torch.Tensor) -> bool:
    whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    return whole and isinstance(parameter, DTensor) and value.shape == parameter.shape


def _share(whole: torch.Tensor, like: DTensor) -> DTensor:
    """The first process's tensor, in shards as ``like``."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _gathered(value: object, keep: bool) -> object:
    """``value`` with whole tensors in place of shards; no tensors unless ``keep``."""
    if isinstance(value, dict):
        return {key: _gathered(part, keep) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_gathered(part, keep) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    whole = value.full_tensor().cpu() if isinstance(value, DTensor) else value
    return whole if keep else None


def _broadcast(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)
