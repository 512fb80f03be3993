"""The benchmark commands on tiny pictures: what they compare is the same network, and what they write is complete."""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
from commands import CONFIG
from mmengine.config import Config
from mmseg.datasets import CityscapesDataset
from mmseg.registry import MODELS

from mmseg_volo.benchmark import (
    SIDES,
    Case,
    build,
    copy_weights,
    draw,
    measure_memory,
    prepare,
    ready,
    sizes_of,
    view_pixels,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = ['--window', '64', '--stride', '43', '--device', 'cpu', '--threads', '1']
MACHINE = {
    'device',
    'device_name',
    'threads',
    'torch',
    'mmseg',
    'timm',
    'triton',
    'numba',
    'mmseg_volo',
    'load',
    'date',
}
CASE = {'arch', 'classes', 'height', 'width', 'window', 'stride', 'views', 'precision', 'window_batch'}
CASE |= {'compile', 'channels_last'}


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small kernels: on a busy machine threads that wait for each other take a multiple of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments) -> int | None:
    """The tool, in this process, and its status: importing PyTorch and mmseg takes longer than the figures."""
    spec = importlib.util.spec_from_file_location('benchmark_tool', ROOT / 'tools/benchmark.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main([str(argument) for argument in arguments])


def rows_of(path: Path) -> list[dict]:
    assert cv2.imread(str(path.with_suffix('.png'))).shape[1] > 500
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def spread(name: str) -> set[str]:
    return {name, f'{name}_min', f'{name}_max'}


TIMES = {name for part in ('stock_s', 'ours_s', 'compiled_s') for name in spread(part)} | {'compiled_missing'}
TIMES |= {*spread('times_faster'), *spread('times_faster_than_compiled')}
MEMORY = {f'{side}_{kind}_mb' for side in (*SIDES, 'compiled') for kind in ('growth', 'peak')}


@torch.no_grad()
def test_the_peer_is_the_same_network():
    case = Case(classes=7, size=(66, 72), window=64, stride=43)
    models = {side: build(case, side) for side in SIDES}
    ours = models['ours']
    for name, value in [*ours.named_parameters(), *ours.named_buffers()]:
        # So that no norm is the identity and no bias is zero, whichever side forgets one.
        if value.is_floating_point() and 'data_preprocessor' not in name:
            value += 0.1 * torch.rand_like(value) if value.dim() == 1 else 0
    torch.nn.init.normal_(ours.backbone.pos_embed)
    ours.decode_head.conv_seg.weight *= 2
    copy_weights(ours, models['stock'])
    ours.test_cfg.return_logits = True
    picture = draw(case.size)

    results = [models[side].test_step(prepare(picture, 1))[0] for side in SIDES]
    stock, own = (result.seg_logits.data for result in results)
    assert stock.shape == own.shape == (7, 66, 72) and stock.std() > 1
    assert (stock - own).abs().max() < 1e-4

    data = prepare(picture, 10)
    views = zip(data['inputs'], data['data_samples'], strict=True)
    means = [models['stock'].test_step(dict(inputs=x, data_samples=y))[0].seg_logits.data.softmax(0) for x, y in views]
    tta = ready(ours, case, 'ours').test_step(prepare(picture, 10))[0]
    expected = torch.stack(means).mean(0)
    assert len(means) == 10 and len({tuple(x[0].shape) for x in data['inputs']}) == 5
    assert (tta.seg_logits.data - expected).abs().max() < 1e-4
    assert (tta.pred_sem_seg.data[0] == expected.argmax(0)).double().mean() >= 0.9999
    assert sum(x[0].numel() for x in data['inputs']) == 3 * view_pixels(case.size, 10)


def test_inference(tmp_path, capsys):
    size = ['--size', 64, 72, '--classes', 4, '--rounds', 1, '--no-compiled']
    run('inference', *size, *TINY, '--views', 1, '--out', tmp_path)
    (row,) = rows_of(tmp_path / 'inference.csv')
    memory = {f'{side}_1_view_{kind}_mb' for side in SIDES for kind in ('growth', 'peak')}
    assert set(row) == CASE | MACHINE | MEMORY | memory | {'rounds', 'equal_pixels'} | TIMES
    assert float(row['equal_pixels']) >= 0.9999 and row['torch'] == torch.__version__
    for side in SIDES:
        growth, peak = float(row[f'{side}_growth_mb']), float(row[f'{side}_peak_mb'])
        assert 1 < growth < peak and float(row[f'{side}_1_view_growth_mb']) == growth
    printed = capsys.readouterr().out
    assert '$ python tools/benchmark.py inference --size 64 72' in printed and 'times faster' in printed

    run('inference', *size, *TINY, '--no-memory', '--channels-last', '--out', tmp_path)
    (row,) = rows_of(tmp_path / 'inference.csv')
    assert row['views'] == '10' and float(row['equal_pixels']) >= 0.9999 and row['stock_growth_mb'] == ''


def test_inference_in_low_precision(tmp_path):
    tiny = '--size', 64, 64, '--classes', 4, '--rounds', 1, '--views', 1, '--no-memory', '--no-compiled'
    run('inference', *tiny, *TINY, '--precision', 'fp32', 'bf16', '--out', tmp_path)
    full, low = rows_of(tmp_path / 'inference.csv')
    assert full['precision'] == 'fp32' and float(full['equal_pixels']) >= 0.9999
    assert low['precision'] == 'bf16' and float(low['equal_pixels']) > 0.5


@pytest.mark.parametrize('command', ['inference', 'backbone', 'train'])
def test_the_compiled_peer_is_a_third_side(command, tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda call, **options: compiled.append(options) or call)
    options = TINY if command == 'inference' else TINY[4:]
    views = ['--views', 1] if command == 'inference' else []
    run(command, '--size', 64, 64, '--rounds', 1, *options, *views, '--no-memory', '--out', tmp_path)
    row = rows_of(tmp_path / f'{command}.csv')[0]
    assert compiled and all(options == dict(dynamic=False) for options in compiled)
    assert row['compiled_missing'] == '' and float(row['compiled_s']) > 0
    faster = float(row['compiled_s']) / float(row['ours_s'])
    assert float(row['times_faster_than_compiled']) == pytest.approx(faster, rel=1e-3)
    assert 'times faster than compiled' in capsys.readouterr().out
    if command == 'train':
        assert row['compiled_loss'] == row['stock_loss']


def test_a_table_goes_on_without_a_compiler(tmp_path, capsys, monkeypatch):
    def none(call, **options):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found in g++")

    monkeypatch.setattr(torch, 'compile', none)
    run('backbone', '--size', 64, 64, '--rounds', 1, *TINY[4:], '--no-memory', '--out', tmp_path)
    (row,) = rows_of(tmp_path / 'backbone.csv')
    assert row['compiled_missing'] == 'needs a C++ compiler' and row['compiled_s'] == ''
    assert float(row['times_faster']) > 0 and row['times_faster_than_compiled'] == ''
    assert 'no compiled peer: needs a C++ compiler' in capsys.readouterr().out


def test_scaling(tmp_path, capsys):
    run('scaling', '--megapixels', 0.01, 0.02, '--classes', 4, *TINY, '--no-memory', '--out', tmp_path)
    rows = rows_of(tmp_path / 'scaling.csv')
    added = {'megapixels', 'seconds', 'seconds_per_megapixel', 'growth_mb', 'peak_mb', 'data_mb'}
    assert len(rows) == 2 and set(rows[0]) == CASE | MACHINE | added
    assert [float(row['megapixels']) for row in rows] == pytest.approx([0.01, 0.02], rel=0.02)
    assert float(rows[0]['data_mb']) == pytest.approx(float(rows[0]['megapixels']) * 11)
    printed = capsys.readouterr().out
    assert 's per megapixel; the line through 0' in printed and 'memory' not in printed.split('before the start')[1]
    assert sizes_of([24]) == [(4000, 6000)]


@pytest.mark.slow
def test_memory_of_ten_views():
    """VOLO-D1, 512 x 1024, 150 classes: against one view, and against stock mmseg."""
    case = Case()
    picture = draw(case.size)
    ten, one = (measure_memory(replace(case, views=views), 'ours', picture) for views in (10, 1))
    assert ten.peak <= 1.15 * one.peak, (ten, one)
    assert ten.growth <= 0.35 * measure_memory(case, 'stock', picture).growth


@pytest.fixture
def model(tmp_path) -> tuple[Path, Path]:
    """A small config, and a checkpoint with random weights for it."""
    config, checkpoint = tmp_path / 'tiny.py', tmp_path / 'tiny.pth'
    config.write_text(CONFIG.replace('DATA', str(tmp_path / 'scenes')))
    network = MODELS.build(Config.fromfile(config).model)
    dataset = CityscapesDataset.METAINFO
    torch.save(dict(state_dict=network.state_dict(), meta=dict(dataset_meta=dataset)), checkpoint)
    return config, checkpoint


def test_precision(model, tmp_path, capsys):
    for i, size in enumerate([(64, 128), (96, 128), (64, 80)]):
        cv2.imwrite(str(tmp_path / f'{i}.png'), draw(size))
    (tmp_path / '00.png').write_bytes(b'broken')
    arguments = ['--rounds', 1, '--device', 'cpu', '--out', tmp_path / 'out']
    run('precision', *model, tmp_path / '*.png', *arguments, '--limit', 3)
    printed = capsys.readouterr()
    assert f'skipped {tmp_path}/00.png' in printed.err and '2 of 4 pictures' in printed.err
    rows = {row['option']: row for row in rows_of(tmp_path / 'out/precision.csv')}
    assert {'fp32', 'bf16', 'channels-last'} <= set(rows) <= {'fp32', 'bf16', 'fp16', 'channels-last'}
    columns = {'option', 'pictures', 'views', 'rounds', 'changed_pixels', *spread('seconds'), *spread('times_faster')}
    assert set(rows['bf16']) == columns | MACHINE
    assert float(rows['fp32']['changed_pixels']) == 0 and float(rows['fp32']['times_faster']) == 1
    assert float(rows['channels-last']['changed_pixels']) < 1e-3 and 0 < float(rows['bf16']['changed_pixels']) < 0.5

    run('precision', *model, tmp_path / '0.png', *arguments, '--aug-test', '--options', 'channels-last')
    rows = rows_of(tmp_path / 'out/precision.csv')
    assert [row['option'] for row in rows] == ['fp32', 'channels-last'] and rows[0]['views'] == 'aug-test'


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
        (['scaling', '--megapixels', 0.001], 'pictures need at least 64 pixels a side, got 26 x 39'),
        (['op', '--shape', 'd1'], 'argument --shape: must be a variant and the side of the picture, as d1@512, got d1'),
        (['op', '--shape', 'd9@512'], 'arch must be one of d1, d2, d3, d4, d5, got d9'),
        (['op', '--shape', 'd1@30'], 'image side must be a multiple of 8, 32 or more, got 30'),
        (['op', '--impl', 'fastest'], "invalid choice: 'fastest'"),
        (['op', '--device', 'nonsense'], 'device nonsense cannot be used'),
        (['backbone', '--size', 72, 64], 'size must be multiples of 16, got 72 x 64'),
        (['backbone', '--size', 48, 64], 'pictures need at least 64 pixels a side, got 48 x 64'),
        (['train', '--batch', 1], 'training needs a batch of 2 or more, got 1'),
        (['models', '--models', 'resnet'], "invalid choice: 'resnet'"),
        (['models', '--batch', 0], 'argument --batch: must be above 0, got 0'),
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


def test_precision_names_what_is_missing(model, tmp_path):
    with pytest.raises(FileNotFoundError, match='no image found'):
        run('precision', *model, tmp_path / 'none*.png', '--device', 'cpu')
