"""StreamingTTAModel with modules that are replaced, wrapped, copied and changed, against mmseg's SegTTAModel."""

import copy
import pickle

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from small_models import batch, build, picture, views
from torch import distributed, nn

from mmseg_volo import StreamingTTAModel

SLIDE = dict(mode='slide', crop_size=(48, 64), stride=(32, 48))


def two_views(seed: int = 0) -> dict:
    image = picture(60, 90, seed=seed)
    return views(batch(image), batch(image.flip(2), flip='horizontal'))


def classes(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.test_step(two_views())[0].pred_sem_seg.data


def stock(seed: int, **arguments) -> nn.Module:
    return build(seed, type='EncoderDecoder', test_cfg=SLIDE, **arguments)


def assert_as_stock(merged: nn.Module, module: nn.Module) -> None:
    """``merged`` predicts what SegTTAModel does with ``module``, one of mmseg's."""
    expected = classes(SegTTAModel(module=module))
    assert (classes(merged) == expected).float().mean() >= 0.9998 and len(expected.unique()) > 1


def test_the_module_may_be_replaced():
    merged = StreamingTTAModel(module=build(0, test_cfg=SLIDE))
    assert_as_stock(merged, stock(0))
    for module in (build(1, test_cfg=SLIDE), stock(2), stock(3, classes=9), build(0, classes=9, test_cfg=SLIDE)):
        merged.module = module
        assert merged.network.segmentor is module
        same = build(type='EncoderDecoder', test_cfg=SLIDE, classes=module.num_classes)
        same.load_state_dict(module.state_dict())
        assert_as_stock(merged, same)
    merged.module.decode_head = copy.deepcopy(stock(5, classes=9).decode_head)
    same.decode_head = merged.module.decode_head
    assert_as_stock(merged, same)


@pytest.mark.parametrize('kind', ['EncoderDecoder', 'StreamingEncoderDecoder'])
def test_weights_and_copies(kind):
    merged = StreamingTTAModel(module=build(0, type=kind, test_cfg=SLIDE))
    before = classes(merged)
    other = pickle.loads(pickle.dumps(copy.deepcopy(merged)))
    assert other.network.segmentor is other.module is not merged.module
    other.module.load_state_dict(build(1).state_dict())
    assert_as_stock(other, stock(1))
    assert torch.equal(classes(merged), before)
    for mine, new in zip(merged.module.parameters(), other.module.parameters(), strict=True):
        swapped = mine.data.clone()  # as EMAHook does
        mine.data.copy_(new.data)
        new.data.copy_(swapped)
    assert_as_stock(merged, stock(1))
    assert torch.equal(classes(other), before)
    merged.load_state_dict({f'module.{name}': value for name, value in stock(2).state_dict().items()})
    assert_as_stock(merged, stock(2))
    assert_as_stock(merged.double().float(), stock(2))


def test_module_in_a_wrapper(tmp_path):
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        for module in (build(0, test_cfg=SLIDE), stock(0)):
            wrapped = MMDistributedDataParallel(module)
            merged = StreamingTTAModel(module=wrapped).eval()
            assert merged.segmentor is module
            assert_as_stock(merged, stock(0))
            module.register_forward_hook(lambda *_: None)  # the views then run one by one
            assert_as_stock(merged, stock(0))
    finally:
        distributed.destroy_process_group()


def test_hooks_of_the_module_run_for_each_view():
    called = []
    merged = StreamingTTAModel(module=build(0, test_cfg=SLIDE))
    merged.module.register_forward_hook(lambda module, inputs, out: called.append(len(out)))
    assert_as_stock(merged, stock(0))
    assert called == [1, 1]


@pytest.mark.parametrize('patched', [False, True])
def test_own_merge_preds(patched):
    def least_likely(self, data_samples_list):
        for samples in data_samples_list:
            scores = sum(sample.seg_logits.data for sample in samples)
            samples[0].pred_sem_seg = PixelData(data=scores.argmin(0, keepdim=True))
        return [samples[0] for samples in data_samples_list]

    found = []
    for base, module in ((SegTTAModel, stock(0)), (StreamingTTAModel, build(0, test_cfg=SLIDE))):
        kind = base if patched else type('Own', (base,), dict(merge_preds=least_likely))
        merged = kind(module=module)
        if patched:
            merged.merge_preds = least_likely.__get__(merged)
        found.append(classes(merged))
        assert not getattr(module, 'network', merged).__dict__.get('logits', False)
    assert (found[0] == found[1]).float().mean() >= 0.9998


def test_merge_preds_of_given_predictions():
    """The public method, and data that is no dict."""
    module, merged = stock(0), StreamingTTAModel(module=build(0, test_cfg=SLIDE))
    samples = [SegDataSample(seg_logits=PixelData(data=torch.randn(7, 20, 30))) for _ in range(3)]
    for sample in samples:
        sample.set_metainfo(dict(img_path='picture.png'))
    expected = SegTTAModel(module=module).merge_preds([copy.deepcopy(samples)])[0].pred_sem_seg.data
    assert torch.equal(merged.merge_preds([samples])[0].pred_sem_seg.data.flatten(), expected.flatten())

    @MODELS.register_module(force=True)
    class FromTuples(MODELS.get('SegDataPreProcessor')):
        def forward(self, data, training=False):
            if not isinstance(data, dict):
                data = dict(zip(('inputs', 'data_samples'), data, strict=True))
            return super().forward(data, training)

    pre = dict(type='FromTuples', mean=[120.0] * 3, std=[60.0] * 3, test_cfg=dict(size_divisor=16))
    own, data = StreamingTTAModel(module=build(data_preprocessor=pre)), tuple(two_views().values())
    expected = SegTTAModel(module=build(type='EncoderDecoder', data_preprocessor=pre)).test_step(copy.deepcopy(data))
    assert torch.equal(own.test_step(data)[0].pred_sem_seg.data.flatten(), expected[0].pred_sem_seg.data.flatten())


def test_modules_that_are_no_segmentor():
    """As in mmengine's own tests: any model with ``test_step``, data as a dict and as a tuple."""

    class Toy(BaseModel):
        def forward(self, inputs, data_samples, mode='tensor'):
            return data_samples

    class Summed(StreamingTTAModel):
        def merge_preds(self, data_samples_list):
            return [sum(samples) for samples in data_samples_list]

    merged = Summed(module=Toy())
    inputs, samples = [[1, 1], [2, 2]], [[3, 3], [4, 4]]
    assert merged.network is None
    assert merged.test_step(dict(inputs=inputs, data_samples=samples)) == [7, 7]
    assert merged.test_step((inputs, samples)) == [7, 7]
