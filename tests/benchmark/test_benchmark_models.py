"""VOLO beside other networks, which are those of mmseg's configs."""

from dataclasses import replace
from pathlib import Path

import mmseg
import pytest
import torch
import yaml
from benchmarking import BATCH, MACHINE, SMALL, rows_of, run, spread
from mmengine.config import Config

from mmseg_volo.benchmark import NETWORKS, RUNS, ModelsCase
from mmseg_volo.benchmark.models import COMPILED


def test_models(small_d1, tmp_path, capsys):
    names = ['volo-d1', 'volo-d1-timm', 'convnext-t']
    run('models', *SMALL, '--models', *names, '--batch', 1, '--no-memory', '--out', tmp_path)
    rows = {row['model']: row for row in rows_of(tmp_path / 'models.csv')}
    assert list(rows) == names and {row['run'] for row in rows.values()} == {'logits'}
    published = {'ade20k_miou', 'ade20k_miou_multi_scale', 'miou_source'}
    measured = {'model', 'run', 'classes', 'parameters_m', 'growth_mb', 'peak_mb', *spread('images_per_s')}
    assert set(rows['volo-d1']) == BATCH | MACHINE | published | measured | spread('times_faster')
    assert rows['volo-d1']['times_faster'] == '1' and rows['convnext-t']['ade20k_miou'] == '46.11'
    assert all(float(row['images_per_s']) > 0 for row in rows.values())
    assert 'times faster than volo-d1' in capsys.readouterr().out


@torch.no_grad()
def test_the_ways_of_running_give_the_same_classes(small_d1, monkeypatch):
    """What WindowNetwork gives in 'network' is what 'logits' starts from."""
    case = ModelsCase(sides=('volo-d1',), size=(64, 96))
    model = case.build_alone('volo-d1')
    x, seen = case.inputs(model), []
    forward = model.network._forward
    monkeypatch.setattr(model.network, '_forward', lambda windows: seen.append(forward(windows)) or seen[-1])
    for way in RUNS:
        replace(case, run_as=way).run(model, 'volo-d1', x)
    expected = model(x, mode='tensor')
    assert len(seen) == 2 and all((found.float() - expected).abs().max() < 1e-4 for found in seen)


def test_the_compiled_network_is_left_out_where_it_cannot_run(small_d1, tmp_path, capsys, monkeypatch):
    def none(call, **options):
        raise RuntimeError('No working C++ compiler found')

    monkeypatch.setattr(torch, 'compile', none)
    arguments = '--models', 'volo-d1', COMPILED, '--batch', 1, '--run', 'predict', '--no-memory'
    run('models', *SMALL, *arguments, '--out', tmp_path)
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
    case = ModelsCase(size=(64, 96), sides=(name,))
    model = case.build_alone(name)
    assert model(case.inputs(model), mode='tensor').shape == (1, 150, 16, 24)
