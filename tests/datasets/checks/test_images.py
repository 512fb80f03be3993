"""Images as the config's loader reads them: bits that it loses, and files that it cannot read."""

import contextlib
import io

import cv2
import mmcv
import numpy as np
import pytest
from faulty_data import IMAGE, PIPELINE, bands, dataset_config, random_image, tiff
from PIL import Image

from mmseg_volo.datasets.checks import check
from mmseg_volo.datasets.checks.check import check_split, quick_check
from mmseg_volo.datasets.checks.images import ImageError, check_image, why_unreadable
from mmseg_volo.datasets.checks.labels import LabelError, decode_label
from mmseg_volo.utils.opencv import quiet_opencv


def encoded(array: np.ndarray, suffix: str = '.png') -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def of_bits(bits: int) -> np.ndarray:
    """An image (H, W, 3), uint16, whose largest value needs this many bits."""
    image = np.random.default_rng(bits).integers(0, 2**bits, (24, 40, 3)).astype(np.uint16)
    image[0, 0] = 2**bits - 1
    return image


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.ppm'])
@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_lost_bits_are_named(bits, suffix):
    data = encoded(of_bits(bits), suffix)
    for flag in ('color', 'grayscale', 'color_ignore_orientation'):
        loss = check_image(data, flag, 'cv2').loss
        assert f'16 bits per value, and {bits} of them are in use' in loss
        assert ('nearly black' in loss) == (mmcv.imfrombytes(data, flag=flag).max() <= 64) == (bits < 16)
    assert check_image(data, 'unchanged', 'cv2').loss == ''


def test_no_loss_where_eight_bits_hold_all_values():
    image = random_image(0)
    for deep in (image.astype(np.uint16) * 257, image.astype(np.uint16) << 8):
        for flag in ('color', 'grayscale'):
            assert check_image(encoded(deep), flag, 'cv2').loss == ''
    assert check_image(encoded(image[..., 0].astype(np.uint16)), 'color', 'pillow').loss == ''  # it does not divide
    assert 'remain' in check_image(encoded(of_bits(12)[..., 0]), 'color', 'pillow').loss
    for suffix in ('.png', '.jpg', '.bmp', '.webp', '.tif'):
        assert check_image(encoded(image, suffix), 'color', 'cv2') == (image.shape[:2], 1, '', '')


def test_depth_is_a_warning_in_the_report_and_in_the_log(data, monkeypatch):
    for path in (data / 'images/train').iterdir():
        path.write_bytes(encoded(of_bits(12)))
    lines = []
    monkeypatch.setattr(check, 'print_log', lambda text, **_: lines.append(text))
    quick_check(dataset_config(data))
    assert len(lines) == 1 and 'depth of an image (1 of 6)' in lines[0] and "color_type='unchanged'" in lines[0]
    report = check_split('train', dataset_config(data), workers=1)
    assert not report.faults and [f.kind for f in report.warnings] == ['depth of an image'] * 6
    own = [dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True), *PIPELINE[1:]]
    assert not check_split('train', dataset_config(data, pipeline=own), workers=1).findings


def test_bands_and_values_that_the_loader_cannot_read_are_called_that():
    six = tiff(bands(6))
    with pytest.raises(ImageError, match=r'it has 6 bands, but the loader reads at most 4\); load it with LoadBands, '):
        check_image(six, 'unchanged', 'cv2')
    with pytest.raises(ImageError, match="its values have 32 bits, which color_type='color' cannot convert"):
        check_image(tiff(bands(3, np.float32)), 'color', 'cv2')
    for array in (bands(3, np.float32), bands(4), bands(4, np.uint16)):
        assert check_image(tiff(array), 'unchanged', 'cv2') == (array.shape[:2], 1, '', '')
    with pytest.raises(ImageError, match='it is damaged, or a kind of TIFF'):
        check_image(tiff(bands(3))[:-9].replace(b'\x03\x01\x03\x00', b'\x03\x01\x03\x01'), 'color', 'cv2')


def test_a_loader_of_more_bands_reads_them(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ImageError, match=r"'tifffile' needs the package tifffile\); pip install tifffile"):
        check_image(b'II*\0' + bytes(50), 'unchanged', 'tifffile')
    monkeypatch.undo()
    pytest.importorskip('tifffile')
    for dtype in (np.uint8, np.uint16, np.float32):
        array = bands(6, dtype)
        assert (mmcv.imfrombytes(tiff(array), backend='tifffile') == array).all()
        assert check_image(tiff(array), 'color', 'tifffile') == (array.shape[:2], 1, '', '')


def test_an_image_over_a_decoders_limit_is_not_called_broken(monkeypatch):
    image = random_image(0)
    for suffix in ('.png', '.jpg', '.tif'):
        data = encoded(image, suffix)
        with monkeypatch.context() as patch:
            patch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)
            with pytest.raises(ImageError, match=r"more than Pillow accepts; the file may be whole\).*backend='cv2'"):
                check_image(data, 'color', 'pillow')
            check_image(data, 'color', 'cv2')
        with monkeypatch.context() as patch:
            patch.setenv('OPENCV_IO_MAX_IMAGE_PIXELS', '900')
            reason = why_unreadable(data, 'color', 'cv2')
        assert 'its 40 x 24 pixels are more than OpenCV accepts' in str(reason) and 'into tiles' in reason.remedy
    file = io.BytesIO()
    Image.new('1', (2**20, 1)).save(file, 'PNG')
    wide = file.getvalue()
    with quiet_opencv():
        assert mmcv.imfrombytes(wide) is None
    with pytest.raises(ImageError, match='more than OpenCV accepts'):
        check_image(wide, 'color', 'cv2')


def test_opencv_does_not_flood_the_output(data, capfd):
    (data / IMAGE).write_bytes(tiff(bands(4)))
    cv2.imdecode(np.frombuffer(tiff(bands(4)), np.uint8), cv2.IMREAD_COLOR)
    assert 'Unknown field with tag 33550' in capfd.readouterr().err
    quick_check(dataset_config(data))
    assert not check_split('train', dataset_config(data), workers=1).faults
    assert 'tag' not in capfd.readouterr().err


@pytest.mark.slow
def test_damaged_files_end_in_one_error():
    image, rng = random_image(0), np.random.default_rng(0)
    deep = image.astype(np.uint16) * 16
    files = [encoded(a, suffix) for a in (image, deep) for suffix in ('.png', '.tif', '.ppm')]
    files += [encoded(image, suffix) for suffix in ('.jpg', '.webp', '.bmp')] + [
        tiff(bands(6)),
        tiff(bands(3, np.float32)),
    ]
    for trial in range(2000):
        data = bytearray(files[trial % len(files)])
        if trial % 3 == 0:
            del data[rng.integers(len(data)) :]
        elif trial % 3 == 1:
            for at in rng.integers(0, len(data), rng.integers(1, 20)):
                data[at] = rng.integers(256)
        else:
            at = rng.integers(len(data))
            data[at:at] = rng.bytes(rng.integers(1, 30))
        for backend in ('cv2', 'pillow'):
            with quiet_opencv():
                for flag in ('color', 'unchanged'):
                    with contextlib.suppress(ImageError):
                        assert len(check_image(bytes(data), flag, backend).shape) == 2
                with contextlib.suppress(LabelError):
                    assert decode_label(bytes(data), backend).ndim == 2
