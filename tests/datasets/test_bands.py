"""Images of any number of bands and depth: the loader against rasterio, tifffile and the arrays that were written."""

import re

import numpy as np
import pytest
import torch
from band_files import scene, write_tiff
from faulty_data import write
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmseg.registry import TRANSFORMS
from PIL import Image

from mmseg_volo.datasets.bands import LoadBands
from mmseg_volo.errors import ConfigError, DataError
from mmseg_volo.models.preprocessor import BandsDataPreProcessor


def load(path, **options) -> dict:
    return LoadBands(**options)(dict(img_path=str(path)))


LAYOUTS = {
    'strips': {},
    'one band after the other': dict(interleave='band', tiled=True, blockxsize=32, blockysize=16),
    'tiles': dict(interleave='pixel', tiled=True, blockxsize=32, blockysize=32, compress='deflate', predictor=2),
    'lzw': dict(compress='lzw', interleave='band'),
    'zstd': dict(compress='zstd', tiled=True, blockxsize=16, blockysize=16),
    'BigTIFF': dict(BIGTIFF='YES'),
    'big endian': dict(ENDIANNESS='BIG'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int16', 'float32'])
def test_all_bands_arrive(layout, dtype, tmp_path):
    bands = scene(0, (5, 45, 70), dtype, 255 if dtype == 'uint8' else 4000)
    loaded = load(write_tiff(tmp_path / 'a.tif', bands, **LAYOUTS[layout]))
    assert loaded['img'].dtype == ('uint8' if dtype == 'uint8' else 'float32')
    assert np.array_equal(loaded['img'], bands.transpose(1, 2, 0)) and loaded['img'].flags.c_contiguous
    assert loaded['img_shape'] == loaded['ori_shape'] == (45, 70) and 'nodata' not in loaded


@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('count', [1, 3, 16])
def test_files_of_another_writer(count, planar, tmp_path):
    tifffile = pytest.importorskip('tifffile', reason='writes files independently of GDAL')
    bands = scene(1, (count, 33, 40), 'uint16', 65535)
    stored = bands if planar == 'separate' else bands.transpose(1, 2, 0)
    several = dict(planarconfig=planar) if count > 1 else {}
    tifffile.imwrite(tmp_path / 'a.tiff', stored.squeeze(), photometric='minisblack', **several)
    assert np.array_equal(load(tmp_path / 'a.tiff')['img'], bands.transpose(1, 2, 0))


def test_chosen_bands_in_their_order(tmp_path):
    bands = scene(2, (17, 20, 30))
    path = write_tiff(tmp_path / 'a.tif', bands)
    assert np.array_equal(load(path, bands=(4, 3, 2, 17))['img'], bands[[3, 2, 1, 16]].transpose(1, 2, 0))


def test_values_without_data_are_filled(tmp_path):
    bands = scene(3, (3, 20, 30), 'int16') + 1
    bands[0, :4] = bands[1, :2] = bands[2, :2] = -9999
    loaded = load(write_tiff(tmp_path / 'a.tif', bands, nodata=-9999), fill=(7, 8, 9))
    assert (loaded['img'][:2] == (7, 8, 9)).all() and (loaded['img'][2:4, :, 0] == 7).all()
    assert np.array_equal(loaded['img'][4:], bands[:, 4:].transpose(1, 2, 0))
    # A pixel has no data only if no band has.
    assert loaded['nodata'][:2].all() and not loaded['nodata'][2:].any()


def test_nan_as_the_nodata_value(tmp_path):
    bands = scene(4, (2, 20, 30), 'float32')
    bands[:, 5, 6] = np.nan
    loaded = load(write_tiff(tmp_path / 'a.tif', bands, nodata=np.nan))
    assert (loaded['img'][5, 6] == 0).all() and loaded['nodata'].sum() == 1


def test_a_mask_in_the_file(tmp_path):
    mask = np.full((20, 30), 255, np.uint8)
    mask[3:5] = 0
    loaded = load(write_tiff(tmp_path / 'a.tif', scene(5, (4, 20, 30)), mask))
    assert np.array_equal(loaded['nodata'], mask == 0)


def test_transparency_is_data_where_it_is_read(tmp_path):
    """GDAL calls the fourth of four 8-bit bands transparency, even if it is near infrared."""
    bands = scene(6, (4, 20, 30), 'uint8', 255)
    bands[3, :5] = 0
    path = write_tiff(tmp_path / 'a.tif', bands)
    assert np.array_equal(load(path)['img'], bands.transpose(1, 2, 0)) and 'nodata' not in load(path)
    assert load(path, bands=(1, 2, 3), fill=9)['nodata'][:5].all()


FAULTS = {
    'NaN': ('float32', {}, r'band 2 has values that are not finite .* row 5, column 6; .*--nodata nan'),
    '17 bands': ('uint8', {}, r'has 17 bands; choose at most 16'),
    'complex': ('complex64', {}, r'values are complex64; LoadBands reads uint8'),
    'too few bands': ('uint8', dict(bands=(4, 3, 2, 8)), r'has 4 bands, but LoadBands reads band 8'),
    'fill': ('uint8', dict(fill=(1, 2)), r'has 2 numbers in fill, but reads 4 bands'),
    'cut off': ('uint16', {}, r'cannot be read as a TIFF, or is damaged \(.*[Rr]ead.*\); restore it'),
    'cut off in its header': ('uint16', {}, r'cannot be read as a TIFF'),
    'empty': ('uint16', {}, r'it is empty \(0 bytes\)'),
    'a PNG': ('uint8', {}, r'cannot be read as a TIFF'),
    'missing': ('uint8', {}, r'the image cannot be read \(No such file'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_bad_file_is_one_line(name, tmp_path, capfd):
    dtype, options, line = FAULTS[name]
    bands = scene(7, (17 if name == '17 bands' else 4, 64, 64), dtype, 200)
    if name == 'NaN':
        bands[1, 5, 6] = np.nan
    path = write_tiff(tmp_path / 'a.tif', bands)
    data = path.read_bytes()
    length = {'cut off': len(data) // 2, 'cut off in its header': 60, 'empty': 0}.get(name, len(data))
    path.write_bytes(data[:length])
    if name == 'a PNG':
        Image.new('RGB', (9, 9)).save(path, format='png')
    if name == 'missing':
        path.unlink()
    with pytest.raises(DataError, match=line) as caught:
        load(path, **options)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value) and capfd.readouterr().err == ''


@pytest.mark.parametrize('bands', [(0, 1), (), (1.5,), tuple(range(1, 18))], ids=str)
def test_wrong_arguments(bands):
    with pytest.raises(ConfigError, match='must be 1 to 16 whole numbers'):
        LoadBands(bands=bands)


@pytest.mark.parametrize('count', [1, 4, 16])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_later_transforms_and_the_data_preprocessor(count, dtype, tmp_path):
    """Training's transforms keep the bands apart: band i of the batch is band i of the file, normalised."""
    high = 200 if dtype == 'uint8' else 20000
    bands = np.stack([np.full((60, 80), (i + 1) * high // 16) for i in range(count)]).astype(dtype)
    image = write_tiff(tmp_path / 'a.tif', bands, nodata=7)
    label = write(tmp_path / 'a.png', np.full((60, 80), 2, np.uint8))
    steps = [
        dict(type='LoadBands'),
        dict(type='LoadCheckedAnnotations'),
        dict(type='RandomResize', scale=(160, 120), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(32, 48), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs'),
    ]
    info = dict(img_path=str(image), seg_map_path=str(label), reduce_zero_label=False, seg_fields=[], label_map=None)
    packed = Compose([TRANSFORMS.build(step) for step in steps])(info)
    mean, std = [float(i) for i in range(count)], [float(i + 1) for i in range(count)]
    pre = BandsDataPreProcessor(mean=mean, std=std, bgr_to_rgb=False, size=(48, 48))
    batch = pre(pseudo_collate([packed]), True)['inputs']
    expected = torch.tensor([(band[0, 0] - m) / s for band, m, s in zip(bands, mean, std, strict=True)])
    assert batch.shape == (1, count, 48, 48)
    assert torch.allclose(batch[0, :, :32], expected.float()[:, None, None].expand(count, 32, 48))


def test_labels_are_ignored_where_no_band_has_data(tmp_path):
    bands = scene(8, (4, 20, 30)) + 1
    bands[:, 3:5] = 0
    image = write_tiff(tmp_path / 'a.tif', bands, nodata=0)
    ids = np.full((20, 30), 2, np.uint8)
    info = dict(img_path=str(image), reduce_zero_label=False, seg_fields=[], label_map=None)
    for label in (write(tmp_path / 'a.png', ids), write_tiff(tmp_path / 'label.tif', ids[None], tiled=True)):
        steps = [dict(type='LoadBands'), dict(type='LoadCheckedAnnotations')]
        found = Compose([TRANSFORMS.build(step) for step in steps])(dict(info, seg_map_path=str(label)))['gt_seg_map']
        assert (found[3:5] == 255).all() and (np.delete(found, [3, 4], 0) == 2).all()


LABELS = dict(deflate=dict(compress='deflate'), lzw=dict(compress='lzw'), big=dict(BIGTIFF='YES'), plain={})


@pytest.mark.parametrize('layout', LABELS)
@pytest.mark.parametrize('tiled', [True, False])
def test_labels_may_be_geotiffs(layout, tiled, tmp_path):
    ids = np.random.default_rng(0).integers(0, 5, (70, 50)).astype(np.uint8)
    path = write_tiff(tmp_path / 'a.tif', ids[None], tiled=tiled, crs='EPSG:32633', **LABELS[layout])
    info = dict(img_path='', seg_map_path=str(path), reduce_zero_label=False, seg_fields=[], label_map=None)
    assert np.array_equal(TRANSFORMS.build(dict(type='LoadCheckedAnnotations'))(info)['gt_seg_map'], ids)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("LoadBands needs rasterio: pip install -e '.[geo]'")):
        LoadBands()
