"""Backbone, training step and checkpoints: both sides do the same, and the tables are complete."""

import csv

import pytest
import torch
from benchmarking import BATCH, MACHINE, MEMORY, SMALL, TIMES, rows_of, run

from mmseg_volo.benchmark import SIDES, BackboneCase, Settings, TrainCase
from mmseg_volo.benchmark.memory import memory_alone


def test_backbone(tmp_path, capsys):
    run('backbone', *SMALL, '--batch', 1, 2, '--channels-last', '--no-memory', '--no-compiled', '--out', tmp_path)
    rows = rows_of(tmp_path / 'backbone.csv')
    options = {'arch', 'compile', 'channels_last', 'cuda_graph', 'largest_difference'}
    assert set(rows[0]) == BATCH | MACHINE | MEMORY | TIMES | options
    assert [row['batch'] for row in rows] == ['1', '2'] and rows[0]['ours_peak_mb'] == ''
    assert all(float(row['largest_difference']) < 1e-5 for row in rows)
    assert 'VOLO-D1, batch 2, fp32, channels_last' in capsys.readouterr().out


def test_backbones_differ_where_weights_do(monkeypatch):
    case = BackboneCase(size=(64, 96))
    build = BackboneCase.build

    def with_other_weights(self):
        models = build(self)
        models['ours'].network[-1][-1].mlp.fc2.bias.data += 1
        return models

    monkeypatch.setattr(BackboneCase, 'build', with_other_weights)
    assert case.rows(Settings(1, memory=False))[0]['largest_difference'] > 1e-2


def test_train(small_d1, tmp_path):
    run('train', *SMALL, '--checkpointing', '--no-memory', '--no-compiled', '--out', tmp_path)
    (row,) = rows_of(tmp_path / 'train.csv')
    own = {'arch', 'classes', 'checkpointing', 'stock_loss', 'ours_loss', 'compiled_loss'}
    assert set(row) == BATCH | MACHINE | MEMORY | TIMES | own
    assert float(row['stock_loss']) > 1 and float(row['ours_loss']) == pytest.approx(float(row['stock_loss']), rel=1e-4)


@pytest.mark.parametrize('side', SIDES)
def test_memory_of_training(side):
    """VOLO-D1, in a process of its own."""
    memory = memory_alone(TrainCase(size=(64, 64), checkpointing=True, threads=1), side)
    assert 100 < memory.growth < memory.peak


def test_both_sides_learn_the_same():
    case = TrainCase(size=(64, 64))
    trainers, losses = case.build(), {}
    batch = case.inputs(trainers['stock'])
    for side, trainer in trainers.items():
        torch.manual_seed(0)
        losses[side] = [trainer.step(batch).item() for _ in range(2)]
    assert losses['ours'] == pytest.approx(losses['stock'], rel=1e-3) and losses['ours'][0] != losses['ours'][1]
    moved = {side: trainer.model.backbone.pos_embed.detach() for side, trainer in trainers.items()}
    # Adam's first steps are 6e-5 whatever the gradient: rounding turns those whose gradient is next to nothing.
    assert ((moved['ours'] - moved['stock']).abs() < 2e-5).double().mean() > 0.99
    assert (moved['stock'] - case.build_alone('ours').model.backbone.pos_embed).abs().max() > 5e-5


def test_saving(small_d1, tmp_path, capsys):
    arguments = '--no-memory', '--folder', tmp_path, '--interval', 100, '--out', tmp_path / 'out'
    run('saving', *SMALL, '--classes', 4, *arguments)
    with (tmp_path / 'out/saving.csv').open(encoding='utf-8') as file:
        (row,) = csv.DictReader(file)
    step, held_up = float(row['step_s']), float(row['ours_s'])
    assert float(row['share']) == pytest.approx(held_up / (100 * step + held_up), rel=1e-3)
    assert float(row['file_mb']) > 10 and float(row['stock_s']) > 0 and float(row['beside_s']) > 0
    assert 'beside training' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['out']
