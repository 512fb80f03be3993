"""The measurement of a validation: a table of two rows, the same figures on both sides, bad input refused."""

import csv

import pytest

from mmseg_volo.benchmark import validation


def test_a_small_measurement_is_complete(tmp_path, capsys):
    validation.measure_validation((64, 96), 3, 2, 'cpu', tmp_path, dict(device_name='some CPU'))
    with (tmp_path / 'validation.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['what'] for row in rows] == ['metric alone', 'validation without the network']
    for row in rows:
        assert row['size'] == '64x96' and row['classes'] == '3' and row['device_name'] == 'some CPU'
        for name in ('IoUMetric_s', 'record_s', 'ratio'):
            assert 0 < float(row[f'{name}_min']) <= float(row[name]) <= float(row[f'{name}_max'])
    assert 'with record and loss' in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='--classes must be 2 or more, got 1'):
        validation.measure_validation((64, 96), 1, 1, 'cpu', tmp_path, {})
    monkeypatch.setitem(validation.SIDES, 'record', (dict(type='ConfusionIoUMetric', ignore_index=0), []))
    with pytest.raises(RuntimeError, match='by the other metric'):
        validation.measure_validation((64, 96), 3, 1, 'cpu', tmp_path, {})
