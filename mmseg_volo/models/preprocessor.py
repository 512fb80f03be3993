"""mmseg's data preprocessor for images of any number of channels."""

from collections.abc import Sequence

import torch
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS

from ..errors import ConfigError


@MODELS.register_module()
class BandsDataPreProcessor(SegDataPreProcessor):
    """mmseg's ``SegDataPreProcessor``, same arguments, whose mean and std may have any number of channels.

    mmengine's constructor accepts only one or three numbers.

    Args:
        mean, std: a number for each channel, or one for all; None: images are not normalised.
        kwargs: of SegDataPreProcessor.

    Raises:
        ConfigError: mean and std have different lengths.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **kwargs):
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
            raise ConfigError(f'data_preprocessor: mean={mean} and std={std} must have one number for each channel')
        super().__init__(None if mean is None else [0.0], None if std is None else [1.0], **kwargs)
        if mean is not None:
            self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
            self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
