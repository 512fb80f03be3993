"""Sampler and loop of a training run that can be resumed exactly.

The random numbers of an iteration depend only on the seed, the iteration and the rank. The random numbers of an image's
augmentation depend only on the seed and the image's position in the stream of all images. So an exact resume needs no
saved random state and no replay, whatever the number of workers and whatever ran in between (a validation, a restart).
Several ranks see the same images with the same augmentation as one rank with the same total batch.
"""

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop
from mmseg.models import EncoderDecoder
from mmseg.registry import DATA_SAMPLERS, LOOPS
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError, DataError
from ..models.segmentors import StreamingEncoderDecoder

_IMAGES, _STEPS = 0, 1  # first part of the seed key: augmentation of an image, or a training step


class Draw(int):
    """An index into a data set, with the seed of the image's augmentation."""

    seed: int

    def __new__(cls, index: int, seed: int):
        """Create an index with its seed."""
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.seed


@DATA_SAMPLERS.register_module()
class ResumableSampler(InfiniteSampler):
    """mmengine's InfiniteSampler, with a seed for each image's augmentation, and a start anywhere in the stream.

    Attributes:
        start: number of images of this rank to skip.
    """

    start = 0

    def __iter__(self) -> Iterator[Draw]:
        """Yield indices without end, each with its seed."""
        stream = islice(self._indices_of_rank(), self.start, None)
        for position, index in enumerate(stream, self.start):
            yield Draw(index, _seed_of(_IMAGES, self.seed, position * self.world_size + self.rank))

    def skip(self, num_samples: int) -> None:
        """Start after ``num_samples`` images of this rank, counted from the start of training.

        Raises:
            ValueError: the number is negative.
            TypeError: it is no integer.
        """
        if operator.index(num_samples) < 0:
            raise ValueError(f'num_samples must be 0 or more, got {num_samples}')
        self.start = operator.index(num_samples)


class SeededDataset(Dataset):
    """Wrap a data set so that its random transforms use the seed of each :class:`Draw`; all else is passed through."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            if not isinstance(index, Draw):
                return self.dataset[index]
            with _restored_random_state():
                _set_seed(index.seed)
                torch.default_generator.manual_seed(index.seed)  # CPU only: the model uses the GPU's generators
                return self.dataset[int(index)]
        except cv2.error as error:
            if not hasattr(self.dataset, 'get_data_info'):
                raise
            path = self.dataset.get_data_info(int(index)).get('img_path')
            raise DataError(
                f'{path}: the pipeline cannot process this image ({error.err}); a side of a very narrow image may '
                'shrink to nothing when it is resized: cut the image, or take it out of the data set'
            ) from error

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not set yet while the object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __deepcopy__(self, memo: dict) -> 'SeededDataset':
        return self  # mmengine deep-copies the config that holds it; that must not copy all annotations


@LOOPS.register_module()
class ResumableTrainLoop(IterBasedTrainLoop):
    """mmengine's IterBasedTrainLoop, which resumes exactly if the data loader has a :class:`ResumableSampler`."""

    def run(self) -> nn.Module:
        """Train from the resumed iteration, or from the first one."""
        sampler, runner = self.dataloader.sampler, self.runner
        if isinstance(sampler, ResumableSampler) and self.dataloader.batch_size is not None:
            # The same seed on all ranks; a resumed run has it from the checkpoint.
            sampler.seed = runner.seed - runner.rank if runner._randomness_cfg.get('diff_rank_seed') else runner.seed
        else:
            print_log(
                f'the sampler is {type(sampler).__name__}: only with ResumableSampler can training be resumed exactly',
                logger='current',
            )
        try:
            return super().run()
        finally:
            self._end_workers()

    def _end_workers(self) -> None:
        """End the data loader's processes at once; the garbage collector would wait five seconds for each."""
        end = getattr(self.dataloader_iterator._iterator, '_shutdown_workers', None)
        # Another run begins with new processes, persistent ones too.
        self.dataloader_iterator._iterator = self.dataloader._iterator = None
        if end:
            end()

    def run_iter(self, data_batch: dict) -> None:
        """Train on one batch, with the random seed of its iteration."""
        seed_everything(_STEPS, self.runner.seed, self._iter, self.runner.rank)
        super().run_iter(data_batch)


def check_epochs_end(loader: DataLoader) -> None:
    """Raise ConfigError if the data loader of a run by epochs never ends one."""
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if isinstance(sampler, InfiniteSampler):
            raise ConfigError(
                f'train_cfg counts epochs, but {type(sampler).__name__} never ends one: set train_dataloader.sampler='
                "dict(type='DefaultSampler', shuffle=True), or train by iterations (max_iters)"
            )


def check_one_size(loader: DataLoader, model: nn.Module, key: str) -> None:
    """Raise ConfigError if mmseg's own segmentor would get a batch of images of several sizes, which it cannot stack.

    Up to 16 images are read, evenly spaced. :class:`StreamingEncoderDecoder` predicts images of any sizes.

    Args:
        loader: of a validation or a test.
        model: the segmentor, without a wrapper.
        key: of the loader in the config.
    """
    size, dataset = loader.batch_size, loader.dataset
    if (size or 1) == 1 or not isinstance(model, EncoderDecoder) or isinstance(model, StreamingEncoderDecoder):
        return
    shapes = {}
    for i in np.linspace(0, len(dataset) - 1, min(len(dataset), 16)).astype(int):
        sample = dataset[int(i)]
        inputs = sample.get('inputs') if isinstance(sample, dict) else None
        if isinstance(inputs, torch.Tensor):
            shapes.setdefault(tuple(inputs.shape[1:]), i)
    if len(shapes) > 1:
        of = ' and '.join(f'{height} x {width}' for height, width in list(shapes)[:2])
        raise ConfigError(
            f'{key}.batch_size: {size}, but {type(model).__name__} takes only batches of images of one size, and the '
            f"pipeline returns images of {of}; set {key}.batch_size=1 or model.type='StreamingEncoderDecoder'"
        )


def is_validation_due(loop: BaseLoop) -> bool:
    """Whether a loop that stands between two iterations validates before the next one."""
    if isinstance(loop, EpochBasedTrainLoop):
        if loop.iter != loop.epoch * len(loop.dataloader):  # stopped within an epoch
            return False
        done, last = loop.epoch, loop.max_epochs
    elif isinstance(loop, IterBasedTrainLoop):
        done, last = loop.iter, loop.max_iters
    else:
        return False
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and PyTorch, GPUs included, from some non-negative integers."""
    seed = _seed_of(*key)
    _set_seed(seed)
    torch.manual_seed(seed)


def _seed_of(*key: int) -> int:
    """Hash a key to 63 bits, so that neighbouring keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def _restored_random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
