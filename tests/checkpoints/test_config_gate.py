"""Config texts in files: those of trained models pass unchanged, and none runs code."""

import random
import sys
from functools import partial
from pathlib import Path

import mmseg
import pytest
import torch
from evil import Canary, planted
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS, VISUALIZERS
from mmseg.apis import MMSegInferencer
from safetensors.torch import save_file
from small_models import segmentor_config
from small_runs import small_config

from mmseg_volo.checkpoints.config_gate import checked_config, config_text
from mmseg_volo.checkpoints.config_text import literals
from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.errors import USER_ERRORS, ConfigError
from mmseg_volo.publish.publish import publish

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
ZOO = sorted((Path(mmseg.__file__).parent / '.mim/configs').glob('*/*.py'))


def as_repr(config: dict) -> str:
    return ''.join(f'{key} = {value!r}\n' for key, value in config.items())


def assert_passes(text: str) -> None:
    """What comes out of the gate is what went in, for mmengine too, without the keys that the gate leaves out."""

    def kept(value):
        if isinstance(value, dict):
            left_out = {'backend_args', 'file_client_args', 'output_dir', 'out_file_path'}
            left_out |= {key for key in ('ann_file',) if str(value.get(key)).endswith('yaml')}
            return {k: kept(v) for k, v in value.items() if k not in left_out}
        return type(value)(map(kept, value)) if isinstance(value, (list, tuple)) else value

    passed, expected = checked_config(text), kept(literals(text))
    assert {key: value for key, value in expected.items() if key in passed and key != 'custom_imports'} == {
        key: value for key, value in passed.items() if key != 'custom_imports'
    }
    # Variables of config files, which nothing reads.
    variables = {
        'checkpoint_file',
        'checkpoint',
        'pretrained',
        'runner',
        'train_ann',
        'val_ann',
        'albu_train_transforms',
    }
    assert expected.keys() - passed.keys() <= variables
    assert Config.fromstring(config_text(passed), '.py').to_dict() == passed == checked_config(config_text(passed))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_this_package_passes(path):
    config = Config.fromfile(path)
    config.work_dir, config.launcher = 'work_dirs/a run, the 2nd', 'none'
    # A run saves pretty_text, which takes a second to format.
    text = config.pretty_text if path == CONFIGS[0] else as_repr(config.to_dict())
    assert_passes(text)
    assert checked_config(text)['custom_imports']['imports'] == ['mmseg_volo']


def zoo_passes(paths: list[Path]) -> list[str]:
    """mmseg's own configs pass, except those that import another package; returns the names of these."""
    others = []
    for path in paths:
        config = Config.fromfile(path, import_custom_modules=False)
        text = as_repr(config.to_dict())
        if any(package in text for package in ('mmdet', 'mmpretrain', 'ldm.models')):
            others.append(path.stem)
            with pytest.raises(ConfigError, match=r'is no type of|imports code|is no plain word'):
                checked_config(text)
        else:
            assert_passes(text)
    return others


def test_mmsegs_own_configs_pass():
    zoo_passes(random.Random(0).sample(ZOO, 5))


@pytest.mark.slow
def test_all_of_mmsegs_own_configs_pass():
    passed = len(ZOO) - len(zoo_passes(ZOO))
    print(passed, len(ZOO))
    assert passed > 600


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    canary = Canary(tmp_path)
    yield canary
    canary.close()
    for name in set(sys.modules) - before:
        if 'evil' in name.lower() or name == 'mc':
            del sys.modules[name]


def test_the_canary_sings(canary):
    """mmengine itself runs these, so the other tests look for the right thing."""
    ran = 0
    for line in canary.statements():
        try:
            config = Config.fromstring(line, '.py')
            MODELS.build(config.model)
        except Exception:
            pass
        if canary.trace.exists():
            ran += 1
            canary.trace.rmdir()
        for name in [name for name in sys.modules if 'evil' in name.lower()]:
            del sys.modules[name]
    assert ran > 15


def test_texts_that_run_code_are_refused(canary):
    plain = Config(dict(default_scope='mmseg', model=segmentor_config().to_dict())).pretty_text
    for line in canary.statements():
        try:
            passed = checked_config(f'{plain}\n{line}\n')
        except ConfigError:
            continue
        assert 'evil' not in config_text(passed) and 'memcached' not in config_text(passed), line
    assert not canary.trace.exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ("model = dict(type='json.tool')", r"model\.type='json\.tool' is no type of mmengine, mmcv, mmseg"),
        ("model = dict(a=[dict(type='antigravity')])", r"model\.a\.0\.type='antigravity' is no type"),
        ("model = dict(class_weight='http://x/y.pkl')", r"model\.class_weight='http://x/y\.pkl' is no plain word"),
        ("model = dict(class_weight='y.npy')", 'is no plain word'),
        ("model = dict(ema_type='antigravity')", 'would be imported as a module'),
        ("model = dict(decode_backend='pickle')", 'would unpickle files'),
        ("train_dataloader = dict(dataset=dict(classes='a/b.pkl'))", r'dataset\.classes.*would be unpickled'),
        ("model = dict(a='{{$HOME:1}}')", 'has double braces'),
        ("model = dict({'{{$HOME:1}}': 1})", 'model has the key'),
        ("model = dict(_scope_='json')", r"model\._scope_='json' is none of mmseg, mmengine, mmcv"),
        ('model = dict(_delete_=True)', 'would change how mmengine reads'),
        ('_base_ = []', '_base_ would change how mmengine reads'),
        ("custom_imports = dict(imports=['json'])", r"custom_imports=\['json'\] imports code"),
        ("test_dataloader = dict(dataset=dict(metainfo=dict(type='json')))", r"metainfo\.type='json' is no type"),
        ("model = dict(type='json.JSONDecoder')", 'is no type of'),
        ("model = dict(type='mmengine.EncoderDecoder')", 'is no type of'),
        ("model = dict(type='mmseg_volo.models.volo.VOLO.forward')", 'is no type of'),
        ('float = str', 'more than plain data'),
        ('float = 1', 'float would change how'),
        ('model = dict(a=0x' + 'f' * 9000 + ')', 'line 1 holds an integer of more than 64 bits'),
        ('model = {0x' + 'f' * 9000 + ': 1}', 'line 1 holds an integer of more than 64 bits'),
        ('model = {(1, 0x' + 'f' * 9000 + '): 1}', 'line 1 holds an integer of more than 64 bits'),
        ('model = range(10**9)', 'more than plain data'),
        ('model = range(1000000000000)', 'more than plain data'),
        ("model = float('1')", 'more than plain data'),
        ('model = -range(3)', 'more than plain data'),
        ('model = ' + '[' * 60 + ']' * 60, 'nested more than 40 levels'),
        ('model = ' + '[' * 5000 + ']' * 5000, 'more than plain data'),
        ('x = 1\n' * 100_000, 'has 600,000 characters'),
        ('model = ' + '-' * 20_000 + '1', 'more than plain data'),
        ('model = 1\0', 'more than plain data'),
        (3, 'it is int, not text'),
        (b'model = 1', 'it is bytes, not text'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_refusal_names_the_key(text, message):
    with pytest.raises(ConfigError, match=message):
        checked_config(text)


def test_what_is_kept_and_left_out():
    text = """
model = dict(type='EncoderDecoder', backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='https://x.y/z.pth')))
train_pipeline = [dict(type='Albu', transforms=[dict(type='RandomBrightnessContrast', p=0.2)])]
test_dataloader = dict(dataset=dict(type='CityscapesDataset', ann_file='a.pkl', data_root='/home/me/my data',
    seg_map_suffix='.png',
    metainfo=dict(classes=('a.b/c: "d"', "it's"), palette=[[1, 2, 3]]), data_prefix=dict(img_path='../x'),
    pipeline=[dict(type='LoadImageFromFile', backend_args=dict(backend='petrel', path_mapping={'./data': 's3://x'}))]))
visualizer = dict(type='SegLocalVisualizer', vis_backends=dict(type='MLflowVisBackend', tracking_uri='http://x'))
test_evaluator = [dict(type='CityscapesMetric', output_dir='/home/me')]  # which it deletes
default_hooks = dict(checkpoint=dict(type='CheckpointHook', filename_tmpl='it_{}.pth', save_best='val/mIoU'))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.norm': dict(decay_mult=0.0), 'a.b': 1}))
server = 'https://a.variable/of.the?config'
work_dir = './work_dirs/x'
"""
    passed = checked_config(text)
    given = literals(text)
    assert passed['model'] == given['model'] and passed['train_pipeline'] == given['train_pipeline']
    assert passed['optim_wrapper'] == given['optim_wrapper'] and passed['work_dir'] == given['work_dir']
    del given['test_dataloader']['dataset']['ann_file']
    given['test_dataloader']['dataset']['pipeline'] = [dict(type='LoadImageFromFile')]
    assert passed['test_dataloader'] == given['test_dataloader']
    assert passed['visualizer']['vis_backends'] == [dict(type='LocalVisBackend')]
    assert passed['default_hooks']['checkpoint'] == dict(type='CheckpointHook', save_best='val/mIoU')
    assert 'server' not in passed and passed['test_evaluator'] == [dict(type='CityscapesMetric')]


def test_what_mmengine_writes_of_a_working_config_is_kept(tmp_path):
    given = Config.fromfile(CONFIGS[0])
    given._p, given.span, given.model.decode_head.in_index = given.test_dataloader, range(3), range(4)
    given.optim_wrapper.clip_grad = dict(max_norm=float('inf'), least=-float('inf'))
    given.model.type, given.optim_wrapper.optimizer.type = 'mmseg.EncoderDecoder', 'torch.optim.AdamW'
    given.model.backbone.type, given.default_hooks.timer.type = 'mmseg_volo.models.volo.VOLO', 'mmengine.IterTimerHook'
    given.test_dataloader.dataset.metainfo = dict(classes=['gr{o}und', '{}', '}{'])
    passed = checked_config(as_repr(given.to_dict()))
    assert (
        '_p' not in passed
        and passed['span'] == [0, 1, 2]
        and passed['model']['decode_head']['in_index'] == [0, 1, 2, 3]
    )
    read = Config.fromstring(config_text(passed), '.py')
    assert read.to_dict() == passed == checked_config(config_text(passed))
    for key in ('optim_wrapper', 'test_dataloader', 'default_hooks'):
        assert passed[key] == checked_config(config_text({key: given.to_dict()[key]}))[key]
    assert passed['optim_wrapper']['clip_grad'] == dict(max_norm=float('inf'), least=-float('inf'))
    assert type(MODELS.build(read.model)).__name__ == 'EncoderDecoder'


@pytest.mark.parametrize('kind', ['TIMMBackbone', 'mmseg.TIMMBackbone', 'mmseg.models.backbones.TIMMBackbone'])
def test_a_backbone_of_timm_reads_no_files_and_downloads_none(kind, monkeypatch):
    backbone = dict(type=kind, model_name='resnet18', checkpoint_path='sub/evil')
    passed = checked_config(as_repr(dict(model=dict(backbone=backbone))))['model']['backbone']
    assert passed == dict(type=kind, model_name='resnet18', pretrained=False)


def build_all(text: str) -> None:
    """Build whatever a config names, as mmengine and mmseg would."""
    config = Config.fromstring(text, '.py')
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    parts = [(MODELS, config.get('model')), (VISUALIZERS, config.get('visualizer')), (DATASETS, dataset)]
    parts += [(TRANSFORMS, one) for one in (dataset.get('pipeline') if isinstance(dataset, dict) else None) or []]
    parts += [(METRICS, config.get('test_evaluator'))]
    parts += [(HOOKS, one) for one in config.get('custom_hooks') or []]
    for registry, part in parts:
        try:
            built = registry.build(part)
            getattr(built, 'full_init', lambda: None)()
        except Exception:  # a config with a word in the wrong place may fail in any way
            pass


def fuzz(canary: Canary, count: int, base: dict) -> dict[str, int]:
    draw, found = random.Random(count), dict(refused=0, passed=0)
    for i in range(count):
        if i % 3 == 2:  # raw lines of code at a random place, and random bytes removed
            lines = config_text(base).splitlines()
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(canary.statements()))
            text = '\n'.join(lines)
            start = draw.randrange(len(text))
            text = text if i % 2 else text[:start] + text[start + draw.randrange(9) :]
        else:
            text = as_repr(planted(base, canary, draw))
        try:
            passed = config_text(checked_config(text))
        except ConfigError:
            found['refused'] += 1
        else:
            found['passed'] += 1
            build_all(passed)
        assert not canary.trace.exists(), text
    return found


@pytest.fixture
def base(tmp_path) -> dict:
    config = small_config(tmp_path).to_dict()
    kept = ('default_scope', 'custom_imports', 'test_dataloader', 'visualizer', 'test_evaluator', 'custom_hooks')
    return dict({key: config[key] for key in kept}, model=segmentor_config().to_dict())


def test_planted_code_never_runs(canary, base):
    found = fuzz(canary, 30, base)
    assert found['refused'] > 12


@pytest.mark.slow
def test_planted_code_never_runs_in_thousands_of_texts(canary, base):
    found = fuzz(canary, 4000, base)
    print(found)
    assert sum(found.values()) == 4000


def test_the_inferencer_runs_no_code(canary, base):
    """A file alone, with every kind of text that runs code."""
    model = MODELS.build(Config(base).model)
    for i, line in enumerate(canary.statements()):
        text = f'{config_text(base)}\n{line}\n'
        torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=text, config=text)), f'x{i}.pth')
        try:
            MMSegInferencer(None, f'x{i}.pth', device='cpu', show_progress=False)
        except Exception as error:
            assert type(error) in (ValueError, KeyError, AttributeError), (line, error)
        assert not canary.trace.exists(), line
    text = config_text(base)
    hub = dict(runtime_info=dict(cfg=text))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=text), message_hub=hub), 'good.pth')
    assert MMSegInferencer(None, 'good.pth', device='cpu', show_progress=False).cfg.model.type == base['model']['type']
    read = load_from_local('good.pth')
    assert read['meta']['cfg'] == read['message_hub']['runtime_info']['cfg'] == text


@pytest.mark.slow
def test_every_entry_runs_no_code(canary, tmp_path):
    """A run's own checkpoint with texts that run code, at each place and through each entry that reads them."""
    once = dict(train_cfg__max_iters=1, train_cfg__val_interval=9, default_hooks__checkpoint__interval=1)
    build_runner(small_config(tmp_path, **once)).train()
    content = load_from_local(str(tmp_path / 'run/iter_1.pth'))
    del content['meta']['sealed_by']
    plain, draw = checked_config(content['meta']['cfg']), random.Random(0)
    texts = [f'{config_text(plain)}\n{line}\n' for line in canary.statements()]
    texts += [as_repr(planted(plain, canary, draw)) for _ in range(60)]
    (tmp_path / 'odd').mkdir()
    for i, text in enumerate(texts):
        content['meta'].update(cfg=text, config=text)
        content['message_hub']['runtime_info']['cfg'] = text
        path, tensors = tmp_path / 'odd/iter_1.pth', tmp_path / 'odd/x.safetensors'
        torch.save(content, path)
        save_file(content['state_dict'], tensors, dict(config=text, classes='["a"]', palette='null'))
        resumed = small_config(tmp_path, f'resumed{i}', resume=True, load_from=str(path), **once)
        inferencer = partial(MMSegInferencer, None, device='cpu', show_progress=False)
        for entry in (
            partial(inferencer, str(path)),
            partial(inferencer, str(tensors)),
            partial(publish, path, tmp_path / f'out{i}'),
            partial(publish, tensors, tmp_path / f'out{i}t'),
            partial(Config.fromfile, tmp_path / f'out{i}/config.py'),
            build_runner(resumed).train,
        ):
            try:
                entry()
            except USER_ERRORS:
                pass
            except Exception as error:
                # mmseg's inferencer has errors of its own for odd configs.
                assert entry.__class__ is partial and entry.func is MMSegInferencer, (text, error)
            assert not canary.trace.exists(), text
