"""Running on what there is: distributed runs without a GPU, mixed precision on a CPU."""

import os
import subprocess
from contextlib import contextmanager

import torch
import torch.distributed
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.runner.amp import autocast
from mmseg.registry import OPTIM_WRAPPERS, RUNNERS
from torch import nn


@RUNNERS.register_module()
class VOLORunner(Runner):
    """mmengine's Runner, which also runs several processes on a machine without a GPU.

    There it starts the processes on gloo and wraps the model without device ids, where mmengine asks for CUDA; SyncBN,
    which works on CUDA only, becomes BN, its running statistics taken from the first process. When resuming, no
    pretrained backbone is read, since the checkpoint replaces it.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """As in mmengine; on a CPU the process group is there before mmengine would make it on CUDA."""
        if self.distributed and not is_distributed() and get_device() == 'cpu':
            _init_gloo(self.launcher)
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """As in mmengine, with plain data parallelism for a model on the CPU."""
        if not self.distributed or get_device() != 'cpu' or is_model_wrapper(model) or model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        return MMDistributedDataParallel(
            module=revert_sync_batchnorm(model),
            broadcast_buffers=True,
            find_unused_parameters=self.cfg.get('find_unused_parameters', False),
        )

    def _init_model_weights(self) -> None:
        resumes = self._resume and (self._load_from is not None or find_latest_checkpoint(self.work_dir) is not None)
        if not resumes:
            super()._init_model_weights()


def _init_gloo(launcher: str) -> None:
    if launcher == 'slurm':
        os.environ.setdefault('MASTER_PORT', '29500')
        if 'MASTER_ADDR' not in os.environ:
            hosts = subprocess.run(
                ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']],
                capture_output=True,
                text=True,
                check=True,
            )
            os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]
        os.environ.update(
            RANK=os.environ['SLURM_PROCID'],
            LOCAL_RANK=os.environ.get('SLURM_LOCALID', '0'),
            WORLD_SIZE=os.environ['SLURM_NTASKS'],
        )
    elif launcher != 'pytorch':
        raise ValueError(f"without a GPU the launcher must be 'pytorch' or 'slurm', got {launcher!r}")
    torch.distributed.init_process_group('gloo')


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16, on a CPU too. Its exponent range is float32's, so the loss needs no scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Run the forward pass under autocast, besides what :class:`OptimWrapper` does."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
