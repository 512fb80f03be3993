"""Find out whether a segmentor predicts as mmseg's :class:`EncoderDecoder` does, so that streaming gives its result.

A subclass, a mix-in or a patched object may change any step between the image and the prediction. Its own steps then
have to run, in mmseg's order and with mmseg's arguments. Methods are compared with those that mmseg had when this
module was imported, so a method that is patched into mmseg's class later counts as changed too.
"""

from collections.abc import Callable

from mmseg.models import CascadeEncoderDecoder, EncoderDecoder, SegDataPreProcessor, SegTTAModel
from mmseg.models.decode_heads import DAHead, EncHead, PointHead
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import nn

from .preprocessor import BandsDataPreProcessor

# From the preprocessed images to the predictions.
_PREDICTION = 'predict', 'inference', 'slide_inference', 'whole_inference', 'encode_decode', 'postprocess_result'
# From the data loader's batch to `predict`.
_CALL = 'test_step', '_run_forward', 'forward'
_KNOWN: dict[str, set[Callable]] = {
    name: {vars(base)[name] for base in (*EncoderDecoder.__mro__, *SegTTAModel.__mro__) if name in vars(base)}
    for name in (*_PREDICTION, *_CALL, 'extract_feat', 'merge_preds')
}
_KNOWN['encode_decode'].add(CascadeEncoderDecoder.encode_decode)
# mmseg's heads that resize logits to the size of the window, and read nothing else of the images' metadata.
_HEAD_PREDICT = {head.predict for head in (BaseDecodeHead, BaseCascadeDecodeHead, DAHead, EncHead, PointHead)}
_HEAD_RESIZE = BaseDecodeHead.predict_by_feat
_PLAIN_PREDICT, _PLAIN_DECODE = BaseDecodeHead.predict, EncoderDecoder.encode_decode


def same_result(method: Callable) -> Callable:
    """Decorate a method of this package that gives the result of the method of this name in mmseg."""
    _KNOWN[method.__name__].add(method)
    return method


def is_standard(model: nn.Module, *names: str, below: type | None = None) -> bool:
    """Whether nothing overrides these methods: all definitions are mmseg's, or marked with :func:`same_result`.

    ``below`` names a class of the model; only the definitions that ``super()`` finds in its methods are then compared.
    """
    line = type(model).__mro__
    places = [vars(model), *map(vars, line)] if below is None else map(vars, line[line.index(below) + 1 :])
    return all(place[name] in _KNOWN[name] for place in places for name in names if name in place)


def windows_suffice(segmentor: EncoderDecoder) -> bool:
    """Whether the logits of a window depend on its pixels alone, so that windows can run in any order and batch.

    They do not if ``encode_decode`` or the decode head is another than mmseg's, since it may read the images' metadata,
    or in training mode, where batch norms see the whole batch.
    """
    head = _head(segmentor)
    return (
        not segmentor.training
        and is_standard(segmentor, 'encode_decode')
        and isinstance(head, BaseDecodeHead)
        and _method(head, 'predict') in _HEAD_PREDICT
        and _method(head, 'predict_by_feat') is _HEAD_RESIZE
        and bool(head.align_corners) == bool(segmentor.align_corners)
    )


def has_plain_head(segmentor: EncoderDecoder) -> bool:
    """Whether the segmentor's logits are those of one decode head, resized as in mmseg."""
    head = segmentor.decode_head
    return (
        _method(segmentor, 'encode_decode') is _PLAIN_DECODE
        and isinstance(head, BaseDecodeHead)
        and _method(head, 'predict') is _PLAIN_PREDICT
        and _method(head, 'predict_by_feat') is _HEAD_RESIZE
    )


def can_stream(segmentor: EncoderDecoder) -> bool:
    """Whether streaming gives the result of ``EncoderDecoder.predict``, since nothing is overridden."""
    return is_standard(segmentor, *_PREDICTION) and windows_suffice(segmentor)


def can_stream_views(segmentor: nn.Module) -> bool:
    """Whether streaming also gives what merging the results of ``segmentor.test_step`` gives."""
    return (
        isinstance(segmentor, EncoderDecoder)
        and not _has_hooks(segmentor)
        and is_standard(segmentor, *_CALL)
        and can_stream(segmentor)
    )


def is_plain_preprocessor(preprocessor: nn.Module) -> bool:
    """Whether a data preprocessor is mmseg's own, which changes each pixel alone and pads."""
    own = type(preprocessor) in (SegDataPreProcessor, BandsDataPreProcessor)
    return own and 'forward' not in vars(preprocessor) and not _has_hooks(preprocessor)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _method(model: nn.Module, name: str) -> object:
    """The function of this name on an object: its own, or else that of its class."""
    return vars(model).get(name) or getattr(type(model), name, None)


def _head(segmentor: EncoderDecoder) -> nn.Module:
    head = segmentor.decode_head
    return head[-1] if isinstance(head, nn.ModuleList) else head
