"""Fully sharded training: each rank keeps a shard of the parameters, the gradients and the optimizer state.

This is PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``), for models too large for plain data parallelism. A
checkpoint holds full tensors under their official names. So sharded and plain runs can resume from each other's files.
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
    """Wrap a segmentor and shard its parameters among all ranks; use it in place of MMDistributedDataParallel.

    Each VOLO block gathers its parameters for its forward and its backward pass, then frees them. The stem, the norms
    and the heads are gathered together. In eval mode all parameters stay gathered, because ranks may predict different
    numbers of windows and cannot gather in step. So all ranks must call ``eval()`` and ``train()`` together, as
    mmengine's loops do. ``eval()`` also broadcasts the buffers of rank 0. On a CPU, SyncBN becomes BN.

    Args:
        module: the segmentor, on its device. It takes the weights of rank 0 and is sharded in place.
        reshard_after_forward: free a block's parameters between its forward and its backward pass too. False gathers
            once a step and keeps the full parameters until its end; gradients and optimizer state stay sharded.

    Raises:
        ConfigError: the model has no VOLO, or ``reshard_after_forward`` is true on a torch before 2.8, which cannot
            switch it off for evaluation.
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
        """Call the segmentor."""
        return self.module(*args, **kwargs)

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """Run one step of the segmentor; exchange gradients only where the optimizer will step."""
        self.module.set_requires_gradient_sync(optim_wrapper.should_sync())
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: dict) -> list:
        """Predict with the segmentor."""
        return self.module.val_step(data)

    def test_step(self, data: dict) -> list:
        """Predict with the segmentor."""
        return self.module.test_step(data)

    def train(self, mode: bool = True) -> 'VOLOFullyShardedDataParallel':
        """Set training mode (sharded parameters) or eval mode (gathered parameters)."""
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
        """Free the gathered parameters."""
        for part in (self.module, *self._units):
            part.reshard()
        if self._reshard_after_forward:
            for unit in self._units:
                unit.set_reshard_after_forward(True, recurse=False)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Replace the shards by plain full parameters, to initialise or load them; all ranks enter together.

    At the end the shards take the values of rank 0; after an exception they keep their own. A model without shards
    stays as it is. Inside the block the model cannot run, and the optimizer still holds the shards.
    """
    if isinstance(model, VOLOFullyShardedDataParallel):
        model.reshard()
    shards = [
        (module, name, shard)
        for module in model.modules()
        for name, shard in module._parameters.items()
        if isinstance(shard, DTensor)
    ]
    # FSDP's own hooks expect load_state_dict to leave shards.
    hooks = {module: module._load_state_dict_post_hooks for module, _, _ in shards}
    try:
        for module in hooks:
            module._load_state_dict_post_hooks = OrderedDict()
        for module, name, shard in shards:
            # In a group of one rank, full_tensor() returns the shard itself, so clone it.
            whole = shard.detach().full_tensor().clone()
            module._parameters[name] = nn.Parameter(whole, requires_grad=shard.requires_grad)
        yield
        for module, name, shard in shards:
            shard.detach().copy_(_shard(module._parameters[name].detach(), shard))
    finally:
        for module, name, shard in shards:
            module._parameters[name] = shard
        for module, own in hooks.items():
            module._load_state_dict_post_hooks = own


# torch.distributed.checkpoint.state_dict is no replacement: it keys the optimizer state by parameter name, steps an
# optimizer that has no state yet, and does not know the entries that mmengine's wrappers add.
def full_state(model: nn.Module, optimizer: Optimizer | OptimWrapper | None = None) -> tuple[dict, dict]:
    """Return the state dicts of model and optimizer as an unsharded run has them; all ranks call it together.

    Args:
        model: sharded or not, wrapped or not.
        optimizer: the optimizer of ``model``, or mmengine's wrapper of it.

    Returns:
        Both state dicts on rank 0, two empty dicts on the other ranks. The second is empty without an optimizer.
        Sharded tensors are gathered one at a time and moved to the CPU. Other tensors are neither copied nor moved.
    """
    if isinstance(model, VOLOFullyShardedDataParallel):
        model.reshard()
    bare = model.module if is_model_wrapper(model) else model
    keep = not dist.is_initialized() or dist.get_rank() == 0
    states = _gather(dict(bare.state_dict()), keep), _gather(optimizer.state_dict() if optimizer else {}, keep)
    return states if keep else ({}, {})


def shard_optimizer_state(optimizer: Optimizer | OptimWrapper, state: dict) -> dict:
    """Shard a full optimizer state dict for ``optimizer.load_state_dict``, wherever the parameters are shards.

    All ranks call it together. Tensors whose shape is not their parameter's, such as step counts, stay as they are.

    Raises:
        ValueError: the state is of another number of parameters.
    """
    groups = (optimizer.optimizer if isinstance(optimizer, OptimWrapper) else optimizer).param_groups
    parameters = [parameter for group in groups for parameter in group['params']]
    numbers = [number for group in state['param_groups'] for number in group['params']]
    if len(parameters) != len(numbers):
        raise ValueError(f'the optimizer has {len(parameters)} parameters, the saved state has {len(numbers)}')
    sharded = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state['state']:
            sharded[number] = {
                key: _shard(value, parameter) if _is_shardable(parameter, value) else value
                for key, value in state['state'][number].items()
            }
    return {**state, 'state': sharded}


def _is_shardable(parameter: torch.Tensor, value: object) -> bool:
    full = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    return full and isinstance(parameter, DTensor) and value.shape == parameter.shape


def _shard(whole: torch.Tensor, like: DTensor) -> DTensor:
    """Shard the tensor of rank 0 as ``like`` is sharded."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _gather(value: object, keep: bool) -> object:
    """Return ``value`` with full tensors in place of shards, or with None in place of tensors unless ``keep``."""
    if isinstance(value, dict):
        return {key: _gather(part, keep) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_gather(part, keep) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    whole = value.full_tensor().cpu() if isinstance(value, DTensor) else value
    return whole if keep else None


def _broadcast(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)
