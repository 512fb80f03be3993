"""Build the runner: training on any device, and resuming after an interruption."""

import atexit
import importlib.util
import mmap
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, get_rank, is_distributed, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from mmseg.registry import DATA_SAMPLERS, LOOPS, RUNNERS
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoints.compatibility import Mode, check_checkpoint
from ..checkpoints.reading import load_checkpoint
from ..checkpoints.writing import save
from ..config_check import NamedBuildErrors, building, check_config, settle
from ..datasets.checks.check import build_checked, check_not_empty, quick_check
from ..errors import USER_ERRORS, CheckpointError, ConfigError, ProcessLost, TrainingStopped
from ..utils.unwrap import bare_model, class_of
from .checkpoint_hook import AtomicCheckpointHook
from .continuity import check_continuity
from .distributed import init_gloo, watch_over
from .guards import classes_of
from .lock import FolderLock, is_locked
from .loop import SeededDataset, check_epochs_end, check_one_size, seed_everything
from .resume import check_resumable, newest_checkpoint
from .saving import collect
from .sharding import VOLOFullyShardedDataParallel, shard_optimizer_state, whole_parameters


@RUNNERS.register_module()
class VOLORunner(NamedBuildErrors, Runner):
    """mmengine's Runner, which also supports distributed runs without a GPU, and safe resuming.

    Without a GPU, where mmengine would require CUDA, the process group uses gloo and the model is wrapped without
    device ids. SyncBN, which needs CUDA, becomes BN; its running statistics are those of rank 0.

    ``resume=True`` continues from the newest complete checkpoint of the work dir, which may have been moved, or of the
    work dir that ``load_from`` names. Broken files are skipped with a warning. The pretrained backbone is not read
    then, since the checkpoint replaces it.

    While a run trains, it locks the folders of its checkpoints (:mod:`mmseg_volo.engine.lock`).
    """

    _mode: Mode = 'infer'
    _found: tuple[str, dict] | None = None  # path and content of the checkpoint to resume from, so that it is read once

    def train(self) -> nn.Module:
        """Train as mmengine does, after a quick check of the data sets.

        Raises:
            ProcessLost: a data loader's worker or another rank was killed. Every rank raises it within a minute. A rank
                counts as lost after ``watch_patience`` seconds of silence (a config key, 40 by default).
            DataError: the quick part of ``tools/check_data.py`` found a fault.
            SaveError, TrainingStopped: see :mod:`mmseg_volo.engine.checkpoint_hook`.
            TrainingDiverged: see :mod:`mmseg_volo.engine.guards`.
            ConfigError: another run trains in the work dir, or a run by epochs has a data loader that never ends one.
        """
        watch = watch_over(self.cfg.get('watch_patience', 40))
        locks = ExitStack()
        try:
            self._mode = 'train'
            self._on_rank_0(lambda: self._lock_folders(locks))
            self._end_epochs()
            for name in ('_train_dataloader', '_val_dataloader'):
                loader = getattr(self, name)
                if isinstance(loader, dict) and isinstance(loader.get('dataset'), dict):
                    with building(self.cfg, f'{name[1:]}.dataset'):
                        dataset = build_checked(loader['dataset'], quick_check)
                    setattr(self, name, dict(loader, dataset=dataset))
            self._find_resume_point()
            return super().train()
        except TrainingStopped:
            raise
        except Exception as error:
            lost = _worker_lost(error)
            if watch:
                lost = watch.report(lost or error) or lost
            if lost:
                raise lost from error
            raise
        finally:
            if watch:
                watch.close()
            for hook in self.hooks:
                if isinstance(hook, AtomicCheckpointHook):
                    hook.release()
            locks.close()

    def val(self) -> dict:
        """As in mmengine; the checkpoint's weights are enough, even if the config says ``resume``."""
        self._resume = self._resume and self._load_from is None
        return super().val()

    def test(self) -> dict:
        """As in mmengine; the checkpoint's weights are enough, even if the config says ``resume``."""
        self._resume = self._resume and self._load_from is None
        return super().test()

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """As in mmengine, after a check that the model can predict the batches."""
        return self._checked_loop(super().build_val_loop(loop), 'val_dataloader')

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """As in mmengine, after a check that the model can predict the batches."""
        return self._checked_loop(super().build_test_loop(loop), 'test_dataloader')

    def _checked_loop(self, loop: BaseLoop, key: str) -> BaseLoop:
        if isinstance(loader := getattr(loop, 'dataloader', None), DataLoader):
            check_one_size(loader, bare_model(self.model), key)
        return loop

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False):
        """As in mmengine; augmentation uses the seeds of a :class:`~mmseg_volo.engine.loop.ResumableSampler`."""
        if isinstance(dataloader, dict):
            dataset = dataloader['dataset']
            if isinstance(dataset, dict):
                dataset = build_checked(dataset, check_not_empty)
            dataloader = dict(dataloader, dataset=SeededDataset(dataset))
            if dataloader.get('num_workers') and 'worker_init_fn' not in dataloader:
                dataloader['worker_init_fn'] = dict(type=_init_worker, seed=seed, rank=get_rank())
                dataloader.pop('disable_subprocess_warning', None)  # an option of mmengine's worker_init_fn only
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """As in mmengine, but atomic (:mod:`mmseg_volo.checkpoints.writing`) if ``out_dir`` is a local folder.

        Rank 0 saves. If the model is sharded, all ranks must call this.

        Raises:
            SaveError: the file could not be written; an older file of that name is unchanged.
        """
        if file_client_args or not isinstance(get_file_backend(out_dir, backend_args=backend_args), LocalBackend):
            super().save_checkpoint(
                out_dir, filename, file_client_args, save_optimizer, save_param_scheduler, meta, by_epoch, backend_args
            )
            return
        meta = {} if meta is None else meta
        meta.setdefault('epoch', self.epoch + by_epoch)
        meta.setdefault('iter', self.iter + (not by_epoch))
        checkpoint = collect(self, meta, save_optimizer, save_param_scheduler)
        if checkpoint is not None:
            save(checkpoint, Path(out_dir, filename))

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'cpu',
    ) -> None:
        """As in mmengine, but read to the CPU, so that the GPU does not hold everything twice."""
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r'^module.', ''),),
    ) -> dict:
        """As in mmengine, after a check of the file against the model.

        Training loads what fits and logs the rest. A test rejects a checkpoint of another model or of other classes. To
        resume, the file must hold the state of a training run with the same optimizer, schedules and classes.

        Raises:
            CheckpointError: see :func:`~mmseg_volo.checkpoints.compatibility.check_checkpoint`,
                :func:`~mmseg_volo.engine.resume.check_resumable` and
                :func:`~mmseg_volo.engine.continuity.check_continuity`.
        """
        path, checkpoint = self._found or (None, None)
        self._found = None
        if path != filename:
            checkpoint = load_checkpoint(filename, map_location)
        model = bare_model(self.model)
        if self._resume:
            check_resumable(checkpoint, Path(filename))
            check_continuity(self, checkpoint, filename)
        check_checkpoint(model, checkpoint, 'resume' if self._resume else self._mode, classes_of(self))
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        with whole_parameters(self.model):
            _load_checkpoint_to_model(model, checkpoint, strict, 'current', list(revise_keys))
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        if self._resume:
            checkpoint['message_hub']['runtime_info'].pop('cfg', None)  # the run has its own
            before = checkpoint['meta'].get('world_size', self.world_size)
            if before != self.world_size:
                self.logger.warning(
                    f'RESUME: the checkpoint was saved by {before} ranks, and this run has {self.world_size}: from '
                    'here on it sees other images'
                )
            if isinstance(self.model, VOLOFullyShardedDataParallel):
                checkpoint['optimizer'] = shard_optimizer_state(self.optim_wrapper, checkpoint['optimizer'])
        return checkpoint

    def _end_epochs(self) -> None:
        """Give a run by epochs a DefaultSampler in place of a sampler that never ends, which base configs have."""
        loop, loader = self._train_loop, self._train_dataloader
        if not isinstance(loop, dict) or not _counts_epochs(loop):
            return
        if isinstance(loader, DataLoader):
            check_epochs_end(loader)
            return
        sampler = loader.get('sampler')
        kind = class_of(sampler, DATA_SAMPLERS) if isinstance(sampler, dict) else None
        if isinstance(kind, type) and issubclass(kind, InfiniteSampler):
            self._train_dataloader = dict(loader, sampler=dict(sampler, type='DefaultSampler'))  # same arguments
            self.logger.info(
                f'train_cfg counts epochs: train_dataloader.sampler is DefaultSampler, since {kind.__name__} never '
                'ends. A run by iterations (ResumableTrainLoop) can be resumed exactly, this one only about'
            )

    def _find_resume_point(self) -> None:
        if not self._resume:
            return
        named = None if self.cfg.get('auto_resume') else self._load_from
        if named and not self._on_rank_0(lambda: Path(named).is_dir()):
            return
        folders = [Path(named)] if named else self._checkpoint_folders()
        templates = [hook.filename_tmpl for hook in self.hooks if isinstance(hook, CheckpointHook)]

        def find() -> str | None:
            self._found = newest_checkpoint(folders, self.logger, templates)
            return self._found and self._found[0]

        path = self._on_rank_0(find)
        if path:
            self._load_from = path
        elif named:
            raise CheckpointError(f'--resume: no checkpoint of a training run in the folder {named}')
        else:
            self._resume = False
            self.logger.warning(
                f'RESUME: no checkpoint in {" or ".join(map(str, folders))}: TRAINING STARTS FROM ITERATION 0. To '
                'resume another run, give --resume FILE or the --work-dir of that run.'
            )

    def _checkpoint_folders(self) -> list[Path]:
        """The local folders of checkpoints, the work dir first."""
        folders = [Path(self.work_dir)]
        for hook in self.hooks:
            if not isinstance(hook, CheckpointHook) or not hook.out_dir or hook.file_client_args:
                continue
            if isinstance(get_file_backend(hook.out_dir, backend_args=hook.backend_args), LocalBackend):
                folders.append(Path(hook.out_dir, folders[0].name))
        return folders

    def _lock_folders(self, locks: ExitStack) -> None:
        for folder in dict.fromkeys(folder.resolve() for folder in self._checkpoint_folders()):
            locks.callback(FolderLock(folder, patience=1.0).release)

    @staticmethod
    def _on_rank_0(work: Callable[[], Any]) -> Any:
        """Call ``work`` on rank 0, because another host may see an older state of a shared folder.

        Every rank gets the result, or raises the error.
        """
        result, error = None, None
        if is_main_process():
            try:
                result = work()
            except USER_ERRORS as caught:
                error = caught
        both = [result, error]
        broadcast_object_list(both)
        if both[1]:
            raise both[1]
        return both[0]

    def dump_config(self) -> None:
        """As in mmengine, unless another run trains in the work dir, whose config must not be replaced."""
        if not is_locked(self.work_dir):
            super().dump_config()

    def setup_env(self, env_cfg: dict) -> None:
        """As in mmengine; on a CPU, start gloo first, because mmengine would require CUDA."""
        if self.distributed and not is_distributed() and get_device() == 'cpu':
            init_gloo(self.launcher)
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """As in mmengine; on a CPU, wrap the model without device ids."""
        if not self.distributed or get_device() != 'cpu' or is_model_wrapper(model) or model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        return MMDistributedDataParallel(
            module=revert_sync_batchnorm(model),
            broadcast_buffers=True,
            find_unused_parameters=self.cfg.get('find_unused_parameters', False),
        )

    def _init_model_weights(self) -> None:
        if not self._resume:
            with self._named('model'), whole_parameters(self.model):
                super()._init_model_weights()


def _counts_epochs(loop: dict) -> bool:
    kind = class_of(loop, LOOPS)
    return issubclass(kind, EpochBasedTrainLoop) if isinstance(kind, type) else bool(loop.get('by_epoch'))


# Set to 1 when this process exits. The memory is shared with forked workers.
_ENDING = mmap.mmap(-1, 1)
atexit.register(_ENDING.write_byte, 1)


def _init_worker(worker_id: int, seed: int | None, rank: int) -> None:
    """Initialise a data loader's worker, which ignores signals sent to all processes (Ctrl-C, Slurm).

    Otherwise the workers would die while the trainer still needs them for its last batch. The trainer ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if multiprocessing.get_start_method() == 'fork':
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if _ENDING[0] else None)
    if seed is not None:
        seed_everything(seed, rank, worker_id)


def _worker_lost(error: Exception) -> ProcessLost | None:
    """Turn PyTorch's error about a dead data loader worker into one that says what to do."""
    if not isinstance(error, RuntimeError) or not re.search(r'DataLoader worker .*(killed|exited)', str(error)):
        return None
    return ProcessLost(
        f'{str(error).splitlines()[0]} Usually the machine ran out of memory: lower train_dataloader.num_workers and '
        'val_dataloader.num_workers, then continue with --resume'
    )


# The packages of the visualizer's backends. mmengine itself notices a missing one only at its first use.
_BACKENDS = {
    'TensorboardVisBackend': 'tensorboard',
    'WandbVisBackend': 'wandb',
    'MLflowVisBackend': 'mlflow',
    'ClearMLVisBackend': 'clearml',
    'NeptuneVisBackend': 'neptune',
    'DVCLiveVisBackend': 'dvclive',
    'AimVisBackend': 'aim',
}


def check_vis_backends(config: Config) -> None:
    """Raise ConfigError if a visualizer backend of the config needs a package that is not installed."""
    visualizer = config.get('visualizer') or {}
    for backend in visualizer.get('vis_backends') or []:
        package = _BACKENDS.get(backend.get('type')) if isinstance(backend, dict) else None
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'visualizer.vis_backends has {backend["type"]}, but {package} is not installed: pip install {package}'
            )


def build_runner(config: Config, task: Literal['train', 'test'] | None = None) -> Runner:
    """Check a config and build the runner of ``config.runner_type``, by default mmengine's own.

    Args:
        config: changed where settings cannot hold beside others; see :func:`~mmseg_volo.config_check.settle`.
        task: what the runner will do; see :func:`~mmseg_volo.config_check.check_config`.

    Raises:
        ConfigError: see :func:`~mmseg_volo.config_check.check_config` and :func:`check_vis_backends`; or a constructor
            rejects its part of the config.
    """
    settle(config)
    check_config(config, task)
    check_vis_backends(config)
    if config.get('runner_type') != 'VOLORunner':
        config.custom_hooks = [*(config.get('custom_hooks') or []), dict(type='MatchingCheckpointHook')]
    with building(config, 'config'):
        return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
