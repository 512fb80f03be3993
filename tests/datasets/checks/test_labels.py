"""What mmseg makes of the values of a label file."""

import numpy as np
import pytest
from faulty_data import write
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS

from mmseg_volo.datasets.checks.labels import label_table


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
