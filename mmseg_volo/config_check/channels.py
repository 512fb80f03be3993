"""Faults in the number and the order of channels: loader, transforms, data preprocessor and backbone."""

from collections.abc import Iterator, Sequence

from mmseg.datasets.transforms import CLAHE, AdjustGamma, PhotoMetricDistortion
from mmseg.models import SegDataPreProcessor

from ..datasets.bands import LoadBands
from ..models.preprocessor import BandsDataPreProcessor
from .parts import Part

_MEASURE = 'tools/check_data.py CONFIG prints them'


def check_channels(model: Sequence[Part], steps: Sequence[Part]) -> Iterator[str]:
    """The faults that images have other channels than the model takes, or are changed as if they were 8-bit colours.

    Args:
        model: all parts of the model.
        steps: the transforms of one data set.
    """
    backbone = next((part for part in model if part.key.endswith('.backbone')), None)
    takes = backbone.get('in_channels') if backbone else None
    pre = next((part for part in model if part.is_a(SegDataPreProcessor)), None)
    if not isinstance(takes, int) or pre is None:
        return
    mean, loader = pre.cfg.get('mean'), next((step for step in steps if step.is_a(LoadBands)), None)
    if isinstance(mean, list | tuple) and len(mean) not in (1, takes):
        yield (
            f'{pre.key}.mean: {len(mean)} number{"s" * (len(mean) > 1)}, but {backbone.key}.in_channels is {takes}; '
            f'give mean and std one number for each channel ({_MEASURE})'
        )
    if isinstance(mean, list | tuple) and len(mean) not in (1, 3) and not pre.is_a(BandsDataPreProcessor):
        yield (
            f"{pre.type_key}: mmseg's {pre.kind.__name__} takes 1 or 3 numbers in mean and std, here are "
            f"{len(mean)}; set it to 'BandsDataPreProcessor', which takes the same arguments"
        )
    if loader is None:
        return
    bands = loader.cfg.get('bands')
    if isinstance(bands, list | tuple) and len(bands) != takes:
        yield f'{loader.key}.bands: {len(bands)} bands, but {backbone.key}.in_channels is {takes}; make them equal'
    for name in ('bgr_to_rgb', 'rgb_to_bgr'):
        if takes == 3 and pre.get(name) is True:
            yield f'{pre.key}.{name}: True, but LoadBands gives the bands in the order of the file; set it to False'
    highest = max(mean) if isinstance(mean, list | tuple) and all(isinstance(x, int | float) for x in mean) else 128
    for step in steps:
        if step.is_a(PhotoMetricDistortion) and takes != 3:
            yield f'{step.key}: PhotoMetricDistortion takes 3 channels, but images have {takes}; leave it out'
        elif step.is_a(PhotoMetricDistortion, CLAHE, AdjustGamma) and not 1 < highest <= 255:
            yield (
                f'{step.key}: {step.kind.__name__} turns values into 8 bits, but {pre.key}.mean is of other values '
                f'({highest:g}); leave it out'
            )
