"""What mmseg makes of the values of a label file."""

import io
import struct
import warnings

import mmcv
import numpy as np
import pytest
from faulty_data import dataset_config, random_label, write
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

from mmseg_volo.datasets.checks.check import quick_check
from mmseg_volo.datasets.checks.labels import LabelError, decode_label, label_table
from mmseg_volo.errors import DataError


@pytest.mark.parametrize('reduced', [False, True])
@pytest.mark.parametrize('label_map', [None, {0: 255, 1: 0, 2: 1, 3: 255}, {0: 1, 1: 0}])
def test_labels_equal_those_of_mmseg(tmp_path, reduced, label_map):
    path = write(tmp_path / 'every.png', np.arange(256, dtype=np.uint8).reshape(8, 32))
    info = dict(seg_map_path=str(path), label_map=label_map, reduce_zero_label=reduced)
    theirs = LoadAnnotations().transform(dict(info, seg_fields=[]))
    ours = TRANSFORMS.build(dict(type='LoadCheckedAnnotations')).transform(dict(info, seg_fields=[], ori_shape=(8, 32)))
    assert ours['seg_fields'] == ['gt_seg_map'] and ours['gt_seg_map'].dtype == np.uint8
    assert (ours['gt_seg_map'] == theirs['gt_seg_map']).all()
    assert (label_table(reduced, label_map) == theirs['gt_seg_map'].ravel()).all()


def png(ids: np.ndarray, mode: str, bits: int) -> bytes:
    """A PNG of a Pillow mode, with so many bits per value."""
    image = Image.fromarray(ids)
    if mode == 'P':
        image.putpalette(bytes(range(256)) * 3)
    file = io.BytesIO()
    image.convert(mode).save(file, 'PNG', bits=bits)
    return file.getvalue()


@pytest.mark.parametrize(('mode', 'bits'), [('L', 8), ('P', 8), ('P', 4), ('P', 2), ('P', 1), ('1', 1), ('I;16', 16)])
def test_a_label_over_pillows_limit_is_read_like_any_other(monkeypatch, mode, bits):
    content = png(random_label(3) % (2 if bits == 1 else 4), mode, bits)
    expected = mmcv.imfrombytes(content, flag='unchanged', backend='pillow')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)  # an error above twice as many
    with pytest.raises(Image.DecompressionBombError):
        mmcv.imfrombytes(content, flag='unchanged', backend='pillow')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (decode_label(content) == expected).all()
    assert Image.MAX_IMAGE_PIXELS == 400


def test_a_damaged_header_with_a_huge_size_takes_no_memory():
    file = io.BytesIO()
    Image.fromarray(random_label(0)).save(file, 'BMP')
    content = bytearray(file.getvalue())
    content[18:26] = struct.pack('<II', 60_000, 60_000)
    with pytest.raises(LabelError, match='it is damaged: its header gives 60000 x 60000 pixels'):
        decode_label(bytes(content))


def test_the_check_knows_which_transform_has_pillows_limit(data, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)
    cfg = dataset_config(data)
    quick_check(cfg)
    assert (DATASETS.build(cfg)[3]['data_samples'].gt_sem_seg.data[0].numpy() == random_label(3)).all()
    cfg['pipeline'] = [cfg['pipeline'][0], dict(type='LoadAnnotations')]
    with pytest.raises(Image.DecompressionBombError):
        DATASETS.build(cfg)[3]
    with pytest.raises(DataError, match='LoadAnnotations cannot read it; use LoadCheckedAnnotations in its place'):
        quick_check(cfg)


def test_a_label_with_transparency_is_called_that():
    ids = random_label(0)
    for mode, words in (('LA', 'the second is transparency: save the first'), ('RGBA', 'the first three are equal')):
        with pytest.raises(LabelError, match=f'channels; {words}'):
            decode_label(png(ids, mode, 8))
    assert (decode_label(png(ids.astype(np.uint16), 'I;16', 16)) == ids).all()
