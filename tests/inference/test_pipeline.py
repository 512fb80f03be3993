"""All tools predict the pixels that the loader of the config's test pipeline reads."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from drawn_videos import draw_video, frames_of
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import TRANSFORMS
from PIL import Image
from small_models import build, segmentor_config

from mmseg_volo.demo.shared_model import SharedModel
from mmseg_volo.demo.uploads import read_upload
from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor, as_bgr, read_image
from mmseg_volo.inference.files import predict_files
from mmseg_volo.inference.images import for_display
from mmseg_volo.inference.video import predict_video

HEIGHT, WIDTH = 40, 56


@TRANSFORMS.register_module(force=True)
class LoadByPillow:
    """An own loader: RGB, not derived from mmcv's, which needs an argument."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, results: dict) -> dict:
        image = np.array(Image.open(results['img_path']).convert(self.mode))
        return {**results, 'img': image, 'img_shape': image.shape[:2], 'ori_shape': image.shape[:2]}


@TRANSFORMS.register_module(force=True)
class ReadOwnMask:
    """An own loader of labels, not derived from mmcv's."""

    def __call__(self, results: dict) -> dict:
        results['gt_seg_map'] = cv2.imread(results['seg_map_path'], -1)
        results['seg_fields'].append('gt_seg_map')
        return results


def draw() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('files')
    image = draw()
    rgb = Image.fromarray(np.ascontiguousarray(image[..., 2::-1]))
    stored = {
        'grey.png': image[..., 0],
        'grey16.png': image[..., 0].astype(np.uint16) * 200 + 77,
        'grey16.tif': image[..., 0].astype(np.uint16) * 200 + 77,
        'rgb.png': image[..., :3],
        'rgb16.png': image[..., :3].astype(np.uint16) * 257,
        'rgba.png': image,
        'bands.tif': image,
        'bands16.tif': image.astype(np.uint16) * 40 + 7,
    }
    for name, pixels in stored.items():
        cv2.imwrite(str(folder / name), pixels)
    rgb.convert('P').save(folder / 'palette.png')
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        for suffix in ('jpg', 'png'):
            rgb.save(folder / f'turned{orientation}.{suffix}', exif=exif)
    return folder


def config(loader: dict, channels: int, mean: float = 110, std: float = 60, **labels) -> Config:
    model = segmentor_config()
    model.backbone.in_channels = channels
    values = dict(mean=[mean], std=[std]) if channels != 3 else dict(mean=[mean] * 3, std=[std] * 3)
    model.data_preprocessor.update(values, bgr_to_rgb=channels == 3)
    resize = dict(type='Resize', scale=(84, 60), keep_ratio=True)
    label = labels or dict(type='LoadCheckedAnnotations')
    pipeline = [loader, resize, label, dict(type='PackSegInputs')]
    views = [[resize], [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)], [label]]
    tta = [loader, dict(type='TestTimeAug', transforms=[*views, [dict(type='PackSegInputs')]])]
    names = [f'class {i}' for i in range(7)]
    data = dict(
        type='BaseSegDataset', pipeline=pipeline, metainfo=dict(classes=names, palette=[[i] * 3 for i in range(7)])
    )
    return Config(
        dict(
            default_scope='mmseg',
            model=model,
            test_dataloader=dict(dataset=data),
            tta_pipeline=tta,
            tta_model=dict(type='StreamingTTAModel'),
            test_pipeline=pipeline,
        )
    )


def weights(folder: Path, channels: int) -> str:
    path = folder / f'{channels}.pth'
    if not path.exists():
        model = build()
        state = model.state_dict()
        first = state['backbone.patch_embed.conv.0.weight']
        state['backbone.patch_embed.conv.0.weight'] = first.mean(1, keepdim=True).repeat(1, channels, 1, 1) * (
            1 + torch.arange(channels).view(1, -1, 1, 1) / channels
        )
        torch.save(state, path)
    return str(path)


def of_the_data_set(predictor: Predictor, cfg: Config, path: Path) -> np.ndarray:
    """The class ids that tools/test.py finds for a file of the data set: its pipeline, as mmengine runs it."""
    init_default_scope('mmseg')
    steps = [step for step in cfg.test_dataloader.dataset.pipeline if step['type'] != 'ReadOwnMask']
    sample = Compose(steps)(dict(img_path=str(path), reduce_zero_label=False, label_map=None, seg_fields=[]))
    predictor.model.network.progress = None
    return predictor.model.test_step(pseudo_collate([sample]))[0].pred_sem_seg.data[0].numpy()


LOADERS = {
    'plain': (dict(type='LoadImageFromFile'), 3, '*', {}),
    'float': (dict(type='mmcv.LoadImageFromFile', to_float32=True), 3, '[rgp]*', {}),
    'no orientation': (dict(type='LoadImageFromFile', color_type='color_ignore_orientation'), 3, 'turned*', {}),
    'pillow': (dict(type='LoadImageFromFile', imdecode_backend='pillow'), 3, '[rpt]*[ab5].png', {}),
    'grey': (dict(type='LoadImageFromFile', color_type='grayscale'), 1, '*', {}),
    'grey, no orientation': (
        dict(type='LoadImageFromFile', color_type='grayscale_ignore_orientation'),
        1,
        'turned[5-8]*',
        {},
    ),
    'grey of 16 bits': (
        dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True),
        1,
        'grey16*',
        dict(mean=25000, std=12000),
    ),
    'four bands': (dict(type='LoadImageFromFile', color_type='unchanged'), 4, 'bands.tif', {}),
    'four bands of 16 bits': (
        dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True),
        4,
        'bands16.tif',
        dict(mean=5000, std=2500),
    ),
    'checked': (dict(type='LoadCheckedImage', color_type='color_ignore_orientation'), 3, 'turned6*', {}),
    'own': (dict(type='LoadByPillow', mode='RGB'), 3, '[rt]*[ab6].png', {}),
    'own labels': (dict(type='LoadImageFromFile'), 3, 'rgb.png', dict(type='ReadOwnMask')),
}


@pytest.mark.parametrize('name', LOADERS)
def test_all_tools_predict_the_pixels_of_the_configs_loader(name, files, tmp_path):
    loader, channels, pattern, more = LOADERS[name]
    cfg = config(loader, channels, **more)
    predictor = Predictor(cfg, weights(files.parent, channels), 'cpu')
    images = sorted(files.glob(pattern))
    assert images
    assert predict_files(predictor, list(map(str, images)), str(tmp_path), with_overlay=True) == {}
    tested = {path: of_the_data_set(predictor, cfg, path) for path in images}
    shared = SharedModel(predictor) if name in ('grey', 'four bands', 'own') else None
    for path, expected in tested.items():
        alone = [p for p in images if p.stem == path.stem] == [path]
        result = cv2.imread(str(tmp_path / f'{path.stem if alone else path.name}.png'), -1)
        assert np.array_equal(result, expected), path
        assert np.array_equal(predictor(path), expected), path
        turned = path.stem[-1] in '5678' and 'ignore' not in loader.get('color_type', '') and 'own' not in name
        turned = turned and path.stem.startswith('turned')
        assert expected.shape == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH)), path
        if shared:
            read = read_upload(path, 1, shared.read)
            assert np.array_equal(shared.predict(read).classes, expected), path
            assert read.shown().shape == (*expected.shape, 3) and read.shown().dtype == np.uint8
    assert len(np.unique(np.concatenate([ids.ravel() for ids in tested.values()]))) > 1


def test_views_are_read_by_the_loader_of_the_tta_pipeline(files):
    loader = dict(type='LoadImageFromFile', color_type='color_ignore_orientation')
    cfg = config(loader, 3)
    plain = Predictor(cfg, weights(files.parent, 3), 'cpu')
    for aug_test in (False, True):
        predictor = plain.with_options(aug_test=aug_test)
        assert predictor(files / 'turned6.png').shape == (HEIGHT, WIDTH)
        assert np.array_equal(predictor(files / 'turned6.png'), predictor(files / 'rgb.png'))
        assert np.array_equal(predictor(plain.read(files / 'turned6.png')), predictor(files / 'rgb.png'))


def test_arrays_and_frames_become_what_the_loader_gives(files, tmp_path):
    bgr = cv2.imread(str(files / 'rgb.png'))
    for name in ('plain', 'float', 'grey', 'own'):
        loader, channels, _, more = LOADERS[name]
        predictor = Predictor(config(loader, channels, **more), weights(files.parent, channels), 'cpu')
        expected = predictor.read(files / 'rgb.png').results['img']
        frame = predictor.read_frame(bgr).results['img']
        assert np.array_equal(frame, expected) and frame.dtype == expected.dtype, name
        array = expected if name == 'own' else bgr
        assert np.array_equal(predictor(array), predictor(files / 'rgb.png')), name
        dark = np.zeros_like(bgr)
        dark[3, 3] = 1
        predictor(dark)
    loader, channels, _, more = LOADERS['four bands']
    predictor = Predictor(config(loader, channels, **more), weights(files.parent, channels), 'cpu')
    assert np.array_equal(predictor(cv2.imread(str(files / 'bands.tif'), -1)), predictor(files / 'bands.tif'))
    with pytest.raises(ValueError, match=r'shape \(3, 60, 84\), uint8: expected \(4, H, W\)'):
        predictor(bgr)
    with pytest.raises(ValueError, match='frames of a video have 3 channels, the model takes 4'):
        predict_video(predictor, draw_video(tmp_path / 'a.mp4', 3), tmp_path / 'b.mp4')
    assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']


def test_a_grey_model_predicts_videos(files, tmp_path):
    loader, channels, _, more = LOADERS['grey']
    predictor = Predictor(config(loader, channels, **more), weights(files.parent, channels), 'cpu')
    assert predict_video(predictor, draw_video(tmp_path / 'a.mp4', 3), tmp_path / 'b.mp4') is None
    assert len(frames_of(tmp_path / 'b.mp4')[0]) == 3


def six_bands(path: Path) -> Path:
    """Write a TIFF of six bands, which OpenCV and Pillow do not read: a list of tags, then the pixels."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 122, 277: 6, 278: 8, 279: 384}
    fields = b''.join(tag.to_bytes(2, 'little') + b'\3\0\1\0\0\0' + v.to_bytes(4, 'little') for tag, v in tags.items())
    path.write_bytes(b'II*\0\x08\0\0\0' + len(tags).to_bytes(2, 'little') + fields + bytes(4 + 384))
    return path


def test_files_that_the_loader_does_not_read(files, tmp_path, monkeypatch):
    def refusal(name: str, path: Path) -> str:
        loader, channels, _, more = LOADERS[name]
        predictor = Predictor(config(loader, channels, **more), weights(files.parent, channels), 'cpu')
        with pytest.raises(ValueError, match='it is') as refused:
            predictor.read(path)
        return str(refused.value)

    bands = six_bands(tmp_path / 'six.tif')
    assert refusal('plain', bands) == "it is an image of 6 bands; the config's loader (LoadImageFromFile) reads 3"
    assert refusal('grey', bands).endswith("6 bands; the config's loader (LoadImageFromFile) reads 1")
    (tmp_path / 'text.png').write_text('no image')
    assert refusal('plain', tmp_path / 'text.png') == 'it is no image, or broken'
    assert 'LoadByPillow: cannot identify image file' in refusal('own', tmp_path / 'text.png')
    cut = tmp_path / 'cut.jpg'
    cut.write_bytes((files / 'turned1.jpg').read_bytes()[:-50])
    assert refusal('own', cut) == 'it is no image, or broken: it is cut off'
    for wrong in (dict(color_type='color_ignore_orientaton'), dict(imdecode_backend='pil')):  # not taken for the file's
        with pytest.raises(ConfigError, match=rf'test_dataloader\.dataset\.pipeline.*{next(iter(wrong))}'):
            Predictor(config(dict(type='LoadImageFromFile', **wrong), 3), weights(files.parent, 3), 'cpu')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install tifffile'):
        Predictor(
            config(dict(type='LoadImageFromFile', imdecode_backend='tifffile'), 3), weights(files.parent, 3), 'cpu'
        )


def test_loaded_images_of_every_kind_can_be_shown():
    image = draw()
    assert np.array_equal(for_display(image), image[..., :3])
    assert np.array_equal(for_display(image[..., 0]), np.dstack([image[..., 0]] * 3))
    assert np.array_equal(for_display(image[..., :2]), np.dstack([image[..., 0]] * 3))
    assert np.array_equal(for_display(image.astype(np.float32)), image[..., :3])
    assert np.array_equal(for_display(image / 255), image[..., :3])
    deep = for_display(image.astype(np.uint16) * 40 + 1000)
    assert deep.dtype == np.uint8 and deep.min() < 20 and deep.max() > 235
    assert np.corrcoef(deep.ravel(), image[..., :3].ravel())[0, 1] > 0.99
    assert for_display(np.full((40, 40), np.nan)).max() == 0


def test_12_bits_that_become_near_black_are_named(tmp_path):
    deep = draw()[..., :3].astype(np.uint16) * 16
    cv2.imwrite(str(tmp_path / 'a.png'), deep)
    cv2.imwrite(str(tmp_path / 'b.png'), deep * 16)
    with pytest.warns(UserWarning, match=r'a\.png: the file has 16 bits and values from \d+ to 4080.*0 to 15 of 255'):
        assert read_image(tmp_path / 'a.png').max() == 15
    with pytest.warns(
        UserWarning, match=r'uint16: values up to 4080.*0 to 15 of 255. Multiply values of 12 bits by 16'
    ):
        assert as_bgr(deep).max() == 15
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(tmp_path / 'b.png').max() == as_bgr(deep * 16).max() == 255


def test_a_loader_of_remote_sensing_images(files, monkeypatch):
    """mmseg's own, which needs GDAL; here with a stand-in."""
    cfg = config(dict(type='LoadSingleRSImageFromFile'), 4)
    monkeypatch.setattr('mmseg.datasets.transforms.loading.gdal', None)
    with pytest.raises(ConfigError, match='gdal is not installed'):
        Predictor(cfg, weights(files.parent, 4), 'cpu')
    stand_in = SimpleNamespace(ReadAsArray=lambda: draw().transpose(2, 0, 1))
    monkeypatch.setattr('mmseg.datasets.transforms.loading.gdal', SimpleNamespace(Open=lambda name: stand_in))
    predictor = Predictor(cfg, weights(files.parent, 4), 'cpu')
    assert np.array_equal(predictor(files / 'bands.tif'), of_the_data_set(predictor, cfg, files / 'bands.tif'))
    assert predictor.read(files / 'bands.tif').shown().shape == (HEIGHT, WIDTH, 3)
