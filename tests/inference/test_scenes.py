"""Scenes that LoadBands reads: GeoTIFFs of class ids, against the prediction of the whole image."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from band_files import rasterio, scene, write_tiff
from mmengine.config import Config
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine
from small_models import ARCH, BN, segmentor_config

from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor, scenes
from mmseg_volo.inference.files import Recipe, predict_files
from mmseg_volo.inference.model import init_model
from mmseg_volo.inference.outputs import OutputError
from mmseg_volo.inference.scenes import predict_scene
from mmseg_volo.utils.signals import Stopped

ROOT = Path(__file__).resolve().parents[2]
ROTATED = Affine(10, 1.5, 4e5, 2, -10, 5.3e6)
PIPELINE = [dict(type='LoadBands'), dict(type='LoadCheckedAnnotations'), dict(type='PackSegInputs')]


def scene_config(classes: int = 7, pipeline: list = PIPELINE, **test_cfg) -> Config:
    names = tuple(f'class {i}' for i in range(classes))
    meta = dict(classes=names, palette=[[i % 256, 255 - i % 256, 7] for i in range(classes)])
    model = segmentor_config(
        classes=classes,
        backbone=dict(type='VOLO', arch=ARCH, img_size=64, norm_cfg=BN, in_channels=4),
        data_preprocessor=dict(
            type='BandsDataPreProcessor', mean=[1800.0] * 4, std=[700.0] * 4, test_cfg=dict(size_divisor=16)
        ),
        test_cfg=dict(dict(mode='slide', crop_size=(64, 96), stride=(43, 64)), **test_cfg),
    )
    dataset = dict(type='BaseSegDataset', metainfo=meta, pipeline=pipeline, img_suffix='.tif')
    return Config(dict(default_scope='mmseg', model=model, test_dataloader=dict(dataset=dataset)))


def trained(folder: Path, config: Config) -> str:
    """A checkpoint of random weights with which each class wins somewhere."""
    torch.manual_seed(0)
    model = init_model(config, device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        last = model.decode_head.conv_seg
        image = torch.from_numpy(scene(5, (4, 96, 160)).astype(np.float32))
        logits = model((image[None] - 1800) / 700)
        last.weight.mul_(3 / logits.std((0, 2, 3)).view(-1, 1, 1, 1))
        last.bias.copy_(-3 * logits.mean((0, 2, 3)) / logits.std((0, 2, 3)))
    path = folder / f'{last.out_channels}.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)), path)
    return str(path)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> str:
    return trained(tmp_path_factory.mktemp('scenes'), scene_config())


@pytest.fixture(scope='module')
def predictor(checkpoint) -> Predictor:
    return Predictor(scene_config(), checkpoint, 'cpu', confidence=True)


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def predict(predictor: Predictor, path: Path, out: Path) -> np.ndarray:
    assert predict_scene(predictor, path, out, Path('sub/s')) == ['sub/s.tif', 'sub/s_confidence.tif']
    assert sorted(one.name for one in (out / 'sub').iterdir()) == ['s.tif', 's_confidence.tif']
    return read(out / 'sub/s.tif')


TILES = dict(tiled=True, blockxsize=64, blockysize=64, compress='deflate')
SHAPES = {
    'high tiles': ((4, 330, 211), TILES, True),
    'wide tiles': ((4, 211, 330), TILES, True),
    'high strips': ((4, 330, 120), {}, True),
    'wide strips': ((4, 120, 330), {}, False),
    'one window': ((4, 50, 70), {}, False),
    'smaller than the smallest input': ((4, 20, 200), TILES, True),
}


@pytest.mark.parametrize('name', SHAPES)
def test_result_is_that_of_the_whole_image(name, predictor, tmp_path, monkeypatch):
    """Bit for bit; in strips that are wider than high, windows are added in another order."""
    monkeypatch.setattr(scenes, '_BLOCK', 128)  # several strips are written
    shape, layout, exact = SHAPES[name]
    bands = scene(1, shape) + 1
    bands[:, 5:15, :30] = 0
    path = write_tiff(tmp_path / 's.tif', bands, crs='EPSG:32633', transform=ROTATED, nodata=0, **layout)
    assert predictor.needs_whole == ''
    found = predict(predictor, path, tmp_path / 'out')
    expected = predictor.predict(predictor.prepare(path))
    empty = (bands == 0).all(0)
    assert (found[empty] == 255).all() and len(np.unique(found[~empty])) >= min(shape[2] // 60, 4)
    confidence = read(tmp_path / 'out/sub/s_confidence.tif').astype(int)
    assert (confidence[empty] == 0).all()
    differ = found != expected.classes, abs(confidence - np.rint(expected.confidence * 255)) > 0
    assert all(one[~empty].mean() <= (0 if exact else 1e-3) for one in differ)


def test_windows_without_data_are_computed_once(predictor, tmp_path, monkeypatch):
    bands = scene(1, (4, 330, 208)) + 1
    bands[:, :200] = 0
    path = write_tiff(tmp_path / 's.tif', bands, crs='EPSG:32633', transform=ROTATED, nodata=0, **TILES)
    expected = predictor.predict(predictor.prepare(path)).classes
    network, computed = predictor.model.network, []
    monkeypatch.setattr(network, 'run', lambda windows: computed.append(windows) or type(network).run(network, windows))
    monkeypatch.setitem(predictor.model.test_cfg, 'window_batch', 1)
    found = predict(predictor, path, tmp_path / 'out')
    # 8 windows (of 64, stride 43) fit along the scene, of which 4 begin and end without data, and 3 across it.
    assert len(computed) == 4 * 3 + 1
    assert np.array_equal(found[200:], expected[200:]) and (found[:200] == 255).all()


def test_the_georeference_and_the_colours_stay(predictor, tmp_path):
    path = write_tiff(tmp_path / 's.tif', scene(1, (4, 70, 90)), crs='EPSG:32633', transform=ROTATED)
    predict(predictor, path, tmp_path / 'out')
    with rasterio.open(tmp_path / 'out/sub/s.tif') as file:
        assert file.crs == 'EPSG:32633' and file.transform == ROTATED
        assert file.dtypes == ('uint8',) and file.nodata == 255 and file.compression.name == 'deflate'
        assert file.colormap(1)[3] == (3, 252, 7, 255) and file.colormap(1)[255][3] == 0
        assert json.loads(file.tags(1)['classes']) == list(predictor.classes)
    with rasterio.open(tmp_path / 'out/sub/s_confidence.tif') as file:
        assert file.crs == 'EPSG:32633' and file.transform == ROTATED and file.nodata is None


def test_control_points_stay(predictor, tmp_path):
    points = [GroundControlPoint(r, c, 10 + c / 100, 50 - r / 100) for r, c in ((0, 0), (0, 60), (60, 0), (60, 60))]
    path = write_tiff(tmp_path / 's.tif', scene(1, (4, 70, 90)), gcps=points, crs='EPSG:4326')
    predict(predictor, path, tmp_path / 'out')
    with rasterio.open(tmp_path / 'out/sub/s.tif') as file:
        found, crs = file.gcps
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
        assert crs == 'EPSG:4326'


@pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
def test_a_plain_tiff_gives_a_plain_tiff(predictor, tmp_path, recwarn):
    path = write_tiff(tmp_path / 's.tif', scene(1, (4, 70, 90)))
    predict(predictor, path, tmp_path / 'out')
    with rasterio.open(tmp_path / 'out/sub/s.tif') as file:
        assert file.crs is None and file.transform.is_identity and file.shape == (70, 90)


def test_more_classes_than_eight_bits(tmp_path):
    config = scene_config(300)
    predictor = Predictor(config, trained(tmp_path, config), 'cpu')
    bands = scene(1, (4, 70, 90)) + 1
    bands[:, :5] = 0
    path = write_tiff(tmp_path / 's.tif', bands, nodata=0)
    assert predict_scene(predictor, path, tmp_path, Path('r')) == ['r.tif']
    found, expected = read(tmp_path / 'r.tif'), predictor.predict(predictor.prepare(path)).classes
    assert found.dtype == np.uint16 and (found[:5] == 65535).all() and np.array_equal(found[5:], expected[5:])
    assert found[5:].max() > 255


def test_images_are_shown_in_natural_colours(predictor, tmp_path):
    bands = np.zeros((4, 40, 50), np.uint8)
    bands[0] = 200  # red
    loaded = predictor.read(write_tiff(tmp_path / 's.tif', bands))
    assert loaded.results['img'][0, 0].tolist() == [200, 0, 0, 0] and loaded.shown()[0, 0].tolist() == [0, 0, 200]


WHOLE = {
    'a transform': (
        dict(pipeline=[PIPELINE[0], dict(type='Resize', scale=(96, 80), keep_ratio=False), *PIPELINE[1:]]),
        "the test pipeline's Resize needs the whole image",
    ),
    'the mode': (dict(mode='whole'), "model.test_cfg.mode is 'whole'"),
}


@pytest.mark.parametrize('name', WHOLE)
def test_what_needs_the_whole_image(name, checkpoint, tmp_path, monkeypatch):
    options, reason = WHOLE[name]
    predictor = Predictor(scene_config(**options), checkpoint, 'cpu', confidence=True)
    assert predictor.needs_whole.startswith(reason)
    path = write_tiff(tmp_path / 's.tif', scene(1, (4, 700, 130)), crs='EPSG:32633', transform=ROTATED)
    found = predict(predictor, path, tmp_path / 'out')
    assert np.array_equal(found, predictor.predict(predictor.prepare(path)).classes)
    monkeypatch.setattr(scenes, '_MOST_AT_ONCE', 9000)
    with pytest.raises(ValueError, match=f'130 x 700 pixels are too many to be predicted at once, but {reason}'):
        predict(predictor, path, tmp_path / 'out2')
    assert not list(tmp_path.glob('out2/**/*.tif'))


def test_augmentation_needs_the_whole_image(checkpoint, tmp_path):
    config = scene_config()
    flips = [[dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)], PIPELINE[1:2], PIPELINE[2:]]
    config.tta_pipeline = [PIPELINE[0], dict(type='TestTimeAug', transforms=flips)]
    config.tta_model = dict(type='StreamingTTAModel')
    predictor = Predictor(config, checkpoint, 'cpu', aug_test=True, confidence=True)
    assert 'leave out --aug-test' in predictor.needs_whole
    path = write_tiff(tmp_path / 's.tif', scene(1, (4, 80, 130)))
    found = predict(predictor, path, tmp_path / 'out')
    assert np.array_equal(found, predictor.predict(predictor.prepare(path)).classes) and len(np.unique(found)) > 3


def run_tool(tmp_path: Path, checkpoint: str, monkeypatch, *options: str) -> int:
    spec = importlib.util.spec_from_file_location('predict_tool', ROOT / 'tools/predict.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / 'config.py').write_text(scene_config().pretty_text)
    given = tmp_path / 'config.py', checkpoint, tmp_path / 'in', '--out', tmp_path / 'out', '--device', 'cpu', *options
    monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, given)])
    return tool.main()


def test_the_tool_predicts_skips_and_resumes(checkpoint, tmp_path, monkeypatch, capsys):
    for i in range(2):
        write_tiff(tmp_path / f'in/{i}.tif', scene(i, (4, 70, 90)))
    broken = scene(3, (4, 70, 90), 'float32')
    broken[1, 60, 80] = np.nan
    write_tiff(tmp_path / 'in/nan.tif', broken)
    write_tiff(tmp_path / 'in/three.tif', scene(3, (3, 70, 90)))
    write_tiff(tmp_path / 'in/many.tif', scene(3, (17, 70, 90), 'uint8', 200))
    write_tiff(tmp_path / 'in/complex.tif', scene(3, (4, 70, 90), 'complex64'))
    cut = write_tiff(tmp_path / 'in/cut.tif', scene(3, (4, 70, 90)))
    cut.write_bytes(cut.read_bytes()[:20000])
    assert run_tool(tmp_path, checkpoint, monkeypatch) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if 'skipped' in line]
    problems = {Path(line.split(': ')[0]).stem.split('/')[-1]: line.split(': ', 1)[1] for line in lines}
    assert (
        problems['nan'].startswith('band 2 has values that are not finite') and 'row 60, column 80' in problems['nan']
    )
    assert 'expected (4, H, W)' in problems['three'] and problems['many'].startswith('it has 17 bands')
    assert problems['complex'].startswith('its values are complex64') and 'is damaged' in problems['cut']
    assert len(problems) == 5
    files = sorted(one.name for one in (tmp_path / 'out').iterdir())
    assert files == ['0.tif', '1.tif', 'predict.jsonl']
    for name in problems:
        (tmp_path / f'in/{name}.tif').unlink()
    (tmp_path / 'out/1.tif').unlink()
    assert run_tool(tmp_path, checkpoint, monkeypatch, '--resume') == 0
    assert '1 done before, 1 to do' in capsys.readouterr().err and (tmp_path / 'out/1.tif').is_file()


def test_overlays_are_refused_and_no_source_is_replaced(checkpoint, tmp_path):
    write_tiff(tmp_path / 's.tif', scene(0, (4, 70, 90)))
    recipe = Recipe(scene_config(), checkpoint, 'cpu')
    with pytest.raises(ConfigError, match='overlay: LoadBands gives GeoTIFFs, whose colour table'):
        predict_files(recipe, [str(tmp_path / 's.tif')], str(tmp_path / 'out'), with_overlay=True)
    with pytest.raises(FileExistsError, match='would replace a source'):
        predict_files(recipe, [str(tmp_path / 's.tif')], str(tmp_path))


def test_a_signal_leaves_no_half_written_file(checkpoint, tmp_path, monkeypatch):
    write_tiff(tmp_path / 'in/a.tif', scene(0, (4, 70, 90)))
    write_tiff(tmp_path / 'in/b.tif', scene(0, (4, 600, 90)))
    put, parts = scenes.Strips.put, []

    def interrupt(strips, rows, columns, values):
        put(strips, rows, columns, values)
        if rows.start > 300:
            parts.extend(one.name for one in (tmp_path / 'out').glob('.*part*'))
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(scenes.Strips, 'put', interrupt)
    recipe = Recipe(scene_config(), checkpoint, 'cpu')
    with pytest.raises(Stopped):
        predict_files(recipe, [str(tmp_path / 'in')], str(tmp_path / 'out'))
    assert '.b.part.tif' in parts
    assert sorted(one.name for one in (tmp_path / 'out').iterdir()) == ['a.tif', 'predict.jsonl']
    monkeypatch.undo()
    assert predict_files(recipe, [str(tmp_path / 'in')], str(tmp_path / 'out'), resume=True) == {}
    assert read(tmp_path / 'out/b.tif').shape == (600, 90)


@pytest.mark.parametrize('limit', [pytest.param(n, marks=pytest.mark.slow) for n in (100, 2000)] + [700])
def test_a_full_disk_is_told(limit, predictor, tmp_path):
    """GDAL reports some of these errors nowhere, only the content of the file differs."""
    path = write_tiff(tmp_path / 's.tif', scene(0, (4, 600, 600)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match=r'^\S+out/s(_confidence)?\.tif cannot be written \('):
            predict_scene(predictor, path, tmp_path / 'out', Path('s'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / 'out').iterdir())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_scene(checkpoint, tmp_path):
    """Peak memory of the whole process; the values of the larger scene alone are 2.3 GB as float32."""
    (tmp_path / 'config.py').write_text(scene_config(crop_size=(512, 512), stride=(512, 512)).pretty_text)
    peaks = []
    for side in (1000, 12000):
        profile = dict(driver='GTiff', count=4, height=side, width=side, dtype='uint16', **TILES)
        with rasterio.open(tmp_path / f'{side}.tif', 'w', **dict(profile, blockxsize=512, blockysize=512)) as file:
            row = scene(0, (4, 512, 1000))
            for top in range(0, side, 512):
                rows = min(512, side - top)
                window = rasterio.windows.Window(0, top, side, rows)
                file.write(np.tile(row, (1, 1, side // 1000))[:, :rows], window=window)
        tool = [ROOT / 'tools/predict.py', tmp_path / 'config.py', checkpoint, tmp_path / f'{side}.tif']
        command = [*map(str, tool), '--out', str(tmp_path / 'out'), '--device', 'cpu']
        code = (
            'import resource, runpy, sys\nsys.argv = sys.argv[1:]\n'
            'try:\n    runpy.run_path(sys.argv[0], run_name="__main__")\n'
            'finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)'
        )
        done = subprocess.run([sys.executable, '-c', code, *command], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)  # MB
        assert read(tmp_path / f'out/{side}.tif').shape == (side, side)
    assert peaks[1] < peaks[0] + 900 and peaks[1] < 2000, peaks
