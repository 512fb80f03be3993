"""Sides of a comparison: the compiled peer, sides that cannot run, wrong arguments."""

import pytest
import torch
from benchmarking import ON_CPU, SMALL, rows_of, run


@pytest.mark.parametrize('command', ['inference', 'backbone', 'train'])
def test_the_compiled_peer_is_a_third_side(command, small_d1, tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda call, **options: compiled.append(options) or call)
    options = ['--window', 64, '--stride', 43, '--views', 1, '--classes', 4] if command == 'inference' else []
    options += ['--classes', 4] if command == 'train' else []
    run(command, *SMALL, *options, '--no-memory', '--out', tmp_path)
    row = rows_of(tmp_path / f'{command}.csv')[0]
    assert compiled and all(options == dict(dynamic=False) for options in compiled)
    assert row['compiled_missing'] == '' and float(row['compiled_s']) > 0
    faster = float(row['compiled_s']) / float(row['ours_s'])
    assert float(row['times_faster_than_compiled']) == pytest.approx(faster, rel=1e-3)
    assert 'times faster than compiled' in capsys.readouterr().out
    if command == 'train':
        assert row['compiled_loss'] == row['stock_loss']


def test_a_table_goes_on_without_a_compiler(small_d1, tmp_path, capsys, monkeypatch):
    def none(call, **options):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found in g++")

    monkeypatch.setattr(torch, 'compile', none)
    run('backbone', *SMALL, '--no-memory', '--out', tmp_path)
    (row,) = rows_of(tmp_path / 'backbone.csv')
    assert row['compiled_missing'] == 'needs a C++ compiler' and row['compiled_s'] == ''
    assert float(row['times_faster']) > 0 and row['times_faster_than_compiled'] == ''
    printed = capsys.readouterr().out
    assert 'no compiled peer: needs a C++ compiler' in printed and 'than compiled' not in printed


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['inference', '--stride', 600], 'stride must be within 1...window, got stride 600 with window 512'),
        (['inference', '--window', 100], 'window must be a multiple of 16'),
        (['inference', '--rounds', 0], 'argument --rounds: must be above 0, got 0'),
        (['inference', '--rounds', 'x'], "argument --rounds: invalid int value: 'x'"),
        (['inference', '--arch', 'd9'], "invalid choice: 'd9'"),
        (['inference', '--classes', 1], 'classes must be 2 or more'),
        (['inference', '--device', 'nonsense'], 'device nonsense cannot be used'),
        (['scaling', '--megapixels', 1, -2], 'argument --megapixels: must be above 0, got -2'),
        (['scaling', '--megapixels', 0.001], 'images need at least 64 pixels a side, got 26 x 39'),
        (['op', '--shape', 'd1'], 'argument --shape: must be a variant and the side of the image, as d1@512, got d1'),
        (['op', '--shape', 'd9@512'], 'arch must be one of d1, d2, d3, d4, d5, got d9'),
        (['op', '--shape', 'd1@30'], 'image side must be a multiple of 8, 32 or more, got 30'),
        (['op', '--impl', 'fastest'], "invalid choice: 'fastest'"),
        (['op', '--device', 'nonsense'], 'device nonsense cannot be used'),
        (['backbone', '--size', 72, 64], 'size must be multiples of 16, got 72 x 64'),
        (['backbone', '--size', 48, 64], 'images need at least 64 pixels a side, got 48 x 64'),
        (['backbone', '--cuda-graph', *ON_CPU], 'CUDA graphs need a GPU, got device cpu'),
        (['train', '--batch', 1], 'training needs a batch of 2 or more, got 1'),
        (['train', '--classes', 1], 'classes must be 2 or more, got 1'),
        (['models', '--models', 'resnet'], "invalid choice: 'resnet'"),
        (['models', '--models', 'volo-d1-timm-compiled', '--no-compiled'], '--no-compiled leaves none of --models'),
        (['models', '--batch', 0], 'argument --batch: must be above 0, got 0'),
        (['suite', '--parts', 'all'], "invalid choice: 'all'"),
        ([], 'COMMAND'),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='tests the way without a GPU')
def test_no_gpu_is_said_in_one_line(capsys):
    with pytest.raises(SystemExit):
        run('inference', '--device', 'cuda')
    assert 'error: device cuda cannot be used: ' in capsys.readouterr().err
