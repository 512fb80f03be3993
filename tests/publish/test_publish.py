"""A published folder: same predictions through every entry, nothing private, a card that states what was recorded."""

import getpass
import hashlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from evil import Evil
from huggingface_hub import ModelCard
from mmengine.config import Config
from mmseg.apis import MMSegInferencer, inference_model
from mmseg.apis import init_model as mmseg_init_model
from mmseg.registry import MODELS
from safetensors import safe_open
from small_runs import ROOT, small_config

import mmseg_volo.evaluation  # noqa: F401  (registers the hook)
from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.checkpoints.writing import save
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.errors import CheckpointError, ConfigError
from mmseg_volo.inference import Predictor
from mmseg_volo.inference.model import init_model
from mmseg_volo.publish.publish import publish
from mmseg_volo.publish.shareable_config import read_config


def tool(name: str, *arguments: object) -> None:
    """Run a tool's ``main`` in this process."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = before


def recorded(config: Config) -> Config:
    """The config with exactly one hook that records evaluations."""
    others = [hook for hook in config.custom_hooks if hook['type'] != 'EvaluationRecordHook']
    config.custom_hooks = [*others, dict(type='EvaluationRecordHook')]
    return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Work dir of a short run with one validation; the names of its folders are private."""
    folder = tmp_path_factory.mktemp('secret_place')
    config = small_config(folder, train_cfg__max_iters=2, train_cfg__val_interval=2)
    config.experiment_name = 'tiny'
    recorded(config)
    build_runner(config).train()
    return folder / 'run'


@pytest.fixture(scope='module')
def checkpoint(run):
    return run / 'iter_2.pth'


@pytest.fixture(scope='module')
def published(run, checkpoint):
    """The folder that ``tools/publish.py`` writes, moved afterwards."""
    tool('publish', checkpoint, run.parent / 'made', '--license', 'Apache-2.0')
    return shutil.move(run.parent / 'made', run.parent / 'out')


@pytest.fixture(scope='module')
def image(run):
    return next((run.parent / 'scenes').rglob('*leftImg8bit/val/**/*.png'))


@pytest.fixture(scope='module')
def expected(run, checkpoint, image):
    """Class ids (H, W) that the checkpoint itself predicts."""
    config = Config.fromstring(load_from_local(str(checkpoint))['meta']['cfg'], '.py')
    return Predictor(config, str(checkpoint), 'cpu')(cv2.imread(str(image)))


def files(folder: Path, suffix: str) -> Path:
    (found,) = Path(folder).glob(f'*{suffix}')
    return found


both = pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])


def test_the_folder(published, checkpoint):
    names = sorted(path.name for path in Path(published).iterdir())
    assert len(names) == 5 and {'README.md', 'config.py', 'metafile.yml'} < set(names)
    for suffix in ('.pth', '.safetensors'):
        path = files(published, suffix)
        assert path.name == f'tiny-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}{suffix}'
        assert path.stat().st_size < checkpoint.stat().st_size / 2  # AdamW keeps two more of each weight
    content = torch.load(files(published, '.pth'), weights_only=True)  # mmengine's own kinds are not known here
    assert content.keys() == {'meta', 'state_dict'} and content['meta']['iter'] == 2
    assert content['meta']['dataset_meta']['classes'][:2] == ['road', 'sidewalk']
    assert content['meta']['cfg'] == (Path(published) / 'config.py').read_text()
    with safe_open(files(published, '.safetensors'), 'pt') as file:
        meta = file.metadata()
        assert json.loads(meta['classes']) == content['meta']['dataset_meta']['classes']
        assert json.loads(meta['palette'])[0] == [128, 64, 128] and meta['config'] == content['meta']['cfg']
        assert set(file.keys()) == content['state_dict'].keys()
    trained = load_from_local(str(checkpoint))['state_dict']
    assert all(torch.equal(content['state_dict'][name], value) for name, value in trained.items())


def test_nothing_private_is_in_it(published, run, checkpoint):
    assert str(run.parent).encode() in checkpoint.read_bytes()
    private = [str(run), str(run.parent), run.parent.name, str(Path.home()), str(ROOT), 'message_hub', 'exp_avg']
    private += [getpass.getuser()] if len(getpass.getuser()) > 4 else []
    for path in Path(published).iterdir():
        data = path.read_bytes()
        assert [text for text in private if text.encode() in data] == [], path
    config = Config.fromfile(Path(published) / 'config.py')
    assert config.test_dataloader.dataset.data_root == 'data/street_scenes'
    assert config.load_from is None and 'work_dir' not in config and 'data_root' not in config


def test_publishing_again_gives_the_same_bytes(published, run, checkpoint, capsys):
    before = {path.name: path.read_bytes() for path in Path(published).iterdir()}
    again = publish(checkpoint, run.parent / 'again', license='apache-2.0')
    assert {path.name: path.read_bytes() for path in again.weights.parent.iterdir()} == before
    # Into the same folder: weights stay, an edited card is written again, a licence text is kept.
    (run.parent / 'again/README.md').write_text('mine')
    (run.parent / 'again/LICENSE').write_text('mine')
    assert not publish(checkpoint, run.parent / 'again', license='apache-2.0').unchanged
    tool('publish', checkpoint, run.parent / 'again', '--license', 'apache-2.0')
    assert 'already there, and the same' in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (run.parent / 'again').iterdir()} == {**before, 'LICENSE': b'mine'}
    assert not list(run.parent.glob('.*'))


@both
def test_every_entry_predicts_the_same(published, image, expected, suffix, tmp_path):
    config, weights = str(Path(published) / 'config.py'), str(files(published, suffix))
    assert len(np.unique(expected)) > 1

    def same(result):
        return np.array_equal(result.pred_sem_seg.data[0].numpy(), expected)

    ours = init_model(config, weights, 'cpu')
    assert same(inference_model(ours, str(image)))
    assert list(ours.dataset_meta['classes'])[:2] == ['road', 'sidewalk']
    assert same(inference_model(mmseg_init_model(config, weights, 'cpu'), str(image)))
    inferencer = MMSegInferencer(config, weights, device='cpu', show_progress=False)
    assert same(inferencer(str(image), return_datasamples=True))
    assert np.array_equal(Predictor(config, weights, 'cpu')(cv2.imread(str(image))), expected)
    tool('predict', config, weights, image, '--out', tmp_path, '--device', 'cpu')
    assert np.array_equal(cv2.imread(str(next(tmp_path.rglob('*.png'))), cv2.IMREAD_UNCHANGED), expected)


def test_the_file_alone_is_enough_for_the_inferencer(published, image, expected):
    inferencer = MMSegInferencer(None, str(files(published, '.pth')), device='cpu', show_progress=False)
    result = inferencer(str(image), return_datasamples=True)
    assert np.array_equal(result.pred_sem_seg.data[0].numpy(), expected)


def test_safetensors_have_what_the_pth_has_beside_the_weights(published):
    one, two = (load_from_local(str(files(published, suffix)))['meta'] for suffix in ('.pth', '.safetensors'))
    assert two['cfg'] == one['cfg'] and two['dataset_meta'] == one['dataset_meta']


def test_a_download_is_checked_by_the_hash_in_the_name(published, tmp_path):
    weights = files(published, '.pth')
    loaded = torch.hub.load_state_dict_from_url(weights.as_uri(), str(tmp_path), check_hash=True, weights_only=True)
    assert loaded['meta']['task'] == 'semantic segmentation'
    broken = tmp_path / 'broken' / weights.name
    broken.parent.mkdir()
    broken.write_bytes(weights.read_bytes()[:-1] + b'?')
    with pytest.raises(RuntimeError, match='invalid hash value'):
        torch.hub.load_state_dict_from_url(broken.as_uri(), str(tmp_path / 'other'), check_hash=True)
    with pytest.raises(CheckpointError, match=r'not those that were saved|seal is missing'):
        load_from_local(str(broken))


@both
def test_a_new_head_takes_the_backbone(published, checkpoint, suffix):
    config = Config.fromfile(Path(published) / 'config.py').model
    init = dict(type='Pretrained', checkpoint=str(files(published, suffix)))
    backbone = MODELS.build(dict(config.backbone, init_cfg=init))
    backbone.init_weights()
    trained = load_from_local(str(checkpoint))['state_dict']
    own = backbone.state_dict()
    assert own and all(torch.equal(value, trained[f'backbone.{name}']) for name, value in own.items())


@both
def test_tests_and_training_start_from_it(published, run, suffix, tmp_path):
    config, weights = Path(published) / 'config.py', files(published, suffix)
    (record,) = (json.loads(path.read_text()) for path in run.glob('*/evaluation/val_iter_2.json'))
    data = [f'{which}_dataloader.dataset.data_root={run.parent}/scenes' for which in ('train', 'val', 'test')]
    options = ['--work-dir', tmp_path, '--cfg-options', *data, f'experiment_name=again{suffix}']
    tool('test', config, weights, *options)
    (again,) = (json.loads(path.read_text()) for path in tmp_path.glob('*/evaluation/test.json'))
    assert again['confusion'] == record['confusion'] and again['metrics']['mIoU'] == record['metrics']['mIoU']
    fine = Config.fromfile(config)
    fine.merge_from_dict(dict(load_from=str(weights), work_dir=str(tmp_path), experiment_name=f'fine{suffix}'))
    fine.merge_from_dict(dict(option.split('=') for option in data))
    runner = build_runner(fine)
    runner.load_or_resume()
    own = load_from_local(str(run / 'iter_2.pth'))['state_dict']
    assert all(torch.equal(value, own[name]) for name, value in runner.model.state_dict().items())


@pytest.mark.slow
def test_fine_tuning(published, run, tmp_path):
    """The card's command for fine-tuning works."""
    options = [f'{which}_dataloader.dataset.data_root={run.parent}/scenes' for which in ('train', 'val', 'test')]
    options += [f'load_from={files(published, ".pth")}', 'experiment_name=tuned']
    tool('train', Path(published) / 'config.py', '--work-dir', tmp_path, '--cfg-options', *options)
    assert (tmp_path / 'iter_2.pth').is_file()
    assert (
        'random weights'
        not in (publish(tmp_path / 'iter_2.pth', tmp_path / 'o').weights.parent / 'README.md').read_text()
    )


@pytest.mark.slow
def test_averaged_weights_are_those_that_were_measured(tmp_path):
    """EMAHook validates with the averaged weights and saves them: the published file tests the same."""
    config = small_config(tmp_path, train_cfg__max_iters=2, train_cfg__val_interval=2, experiment_name='averaged')
    recorded(config).custom_hooks.append(dict(type='EMAHook', momentum=0.5))
    build_runner(config).train()
    content = load_from_local(str(tmp_path / 'run/iter_2.pth'))
    last = {name.removeprefix('module.'): value for name, value in content['ema_state_dict'].items()}
    assert any(not torch.equal(value, last[name]) for name, value in content['state_dict'].items())
    done = publish(tmp_path / 'run/iter_2.pth', tmp_path / 'out')
    options = ['--cfg-options', f'test_dataloader.dataset.data_root={tmp_path}/scenes', 'experiment_name=averaged_test']
    tool('test', tmp_path / 'out/config.py', done.weights, '--work-dir', tmp_path / 'test', *options)
    val = json.loads(next(tmp_path.glob('run/*/evaluation/val_iter_2.json')).read_text())
    test = json.loads(next(tmp_path.glob('test/*/evaluation/test.json')).read_text())
    assert test['confusion'] == val['confusion'] and done.measured == 1


def confusion_figures(record: dict) -> tuple[float, list[float]]:
    """mIoU and IoU of each class in percent, computed independently from the confusion matrix."""
    table = np.array(record['confusion'], float)
    iou = [
        100 * table[i, i] / u if (u := table[i].sum() + table[:, i].sum() - table[i, i]) else None
        for i in range(len(table))
    ]
    return np.mean([value for value in iou if value is not None]), iou


def test_the_card_states_the_evaluation(published, run, checkpoint):
    text = (Path(published) / 'README.md').read_text()
    data = ModelCard(text).data
    assert (data.license, data.pipeline_tag, data.library_name) == (
        'apache-2.0',
        'image-segmentation',
        'mmseg_volo',
    )
    (record,) = (json.loads(path.read_text()) for path in run.glob('*/evaluation/val_iter_2.json'))
    miou, iou = confusion_figures(record)
    values = {result.metric_type: result for result in data.eval_results}
    assert values['mean_iou'].metric_value == pytest.approx(miou, abs=0.006)
    assert 'single-scale, images: 2' in values['mean_iou'].metric_name and values['accuracy'].dataset_split == 'val'
    for name, value in zip(record['classes'], iou, strict=True):
        assert f'| {name} | {"–" if value is None else f"{value:.2f}"} |' in text
    weights = files(published, '.pth').name
    assert f'python tools/test.py config.py {weights}\n' in text and '--aug-test' not in text
    for said in ('| iterations | 2 of 2 |', '| batch | 2 images (1 process) |', '| start | random weights |'):
        assert said in text
    assert 'were the validation set of the training' in text
    model = yaml.safe_load((Path(published) / 'metafile.yml').read_text())['Models'][0]
    assert model['Weights'] == weights and model['Config'] == 'config.py'
    assert model['Results'][0]['Metrics']['mIoU'] == pytest.approx(miou, abs=0.006)
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(blocks) == 2 and all(compile(block, 'card', 'exec') for block in blocks)


def write_record(run: Path, stamp: str, **changes) -> Path:
    """Write a record like the run's own, with changes."""
    record = json.loads(next(run.glob('*/evaluation/val_iter_2.json')).read_text())
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    path = run / stamp / 'evaluation' / f'{record["kind"]}.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the work dir with the checkpoint, its log and its record."""
    return shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('best*', 'iter_[0134]*'))


def test_the_card_states_tests(copy):
    test = dict(kind='test', checkpoint='run/iter_2.pth', date='2100-01-01T00:00:00+00:00')
    write_record(copy, '1', **test)
    write_record(copy, '2', **test, aug_test=True, environment=dict(device='NVIDIA H100'))
    part = write_record(copy, '3', **test, dataset=dict(pictures=1))
    write_record(copy, '4', **dict(test, checkpoint=None))  # of an exported file
    used = Config.fromfile(next(copy.glob('2*/vis_data/config.py')))
    used.test_dataloader.dataset.update(indices=1, data_root='/another/place')
    used.model.test_cfg.precision = 'bf16'
    (part.parents[1] / 'vis_data').mkdir()
    used.dump(part.parents[1] / 'vis_data/config.py')
    done = publish(copy / 'iter_2.pth', copy / 'out')
    text = (copy / 'out/README.md').read_text()
    assert '| single-scale, precision=bf16, indices=1 | 1 |' in text and '/another/place' not in text
    assert (
        f'{done.weights.name} --cfg-options model.test_cfg.precision=bf16 test_dataloader.dataset.indices=1\n' in text
    )
    assert done.measured == 3 and not done.notes  # the test replaces the validation on the same images
    assert (
        '- multi-scale: drawn street scenes val (`leftImg8bit/val`), 2 images, scales' in text
        and 'on NVIDIA H100' in text
    )
    assert f'config.py {done.weights.name} --aug-test\n' in text
    assert 'No licence is stated yet' in text and 'license' not in text.split('---')[1]
    metrics = [
        result['Metrics'] for result in yaml.safe_load((copy / 'out/metafile.yml').read_text())['Models'][0]['Results']
    ]
    assert [list(one) for one in metrics] == [['mIoU'], ['mIoU'], ['mIoU(ms+flip)']]


def rewritten(checkpoint: Path, target: Path, **changes) -> Path:
    content = load_from_local(str(checkpoint))
    content['meta'].update(changes.pop('meta', {}))
    content.pop('message_hub'), content.pop('optimizer')
    content.update(changes)
    save(content, target)
    return target


def test_a_config_in_a_checkpoint_imports_nothing(checkpoint, tmp_path):
    trace = tmp_path / 'code-ran'
    text = load_from_local(str(checkpoint))['meta']['cfg']
    for code in (f"model = dict(type='os.mkdir', path='{trace}')", "custom_imports = dict(imports=['antigravity'])"):
        with pytest.raises(
            ConfigError, match=r'\((model\.type=|custom_imports=).*could run any code; give the one .* as --config'
        ):
            read_config(None, f'{text}\n{code}\n', checkpoint)
        evil = rewritten(checkpoint, tmp_path / 'evil.pth', meta=dict(cfg=f'{text}\n{code}\n'))
        with pytest.raises(ConfigError, match='give the one that it was trained with as --config'):
            publish(evil, tmp_path / 'out')
    evil = rewritten(checkpoint, tmp_path / 'evil.pth', meta=dict(cfg=f'import os\nos.mkdir({str(trace)!r})\n{text}'))
    with pytest.raises(ConfigError, match='holds no config; give the one that it was trained with as --config'):
        publish(evil, tmp_path / 'out')
    torch.save(dict(meta=Evil(trace), state_dict={}), tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match='refused, because it holds more than tensors'):
        publish(tmp_path / 'evil.pth', tmp_path / 'out')
    assert not trace.exists() and not (tmp_path / 'out').exists() and 'antigravity' not in sys.modules


def test_bad_input(checkpoint, tmp_path):
    out = tmp_path / 'out'

    def fails(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            publish(*arguments, **options)
        assert not out.exists() and not list(tmp_path.glob('.*'))

    fails(FileNotFoundError, 'gone.pth does not exist', tmp_path / 'gone.pth', out)
    (tmp_path / 'no.pth').write_text('no')
    fails(CheckpointError, 'is no checkpoint', tmp_path / 'no.pth', out)
    torch.save({'patch_embed.conv.0.weight': torch.ones(1), 'head.weight': torch.ones(1)}, tmp_path / 'classifier.pth')
    fails(CheckpointError, 'has no decode_head, so it is a classifier', tmp_path / 'classifier.pth', out)
    bare = rewritten(checkpoint, tmp_path / 'bare.pth', meta=dict(cfg=None))
    fails(ConfigError, 'holds no config; give .* --config', bare, out)
    fails(FileNotFoundError, 'does not exist', bare, out, config='gone.py')
    other = str(ROOT / 'configs/volo_d1_camvid_laptop.py')
    fails(CheckpointError, r'not the weights of the model of .*laptop.py \(.*missing', checkpoint, out, config=other)
    (tmp_path / 'broken.py').write_text('model = dict(')
    fails(ConfigError, r'broken\.py: cannot be read', checkpoint, out, config=str(tmp_path / 'broken.py'))
    (tmp_path / 'empty.py').write_text('a = 1')
    fails(ConfigError, 'has no model', checkpoint, out, config=str(tmp_path / 'empty.py'))
    for name in ('', 'a/b', 'v1.2', '../x'):
        fails(ConfigError, '--name .*without dots', checkpoint, out, name=name)
    for license in ('', '  ', 'do as you like'):
        fails(ConfigError, '--license .*expected an identifier', checkpoint, out, license=license)
    fails(FileNotFoundError, 'work dir .* does not exist', checkpoint, out, work_dir=tmp_path / 'gone')
    fails(ConfigError, 'is a file; give a folder', checkpoint, tmp_path / 'no.pth')
    fails(ConfigError, 'could not be written', checkpoint, tmp_path / 'no.pth' / 'out')
    fails(ConfigError, 'could not be written', checkpoint, Path('/proc/no_such_place/out'))
    weights = load_from_local(str(checkpoint))['state_dict']
    weights['decode_head.conv_seg.bias'][0] = float('nan')
    diverged = rewritten(checkpoint, tmp_path / 'diverged.pth', state_dict=weights)
    fails(CheckpointError, 'conv_seg.bias is not finite; the training diverged', diverged, out)
    meta = dict(dataset_meta=dict(classes=['cat'] * 19))
    renamed = rewritten(checkpoint, tmp_path / 'renamed.pth', meta=meta)
    fails(CheckpointError, 'its classes .* are not those of the data set', renamed, out)


def test_a_folder_with_other_content_is_left_alone(checkpoint, published, tmp_path):
    for name in ('notes.txt', 'README.md', 'tiny-00000000.pth'):
        out = tmp_path / name.replace('.', '_')
        out.mkdir()
        (out / name).write_text('mine')
        with pytest.raises(ConfigError, match=f'holds something else .{re.escape(name)}.; give another folder'):
            publish(checkpoint, out)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == 'mine'
    (tmp_path / 'alone').mkdir()
    alone = shutil.copy(checkpoint, tmp_path / 'alone')  # the same weights, and the only copy of an optimizer state
    with pytest.raises(ConfigError, match='holds something else'):
        publish(alone, tmp_path / 'alone')
    assert [path.name for path in (tmp_path / 'alone').iterdir()] == [checkpoint.name]
    out = tmp_path / 'older'  # the same model, published by a version that wrote other bytes
    shutil.copytree(published, out)
    content = torch.load(files(out, '.pth'), weights_only=True)
    files(out, '.pth').unlink()
    save(content, out / 'new.pth')
    (out / 'new.pth').rename(out / f'tiny-{hashlib.sha256((out / "new.pth").read_bytes()).hexdigest()[:8]}.pth')
    publish(checkpoint, out)
    assert len(list(out.iterdir())) == 5 and files(out, '.pth').name == files(published, '.pth').name
    (tmp_path / 'cloned/.git').mkdir(parents=True)  # a fresh clone of a repository on the hub
    publish(checkpoint, tmp_path / 'cloned')
    assert (tmp_path / 'cloned/.git').is_dir() and files(tmp_path / 'cloned', '.pth').name == files(
        published, '.pth'
    ).name


def test_weights_of_other_trainers(checkpoint, tmp_path):
    """Averaged, with the prefix of data parallelism, views of larger tensors, unnamed classes, and a config file."""
    content = load_from_local(str(checkpoint))
    config = tmp_path / 'mine.py'
    config.write_text(content['meta']['cfg'])
    state = {f'module.{name}': torch.stack([value] * 2)[1] for name, value in content['state_dict'].items()}
    torch.save(dict(state_dict=state, ema_state_dict=state), tmp_path / 'weights.pth')
    done = publish(tmp_path / 'weights.pth', tmp_path / 'out', config=str(config))
    assert done.weights.name.startswith('mine-') and done.weights.stat().st_size < checkpoint.stat().st_size / 2
    new = torch.load(done.weights, weights_only=True)
    assert all(torch.equal(new['state_dict'][name], value) for name, value in content['state_dict'].items())
    assert new['meta']['dataset_meta']['classes'][0] == 'road'  # as its data set says
    assert 'exponential moving average' in (tmp_path / 'out/README.md').read_text()


def test_a_published_file_can_be_published_again(published, tmp_path):
    weights = files(published, '.pth')
    again = publish(weights, tmp_path / 'pth')
    assert (again.weights.name, again.safetensors.name) == (weights.name, files(published, '.safetensors').name)
    safe = publish(files(published, '.safetensors'), tmp_path / 'safe', config=f'{published}/config.py', name='tiny')
    assert safe.safetensors.read_bytes() == files(published, '.safetensors').read_bytes()
    for folder in ('pth', 'safe'):  # the start of the training is not in these files: the card must not claim one
        text = (tmp_path / folder / 'README.md').read_text()
        assert '| start |' not in text and 'contact the authors for commercial use' in text
