"""Remove the wrappers of models and data sets."""

from torch import nn
from torch.utils.data import Dataset


def bare_model(model: nn.Module) -> nn.Module:
    """The segmentor inside wrappers for distributed training and test-time augmentation."""
    while not hasattr(model, 'decode_head') and isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    return model


def bare_dataset(dataset: Dataset) -> Dataset:
    """The data set inside wrappers such as ``RepeatDataset`` and ``ConcatDataset``; the first, if there are several."""
    while True:
        if hasattr(dataset, 'datasets'):
            dataset = dataset.datasets[0]
        elif hasattr(dataset, 'dataset'):
            dataset = dataset.dataset
        else:
            return dataset
