"""The benchmark commands for whole networks, tiny: both sides do the same, and the table is complete."""

from dataclasses import replace
from pathlib import Path

import mmseg
import pytest
import torch
import yaml
from mmengine.config import Config
from test_benchmark import MACHINE, MEMORY, TIMES, _one_thread, rows_of, run, spread  # noqa: F401  (the fixture is for all tests)

from mmseg_volo.benchmark import NETWORKS, SIDES, BackboneCase, ModelCase, TrainCase, backbone, models, training

TINY = ['--size', 64, 64, '--rounds', 1, '--device', 'cpu', '--threads', 1]
BATCH = {'height', 'width', 'batch', 'precision', 'rounds'}


def test_backbone(tmp_path, capsys):
    run('backbone', *TINY, '--batch', 1, 2, '--channels-last', '--no-memory', '--no-compiled', '--out', tmp_path)
    rows = rows_of(tmp_path / 'backbone.csv')
    options = {'arch', 'compile', 'channels_last', 'cuda_graph', 'largest_difference'}
    assert set(rows[0]) == BATCH | MACHINE | MEMORY | TIMES | options
    assert [row['batch'] for row in rows] == ['1', '2'] and rows[0]['ours_peak_mb'] == ''
    assert all(float(row['largest_difference']) < 1e-5 for row in rows)
    assert 'VOLO-D1, batch 2, fp32, channels_last' in capsys.readouterr().out


def test_backbones_differ_where_weights_do(monkeypatch):
    case = BackboneCase(size=(64, 96))
    monkeypatch.setattr(backbone.TimmVOLO, 'load_backbone', lambda self, state: None)
    build = backbone._build

    def with_other_weights(case, side):
        model = build(case, side)
        if side == 'ours':
            model.network[-1][-1].mlp.fc2.bias.data += 1
        return model

    monkeypatch.setattr(backbone, '_build', with_other_weights)
    assert backbone.compare(case, 1)['largest_difference'] > 1e-2


def test_train(tmp_path):
    run('train', *TINY, '--checkpointing', '--no-compiled', '--out', tmp_path)
    (row,) = rows_of(tmp_path / 'train.csv')
    assert set(row) == BATCH | MACHINE | MEMORY | TIMES | {
        'arch',
        'classes',
        'checkpointing',
        'stock_loss',
        'ours_loss',
        'compiled_loss',
    }
    assert float(row['stock_loss']) > 1 and float(row['ours_loss']) == pytest.approx(float(row['stock_loss']), rel=1e-4)
    for side in SIDES:
        assert 100 < float(row[f'{side}_growth_mb']) < float(row[f'{side}_peak_mb'])


def test_both_sides_learn_the_same():
    trainers = training.trainers_of(TrainCase(size=(64, 64)))
    losses = {}
    for side, trainer in trainers.items():
        torch.manual_seed(0)
        losses[side] = [trainer.step().item() for _ in range(2)]
    assert losses['ours'] == pytest.approx(losses['stock'], rel=1e-3) and losses['ours'][0] != losses['ours'][1]
    moved = {side: trainer.model.backbone.pos_embed.detach() for side, trainer in trainers.items()}
    # Adam's first steps are 6e-5 whatever the gradient: rounding turns those whose gradient is next to nothing.
    assert ((moved['ours'] - moved['stock']).abs() < 2e-5).double().mean() > 0.99
    assert (moved['stock'] - training._build(trainers['ours'].case, 'ours').backbone.pos_embed).abs().max() > 5e-5


def test_models(tmp_path, capsys):
    names = ['volo-d1', 'volo-d1-timm', 'convnext-t']
    run('models', *TINY, '--models', *names, '--batch', 1, '--no-memory', '--out', tmp_path)
    rows = {row['model']: row for row in rows_of(tmp_path / 'models.csv')}
    assert list(rows) == names and {row['run'] for row in rows.values()} == {'logits'}
    published = {'ade20k_miou', 'ade20k_miou_multi_scale', 'miou_source'}
    measured = {'model', 'run', 'classes', 'parameters_m', 'growth_mb', 'peak_mb', *spread('images_per_s')}
    assert set(rows['volo-d1']) == BATCH | MACHINE | published | measured | spread('times_faster')
    assert rows['volo-d1']['times_faster'] == '1' and rows['convnext-t']['ade20k_miou'] == '46.11'
    assert all(float(row['images_per_s']) > 0 for row in rows.values())
    assert 'times faster than volo-d1' in capsys.readouterr().out


@torch.no_grad()
def test_the_ways_of_running_give_the_same_classes(monkeypatch):
    """What WindowNetwork gives in 'network' is what 'logits' starts from."""
    case = ModelCase(size=(64, 96))
    model, x = models.build_network(case), models.noise(case)
    seen = []
    forward = model.network._forward
    monkeypatch.setattr(model.network, '_forward', lambda windows: seen.append(forward(windows)) or seen[-1])
    for way in models.RUNS:
        models._run(model, replace(case, run=way), x)
    expected = model(x, mode='tensor')
    assert len(seen) == 2 and all((found.float() - expected).abs().max() < 1e-4 for found in seen)


def test_the_compiled_network_is_left_out_where_it_cannot_run(tmp_path, capsys, monkeypatch):
    def none(call, **options):
        raise RuntimeError('No working C++ compiler found')

    monkeypatch.setattr(torch, 'compile', none)
    arguments = '--models', 'volo-d1', models.COMPILED, '--batch', 1, '--run', 'predict', '--no-memory'
    run('models', *TINY, *arguments, '--out', tmp_path)
    assert [(row['model'], row['run']) for row in rows_of(tmp_path / 'models.csv')] == [('volo-d1', 'predict')]
    assert 'does not run here: needs a C++ compiler' in capsys.readouterr().err


@pytest.mark.parametrize('name', [name for name in NETWORKS if not name.startswith('volo')])
def test_models_are_those_of_mmseg(name):
    """Backbone, head and accuracy as in the configs that mmseg ships."""
    files = {'swin': 'swin', 'convnext': 'convnext', 'mit': 'segformer'}
    folder = Path(mmseg.__file__).parent / '.mim/configs' / files[name.split('-')[0]]
    if not folder.is_dir():
        pytest.skip('needs the configs in the mmsegmentation package')
    network = NETWORKS[name]
    sizes = {'t': 'tiny', 's': 'small', 'b5': 'mit-b5'}
    size = sizes[name.split('-')[1]]
    (path,) = [p for p in folder.glob('*ade20k-512x512.py') if size in p.name]
    config = Config.fromfile(path, import_custom_modules=False).model

    backbone = {key: value for key, value in network.backbone.items() if key not in ('type', 'pretrained')}
    if name.startswith('convnext'):
        assert config.backbone.arch == size and backbone['model_name'] == f'convnext_{size}'
    else:
        assert config.backbone.type == network.backbone['type'].__name__
        assert {key: as_list(config.backbone[key]) for key in backbone} == {k: as_list(v) for k, v in backbone.items()}
    assert config.decode_head.type == network.head['type'].__name__
    for key in set(network.head) - {'type'}:
        assert as_list(config.decode_head[key]) == as_list(network.head[key])

    (entry,) = [m for m in yaml.safe_load((folder / 'metafile.yaml').read_text())['Models'] if m['Name'] == path.stem]
    metrics = entry['Results']['Metrics']
    assert (metrics['mIoU'], metrics['mIoU(ms+flip)']) == (network.miou, network.miou_multi)


def as_list(value: object) -> object:
    return list(value) if isinstance(value, (tuple, list)) else value


@torch.no_grad()
@pytest.mark.parametrize('name', ['swin-t', 'mit-b5'])
def test_models_give_logits(name):
    case = ModelCase(size=(64, 96), model=name)
    logits = models.build_network(case)(models.noise(case), mode='tensor')
    assert logits.shape == (1, 150, 16, 24)


def test_memory_takes_three_steps():
    """What memory_of runs: model, then input, then the call. The train command measures with it."""
    assert len(list(backbone.forward_steps(BackboneCase(size=(64, 64)), 'ours'))) == 2
    assert len(list(models.forward_steps(ModelCase(size=(64, 64))))) == 2
