"""Uploads: read as the package reads images, or refused before decoding with a message for their owner."""

import cv2
import numpy as np
import pytest
from demo_server import LIMITS, bad_files, random_image
from PIL import Image

from mmseg_volo.demo.uploads import RefusedImage, read_upload

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
