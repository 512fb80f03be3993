"""``tools/benchmark.py precision`` on a small model, and images of several sizes."""

from pathlib import Path

import cv2
import pytest
import torch
from benchmarking import MACHINE, rows_of, run, spread
from mmseg.registry import DATASETS, MODELS
from small_camvid import small_config

from mmseg_volo.benchmark.inputs import draw


@pytest.fixture
def model(tmp_path) -> tuple[Path, Path]:
    """A small config, and a checkpoint with random weights for it."""
    config = small_config(tmp_path)
    meta = dict(dataset_meta=DATASETS.get(config.test_dataloader.dataset.type).METAINFO)
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict(), meta=meta), tmp_path / 'model.pth')
    config.dump(tmp_path / 'config.py')
    return tmp_path / 'config.py', tmp_path / 'model.pth'


def test_precision(model, tmp_path, capsys):
    for i, size in enumerate([(64, 128), (96, 128), (64, 80)]):
        cv2.imwrite(str(tmp_path / f'{i}.png'), draw(size)[0])
    (tmp_path / '00.png').write_bytes(b'broken')
    arguments = ['--rounds', 1, '--device', 'cpu', '--out', tmp_path / 'out']
    run('precision', *model, tmp_path / '*.png', *arguments, '--limit', 3)
    printed = capsys.readouterr()
    assert f'skipped {tmp_path}/00.png' in printed.err and '2 of 4 images' in printed.err
    rows = {row['option']: row for row in rows_of(tmp_path / 'out/precision.csv')}
    assert {'fp32', 'bf16', 'channels-last'} <= set(rows) <= {'fp32', 'bf16', 'fp16', 'channels-last'}
    columns = {'option', 'pictures', 'views', 'rounds', 'changed_pixels', *spread('seconds'), *spread('times_faster')}
    assert set(rows['bf16']) == columns | MACHINE
    assert float(rows['fp32']['changed_pixels']) == 0 and float(rows['fp32']['times_faster']) == 1
    assert float(rows['channels-last']['changed_pixels']) < 1e-3 and 0 < float(rows['bf16']['changed_pixels']) < 0.5

    run('precision', *model, tmp_path / '0.png', *arguments, '--aug-test', '--options', 'channels-last')
    rows = rows_of(tmp_path / 'out/precision.csv')
    assert [row['option'] for row in rows] == ['fp32', 'channels-last'] and rows[0]['views'] == 'aug-test'


def test_what_is_missing_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match='no image found'):
        run('precision', *model, tmp_path / 'none*.png', '--device', 'cpu')
    with pytest.raises(FileNotFoundError, match='does not exist'):
        run('precision', tmp_path / 'none.py', model[1], tmp_path, '--device', 'cpu')
