"""Training whose result does not depend on where it was interrupted.

The random numbers of an iteration are a function of the seed, the iteration and the rank. The random numbers of an
image's augmentation are a function of the seed and the image's place in the stream of all images. So nothing has to be
kept or replayed to resume exactly: neither the number of workers nor what ran in between (a validation, a restart)
matters. Several ranks see the same images with the same augmentation as one rank with the same total batch.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import DATA_SAMPLERS, LOOPS
from torch.utils.data import Dataset

_IMAGES, _STEPS = 0, 1  # the two families of random numbers


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
    """mmengine's InfiniteSampler, with a seed for each image's augmentation. It can start anywhere.

    Attributes:
        start: how many images of this rank were drawn before.
    """

    start = 0

    def __iter__(self) -> Iterator[Draw]:
        """Indices without end, each with its seed."""
        stream = islice(self._indices_of_rank(), self.start, None)
        for place, index in enumerate(stream, self.start):
            yield Draw(index, _seed_of(_IMAGES, self.seed, place * self.world_size + self.rank))

    def skip(self, num_samples: int) -> None:
        """Start after ``num_samples`` images of this rank, counted from the first of training."""
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
    """mmengine's IterBasedTrainLoop, exact in resuming: with a :class:`ResumableSampler` in the data loader."""

    def run(self) -> torch.nn.Module:
        """Train, from the iteration that was resumed or from the first."""
        sampler, runner = self.dataloader.sampler, self.runner
        if isinstance(sampler, ResumableSampler) and self.dataloader.batch_size is not None:
            # One seed for all ranks, the checkpoint's where the run goes on from one.
            sampler.seed = runner.seed - runner.rank if runner._randomness_cfg.get('diff_rank_seed') else runner.seed
        else:
            print_log(
                f'the sampler is {type(sampler).__name__}: resuming is exact with ResumableSampler only',
                logger='current',
            )
        return super().run()

    def run_iter(self, data_batch: dict) -> None:
        """Train on one batch, with the random numbers of its iteration."""
        seed_everything(_STEPS, self.runner.seed, self._iter, self.runner.rank)
        super().run_iter(data_batch)

    def validate_again(self) -> None:
        """Validate now where validation is due at this iteration."""
        due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        if self.runner.val_loop is not None and due and self._iter >= self.val_begin:
            self.runner.val_loop.run()


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
