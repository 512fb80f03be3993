"""Faults between a head's losses, its outputs and its classes."""

import inspect
import math
from collections.abc import Iterator, Sequence

from mmseg.models import losses
from mmseg.models.decode_heads import STDCHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead

from ..models.losses import BandedLoss
from .classes import outputs_of
from .parts import Part

_WEIGHTED = (
    losses.CrossEntropyLoss,
    losses.FocalLoss,
    losses.LovaszLoss,
    losses.OhemCrossEntropy,
    losses.TverskyLoss,
)
_PACKAGES = 'mmseg', 'mmseg_volo'
# Heads of mmseg whose losses see other maps than one for each class.
_OTHER_OUTPUTS = 'SideAdapterCLIPHead', 'MaskFormerHead', 'Mask2FormerHead'


def check_outputs(head: Part) -> Iterator[str]:
    """The faults between a head's outputs, classes and threshold."""
    if not head.is_a(BaseDecodeHead):
        return
    classes, outputs, threshold = head.get('num_classes'), outputs_of(head), head.get('threshold')
    if not isinstance(classes, int) or outputs is None:
        return
    if outputs not in (1, classes) or (outputs == 1 and classes > 2):
        yield (
            f'{head.key}.out_channels: {outputs}, but num_classes is {classes}; leave out_channels out, or set '
            'out_channels=1 with num_classes=2 for two classes'
        )
    elif outputs == 1 and isinstance(threshold, int | float) and not 0 < threshold < 1:
        yield f'{head.key}.threshold: {threshold} is not between 0 and 1, so every pixel becomes the same class'
    elif isinstance(threshold, str):
        yield f'{head.key}.threshold: {threshold!r} is no number between 0 and 1'


def check_losses(head: Part, model: Sequence[Part], counts: set[int]) -> Iterator[str]:
    """The faults between a head and its losses.

    Args:
        head: a decode or auxiliary head.
        model: all parts of the model.
        counts: the numbers of classes of the data sets, as far as known.
    """
    classes, outputs = head.get('num_classes'), outputs_of(head)
    if not head.is_a(BaseDecodeHead) or not isinstance(classes, int) or outputs not in (1, classes):
        return
    loss_by_feat = getattr(head.kind, 'loss_by_feat', None)
    if getattr(loss_by_feat, '__module__', '').split('.')[0] not in _PACKAGES or head.is_a(STDCHead):
        return
    if head.kind.__name__ in _OTHER_OUTPUTS:
        return
    given = [part for part in model if part.key.startswith(f'{head.key}.loss_decode')]
    default = head.get('loss_decode')
    if not given and isinstance(default, dict) and default.get('type') == 'CrossEntropyLoss':
        given = [Part(f'{head.key}.loss_decode', default, head.registry, losses.CrossEntropyLoss)]
    plain = loss_by_feat in (BaseDecodeHead.loss_by_feat, BandedLoss.loss_by_feat)
    for loss in given:
        if plain and (missing := {'weight', 'ignore_index'} - _arguments(loss)):
            hint = 'it is for other heads'
            if loss.is_a(losses.OhemCrossEntropy):
                hint = f"instead set {head.key}.sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=100000)"
            yield (
                f'{loss.type_key}: {loss.kind.__name__} does not take {" and ".join(sorted(missing))}, which '
                f'{head.kind.__name__} passes; {hint}'
            )
        yield from _check_loss(loss, head, outputs, classes, counts)


def _arguments(loss: Part) -> set[str]:
    """The arguments that a loss is called with, all that heads pass if they are not known."""
    forward = getattr(loss.kind, 'forward', None)
    found = inspect.signature(forward).parameters if inspect.isfunction(forward) else {}
    if not found or any(one.kind is one.VAR_KEYWORD for one in found.values()):
        return {'weight', 'ignore_index'}
    return set(found)


def _check_loss(loss: Part, head: Part, outputs: int, classes: int, counts: set[int]) -> Iterator[str]:
    sigmoid = loss.get('use_sigmoid') is True or loss.get('use_mask') is True
    if outputs == 1 and not sigmoid and _is_softmax(loss):
        yield (
            f'{loss.key}: the softmax of one output is always 1, so {loss.kind.__name__} is 0 or constant and nothing '
            f'is learnt; {_binary(head, classes)}'
        )
    elif outputs == 1 == classes and loss.is_a(losses.CrossEntropyLoss) and (counts == {1} or not counts) and sigmoid:
        yield (
            f'{loss.key}: the sigmoid of one output tells two classes apart, but {head.key}.num_classes is 1; '
            f'{_binary(head, classes)}'
        )
    weights, weight = loss.get('class_weight'), loss.get('loss_weight')
    if isinstance(weight, int | float) and not 0 <= weight < math.inf:
        yield f'{loss.key}.loss_weight: {weight} is no finite number from 0 on'
    if isinstance(weights, list | tuple) and any(isinstance(x, int | float) and not 0 <= x < math.inf for x in weights):
        yield f'{loss.key}.class_weight: {weights} has a number that is negative or not finite'
    if not loss.is_a(*_WEIGHTED) or not isinstance(weights, list | tuple):
        return
    expected = {outputs}
    if loss.is_a(losses.CrossEntropyLoss) and loss.get('use_sigmoid') is True:
        expected = {1}  # PyTorch broadcasts it over the columns, not over the classes
    elif loss.is_a(losses.FocalLoss):
        expected = {1, outputs}
    elif loss.is_a(losses.LovaszLoss) and loss.get('loss_type') == 'binary':
        return
    if len(weights) not in expected:
        count = f'{len(weights)} weight{"s" if len(weights) > 1 else ""}'
        if expected == {1}:
            yield f'{loss.key}.class_weight: {count}, but with use_sigmoid=True it takes one, for all classes'
        else:
            plural = 'es' if outputs > 1 else ''
            yield (
                f'{loss.key}.class_weight: {count} for {outputs} class{plural} ({head.key}); give one weight for each '
                'class'
            )


def _is_softmax(loss: Part) -> bool:
    """Whether a loss takes the softmax of the outputs."""
    if loss.is_a(losses.LovaszLoss):
        return loss.get('loss_type') == 'multi_class'
    if loss.is_a(losses.DiceLoss):
        return loss.get('use_sigmoid') is False and loss.get('activate') is True
    return loss.is_a(losses.CrossEntropyLoss, losses.OhemCrossEntropy, losses.TverskyLoss)


def _binary(head: Part, classes: int) -> str:
    named = 'name the background as a class too and ' if classes == 1 else ''
    return (
        f'{named}set {head.key}.num_classes=2, with out_channels=1 and use_sigmoid=True in its CrossEntropyLoss, or '
        'without out_channels'
    )
