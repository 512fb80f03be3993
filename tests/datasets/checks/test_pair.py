"""One image and its label: what is unusual but valid, and what is only suspicious."""

from pathlib import Path

import numpy as np
from faulty_data import (
    IMAGE,
    dataset_config,
    exif,
    random_image,
    random_label,
    rewrite,
    to_jpeg,
    write,
)
from PIL import Image

from mmseg_volo.datasets.checks.check import check_split, quick_check


def test_unusual_but_valid_files_are_no_faults(data):
    palette = Image.fromarray(random_label(0)).convert('P')
    palette.putpalette(list(range(256)) * 3)
    palette.save(data / 'labels/train/0.png')
    write(data / 'labels/train/1.png', random_label(1).astype(np.uint16))  # 16 bits, but no value needs them
    write(data / 'labels/train/2.png', random_label(2, high=2) % 2 > 0)  # 1 bit
    write(data / 'labels/train/3.png', random_label(3), compress_level=0)
    write(data / 'labels/train/4.png', np.full_like(random_label(4), 255))
    write(data / 'labels/train/spare.png', random_label(7))
    to_jpeg(data / 'images/val')
    quick_check(dataset_config(data))
    train, val = (check_split(split, dataset_config(data, split), workers=1) for split in ('train', 'val'))
    assert not train.faults and not val.findings
    assert {(Path(finding.path).name, finding.kind) for finding in train.warnings} == {
        ('4.png', 'no labelled pixel'),
        ('spare.png', 'label without image'),
    }


def test_damaged_and_turned_images_are_warnings(data):
    to_jpeg(data / 'images/train')
    # Bytes within the scan: the decoder loses its place and finds bytes left when the image is full.
    rewrite(data / IMAGE, lambda content: content[:-2] + b'\x12' * 400 + content[-2:])
    write(data / 'images/train/1.png', random_image(1), format='JPEG', exif=exif(3))
    report = check_split('train', dataset_config(data), workers=1)
    assert not report.faults
    assert {(finding.path, finding.kind) for finding in report.warnings} == {
        (str(data / IMAGE), 'damaged image'),
        (str(data / 'images/train/1.png'), 'turned image'),
    }
    quick_check(dataset_config(data))
