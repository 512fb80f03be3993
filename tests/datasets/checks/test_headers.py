"""Headers of image files, against what OpenCV writes."""

import cv2
import numpy as np
import pytest
from faulty_data import bands, random_image, tiff

from mmseg_volo.datasets.checks.headers import Header, read_header


def test_headers():
    image = random_image(0)
    assert read_header(cv2.imencode('.png', image)[1].tobytes()) == Header('png', image.shape[:2])
    content = cv2.imencode('.jpg', image)[1].tobytes()
    assert read_header(content) == Header('jpeg', image.shape[:2])
    assert read_header(content + b'a phone appends a film') == Header('jpeg', image.shape[:2])
    assert read_header(tiff(bands(6, np.uint16))) == Header('tiff', image.shape[:2], 1, 16, 6)
    assert read_header(b'II*\0' + bytes(9)) == Header('other')
    assert read_header(cv2.imencode('.png', image.astype(np.uint16))[1].tobytes()).bits == 16
    assert read_header(cv2.imencode('.bmp', image)[1].tobytes()) == Header('other')
    progressive = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert read_header(progressive).shape == image.shape[:2] and 5 < read_header(progressive).scans < 20
    png = cv2.imencode('.png', image)[1].tobytes()
    text, segment = b'\0\0\0\0tEXt\0\0\0\0', b'\xff\xe5\0\2'
    for data in (png[:33] + text * 10_001 + png[33:], content[:2] + segment * 10_001 + content[2:]):
        with pytest.raises(ValueError, match='more than 10000 parts'):
            read_header(data)
    for end in range(2, len(content)):
        with pytest.raises(ValueError, match='it is cut off'):
            read_header(content[:end])
    with pytest.raises(ValueError, match='it is empty'):
        read_header(b'')
