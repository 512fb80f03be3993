"""Predictions of whole images: both sides are the same network, and the tables are complete."""

from dataclasses import replace

import pytest
import torch
from benchmarking import MACHINE, MEMORY, ON_CPU, TIMES, rows_of, run

from mmseg_volo.benchmark import SIDES, InferenceCase, sizes_of
from mmseg_volo.benchmark.inputs import draw, prepare, view_pixels
from mmseg_volo.benchmark.memory import memory_alone
from mmseg_volo.benchmark.stock import copy_weights

WINDOWS = ['--window', 64, '--stride', 43, '--classes', 4, *ON_CPU]
CASE = {'arch', 'classes', 'height', 'width', 'window', 'stride', 'views', 'precision', 'window_batch'}
CASE |= {'compile', 'channels_last'}


@pytest.mark.slow
@torch.no_grad()
def test_the_peer_is_the_same_network():
    case = InferenceCase(classes=7, size=(66, 72), window=64, stride=43)
    models = {side: case.segmentor(side) for side in SIDES}
    ours = models['ours']
    for name, value in [*ours.named_parameters(), *ours.named_buffers()]:
        # So that no norm is the identity and no bias is zero, whichever side forgets one.
        if value.is_floating_point() and 'data_preprocessor' not in name:
            value += 0.1 * torch.rand_like(value) if value.dim() == 1 else 0
    torch.nn.init.normal_(ours.backbone.pos_embed)
    ours.decode_head.conv_seg.weight *= 2
    copy_weights(ours, models['stock'])
    ours.test_cfg.return_logits = True
    image, _ = draw(case.size)

    results = [models[side].test_step(prepare(image, 1))[0] for side in SIDES]
    stock, own = (result.seg_logits.data for result in results)
    assert stock.shape == own.shape == (7, 66, 72) and stock.std() > 1
    assert (stock - own).abs().max() < 1e-4

    data = prepare(image, 10)
    views = zip(data['inputs'], data['data_samples'], strict=True)
    means = [models['stock'].test_step(dict(inputs=x, data_samples=y))[0].seg_logits.data.softmax(0) for x, y in views]
    tta = case.ready(ours, 'ours').test_step(prepare(image, 10))[0]
    expected = torch.stack(means).mean(0)
    assert len(means) == 10 and len({tuple(x[0].shape) for x in data['inputs']}) == 5
    assert (tta.seg_logits.data - expected).abs().max() < 1e-4
    assert (tta.pred_sem_seg.data[0] == expected.argmax(0)).double().mean() >= 0.9999
    assert sum(x[0].numel() for x in data['inputs']) == 3 * view_pixels(case.size, 10)


def test_inference(small_d1, tmp_path, capsys):
    """Memory is that of D1 all the same: it is taken in other processes."""
    arguments = ['--size', 64, 72, '--views', 1, '--rounds', 1, '--no-compiled', '--out', tmp_path]
    run('inference', *arguments, *WINDOWS)
    (row,) = rows_of(tmp_path / 'inference.csv')
    memory = {f'{side}_1_view_{kind}_mb' for side in SIDES for kind in ('growth', 'peak')}
    assert set(row) == CASE | MACHINE | MEMORY | memory | {'rounds', 'equal_pixels'} | TIMES
    assert float(row['equal_pixels']) >= 0.9999 and row['torch'] == torch.__version__
    for side in SIDES:
        growth, peak = float(row[f'{side}_growth_mb']), float(row[f'{side}_peak_mb'])
        assert 1 < growth < peak and float(row[f'{side}_1_view_growth_mb']) == growth
    printed = capsys.readouterr().out
    assert '$ python tools/benchmark.py inference --size 64 72' in printed and 'times faster' in printed


def test_ten_views(small_d1, tmp_path):
    arguments = ['--size', 64, 72, '--rounds', 1, '--no-compiled', '--no-memory', '--channels-last', '--out', tmp_path]
    run('inference', *arguments, *WINDOWS)
    (row,) = rows_of(tmp_path / 'inference.csv')
    assert row['views'] == '10' and float(row['equal_pixels']) >= 0.9999 and row['stock_growth_mb'] == ''
    assert row['compiled_missing'] == 'not asked for'


def test_low_precision(small_d1, tmp_path):
    arguments = '--size', 64, 64, '--rounds', 1, '--views', 1, '--no-memory', '--no-compiled'
    run('inference', *arguments, *WINDOWS, '--precision', 'fp32', 'bf16', '--out', tmp_path)
    full, low = rows_of(tmp_path / 'inference.csv')
    assert full['precision'] == 'fp32' and float(full['equal_pixels']) >= 0.9999
    assert low['precision'] == 'bf16' and float(low['equal_pixels']) > 0.5


def test_scaling(small_d1, tmp_path, capsys):
    run('scaling', '--megapixels', 0.01, 0.02, *WINDOWS, '--no-memory', '--out', tmp_path)
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
    case = InferenceCase()
    ten, one = (memory_alone(replace(case, views=views), 'ours') for views in (10, 1))
    assert ten.peak <= 1.15 * one.peak, (ten, one)
    assert ten.growth <= 0.35 * memory_alone(case, 'stock').growth
