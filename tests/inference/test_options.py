"""The options of a test: its views are prepared as the images of a plain test are, for all ways to write the config."""

import copy
import itertools

import cv2
import numpy as np
import pytest
import torch
from mmseg.models import SegTTAModel
from mmseg.registry import DATASETS, MODELS
from small_evaluation import OWN, drawn_dataset, evaluation_config, measured
from small_models import batch, picture, segmentor_config, views

from mmseg_volo.engine.runner import build_runner
from mmseg_volo.errors import ConfigError
from mmseg_volo.export.checks import sample_images
from mmseg_volo.inference import Predictor
from mmseg_volo.inference.manifest import identity
from mmseg_volo.inference.model import init_model
from mmseg_volo.inference.options import datasets_to_test, use_tta


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dict:
    return drawn_dataset(tmp_path_factory.mktemp('options') / 'a')


@pytest.fixture
def config(data, tmp_path):
    """Return a function that gives configs, each with its own work dir."""
    number = itertools.count()
    return lambda **changes: evaluation_config(tmp_path, str(next(number)), data, **changes)


@pytest.mark.parametrize('kind', ['StreamingEncoderDecoder', 'EncoderDecoder'])
def test_one_view_measures_what_a_plain_test_measures(config, kind):
    """The top-level data_preprocessor of configs/_base_ has other values; with it, the figures are others."""
    one = config(model__type=kind)
    assert one.data_preprocessor.mean != OWN['mean']
    plain = measured(one)
    for tta_model in ('StreamingTTAModel', 'SegTTAModel'):
        one.tta_model = dict(type=tta_model)
        assert measured(one, True) == plain
    if kind == 'EncoderDecoder':
        one.pop('runner_type')  # mmengine's own runner
        assert measured(one, True) == measured(one) == plain
        one.model.data_preprocessor = one.data_preprocessor
        assert measured(one) != plain


def test_all_entries_prepare_images_alike(config, tmp_path):
    """With the model's own data preprocessor, or with that of the top level for a model that has none."""
    image = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    found = []
    for own in (True, False):
        one = config()
        if not own:
            one.data_preprocessor = one.model.pop('data_preprocessor')
        torch.manual_seed(0)
        torch.save(dict(state_dict=init_model(one, device='cpu').state_dict()), tmp_path / 'weights.pth')
        one.load_from = str(tmp_path / 'weights.pth')
        figures = measured(one), measured(one, True)
        assert figures[0] == figures[1]
        predictors = [Predictor(one, one.load_from, 'cpu', aug_test) for aug_test in (False, True)]
        one.tta_model = dict(type='SegTTAModel')
        assert (predictors[0](image) == Predictor(one, one.load_from, 'cpu', True)(image)).all()
        found += [figures[0], *(predictor(image).tolist() for predictor in predictors)]
        runner = build_runner(one, 'test')
        assert runner.model.data_preprocessor.mean.flatten().tolist() == OWN['mean']
        assert predictors[0].model.data_preprocessor.mean.flatten().tolist() == OWN['mean']
    assert found[:3] == found[3:] and found[1] == found[2]


def test_views_with_another_preprocessor_are_refused(config):
    same = config(tta_model__data_preprocessor=OWN)
    assert measured(same, True) == measured(same)
    other = config(tta_model__data_preprocessor=dict(OWN, mean=[0, 0, 0]))
    with pytest.raises(ConfigError, match=r"tta_model\.data_preprocessor differs from the model's"):
        use_tta(other)


@MODELS.register_module()
class Merging(SegTTAModel):
    def merge_preds(self, data_samples_list):
        return [samples[0] for samples in data_samples_list]


@pytest.mark.parametrize(
    ('tta_model', 'threshold', 'refused'),
    [
        ('SegTTAModel', None, True),
        ('mmseg.SegTTAModel', 0.5, True),
        (SegTTAModel, 0.4, True),
        ('SegTTAModel', 0.62, False),
        ('Merging', None, False),
        ('StreamingTTAModel', None, False),
    ],
)
def test_mmsegs_tta_of_one_channel_is_refused(config, tta_model, threshold, refused):
    one = config(tta_model=dict(type=tta_model))
    one.model = segmentor_config(classes=2, out_channels=1)
    one.model.decode_head.threshold = threshold
    if not refused:
        use_tta(one)
        return
    # mmseg's own class, with random weights: every pixel is foreground.
    module = MODELS.build(dict(one.model, test_cfg=dict(mode='whole', return_logits=True))).eval()
    with torch.no_grad():
        found = SegTTAModel(module=module).test_step(views(batch(picture(64, 64))))[0].pred_sem_seg.data
    assert (found == 1).all()
    with pytest.raises(ConfigError, match=r'applies the sigmoid twice .* set tta_model\.type to StreamingTTAModel'):
        use_tta(one)


WRAPPERS = {
    'concat': lambda a, b: dict(type='ConcatDataset', datasets=[a, b]),
    'repeat': lambda a, b: dict(type='RepeatDataset', times=2, dataset=a),
    'both': lambda a, b: dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[dict(b), dict(a)])
    ),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrapped_test_data(config, data, wrapper, tmp_path):
    one = config()
    other = drawn_dataset(tmp_path / 'other')
    one.test_dataloader.dataset = WRAPPERS[wrapper](copy.deepcopy(data), other)
    figures = measured(one)
    assert measured(one, True) == figures
    viewed = copy.deepcopy(one)
    use_tta(viewed)
    # mmengine's own data set gives one view of each image.
    built = DATASETS.build(viewed.test_dataloader.dataset)
    assert [len(built[i]['inputs']) for i in range(len(built))] == [1] * len(built)
    assert [step['type'] for step in datasets_to_test(one)[0].pipeline] == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'PackSegInputs',
    ]
    model = init_model(one, device='cpu')
    assert model.dataset_meta['classes'] == data['metainfo']['classes']
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    image = cv2.imread(f'{data["data_root"]}/images/0.png')
    assert Predictor(one, str(tmp_path / 'weights.pth'), 'cpu')(image).shape == image.shape[:2]
    images, text = sample_images(one, ())
    assert len(images) == 4 and 'images from' in text and images[0].shape == image.shape
    changed = copy.deepcopy(one)
    datasets_to_test(changed)[0].pipeline.insert(1, dict(type='Resize', scale=(32, 32)))
    assert identity(changed, 'x', False) != identity(one, 'x', False)


def test_a_config_without_test_data(config):
    one = config(test_dataloader=None)
    with pytest.raises(ConfigError, match='the config has no test_dataloader'):
        use_tta(one)
    one.tta_model = None
    with pytest.raises(ConfigError, match='--aug-test needs tta_pipeline and tta_model'):
        use_tta(one)


def test_cascades(config, data, tmp_path):
    """The decode head is a list: its last one gives the classes."""
    head = segmentor_config().decode_head
    second = dict(
        type='OCRHead', in_channels=32, in_index=0, channels=16, ocr_channels=8, norm_cfg=head.norm_cfg,
        num_classes=7, align_corners=False, loss_decode=head.loss_decode,
    )  # fmt: skip
    one = config()
    one.model = segmentor_config(
        type='CascadeEncoderDecoder', num_stages=2, decode_head=[head, second], data_preprocessor=OWN
    )
    model = init_model(one, device='cpu')
    assert model.dataset_meta['classes'] == data['metainfo']['classes']
    one.pop('data_preprocessor')
    assert measured(one) == measured(one, True)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    image = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    plain, views = (Predictor(one, str(tmp_path / 'weights.pth'), 'cpu', aug_test)(image) for aug_test in (False, True))
    assert (plain == views).all()
