"""Faults between the places that must know the ignored label: heads, losses, data sets, metrics and padding."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmseg.models import losses
from mmseg.models.decode_heads import STDCHead

from .lookup import NOTHING
from .parts import Part


def check_ignored(
    heads: Sequence[Part],
    model: Sequence[Part],
    datasets: Sequence[Part],
    metrics: Sequence[Part],
    transforms: Sequence[Part],
    mapped: Sequence[Part],
) -> Iterator[str]:
    """The fault that places which must know the ignored label differ.

    Args:
        heads, model, metrics: of the run.
        datasets: without wrappers; only an ``ignore_index`` given in the config counts, because mmseg does not use it.
        transforms: of the training pipelines; empty where nothing is trained.
        mapped: data sets that turn some labels into 255.
    """
    for part in (*heads, *metrics):
        value = part.get('ignore_index')
        # A text is found with those of other arguments.
        if not (isinstance(value, int | str) or value is NOTHING or (value is None and _takes_none(part, model))):
            yield f'{part.key}.ignore_index: {value!r} is no whole number, such as 255'
    places = [(f'{head.key}.ignore_index', head.get('ignore_index')) for head in heads if not head.is_a(STDCHead)]
    places = [(key, value) for key, value in places if isinstance(value, int)]
    if not places:
        return
    for head in heads:
        for loss in (part for part in model if part.key.startswith(f'{head.key}.loss_decode')):
            if loss.is_a(losses.OhemCrossEntropy, losses.TverskyLoss):
                name = 'ignore_label' if loss.is_a(losses.OhemCrossEntropy) else 'ignore_index'
                places.append((f'{loss.key}.{name}', loss.get(name)))
    places += [(f'{one.key}.ignore_index', one.cfg['ignore_index']) for one in datasets if 'ignore_index' in one.cfg]
    places += [
        (f'{metric.key}.ignore_index', metric.get('ignore_index'))
        for metric in metrics
        if metric.get('format_only') is not True
    ]
    for step in transforms:
        if 'ignore_index' in step.cfg:  # used only to choose crops, so its default does no harm
            places.append((f'{step.key}.ignore_index', step.cfg['ignore_index']))
        places.append((f'{step.key}.seg_pad_val', step.get('seg_pad_val')))
        padding = step.get('pad_val')
        if isinstance(padding, dict) and 'seg' in padding:
            places.append((f'{step.key}.pad_val.seg', padding['seg']))
    # Without a resize, crops often have the size that they are padded to. Padding with a class is a mistake anyway.
    resized = any('Resize' in str(step.cfg.get('type')) for step in transforms)
    classes = [count for head in heads if isinstance(count := head.get('num_classes'), int)]
    for part in model if transforms else ():
        padding = part.get('seg_pad_val')
        if isinstance(padding, int | float) and (resized or 0 <= padding < max(classes, default=0)):
            places.append((f'{part.key}.seg_pad_val', padding))
    values: dict[Any, list[str]] = {}
    for key, value in places:
        if value is not NOTHING and isinstance(value, int | float):
            values.setdefault(value, []).append(key)
    if len(values) > 1:
        # The value that most places have comes last.
        told = sorted(values.items(), key=lambda item: len(item[1]))
        listed = ', but '.join(f'{", ".join(dict.fromkeys(keys))} = {value}' for value, keys in told)
        yield f'ignore_index: {listed}; set all of them to one value'
    elif 255 not in values and mapped:
        value, reason = next(iter(values)), 'reduce_zero_label'
        if not mapped[0].get('reduce_zero_label'):
            reason = 'a part of its classes'
        yield (
            f'{mapped[0].key}: {reason} turns labels into 255, but {places[0][0]} is {value}; set ignore_index=255 '
            'everywhere'
        )


def _takes_none(part: Part, model: Sequence[Part]) -> bool:
    """Whether a head or metric may have no ignored label: mmseg's metric and DiceLoss may, its other losses not."""
    given = [loss for loss in model if loss.key.startswith(f'{part.key}.loss_decode')]
    return all(loss.is_a(losses.DiceLoss) for loss in given) and not part.kind.__module__.startswith('mmseg_volo')
