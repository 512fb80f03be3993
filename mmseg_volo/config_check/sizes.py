"""Faults in sizes: crops against the size that batches are padded to, and sliding windows."""

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from typing import Any

from mmseg.models import EncoderDecoder, SegDataPreProcessor
from mmseg.models.backbones import MAE, BEiT

from ..models.segmentors import StreamingEncoderDecoder
from ..models.windows import PRECISIONS
from .lookup import NOTHING, nearest
from .parts import Part

# What StreamingEncoderDecoder reads of its test_cfg.
_OPTIONS = (
    *('mode', 'crop_size', 'stride', 'window_batch', 'precision', 'compile', 'cuda_graph', 'channels_last'),
    *('confidence', 'return_logits', 'allow_mismatch', 'runtime'),
)
# Transforms that leave the size of an image as it is.
_SAME_SIZE = {
    'LoadImageFromFile',
    'LoadCheckedImage',
    'LoadBands',
    'LoadAnnotations',
    'LoadCheckedAnnotations',
    'RandomFlip',
    'PhotoMetricDistortion',
    'RandomCutOut',
    'CLAHE',
    'AdjustGamma',
    'RGB2Gray',
    'Rerange',
    'GenerateEdge',
    'PackSegInputs',
}


def check_preprocessor(model: Sequence[Part]) -> Iterator[str]:
    """The faults that the segmentor has no preprocessor, or that this cannot normalise or pad images."""
    given = model and model[0].cfg.get('data_preprocessor')
    if model and model[0].is_a(EncoderDecoder) and not given and model[-1].key != 'data_preprocessor':
        yield "model.data_preprocessor: not set; set dict(type='SegDataPreProcessor', ...)"
    for part in (one for one in model if one.is_a(SegDataPreProcessor)):
        mean, std = ([x] if isinstance(x, int | float) else x for x in map(part.cfg.get, ('mean', 'std')))
        if isinstance(std, list | tuple) and any(isinstance(x, int | float) and not x > 0 for x in std):
            yield f'{part.key}.std: {std} has a number that is not above 0, by which images cannot be divided'
        if isinstance(mean, list | tuple) and isinstance(std, list | tuple) and len(mean) != len(std):
            yield f'{part.key}: {len(mean)} numbers in mean and {len(std)} in std; give both one for each channel'
        padding = part.cfg.get('test_cfg')
        if padding and isinstance(padding, dict):
            given = [name for name in ('size', 'size_divisor') if padding.get(name) is not None]
            if len(given) != 1:
                what = 'both' if given else 'neither'
                yield f'{part.key}.test_cfg: {what} of size and size_divisor set; set one of them to None, and one not'


def check_crop(model: Sequence[Part], transforms: Sequence[Part]) -> Iterator[str]:
    """The fault that training images may be larger than the size that their batch is padded to.

    Args:
        model: all parts of the model.
        transforms: one training pipeline, in its order.
    """
    pre = next((part for part in model if part.is_a(SegDataPreProcessor)), None)
    if pre is None:
        return
    size, divisor = pre.get('size'), pre.get('size_divisor')
    if (size is None) == (divisor is None):
        given = 'neither' if size is None else 'both'
        yield f'{pre.key}: {given} of size and size_divisor set; training needs exactly one, such as size=(512, 512)'
        return
    if size is None or size is NOTHING:
        return
    if not _is_pair(size):
        yield f'{pre.key}.size: {size!r} is no (height, width)'
        return
    for backbone in (part for part in model if part.is_a(BEiT, MAE)):
        side = backbone.get('img_size')
        if tuple(size) != (tuple(side) if _is_pair(side) else (side, side)):
            yield (
                f'{backbone.key}.img_size: {side}, but batches have {pre.key}.size = {tuple(size)}, and '
                f'{backbone.kind.__name__} takes only the size that it is built for; make them equal'
            )
    for key, crop in sorted(filter(None, _possible(transforms, {None}))):
        if crop[0] > size[0] or crop[1] > size[1]:
            yield (
                f'{key}: images of {crop[0]} x {crop[1]} pixels (height x width) are larger than '
                f'{pre.key}.size = {tuple(size)}, to which batches are padded; make them equal'
            )


# The key that bounds the size of images, and this size (height, width); None if the size is not known.
_Bound = tuple[str, tuple[int, int]] | None


def _possible(transforms: Sequence[Part], found: set[_Bound]) -> set[_Bound]:
    """The bounds that images may have after a pipeline, by the choices that its transforms make."""
    index = 0
    while index < len(transforms):
        step, index = transforms[index], index + 1
        below = f'{step.key}.transforms.'
        nested = list(takewhile(lambda one: one.key.startswith(below), transforms[index:]))  # noqa: B023
        index += len(nested)
        name = getattr(step.kind, '__name__', None)
        if name == 'RandomChoice':
            branches = groupby(nested, lambda one: one.key[len(below) :].split('.')[0])  # noqa: B023
            found = set().union(*(_possible(list(branch), found) for _, branch in branches))
        elif name == 'RandomApply':
            found = found | _possible(nested, found)
        elif nested:
            found = _possible(nested, {None})
        else:
            found = {_after(step, name, before) for before in found}
    return found


def _after(step: Part, name: str | None, before: _Bound) -> _Bound:
    if name in ('RandomCrop', 'CenterCrop'):
        crop = step.cfg.get('crop_size')
        crop = (crop, crop) if isinstance(crop, int) else crop
        return (f'{step.key}.crop_size', tuple(crop)) if _is_pair(crop) else None
    if name == 'Resize' and step.get('keep_ratio') is False and _is_pair(step.cfg.get('scale')):
        return f'{step.key}.scale', tuple(step.cfg['scale'])[::-1]
    same = name in _SAME_SIZE or (name == 'RandomRotate' and step.get('auto_bound') is False)
    return before if same else None


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)


def check_windows(segmentor: Part, predicts: bool) -> Iterator[str]:
    """The faults in the ``test_cfg`` of a segmentor, which it needs if it ``predicts``."""
    cfg = segmentor.cfg.get('test_cfg')
    own_modes = getattr(segmentor.kind, 'inference', None) is not EncoderDecoder.inference
    if own_modes and not segmentor.is_a(StreamingEncoderDecoder):
        return
    if not isinstance(cfg, dict):
        if predicts:
            yield f"{segmentor.key}.test_cfg: not set, but predictions need it; set test_cfg=dict(mode='whole')"
        return
    key, mode = f'{segmentor.key}.test_cfg', cfg.get('mode', 'whole')
    if segmentor.is_a(StreamingEncoderDecoder):
        for name in cfg:
            if name not in _OPTIONS and (hint := nearest(name, _OPTIONS, 0.75)):
                yield f'{key}.{name}: nothing reads this key{hint}'
        if (precision := cfg.get('precision')) is not None and precision not in [*PRECISIONS]:
            yield f'{key}.precision: {precision!r} is none of {", ".join(PRECISIONS)}'
        batch = cfg.get('window_batch')
        if batch is not None and not (isinstance(batch, int) and batch >= 1):
            yield f'{key}.window_batch: {batch!r} is no whole number from 1 on'
    if mode not in ('slide', 'whole'):
        yield f"{key}.mode: {mode!r} is neither 'slide' nor 'whole'"
    if mode != 'slide':
        return
    crop, stride = cfg.get('crop_size'), cfg.get('stride')
    for name, value in (('crop_size', crop), ('stride', stride)):
        if not _is_pair(value):
            yield f"{key}.{name}: {value!r} is no (height, width); mode='slide' needs {name}, such as (512, 512)"
    if _is_pair(crop) and _is_pair(stride) and not all(0 < s <= c for c, s in zip(crop, stride, strict=True)):
        yield (
            f'{key}.stride: {tuple(stride)} with crop_size = {tuple(crop)} leaves pixels out; a stride goes from 1 to '
            'the size of the window'
        )
