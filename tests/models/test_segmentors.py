"""StreamingEncoderDecoder and StreamingTTAModel against mmseg's own classes."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from small_models import BN, SLIDE, batch, build, picture, segmentor_config, views
from torch import nn

from mmseg_volo import StreamingTTAModel
from mmseg_volo.models.volo import Block, PatchEmbed

WHOLE = dict(mode='whole')
LOGITS = dict(return_logits=True)
# Height and width of the view, size of the original, flip; one is smaller than the window, one no multiple of 16.
VIEWS = [
    (96, 160, None, None),
    (100, 150, (75, 112), 'horizontal'),
    (50, 60, (77, 90), None),
    (131, 77, (100, 59), 'vertical'),
]


def stock_and_ours(ours: dict | None = None, **arguments) -> tuple:
    """mmseg's EncoderDecoder and ours with the same weights; ``ours`` is added to our ``test_cfg``."""
    test_cfg = arguments.pop('test_cfg', SLIDE)
    stock = build(type='EncoderDecoder', test_cfg=test_cfg, **arguments)
    streaming = build(test_cfg={**test_cfg, **(ours or {})}, **arguments)
    streaming.load_state_dict(stock.state_dict())
    return stock, streaming


def ten_views(image: torch.Tensor, scales=(0.75, 1.0, 1.25, 1.5, 1.75), ori: tuple | None = None) -> dict:
    """The views of TestTimeAug, resized and flipped as its transforms do."""
    array = image.permute(1, 2, 0).numpy()
    found = []
    for scale in scales:
        resized = mmcv.imrescale(array, scale)
        for flip in (None, 'horizontal'):
            view = mmcv.imflip(resized) if flip else resized
            view = torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))
            found.append(batch(view, ori_shape=ori or tuple(image.shape[1:]), flip=flip))
    return views(*found)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
@pytest.mark.parametrize('view', VIEWS, ids=str)
@pytest.mark.parametrize('out_channels', [None, 1], ids=['multi', 'single'])
def test_predictions_and_logits_equal_mmseg(view, test_cfg, align_corners, out_channels):
    classes = 2 if out_channels else 7
    stock, ours = stock_and_ours(LOGITS, test_cfg=test_cfg, classes=classes, out_channels=out_channels)
    for model in (stock, ours):
        model.align_corners = model.decode_head.align_corners = align_corners
    height, width, ori, flip = view
    data = [batch(picture(height, width), ori_shape=ori, flip=flip) for _ in range(2)]
    with torch.no_grad():
        expected, got = (model.test_step(d)[0] for model, d in zip((stock, ours), data, strict=True))
    torch.testing.assert_close(got.seg_logits.data, expected.seg_logits.data, rtol=1e-5, atol=1e-4)
    assert got.pred_sem_seg.data.dtype == expected.pred_sem_seg.data.dtype
    assert (got.pred_sem_seg.data == expected.pred_sem_seg.data).float().mean() >= 0.9999
    assert len(expected.pred_sem_seg.data.unique()) > 1  # otherwise the comparison means little


@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
def test_logits_of_a_batch_through_inference(test_cfg):
    stock, ours = stock_and_ours(test_cfg=test_cfg)
    inputs = torch.randn(3, 3, 96, 160)
    metas = [dict(ori_shape=(96, 160), img_shape=(96, 160), pad_shape=(96, 160), flip=False) for _ in range(3)]
    before = copy.deepcopy(metas)
    with torch.no_grad():
        got = ours.inference(inputs, metas)
        assert metas == before
        torch.testing.assert_close(got, stock.inference(inputs, metas), rtol=1e-5, atol=1e-4)
        for sample, expected in zip(ours.predict(inputs), stock.predict(inputs), strict=True):
            # The probabilities of two classes may differ by rounding only.
            assert (sample.pred_sem_seg.data == expected.pred_sem_seg.data).float().mean() >= 0.9998


def test_metadata_of_the_caller_is_not_changed():
    _, ours = stock_and_ours()
    data = batch(picture(100, 150), picture(100, 150, seed=1))
    before = [dict(sample.metainfo) for sample in data['data_samples']]
    found = ours.test_step(data)
    for sample, meta in zip(found, before, strict=True):
        assert {key: sample.metainfo[key] for key in meta} == meta


def test_default_predictions_have_class_ids_only():
    _, ours = stock_and_ours()
    sample = ours.test_step(batch(picture(100, 150)))[0]
    assert sample.keys() == ['pred_sem_seg']
    _, ours = stock_and_ours(dict(confidence=True, return_logits=True))
    full = ours.test_step(batch(picture(100, 150)))[0]
    assert torch.equal(full.pred_sem_seg.data, sample.pred_sem_seg.data)
    expected = full.seg_logits.data.softmax(0).amax(0, keepdim=True)
    torch.testing.assert_close(full.seg_confidence.data, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('step', ['test_step', 'val_step'])
def test_a_batch_of_several_sizes_is_predicted(step):
    stock, ours = stock_and_ours(LOGITS, test_cfg=WHOLE)
    images = [picture(*size, seed=i) for i, size in enumerate([(96, 128), (70, 150), (96, 128), (200, 90)])]
    with torch.no_grad():
        found = getattr(ours, step)(batch(*images))
        expected = [getattr(stock, step)(batch(image))[0] for image in images]
    for sample, one in zip(found, expected, strict=True):
        assert sample.ori_shape == one.ori_shape
        torch.testing.assert_close(sample.seg_logits.data, one.seg_logits.data, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('batch_size', [1, 2, 100, None])
def test_batches_span_images(batch_size):
    _, ours = stock_and_ours(dict(window_batch=batch_size))
    sizes = []
    ours.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = [picture(107, 160, seed=i) for i in range(3)]
    expected = [ours.test_step(batch(one))[0].pred_sem_seg.data for one in images]
    sizes.clear()
    found = ours.test_step(batch(*images))
    # Six windows per image; the default batch has 2**18 pixels, or 42 windows.
    assert sum(sizes) == 3 * 6 and max(sizes) == min(batch_size or 42, 18)
    for sample, one in zip(found, expected, strict=True):
        assert (sample.pred_sem_seg.data == one).float().mean() >= 0.9999


def test_a_batch_that_does_not_fit_is_halved():
    _, ours = stock_and_ours(dict(window_batch=4))
    expected = ours.test_step(batch(picture(107, 160)))[0].pred_sem_seg.data
    sizes = []

    def only_one_fits(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 1:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    ours.backbone.register_forward_pre_hook(only_one_fits)
    assert (ours.test_step(batch(picture(107, 160)))[0].pred_sem_seg.data == expected).float().mean() >= 0.9999
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1]
    ours.test_step(batch(picture(107, 160)))
    assert sizes[8:] == [1] * 6  # the reduced size is remembered


@pytest.mark.parametrize('labelled', [False, True])
@pytest.mark.parametrize('out_channels', [None, 1], ids=['multi', 'single'])
@pytest.mark.parametrize('module', ['EncoderDecoder', 'StreamingEncoderDecoder'])
@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
def test_tta_equals_mmseg(test_cfg, module, out_channels, labelled):
    arguments = dict(classes=2 if out_channels else 7, out_channels=out_channels)
    stock, ours = stock_and_ours(LOGITS, test_cfg=test_cfg, **arguments)
    if out_channels:  # mmseg averages a sigmoid of a sigmoid, which is above 0.5
        stock.decode_head.threshold = ours.decode_head.threshold = 0.62
    if module == 'EncoderDecoder':
        ours = copy.deepcopy(stock)
        ours.test_cfg.return_logits = True
    reference, merged = SegTTAModel(module=stock).eval(), StreamingTTAModel(module=ours, sigmoid_twice=True).eval()
    data = [ten_views(picture(100, 150)) for _ in range(2)]
    if labelled:
        label = torch.randint(0, 2, (1, 100, 150))
        for one in data:
            for samples in one['data_samples']:
                samples[0].gt_sem_seg = PixelData(data=label)
    with torch.no_grad():
        views_of = [stock.test_step({k: v[i] for k, v in copy.deepcopy(data[0]).items()})[0] for i in range(10)]
        expected, got = reference.test_step(data[0])[0], merged.test_step(data[1])[0]
    assert (got.pred_sem_seg.data == expected.pred_sem_seg.data).float().mean() >= 0.9999
    assert got.pred_sem_seg.data.dtype == expected.pred_sem_seg.data.dtype
    assert len(expected.pred_sem_seg.data.unique()) > (1 if out_channels else 3)
    probabilities = [v.seg_logits.data.sigmoid() if out_channels else v.seg_logits.data.softmax(0) for v in views_of]
    torch.testing.assert_close(got.seg_logits.data, sum(probabilities) / 10, rtol=1e-5, atol=1e-4)
    assert got.img_path == expected.img_path
    assert ('gt_sem_seg' in got) == labelled


@pytest.mark.filterwarnings('error:as in mmseg')
def test_the_probabilities_of_one_channel_are_averaged():
    stock, ours = stock_and_ours(classes=2, out_channels=1)
    ours.decode_head.threshold = 0.5
    with pytest.warns(UserWarning, match=r'every pixel is over the threshold 0\.5'):
        StreamingTTAModel(module=ours, sigmoid_twice=True)
    merged = StreamingTTAModel(module=ours)
    with torch.no_grad():
        alone = merged.test_step(views(batch(picture(100, 150))))[0].pred_sem_seg.data
        assert torch.equal(alone, ours.test_step(batch(picture(100, 150)))[0].pred_sem_seg.data)
        found = [
            stock.test_step(batch(i[0], ori_shape=(100, 150), flip=s[0].flip_direction))[0]
            for i, s in zip(*ten_views(picture(100, 150)).values(), strict=True)
        ]
        got = merged.test_step(ten_views(picture(100, 150)))[0].pred_sem_seg.data
    mean = sum(sample.seg_logits.data for sample in found) / 10
    assert (got == (mean > 0.5)).float().mean() >= 0.9999
    assert got.unique().tolist() == [0, 1]


def test_tta_of_two_different_images():
    stock, ours = stock_and_ours()
    reference, merged = SegTTAModel(module=stock).eval(), StreamingTTAModel(module=ours).eval()
    one, two = ten_views(picture(100, 150)), ten_views(picture(100, 150, seed=1), ori=(50, 75))
    both = {key: [a + b for a, b in zip(one[key], two[key], strict=True)] for key in one}
    with torch.no_grad():
        for got, data in zip(merged.test_step(copy.deepcopy(both)), (one, two), strict=True):
            expected = reference.test_step(data)[0].pred_sem_seg.data
            assert (got.pred_sem_seg.data == expected).float().mean() >= 0.9999


def test_tta_with_a_custom_preprocessor():
    @MODELS.register_module(force=True)
    class Inverted(MODELS.get('SegDataPreProcessor')):
        def forward(self, data, training=False):
            return super().forward(dict(data, inputs=[255 - x for x in data['inputs']]), training)

    pre = dict(segmentor_config().data_preprocessor, type='Inverted')
    stock, ours = stock_and_ours(data_preprocessor=pre)
    both = views(batch(picture(100, 150), picture(64, 80)))  # of two sizes
    with torch.no_grad():
        expected = SegTTAModel(module=stock).test_step(ten_views(picture(100, 150)))[0].pred_sem_seg.data
        got = StreamingTTAModel(module=ours).test_step(ten_views(picture(100, 150)))[0].pred_sem_seg.data
        second = StreamingTTAModel(module=ours).test_step(both)[1].pred_sem_seg.data
        alone = stock.test_step(batch(picture(64, 80)))[0].pred_sem_seg.data
    assert (got == expected).float().mean() >= 0.9999 and (second == alone).float().mean() >= 0.9999


@pytest.mark.parametrize(
    'test_cfg', [None, dict(size=(120, 200)), dict(size_divisor=32)], ids=['none', 'size', 'size_divisor']
)
def test_tta_pads_like_the_preprocessor(test_cfg):
    pre = dict(segmentor_config().data_preprocessor, test_cfg=test_cfg)
    stock, ours = stock_and_ours(
        data_preprocessor=pre, test_cfg=dict(mode='slide', crop_size=(50, 70), stride=(31, 64))
    )
    with torch.no_grad():
        expected = SegTTAModel(module=stock).test_step(ten_views(picture(100, 150)))[0].pred_sem_seg.data
        got = StreamingTTAModel(module=ours).test_step(ten_views(picture(100, 150)))[0].pred_sem_seg.data
    assert (got == expected).float().mean() >= 0.9999


def test_other_heads_and_cascades_keep_their_resize():
    """Heads with their own ``predict_by_feat``, and segmentors with another ``encode_decode``."""

    @MODELS.register_module(force=True)
    class Doubling(MODELS.get('UPerHead')):
        def predict_by_feat(self, seg_logits, batch_img_metas):
            return super().predict_by_feat(2 * seg_logits, batch_img_metas)

    stock, ours = stock_and_ours(LOGITS, head='Doubling')
    with torch.no_grad():
        expected, got = (m.test_step(batch(picture(100, 150)))[0].seg_logits.data for m in (stock, ours))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)

    head = segmentor_config().decode_head
    second = dict(
        type='OCRHead',
        in_channels=32,
        in_index=0,
        channels=16,
        ocr_channels=8,
        num_classes=7,
        norm_cfg=BN,
        align_corners=False,
        loss_decode=head.loss_decode,
    )
    model = segmentor_config(type='CascadeEncoderDecoder', num_stages=2, decode_head=[head, second], test_cfg=SLIDE)
    torch.manual_seed(0)
    cascade = MODELS.build(ConfigDict(model)).eval()
    with torch.no_grad():
        expected = SegTTAModel(module=cascade).test_step(ten_views(picture(100, 150)))[0].pred_sem_seg.data
        got = StreamingTTAModel(module=cascade).test_step(ten_views(picture(100, 150)))[0].pred_sem_seg.data
    assert (got == expected).float().mean() >= 0.9999


def test_real_images(camvid):
    """Full-size CamVid images, with windows and ten views; the weights are random."""
    stock, ours = stock_and_ours(LOGITS, test_cfg=dict(mode='slide', crop_size=(224, 224), stride=(149, 149)))
    reference, merged = SegTTAModel(module=stock).eval(), StreamingTTAModel(module=ours).eval()
    for path in sorted((camvid / 'images/val').iterdir())[:2]:
        image = torch.from_numpy(np.ascontiguousarray(mmcv.imread(str(path)).transpose(2, 0, 1)))
        with torch.no_grad():
            expected, got = (m.test_step(batch(image))[0] for m in (stock, ours))
            torch.testing.assert_close(got.seg_logits.data, expected.seg_logits.data, rtol=1e-5, atol=1e-4)
            expected, got = (m.test_step(ten_views(image))[0].pred_sem_seg.data for m in (reference, merged))
        assert (got == expected).float().mean() >= 0.9999 and len(expected.unique()) > 3


def test_gradients_flow_to_the_image():
    """``inference`` is differentiable with respect to the image, as in mmseg."""
    stock, ours = stock_and_ours()
    gradients = []
    for model in (stock, ours):
        inputs = torch.linspace(-1, 1, 3 * 96 * 160).view(1, 3, 96, 160).requires_grad_()
        meta = dict(ori_shape=(96, 160), img_shape=(96, 160), pad_shape=(96, 160))
        model.inference(inputs, [meta])[:, 1].mean().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_precision(precision):
    _, ours = stock_and_ours(LOGITS)
    full = ours.test_step(batch(picture(100, 150)))[0].seg_logits.data
    ours.test_cfg.precision = precision
    low = ours.test_step(batch(picture(100, 150)))[0]
    difference = (low.seg_logits.data - full).abs().max() / full.abs().max()
    assert low.seg_logits.data.dtype == torch.float32
    assert difference == 0 if precision == 'fp32' else 1e-6 < difference < 0.1
    with torch.autocast('cpu', dtype=torch.bfloat16):  # a set precision overrides the caller's autocast
        again = ours.test_step(batch(picture(100, 150)))[0].seg_logits.data
    assert torch.equal(again, low.seg_logits.data)


def test_channels_last():
    _, ours = stock_and_ours(LOGITS)
    plain = ours.test_step(batch(picture(100, 150)))[0].seg_logits.data
    state = copy.deepcopy(ours.state_dict())
    ours.test_cfg.channels_last = True
    torch.testing.assert_close(ours.test_step(batch(picture(100, 150)))[0].seg_logits.data, plain, rtol=1e-4, atol=1e-4)
    weight = ours.decode_head.bottleneck.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_volo_is_compiled_by_region_and_other_networks_as_a_whole(monkeypatch):
    @MODELS.register_module(force=True)
    class Pooling(nn.Module):
        def forward(self, x):
            return [F.avg_pool2d(x, stride) for stride in (8, 16, 16, 16)]

    compiled, called = [], []

    def stand_in(function, dynamic):
        compiled.append(function.__name__)
        return lambda *inputs: called.append(type(inputs[0])) or function(*inputs)

    monkeypatch.setattr(torch, 'compile', stand_in)
    _, ours = stock_and_ours(LOGITS)
    plain = ours.test_step(batch(picture(100, 150)))[0].seg_logits.data
    assert not compiled
    ours.test_cfg.compile = True
    for model in (ours, copy.deepcopy(ours)):
        for _ in range(2):
            got = model.test_step(batch(picture(100, 150)))[0].seg_logits.data
            torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
            assert called == [PatchEmbed, Block, Block, Block, Block]
            called.clear()
    assert compiled == ['call_block', 'call_stem'] * 2
    ours.test_cfg.compile = False
    ours.test_step(batch(picture(100, 150)))
    assert not called

    head = dict(segmentor_config().decode_head, in_channels=[3] * 4)
    torch.manual_seed(0)
    other = MODELS.build(segmentor_config(backbone=dict(type='Pooling'), decode_head=head, test_cfg=SLIDE)).eval()
    plain = other.test_step(batch(picture(100, 150)))[0].pred_sem_seg.data
    compiled.clear()
    other.test_cfg.compile = True
    for model in (other, other, copy.deepcopy(other)):
        assert torch.equal(model.test_step(batch(picture(100, 150)))[0].pred_sem_seg.data, plain)
    assert len(compiled) == 2 and len(called) == 3


@pytest.mark.slow
def test_compiled_by_inductor():
    """With windows of several shapes and batches of several sizes."""
    _, ours = stock_and_ours(LOGITS)
    merged = StreamingTTAModel(module=ours).eval()
    plain = merged.test_step(ten_views(picture(100, 150)))[0].seg_logits.data
    ours.test_cfg.compile = True
    got = merged.test_step(ten_views(picture(100, 150)))[0].seg_logits.data
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)


def test_wrong_options_raise_clear_errors():
    for wrong, message in (
        (dict(precision='int8'), "precision must be one of fp32, bf16, fp16, got 'int8'"),
        (dict(mode='slide', crop_size=(64, 64), stride=(65, 64)), r'stride must be within 1\.\.\.crop_size'),
        (dict(mode='tiles'), "mode must be 'slide' or 'whole', got 'tiles'"),
    ):
        _, ours = stock_and_ours()
        ours.test_cfg.update(wrong)
        with pytest.raises(ValueError, match=message):
            ours.test_step(batch(picture(100, 150)))


MEMORY = """
import json, re, sys
from pathlib import Path
import torch
sys.path[:0] = [{tests!r}, str(Path({tests!r}).parent)]
from mmengine.registry import init_default_scope
from small_models import batch, build, picture
from test_segmentors import ten_views
from mmseg_volo import StreamingTTAModel
init_default_scope('mmseg')
torch.set_num_threads(2)
model = StreamingTTAModel(module=build(classes=150, test_cfg=dict(mode='slide', crop_size={window}, stride={stride})))
model.test_step(ten_views(picture(64, 96)))  # loads libraries, starts thread pools
data = ten_views(picture(*{size}))
Path('/proc/self/clear_refs').write_text('5')  # the peak starts from here
memory = lambda key: int(re.search(key + r':\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024
before = memory('VmRSS')
sample = model.test_step(data)[0]
print(json.dumps(dict(grown=memory('VmHWM') - before, classes=sample.pred_sem_seg.data.unique().numel())))
"""


def grown(**numbers) -> float:
    """Growth of a process in MiB while it predicts ten views with 150 classes."""
    code = MEMORY.format(tests=str(Path(__file__).parent), **numbers)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['classes'] > 20
    return found['grown']


linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc/self/status')


@pytest.mark.slow
@linux_only
def test_memory_does_not_grow_with_views_and_height():
    """The logits of one view at scale 1.75 would take 560 MiB for the low image and twice that for the high one."""
    low = grown(size=(448, 720), window=(128, 128), stride=(85, 85))
    high = grown(size=(896, 720), window=(128, 128), stride=(85, 85))
    # Class ids and pixels of the views grow with the height; the rest depends on the heap.
    assert low < 200 and high < 1.3 * low, (low, high)


@pytest.mark.slow
@linux_only
def test_memory_of_24_megapixels():
    """6000 x 4000 pixels, 150 classes, ten views, window 512; mmseg needs 14 GB for the logits of one view."""
    assert grown(size=(4000, 6000), window=(512, 512), stride=(341, 341)) < 4096
