"""Training whose course does not depend on where it was interrupted.

All randomness of an iteration is a function of the seed, the iteration and the process; all randomness of a picture's
augmentation is a function of the seed and the picture's place in the stream of all pictures. So nothing has to be kept
or replayed to go on exactly: neither the number of workers nor what ran in between (a validation, a restart) matters,
and several processes see the same pictures, augmented alike, as one with the same batch in all.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import broadcast, is_distributed
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from mmseg.registry import DATA_SAMPLERS, LOOPS
from torch.utils.data import Dataset

from .sharding import VOLOFullyShardedDataParallel

_PICTURES, _STEPS = 0, 1  # the two families of random numbers


class Draw(int):
    """An index into a data set with the seed of its augmentation."""

    seed: int

    def __new__(cls, index: int, seed: int):
        """An index and its seed."""
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.seed


@DATA_SAMPLERS.register_module()
class ResumableSampler(InfiniteSampler):
    """mmengine's InfiniteSampler, with a seed for each picture's augmentation; it can begin anywhere.

    Attributes:
        start: how many pictures of this process are behind it already.
    """

    start = 0

    def __iter__(self) -> Iterator[Draw]:
        """Indices without end, each with its seed."""
        stream = islice(self._indices_of_rank(), self.start, None)
        for place, index in enumerate(stream, self.start):
            yield Draw(index, _seed_of(_PICTURES, self.seed, place * self.world_size + self.rank))

    def skip(self, num_samples: int) -> None:
        """Begin after ``num_samples`` pictures of this process, counted from the very first."""
        self.start = num_samples


class SeededDataset(Dataset):
    """A data set whose random transforms follow the seed of each :class:`Draw`; in all else it is that data set."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Draw):
            return self.dataset[index]
        with _random_state_kept():
            _set_seed(index.seed)
            torch.default_generator.manual_seed(index.seed)  # the GPU's are the model's
            return self.dataset[int(index)]

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __deepcopy__(self, memo: dict) -> 'SeededDataset':
        return self  # mmengine copies the config that holds it, which is no reason to hold all annotations twice


@LOOPS.register_module()
class ResumableTrainLoop(IterBasedTrainLoop):
    """mmengine's IterBasedTrainLoop, exact in resuming: with a :class:`ResumableSampler` in the data loader.

    A validation that was due at the iteration of the checkpoint, and did not come to its end, is made up for.
    """

    def run(self) -> torch.nn.Module:
        """Train, from the iteration that was resumed or from the first."""
        sampler = self.dataloader.sampler
        if not isinstance(sampler, ResumableSampler) or self.dataloader.batch_size is None:
            print_log(
                f'the sampler is {type(sampler).__name__}: resuming is exact with ResumableSampler only',
                logger='current',
            )
            return super().run()
        runner = self.runner
        # That of the checkpoint, where the run has none of its own; one for all processes.
        sampler.seed = runner.seed - runner.rank if runner._randomness_cfg.get('diff_rank_seed') else runner.seed
        sampler.skip(self._iter * self.dataloader.batch_size)
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)
        if self._iter and runner.message_hub.runtime_info.get('measured_iter') != self._iter:
            self._validate_if_due()
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            batch = next(self.dataloader_iterator)
            seed_everything(_STEPS, runner.seed, self._iter, runner.rank)
            self.run_iter(batch)
            self._decide_current_val_interval()
            self._validate_if_due()
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def _validate_if_due(self) -> None:
        if self.runner.val_loop is None or self._iter < self.val_begin:
            return
        if self._iter % self.val_interval == 0 or self._iter == self._max_iters:
            _share_buffers(self.runner.model)
            self.runner.val_loop.run()
            self.runner.message_hub.update_info('measured_iter', self._iter)


def _share_buffers(model: torch.nn.Module) -> None:
    """Give all processes the first one's running statistics, which are those that are saved; SyncBN's are the same."""
    if is_distributed() and not isinstance(model, VOLOFullyShardedDataParallel):
        for buffer in model.buffers():
            broadcast(buffer)


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers, the GPU's too, by some non-negative integers."""
    seed = _seed_of(*key)
    _set_seed(seed)
    torch.manual_seed(seed)


def _seed_of(*key: int) -> int:
    """63 well-mixed bits: neighbouring keys have nothing in common."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
