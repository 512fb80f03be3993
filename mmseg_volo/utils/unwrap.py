"""Look below the wrappers of models and data sets."""

from torch import nn
from torch.utils.data import Dataset


def bare_model(model: nn.Module) -> nn.Module:
    """The segmentor below wrappers for several ranks and for test-time augmentation, which call it ``module``."""
    while not hasattr(model, 'decode_head') and isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    return model


def bare_dataset(dataset: Dataset) -> Dataset:
    """The data set below wrappers such as ``RepeatDataset`` and ``ConcatDataset``; of several, the first."""
    while True:
        if hasattr(dataset, 'datasets'):
            dataset = dataset.datasets[0]
        elif hasattr(dataset, 'dataset'):
            dataset = dataset.dataset
        else:
            return dataset
