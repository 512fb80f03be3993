"""Uploads: read as the package reads images, or refused before decoding with a message for their owner."""

import time

import cv2
import numpy as np
import pytest
from demo_server import LIMITS, bad_files, image_file, random_image
from PIL import Image

from mmseg_volo.demo.uploads import RefusedImage, read_upload, try_decoding

pytest_plugins = ['demo_server']


def test_images_of_every_format_are_read_as_pil_reads_them(predictor, tmp_path):
    def read_image(path):
        return read_upload(path, LIMITS.megapixels, predictor.read).results['img']

    image = random_image(3, 64, 96)
    rgb = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))
    cv2.imwrite(str(tmp_path / 'deep.png'), image.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / 'alpha.png'), np.dstack((image, np.full(image.shape[:2], 90, np.uint8))))
    cv2.imwrite(str(tmp_path / 'grey.png'), image[..., 0])
    for name in ('plain.bmp', 'plain.tif', 'plain.webp', 'plain.gif'):
        rgb.save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / 'rotated.jpg', exif=exif)
    rgb.save(tmp_path / 'two.jpg', format='MPO', save_all=True, append_images=[rgb.rotate(90)])
    for path in sorted(tmp_path.iterdir()):
        read = read_image(path)
        assert read.dtype == np.uint8
        assert read.shape == ((96, 64, 3) if path.name == 'rotated.jpg' else (64, 96, 3)), path
    for name in ('deep.png', 'alpha.png', 'plain.bmp', 'plain.tif'):
        assert np.array_equal(read_image(tmp_path / name), image), name
    for name in ('plain.webp', 'plain.gif'):
        expected = np.asarray(Image.open(tmp_path / name).convert('RGB'))[..., ::-1].astype(int)
        assert np.abs(read_image(tmp_path / name) - expected).mean() < 3, name


def test_bad_files_are_refused_with_a_reason(predictor, tmp_path):
    for path, words in bad_files(tmp_path).values():
        with pytest.raises(RefusedImage, match=words):
            read_upload(path, LIMITS.megapixels, predictor.read)
    with pytest.raises(RefusedImage, match='no longer on the server'):
        read_upload(tmp_path / 'gone.png', LIMITS.megapixels, predictor.read)


def test_the_size_is_checked_before_anything_is_decoded(tmp_path):
    path, words = bad_files(tmp_path)['wide.png']

    def fail(*_):
        raise AssertionError('decoded')

    with pytest.raises(RefusedImage, match=words):
        read_upload(path, LIMITS.megapixels, fail)


def many_scans(scans: int) -> bytes:
    """A progressive JPEG of 1 megapixel whose last scan is repeated."""
    jpeg = cv2.imencode('.jpg', np.full((1000, 1000), 128, np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    return jpeg[:-2] + jpeg[jpeg.rindex(b'\xff\xda') : -2] * scans + jpeg[-2:]


def test_a_file_that_keeps_a_decoder_busy_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'scans.jpg').write_bytes(many_scans(3000))
    tif = image_file(tmp_path / 'good.tif', 3, 64, 96)
    try_decoding(tif, 1)
    started = time.monotonic()
    with pytest.raises(RefusedImage, match='Decoding the file takes too long'):
        try_decoding(tmp_path / 'scans.jpg', 1)
    assert time.monotonic() - started < 1
    (tmp_path / 'scans.jpg').write_bytes(many_scans(5))
    try_decoding(tmp_path / 'scans.jpg', 1)
    with pytest.raises(RefusedImage, match='Decoding the file takes too long'):
        try_decoding(tif, 1, seconds=0.001)
    (tmp_path / 'crash').write_text('#!/bin/sh\nkill -SEGV $$\n')
    (tmp_path / 'crash').chmod(0o755)
    monkeypatch.setattr('sys.executable', str(tmp_path / 'crash'))
    with pytest.raises(RefusedImage, match='The file is broken: decoding it fails'):
        try_decoding(tif, 1)
