"""Segmentors and heads whose own methods differ from mmseg's predict as they do below mmseg's classes."""

import copy
import functools

import pytest
import small_models
import torch
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, SegTTAModel
from mmseg.registry import MODELS
from small_models import batch, picture, views
from torch import nn

from mmseg_volo import StreamingEncoderDecoder, StreamingTTAModel

SLIDE = dict(mode='slide', crop_size=(48, 64), stride=(32, 48))


@functools.cache
def _built(**arguments) -> nn.Module:
    return small_models.build(**arguments)


def build(test_cfg: dict = SLIDE, **arguments) -> nn.Module:
    model = copy.deepcopy(_built(**arguments))
    model.test_cfg = ConfigDict(test_cfg)
    return model


def reversed_classes(logits: torch.Tensor) -> torch.Tensor:
    return logits.flip(1)


class Inference:
    def inference(self, inputs, batch_img_metas):
        return reversed_classes(super().inference(inputs, batch_img_metas))


class Slide:
    def slide_inference(self, inputs, batch_img_metas):
        return reversed_classes(super().slide_inference(inputs, batch_img_metas))


class Whole:
    def whole_inference(self, inputs, batch_img_metas):
        return reversed_classes(super().whole_inference(inputs, batch_img_metas))


class BothInOne:
    """One image is predicted in windows and as a whole, whatever the mode is."""

    def inference(self, inputs, batch_img_metas):
        whole = self.whole_inference(inputs, batch_img_metas)
        return whole - 3 * self.slide_inference(inputs, batch_img_metas)


class EncodeDecode:
    def encode_decode(self, inputs, batch_img_metas):
        logits = super().encode_decode(inputs, batch_img_metas)
        in_window = isinstance(batch_img_metas[0]['img_shape'], torch.Size)
        return reversed_classes(logits) if in_window else -logits


class Postprocess:
    def postprocess_result(self, seg_logits, data_samples=None):
        return super().postprocess_result(reversed_classes(seg_logits), data_samples)


class Predict:
    def predict(self, inputs, data_samples=None):
        samples = super().predict(inputs, data_samples)
        for sample in samples:
            sample.pred_sem_seg = PixelData(data=sample.seg_logits.data.argmin(0, keepdim=True))
            sample.seg_logits.data.neg_()
        return samples


class Features:
    def extract_feat(self, inputs):
        return [-x for x in super().extract_feat(inputs)]


class Forward:
    def forward(self, inputs, data_samples=None, mode='tensor'):
        return super().forward(-inputs, data_samples, mode)


class OwnTestStep:
    def test_step(self, data):
        return super().test_step({**data, 'inputs': [255 - image for image in data['inputs']]})


MIXINS = Inference, Slide, Whole, BothInOne, EncodeDecode, Postprocess, Predict, Features, Forward, OwnTestStep


def with_mixin(mixin: type, base: type, **arguments) -> nn.Module:
    """A segmentor of small_models whose class derives from ``mixin`` and ``base``."""
    model = build(**arguments)
    model.__class__ = type(f'{mixin.__name__}{base.__name__}', (mixin, base), {})
    return model


def pair(mixin: type, test_cfg: dict) -> tuple[nn.Module, nn.Module]:
    """mmseg's segmentor and ours, of the same weights, below the same mix-in."""
    stock = with_mixin(mixin, EncoderDecoder, type='EncoderDecoder', test_cfg=test_cfg)
    return stock, with_mixin(mixin, StreamingEncoderDecoder, test_cfg=test_cfg)


def assert_same_results(stock: nn.Module, ours: nn.Module, *images: torch.Tensor) -> None:
    images = images or (picture(60, 90), picture(60, 90, seed=1))
    with torch.no_grad():
        expected, got = (model.test_step(batch(*images, ori_shape=(45, 67))) for model in (stock, ours))
    for one, other in zip(got, expected, strict=True):
        assert (one.pred_sem_seg.data == other.pred_sem_seg.data).float().mean() >= 0.9998
        assert len(other.pred_sem_seg.data.unique()) > 1


def flipped_views() -> dict:
    image = picture(60, 90)
    return views(
        batch(image, ori_shape=(45, 67)),
        batch(image.flip(2), ori_shape=(45, 67), flip='horizontal'),
        batch(picture(75, 112), ori_shape=(45, 67)),
    )


def assert_same_merged(stock: nn.Module, ours: nn.Module) -> None:
    with torch.no_grad():
        expected, got = (model.test_step(flipped_views())[0].pred_sem_seg.data for model in (stock, ours))
    assert (got == expected).float().mean() >= 0.9998
    assert len(expected.unique()) > 1


CASES = [(mixin, 'slide') for mixin in MIXINS] + [(Whole, 'whole'), (EncodeDecode, 'whole')]


@pytest.mark.parametrize(('mixin', 'mode'), CASES, ids=[f'{mixin.__name__}-{mode}' for mixin, mode in CASES])
def test_methods_of_subclasses_are_called(mixin, mode):
    stock, ours = pair(mixin, dict(SLIDE, mode=mode))
    assert_same_results(stock, ours)
    assert_same_merged(SegTTAModel(module=stock), StreamingTTAModel(module=ours))
    assert_same_merged(SegTTAModel(module=stock), StreamingTTAModel(module=stock))


PATCHES = {
    'slide_inference': lambda own: lambda *args: reversed_classes(own(*args)),
    'encode_decode': lambda own: lambda *args: reversed_classes(own(*args)),
    'postprocess_result': lambda own: lambda *args: own(*args[:-2], reversed_classes(args[-2]), args[-1]),
}


@pytest.mark.parametrize('name', PATCHES)
def test_patched_objects_and_classes(name, monkeypatch):
    """A method may also be replaced on the object, or in mmseg's class."""
    stock, ours = build(type='EncoderDecoder', test_cfg=SLIDE), build(test_cfg=SLIDE)
    plain = ours.test_step(batch(picture(60, 90)))[0].pred_sem_seg.data
    for model in (stock, ours):
        monkeypatch.setattr(model, name, PATCHES[name](getattr(model, name)))
    for _ in range(2):
        assert_same_results(stock, ours)
        assert_same_merged(SegTTAModel(module=stock), StreamingTTAModel(module=ours))
        assert_same_merged(SegTTAModel(module=stock), StreamingTTAModel(module=stock))
        assert not torch.equal(ours.test_step(batch(picture(60, 90)))[0].pred_sem_seg.data, plain)
        monkeypatch.undo()
        assert torch.equal(ours.test_step(batch(picture(60, 90)))[0].pred_sem_seg.data, plain)
        monkeypatch.setattr(EncoderDecoder, name, PATCHES[name](getattr(EncoderDecoder, name)))


def recording_head(base: str) -> type:
    """A head that reads the images' metadata, as MaskFormer's does: it masks what lies outside ``img_shape``."""

    @MODELS.register_module(force=True)
    class Recording(MODELS.get(base)):
        def predict(self, inputs, batch_img_metas, test_cfg):
            self.seen.append((len(inputs[0]), [dict(sorted(meta.items())) for meta in batch_img_metas]))
            logits = super().predict(inputs, batch_img_metas, test_cfg)
            for image, meta in zip(logits, batch_img_metas, strict=True):
                height, width = meta['img_shape']
                image[:, height:], image[:, :, width:] = 0, 0
            return logits

        seen: list

    return Recording


@pytest.mark.parametrize(
    ('mode', 'shape', 'images'),
    [('whole', (59, 90), 1), ('whole', (59, 90), 2), ('slide', (59, 90), 2), ('slide', (64, 96), 1)],
)
def test_heads_get_the_metadata_that_mmseg_gives(mode, shape, images):
    recording_head('UPerHead')
    test_cfg = dict(SLIDE, mode=mode)
    stock = build(type='EncoderDecoder', test_cfg=test_cfg)
    ours = build(test_cfg=test_cfg)
    for model in (stock, ours):
        model.decode_head.__class__ = MODELS.get('Recording')
        model.decode_head.seen = []
    assert_same_results(stock, ours, *(picture(*shape, seed=i) for i in range(images)))
    assert stock.decode_head.seen and ours.decode_head.seen == stock.decode_head.seen
    assert_same_merged(SegTTAModel(module=stock), StreamingTTAModel(module=ours))
    assert ours.decode_head.seen == stock.decode_head.seen
    with torch.no_grad():
        got, expected = (model.predict(torch.randn(images, 3, *shape)) for model in (ours, stock))
    assert ours.decode_head.seen == stock.decode_head.seen and len(got) == len(expected) == images


def test_options_apply_to_overridden_methods():
    stock, ours = pair(Postprocess, SLIDE)
    ours.test_cfg.update(confidence=True, precision='bf16')
    ours.network.sampled, done = True, []
    ours.network.progress = lambda *numbers: done.append(numbers)
    dtypes = []
    ours.decode_head.conv_seg.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    with torch.no_grad():
        expected, got = (model.test_step(batch(picture(60, 90)))[0] for model in (stock, ours))
        merged = StreamingTTAModel(module=ours).test_step(flipped_views())[0]
    assert set(dtypes) == {torch.bfloat16} and done[-1] == (1, 1)
    assert (got.pred_sem_seg.data == expected.pred_sem_seg.data).float().mean() > 0.9
    assert torch.equal(got.sampled_logits.data, got.seg_logits.data[:, ::7, ::7])
    assert torch.equal(got.seg_confidence.data, got.seg_logits.data.softmax(0).amax(0, keepdim=True))
    assert set(merged.keys()) == {'pred_sem_seg', 'seg_confidence', 'sampled_probabilities'}
    seen = merged.sampled_probabilities.data
    torch.testing.assert_close(seen.sum(0), torch.ones(seen.shape[1:]))
    torch.testing.assert_close(seen.amax(0), merged.seg_confidence.data[0, ::7, ::7])


def test_one_output_channel_by_overridden_methods():
    """Its probabilities are averaged as in streaming."""
    arguments = dict(classes=2, out_channels=1, test_cfg=dict(mode='whole', return_logits=True, confidence=True))
    for twice in (False, True):
        plain, own = build(**arguments), with_mixin(SamePostprocess, StreamingEncoderDecoder, **arguments)
        for model in (plain, own):
            model.decode_head.threshold, model.network.sampled = 0.6, True
        one, other = (
            StreamingTTAModel(module=model, sigmoid_twice=twice).test_step(flipped_views())[0] for model in (plain, own)
        )
        assert set(one.keys()) == set(other.keys())
        for name, value in one.items():
            torch.testing.assert_close(getattr(other, name).data, value.data, rtol=1e-4, atol=1e-5)
        one, other = (model.test_step(batch(picture(60, 90)))[0] for model in (plain, own))
        for name in ('seg_logits', 'seg_confidence', 'sampled_logits'):
            torch.testing.assert_close(getattr(one, name).data, getattr(other, name).data, rtol=1e-3, atol=1e-4)


class SamePostprocess:
    def postprocess_result(self, seg_logits, data_samples=None):
        return super().postprocess_result(seg_logits, data_samples)


def test_training_mode_sees_whole_batches():
    """As in mmseg, batch norms in training mode take their statistics from all images."""
    stock, ours = (build(type=kind).train() for kind in ('EncoderDecoder', 'StreamingEncoderDecoder'))
    ours.test_cfg.window_batch = 1
    stock.decode_head.dropout = ours.decode_head.dropout = None
    assert_same_results(stock, ours)
    for one, other in zip(stock.buffers(), ours.buffers(), strict=True):
        assert torch.equal(one, other)
