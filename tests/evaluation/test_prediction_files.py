"""Predictions as files: class ids and overlays of tests, for all forms of metrics and hooks, read back with Pillow."""

import copy
import gc
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import run
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.evaluation import CityscapesMetric, IoUMetric
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from small_evaluation import drawn_dataset, evaluation_config, measured

from mmseg_volo.errors import ConfigError, DataError
from mmseg_volo.evaluation import ConfusionIoUMetric
from mmseg_volo.evaluation.prediction_files import file_names, leave_out_labels, save_overlays, save_predictions


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dict:
    return drawn_dataset(tmp_path_factory.mktemp('predictions') / 'a')


class Unmeasured(CityscapesMetric):
    """Without the official script, which needs labels of Cityscapes."""

    def compute_metrics(self, results: list) -> dict:
        return {}


class NoIds(EncoderDecoder):
    """A model that predicts something else, such as depth."""

    def predict(self, inputs, data_samples):
        return data_samples


def saved(config: Config, out: Path | None, aug_test: bool = False) -> dict:
    """Run a test as tools/test.py does with --out; return its figures."""

    def change(config: Config) -> None:
        leave_out_labels(config)
        save_predictions(config, out and str(out))

    return measured(config, aug_test, change)


def files_in(folder: Path) -> dict[str, np.ndarray]:
    """Class ids by the relative path of the file."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in files}


def test_ids_above_255_take_16_bits(tmp_path):
    classes = 300
    config = evaluation_config(tmp_path, 'run', drawn_dataset(tmp_path / 'data', classes=classes), classes)
    dump = tmp_path / 'all.pkl'
    config.test_evaluator = [dict(type='IoUMetric'), dict(type='DumpResults', out_file_path=str(dump))]
    saved(config, tmp_path / 'out')
    found = files_in(tmp_path / 'out')
    assert list(found) == ['0.png', '1.png']
    for sample in pickle.loads(dump.read_bytes()):
        ids = found[Path(sample['img_path']).name]
        assert (ids == sample['pred_sem_seg']['data'][0].numpy()).all() and ids.max() > 255
        assert cv2.imread(str(tmp_path / 'out' / Path(sample['img_path']).name), -1).dtype == np.uint16


@pytest.mark.parametrize(('classes', 'reduced', 'bits'), [(256, False, 8), (256, True, 16), (255, True, 8), (2, 1, 8)])
def test_the_metric_itself_saves_the_same_files(tmp_path, classes, reduced, bits):
    ids = torch.tensor([[0, 1], [classes - 1, 0]])
    sample = SegDataSample(
        metainfo=dict(img_path='x/a.png', reduce_zero_label=reduced), pred_sem_seg=PixelData(data=ids)
    ).to_dict()
    for kind in (ConfusionIoUMetric, IoUMetric):
        metric = kind(output_dir=str(tmp_path / kind.__name__), format_only=True)
        metric.dataset_meta = dict(classes=['c'] * classes)
        metric.process({}, [sample])
    ours, stock = (files_in(tmp_path / kind)['a.png'] for kind in ('ConfusionIoUMetric', 'IoUMetric'))
    assert (ours == ids.numpy() + reduced).all() and (ours.dtype == np.uint8) == (bits == 8)
    assert bits == 16 or (ours == stock).all()


def test_the_metric_refuses_images_of_one_name(tmp_path):
    metric = ConfusionIoUMetric(output_dir=str(tmp_path), format_only=True)
    metric.dataset_meta = dict(classes='ab')
    samples = [
        SegDataSample(metainfo=dict(img_path=path), pred_sem_seg=PixelData(data=torch.full((2, 2), i))).to_dict()
        for i, path in enumerate(['x/a.png', 'x/b.png', 'x/a.png', 'y/a.png'])
    ]
    metric.process({}, samples[:2])
    metric.process({}, samples[2:3])  # the same image in the next evaluation
    with pytest.raises(DataError, match=r'x/a\.png and y/a\.png would both be saved as .*a\.png'):
        metric.process({}, samples[3:])
    assert (files_in(tmp_path)['a.png'] == 2).all()


def test_names_of_files():
    assert file_names(['a/x.png', 'b/y.jpg', 'a/x.png']) == {'a/x.png': 'x.png', 'b/y.jpg': 'y.png'}
    root = Path.cwd()
    given = ['a/x.png', f'{root}/b/c/x.png', 'b/./y.png']
    assert list(file_names(given).values()) == ['a/x.png', 'b/c/x.png', 'b/y.png']
    assert list(file_names(['a/x.png', 'a/x.jpg', 'a/y.jpg']).values()) == ['x.png.png', 'x.jpg.png', 'y.png']
    assert list(file_names(['s3://one/x.png', 's3://one/a/x.png']).values()) == ['x.png', 'a/x.png']
    assert file_names([]) == {}
    with pytest.raises(DataError, match=r'a/x\.png\.tif and a/x\.png would both be saved as x\.png\.png'):
        file_names(['a/x.png.tif', 'a/x.png', 'a/x.jpg'])


def test_images_of_one_name_keep_their_folders(data, tmp_path):
    """Of two data sets, of two folders of one, and with two suffixes."""
    other = drawn_dataset(tmp_path / 'other', ('0.png', 'deep/0.png', 'deep/0.jpg'))
    both = [other, dict(other, img_suffix='.jpg')]
    config = evaluation_config(tmp_path, 'run', dict(type='ConcatDataset', datasets=both))
    saved(config, tmp_path / 'out')
    found = files_in(tmp_path / 'out')
    assert sorted(found) == ['0.png', 'deep/0.jpg.png', 'deep/0.png.png']
    for name, ids in found.items():
        image = tmp_path / 'other/images' / (name if name == '0.png' else name.removesuffix('.png'))
        alone = copy.deepcopy(config)
        alone.test_dataloader.dataset = dict(other, ann_file=str(tmp_path / 'list'), img_suffix=image.suffix)
        (tmp_path / 'list').write_text(str(image.relative_to(tmp_path / 'other/images').with_suffix('')))
        saved(alone, tmp_path / 'alone')
        assert (files_in(tmp_path / 'alone')[f'{image.stem}.png'] == ids).all()
        shutil.rmtree(tmp_path / 'alone')


EVALUATORS = {
    'one': dict(type='ConfusionIoUMetric', output_dir='UNUSED'),
    'stock': [dict(type='IoUMetric', iou_metrics=['mIoU'])],
    'second': [dict(type='DumpResults', out_file_path='DUMP'), dict(type='IoUMetric', output_dir='UNUSED')],
    'evaluator': dict(metrics=[dict(type='DumpResults', out_file_path='DUMP'), dict(type='ConfusionIoUMetric')]),
    'no figures': [dict(type='DumpResults', out_file_path='DUMP')],
    'two': [dict(type='IoUMetric', output_dir='UNUSED'), dict(type='IoUMetric', prefix='b', output_dir='UNUSED')],
    'format only': dict(type='IoUMetric', format_only=True, output_dir='UNUSED'),
    'only one of two': [dict(type='IoUMetric', format_only=True), dict(type='ConfusionIoUMetric')],
}


@pytest.mark.parametrize('form', EVALUATORS)
def test_all_forms_of_evaluators(data, tmp_path, form):
    config = evaluation_config(tmp_path, 'run', data)
    expected = measured(config)
    text = repr(EVALUATORS[form]).replace('DUMP', f'{tmp_path}/all.pkl').replace('UNUSED', f'{tmp_path}/unused')
    config.test_evaluator = eval(text)
    figures = saved(config, tmp_path / 'out')
    assert sorted(files_in(tmp_path / 'out')) == ['0.png', '1.png'] and not (tmp_path / 'unused').exists()
    assert ('DUMP' in text) <= (tmp_path / 'all.pkl').exists()
    if form not in ('no figures', 'format only'):
        assert {key: figures[key] for key in expected} == pytest.approx(expected, abs=0.011)
    if 'UNUSED' in repr(EVALUATORS[form]):  # the config's own folder, without --out
        saved(config, None)
        assert files_in(tmp_path / 'unused').keys() == files_in(tmp_path / 'out').keys()


def test_cityscapes_writes_its_own_format(data, tmp_path):
    labels = pytest.importorskip('cityscapesscripts.helpers.labels').trainId2label
    config = evaluation_config(tmp_path, 'run', data)
    saved(config, tmp_path / 'ids')
    metric = dict(type='CityscapesMetric', output_dir=str(tmp_path / 'unused'), format_only=True, keep_results=True)
    for change in (dict(), dict(format_only=False, keep_results=False)):
        config.test_evaluator = [dict(metric, **change)]
        if change:  # the official script cannot evaluate these labels
            config.test_evaluator[0]['type'] = Unmeasured
        saved(config, tmp_path / 'out')
        gc.collect()  # CityscapesMetric deletes the files, unless it shall keep them
        found, ids = files_in(tmp_path / 'out'), files_in(tmp_path / 'ids')
        assert found.keys() == ids.keys()
        for name, image in found.items():
            assert (image == np.vectorize(lambda i: labels[i].id)(ids[name])).all()
        shutil.rmtree(tmp_path / 'out')


@pytest.mark.parametrize('aug_test', [False, True])
def test_format_only_needs_no_labels(data, tmp_path, aug_test):
    config = evaluation_config(tmp_path, 'run', data)
    saved(config, tmp_path / 'with')
    root = tmp_path / 'unlabelled'
    shutil.copytree(f'{data["data_root"]}/images', root / 'images')
    for prefix in (dict(img_path='images', seg_map_path='labels'), dict(img_path='images')):
        config.test_dataloader.dataset = dict(data, data_root=str(root), data_prefix=prefix, reduce_zero_label=True)
        config.test_evaluator = dict(type='IoUMetric', format_only=True)
        assert saved(config, tmp_path / 'without', aug_test) == {}
        one, other = files_in(tmp_path / 'with'), files_in(tmp_path / 'without')
        assert one.keys() == other.keys() and all((other[name] == one[name] + 1).all() for name in one)
        shutil.rmtree(tmp_path / 'without')
    with pytest.raises(ConfigError, match=r'format_only, which saves predictions .* give --out DIR'):
        saved(config, None, aug_test)


def test_a_model_without_class_ids_is_named(data, tmp_path):
    config = evaluation_config(tmp_path, 'run', data)
    config.model.type = NoIds
    config.test_evaluator = []
    with pytest.raises(DataError, match=r'--out: NoIds predicts no class ids \(pred_sem_seg\)'):
        saved(config, tmp_path / 'out')


HOOKS = {
    'as in configs/_base_': {},
    'no hook': dict(default_hooks={}),
    'another name': dict(default_hooks=dict(drawing=dict(type='SegVisualizationHook'))),
    'a custom hook': dict(default_hooks={}, custom_hooks=[dict(type='SegVisualizationHook')]),
    'no visualizer': dict(visualizer=None),
    'no backend': dict(visualizer=dict(vis_backends=None)),
}


@pytest.mark.parametrize('form', HOOKS)
def test_overlays(data, tmp_path, form):
    config = evaluation_config(tmp_path, 'run', data)
    for key, value in HOOKS[form].items():
        config[key] = value if key != 'visualizer' or value is None else {**config.visualizer, **value}
    measured(config, change=lambda config: save_overlays(config, str(tmp_path / 'show')))
    drawn = sorted((tmp_path / 'show').rglob('*.png'))
    assert [path.name for path in drawn] == ['test_0.png_1.png', 'test_1.png_2.png']
    assert all(Image.open(path).size == (2 * 70, 90) for path in drawn)  # ground truth and prediction


@pytest.mark.slow
def test_two_ranks_save_all_predictions(data, tmp_path):
    other = drawn_dataset(tmp_path / 'other', ('0.png',))
    config = evaluation_config(tmp_path, 'run', dict(type='ConcatDataset', datasets=[data, other]))
    config.test_dataloader.num_workers = 0
    config.load_from = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=MODELS.build(copy.deepcopy(config.model)).state_dict()), config.load_from)
    saved(config, tmp_path / 'one')
    config.dump(tmp_path / 'config.py')
    arguments = 'bash', 'tools/dist_test.sh', tmp_path / 'config.py', config.load_from, '2'
    run(*arguments, '--work-dir', tmp_path / 'wd', '--out', tmp_path / 'two', PORT='29632', OMP_NUM_THREADS='1')
    one, two = files_in(tmp_path / 'one'), files_in(tmp_path / 'two')
    assert one.keys() == two.keys() and len(one) == 3 and all((one[name] == two[name]).all() for name in one)
