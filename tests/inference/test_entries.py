"""Every way to load a model: checkpoints, devices and images that it accepts, and one clear error for the others."""

import copy
import pickle
import re
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from commands import tool
from evil import Evil
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint, load_state_dict
from mmseg.apis import MMSegInferencer, inference_model
from mmseg.apis import init_model as mmseg_init_model
from mmseg.registry import HOOKS, MODELS
from safetensors.torch import save_file
from small_models import segmentor_config
from torch import nn

import mmseg_volo.checkpoints.reading
from mmseg_volo import CheckpointError, ConfigError, init_model
from mmseg_volo.checkpoints.compatibility import check_checkpoint
from mmseg_volo.checkpoints.config_text import literals
from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.engine.runner import build_runner
from mmseg_volo.inference import Predictor, as_bgr
from mmseg_volo.inference.model import dataset_meta

ROOT = Path(__file__).resolve().parents[2]


def config(classes: int = 19, aux: bool = False, **model) -> Config:
    """Return the config of a small model with the classes of Cityscapes, or with ``classes=11`` those of CamVid."""
    out = Config.fromfile(ROOT / 'configs/volo_d1_quickstart.py')
    if classes == 11:
        out.test_dataloader.dataset.type = 'CamVidDataset'
    small = segmentor_config(classes=classes, head='LeanUPerHead')
    if aux:
        small.auxiliary_head = dict(
            type='LeanFCNHead',
            in_channels=64,
            in_index=2,
            channels=8,
            num_convs=1,
            concat_input=False,
            num_classes=classes,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
        )
    out.model = {**small, **model}
    return out


def saved(path: Path, classes: int = 19, aux: bool = False, names: tuple | None = None, **model) -> str:
    """Write a checkpoint of the model of :func:`config`, with mmengine's keys."""
    init_default_scope('mmseg')  # module fixtures run before the fixture that sets it
    cfg = config(classes, aux, **model)
    state = MODELS.build(cfg.model).state_dict()
    meta = dict(dataset_meta=dataset_meta(cfg))
    if names:
        meta['dataset_meta']['classes'] = names
    torch.save(dict(state_dict=state, meta=meta), path)
    return str(path)


@pytest.fixture
def log(caplog):
    """Return a function that returns the lines that mmengine's logger has written so far."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)


ALLOWED = dict(model=dict(test_cfg=dict(allow_mismatch=True)))
ENTRIES = {
    'mmseg_init_model': lambda cfg, path: mmseg_init_model(cfg, path, 'cpu'),
    'init_model': lambda cfg, path: init_model(cfg, path, 'cpu'),
    'MMSegInferencer': lambda cfg, path: MMSegInferencer(cfg, path, device='cpu', show_progress=False).model,
    'Predictor': lambda cfg, path: Predictor(cfg, path, 'cpu').model,
    'Predictor with TTA': lambda cfg, path: Predictor(cfg, path, 'cpu', aug_test=True).model.module,
}


@pytest.mark.parametrize('entry', ENTRIES)
def test_checkpoints_of_other_models_are_refused(entry, tmp_path):
    load = ENTRIES[entry]
    path = saved(tmp_path / 'camvid.pth', classes=11)
    message = (
        r"camvid\.pth: not the weights of the config's model \(2 of other shape: decode_head\.conv_seg\.weight is "
        r'\(11, 16, 1, 1\), expected \(19, 16, 1, 1\), .*\)\. Take the config.*--allow-mismatch or model\.test_cfg'
    )
    with pytest.raises(CheckpointError, match=message):
        load(config(), path)
    allowing = config()
    allowing.merge_from_dict(ALLOWED)
    state = load(allowing, path).state_dict()
    assert torch.equal(state['backbone.pos_embed'], load_from_local(path)['state_dict']['backbone.pos_embed'])


def test_missing_and_unexpected_weights_are_counted(tmp_path):
    content = torch.load(saved(tmp_path / 'x.pth'))
    del content['state_dict']['backbone.norm.weight'], content['state_dict']['backbone.norm.bias']
    content['state_dict']['neck.conv'] = torch.ones(1)
    torch.save(content, tmp_path / 'x.pth')
    found = r'2 missing: backbone\.norm\.weight, backbone\.norm\.bias; 1 unexpected: neck\.conv\)'
    with pytest.raises(CheckpointError, match=found):
        mmseg_init_model(config(), str(tmp_path / 'x.pth'), 'cpu')
    torch.save(MODELS.build(config().model).backbone.state_dict(), tmp_path / 'backbone.pth')
    with pytest.raises(
        CheckpointError, match=r'It holds a backbone alone, which model\.backbone\.init_cfg\.checkpoint'
    ):
        mmseg_init_model(config(), str(tmp_path / 'backbone.pth'), 'cpu')


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize('in_file', [True, False])
def test_checkpoint_and_config_may_differ_in_the_auxiliary_head(entry, in_file, tmp_path):
    path = saved(tmp_path / 'x.pth', aux=in_file)
    model = ENTRIES[entry](config(aux=not in_file), path)
    assert torch.equal(
        model.decode_head.conv_seg.weight, load_from_local(path)['state_dict']['decode_head.conv_seg.weight']
    )


def test_other_image_sizes_and_parallel_wrappers_still_load(tmp_path):
    path = Path(saved(tmp_path / 'x.pth'))
    wide = config()
    wide.model.backbone.img_size = (64, 128)
    assert mmseg_init_model(wide, str(path), 'cpu').backbone.pos_embed.shape == (1, 4, 8, 64)
    content = torch.load(path)
    state = content['state_dict']
    content['state_dict'] = {f'module.{k}': v for k, v in state.items() if not k.endswith('num_batches_tracked')}
    torch.save(content, path)
    assert torch.equal(init_model(config(), path, 'cpu').backbone.pos_embed, state['backbone.pos_embed'])


def test_our_own_entries_check_models_of_any_type(tmp_path):
    path = saved(tmp_path / 'camvid.pth', classes=11)
    for load in (init_model, Predictor):
        with pytest.raises(CheckpointError, match='2 of other shape'):
            load(config(type='EncoderDecoder'), path, 'cpu')
    Predictor(config(type='EncoderDecoder'), path, 'cpu', allow_mismatch=True)


def test_only_weights_from_files_are_checked(tmp_path):
    model = MODELS.build(config().model)
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({})
    model.load_state_dict({}, strict=False)
    save_file({'decode_head.x': torch.ones(1)}, tmp_path / 'x.safetensors')
    with pytest.raises(CheckpointError, match=r'x\.safetensors: not the weights .*missing'):
        load_checkpoint(model, str(tmp_path / 'x.safetensors'))


def test_fine_tuning_loads_what_fits_and_logs_the_rest(tmp_path, log):
    path = saved(tmp_path / 'camvid.pth', classes=11, aux=True)
    model, content = MODELS.build(config().model), load_from_local(path)
    check_checkpoint(model, content, 'train')
    load_state_dict(model, content['state_dict'], logger='current')
    assert torch.equal(model.backbone.pos_embed, load_from_local(path)['state_dict']['backbone.pos_embed'])
    line = next(line for line in log() if 'entries are loaded' in line)
    total = len(load_from_local(path)['state_dict'])
    assert f'camvid.pth: {total - 2 - 4} of its {total} entries are loaded. The rest is left out or keeps its' in line
    assert '4 unexpected: auxiliary_head.conv_seg.weight, ' in line
    assert '2 of other shape: decode_head.conv_seg.weight is (11, 16, 1, 1), expected (19, 16, 1, 1)' in line


def train_config(tmp_path: Path, **options) -> Config:
    cfg = config()
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].dataset.update(
            type='StreetSceneDataset', data_root=f'{tmp_path}/scenes', train=4, val=2, size=(64, 128)
        )
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomCrop', crop_size=(64, 64)),
        dict(type='PackSegInputs'),
    ]
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_cfg.update(max_iters=1, val_interval=10)
    cfg.work_dir = str(tmp_path / 'run')
    cfg.merge_from_dict(options)
    return cfg


@pytest.mark.parametrize('runner_type', ['VOLORunner', 'Runner'])
def test_runners_fine_tune_with_averaging_but_do_not_test(runner_type, tmp_path):
    path = saved(tmp_path / 'camvid.pth', classes=11)
    options = dict(
        runner_type=runner_type, load_from=path, custom_hooks=[dict(type='EMAHook')], experiment_name=runner_type
    )
    build_runner(train_config(tmp_path, **options)).train()
    options.update(custom_hooks=[], experiment_name=f'{runner_type} test')
    with pytest.raises(CheckpointError, match=r'camvid\.pth: not the weights'):
        build_runner(train_config(tmp_path, **options)).test()


def test_a_validation_alone_compares_class_names(tmp_path):
    names = dataset_meta(config())['classes']
    path = saved(tmp_path / 'indoor.pth', names=(*names[:3], 'ceiling', *names[4:]))
    options = dict(load_from=path, test_dataloader=None, test_cfg=None, test_evaluator=None)
    cfg = train_config(tmp_path, runner_type='VOLORunner', experiment_name='validation')
    cfg.update(options)
    with pytest.raises(CheckpointError, match=r'indoor\.pth: has other classes than the data set: 1 of 19'):
        build_runner(cfg).val()


def test_a_frozen_segmentor_is_checked_too(tmp_path):
    path = saved(tmp_path / 'camvid.pth', classes=11)
    frozen = MODELS.build(config().model).requires_grad_(False)
    with pytest.raises(CheckpointError, match=r'camvid\.pth: not the weights'):
        load_checkpoint(frozen, path)


def test_fine_tuning_by_mmengine_alone(tmp_path):
    """A runner without this package's hooks, and weights of other classes in ``init_cfg`` or ``load_from``."""
    path = saved(tmp_path / 'camvid.pth', classes=11)
    cfg = train_config(tmp_path, experiment_name='load_from', load_from=path, runner_type='Runner', custom_hooks=[])
    runner = build_runner(cfg)
    runner._hooks = [hook for hook in runner._hooks if 'Checkpoint' not in type(hook).__name__]
    runner.train()
    init_cfg = dict(type='Pretrained', checkpoint=path)
    model = MODELS.build(config(init_cfg=init_cfg).model)
    model.init_weights()
    assert torch.equal(model.backbone.pos_embed, load_from_local(path)['state_dict']['backbone.pos_embed'])
    frozen = MODELS.build(config(init_cfg=init_cfg).model).requires_grad_(False)
    with pytest.raises(CheckpointError, match=r'camvid\.pth: not the weights'):
        frozen.init_weights()
    with pytest.raises(CheckpointError, match=r'camvid\.pth: not the weights'):
        load_checkpoint(model.eval(), path)


def test_each_model_that_takes_a_state_dict_checks_it(tmp_path):
    state = load_from_local(saved(tmp_path / 'x.pth'))['state_dict']
    load_state_dict(MODELS.build(config().model), state)
    other = MODELS.build(config(classes=11).model)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r'x\.pth: not the weights'):
            load_state_dict(other, state)


def test_resuming_needs_every_weight(tmp_path):
    content = load_from_local(saved(tmp_path / 'x.pth'))
    model = MODELS.build(config(aux=True, test_cfg=dict(mode='whole', allow_mismatch=True)).model)
    with pytest.raises(CheckpointError, match=r'missing: auxiliary_head.*load_from=FILE instead of --resume'):
        check_checkpoint(model, content, 'resume')


def test_class_names_are_compared(tmp_path):
    names = dataset_meta(config())['classes']
    other = (*names[:3], 'ceiling', *names[4:])
    path = saved(tmp_path / 'indoor.pth', names=other)
    with pytest.raises(
        CheckpointError, match=r"indoor\.pth: has other classes than the data set: 1 of 19, as 'ceiling'"
    ):
        Predictor(config(), path, 'cpu')
    assert Predictor(config(), path, 'cpu', allow_mismatch=True).classes[3] == 'ceiling'
    content = load_from_local(path)
    with pytest.raises(CheckpointError, match='has 19 classes, the data set 2'):
        check_checkpoint(MODELS.build(config().model), content, 'infer', ('a', 'b'))
    model = MODELS.build(config().model)
    check_checkpoint(model, content, 'infer')
    check_checkpoint(model, dict(state_dict={}, meta={}), 'infer', names)
    check_checkpoint(model, content, 'infer', [name.upper() for name in other])


def test_the_hook_for_tests_checks_class_names_and_models_of_any_type(tmp_path):
    hook = HOOKS.build(dict(type='MatchingCheckpointHook'))
    names = dataset_meta(config())['classes']
    dataset = SimpleNamespace(metainfo=dict(classes=names))
    model = MODELS.build(config(type='EncoderDecoder').model)
    loader = SimpleNamespace(dataset=dataset)
    loops = dict(_train_loop=dict(max_iters=1), _val_loop=None, _test_loop=SimpleNamespace(dataloader=loader))
    runner = SimpleNamespace(model=model, **loops)
    content = load_from_local(saved(tmp_path / 'x.pth'))
    hook.after_load_checkpoint(runner, content)
    with pytest.raises(CheckpointError, match='2 of other shape'):
        hook.after_load_checkpoint(runner, load_from_local(saved(tmp_path / 'y.pth', classes=11)))
    dataset.metainfo['classes'] = (*names[1:], 'x')
    with pytest.raises(CheckpointError, match='has other classes than the data set: 19 of 19'):
        hook.after_load_checkpoint(runner, content)
    model.test_cfg['allow_mismatch'] = True
    hook.after_load_checkpoint(runner, content)


@pytest.mark.skipif(torch.cuda.is_available(), reason='tests machines without a GPU')
def test_without_a_gpu(tmp_path):
    path = saved(tmp_path / 'x.pth')
    message = "device cuda.*: PyTorch finds no GPU; pass device='cpu'"
    for load in (
        partial(mmseg_init_model, config(), path),  # its default is cuda:0
        partial(init_model, config(), path, 'cuda:1'),
        partial(Predictor, config(), path, 'cuda'),
        MODELS.build(config().model).cuda,
        partial(MODELS.build(config().model).to, device=torch.device('cuda', 0)),
    ):
        with pytest.raises(ConfigError, match=message):
            load()
    assert next(init_model(config(), path).parameters()).device.type == 'cpu'
    MODELS.build(config().model).to(torch.float64).to('cpu', torch.float32).to(memory_format=torch.channels_last)


def forms(state: dict) -> dict:
    return {
        'bare': state,
        'no_meta': dict(state_dict=state),
        'odd_meta': dict(state_dict=state, meta='text'),
        'no_classes': dict(state_dict=state, meta=dict(dataset_meta=dict(classes=None))),
        'model': dict(model=state, epoch=3),
        'ordered': OrderedDict(state),
        'with_numbers': {**state, 'epoch': 3},
    }


@pytest.mark.parametrize('form', [*forms({}), 'safetensors'])
def test_weights_without_meta(form, tmp_path):
    state = MODELS.build(config(11).model).state_dict()
    path = str(tmp_path / f'x.{form}.pth')
    if form == 'safetensors':
        path = str(tmp_path / 'x.safetensors')
        save_file(state, path)
    else:
        torch.save(forms(state)[form], path)
    model = init_model(config(11), path)
    assert torch.equal(model.backbone.pos_embed, state['backbone.pos_embed'])
    assert model.dataset_meta['classes'][0] == 'Sky' and model.dataset_meta['palette'][1] == [128, 0, 0]
    assert Predictor(config(11), path).classes[-1] == 'Bicyclist'
    mmseg_init_model(config(11), path, 'cpu')
    MMSegInferencer(config(11), path, device='cpu', show_progress=False)


@pytest.mark.parametrize('content', [{}, dict(a=1, b='x'), dict(optimizer={}), {3: 4}, [], 'text', None], ids=str)
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / 'x.pth')
    of_mmseg = ('mmseg_init_model', 'MMSegInferencer')
    for name, entry in ENTRIES.items():
        # mmseg's own entries get what the file holds, and fail on a list in their own way.
        foreign = name in of_mmseg and not isinstance(content, dict)
        with pytest.raises(
            (RuntimeError, AttributeError, TypeError) if foreign else CheckpointError,
            match=''
            if foreign
            else r'x\.pth: (no weights found; expected a dict|expected .*weights|not the weights of)',
        ):
            entry(config(), str(tmp_path / 'x.pth'))


def test_foreign_state_dicts(tmp_path):
    for state in ({}, {'a': 1}, {'backbone.pos_embed': 'text'}, {1: torch.ones(1)}, {'x': {'y': torch.ones(1)}}):
        torch.save(dict(state_dict=state), tmp_path / 'x.pth')
        with pytest.raises(
            CheckpointError, match=r"x\.pth: (not the weights of the config's model|expected weights und)"
        ):
            mmseg_init_model(config(), str(tmp_path / 'x.pth'), 'cpu')


def test_classes_come_from_the_config_or_are_numbered():
    cfg = config(11)
    cfg.test_dataloader.dataset.metainfo = dict(classes=('Road', 'Sky'))
    assert dataset_meta(cfg) == dict(classes=['Road', 'Sky'], palette=[[128, 64, 128], [128, 128, 128]])
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[cfg.test_dataloader.dataset])
    assert dataset_meta(cfg)['classes'] == ['Road', 'Sky']
    with pytest.raises(ConfigError, match=r'decode_head\.num_classes: 11, but .* has 2 classes \(Road, Sky\)'):
        init_model(cfg)
    meta = init_model(cfg, cfg_options=dict(model=dict(test_cfg=dict(allow_mismatch=True)))).dataset_meta
    assert meta['classes'][10] == '10' and len(meta['palette']) == 11
    cfg.pop('test_dataloader')
    assert dataset_meta(cfg) == {} and len(init_model(cfg).dataset_meta['classes']) == 11


def test_our_init_model_does_not_change_the_config(tmp_path):
    cfg = config()
    before = copy.deepcopy(cfg.to_dict())
    model = init_model(cfg, saved(tmp_path / 'x.pth'), cfg_options=dict(model=dict(test_cfg=dict(confidence=True))))
    assert cfg.to_dict() == before and model.test_cfg.confidence and not model.training
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    assert inference_model(model, image).seg_confidence.shape == (64, 96)


@pytest.fixture
def evil(tmp_path):
    """Write files that make a folder when an unsafe reader opens them; check afterwards that there is no folder."""
    trace = tmp_path / 'code-ran'
    content = {'state_dict': {}, 'meta': Evil(trace)}
    torch.save(content, tmp_path / 'zip.pth')
    torch.save(content, tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    (tmp_path / 'bare.pth.tar').write_bytes(pickle.dumps(content))
    (tmp_path / 'old.pth').write_bytes(pickle.dumps(content, protocol=0))
    (tmp_path / 'new.bin').write_bytes(pickle.dumps(content, protocol=5))
    (tmp_path / 'pickle.safetensors').write_bytes(pickle.dumps(content))
    yield [path for path in tmp_path.iterdir() if path.is_file()]
    assert not trace.exists()


def test_no_entry_runs_code(evil, tmp_path):
    pretrained = config()
    readers = {
        **ENTRIES,
        'load_checkpoint': lambda cfg, path: load_checkpoint(nn.Linear(1, 1), path),
        'init_cfg': lambda cfg, path: MODELS.build(
            dict(
                type='EncoderDecoder',
                **{k: cfg.model[k] for k in ('backbone', 'decode_head')},
                init_cfg=dict(type='Pretrained', checkpoint=path),
            )
        ).init_weights(),
        'prefix': lambda cfg, path: MODELS.build(
            dict(cfg.model.decode_head, init_cfg=dict(type='Pretrained', checkpoint=path, prefix='decode_head'))
        ).init_weights(),
        'Runner': lambda cfg, path: Runner(nn.Linear(1, 1), str(tmp_path / 'w'), experiment_name=path).load_checkpoint(
            path
        ),
        'publishing': lambda cfg, path: HOOKS.build(
            dict(type='CheckpointHook', published_keys=['state_dict'])
        )._publish_model(None, path),
        'weights alone': lambda cfg, path: MMSegInferencer(None, path, device='cpu'),
    }
    for path in evil:
        for name, read in readers.items():
            with pytest.raises(CheckpointError, match=r'refused, because|is cut off or is no checkpoint'):
                read(copy.deepcopy(pretrained), str(path))
                pytest.fail(f'{name} took {path}')


def test_every_scheme_reads_safely(evil, tmp_path, monkeypatch):
    assert {loader.__module__ for loader in CheckpointLoader._schemes.values()} == {'mmseg_volo.checkpoints.reading'}
    legacy, good = tmp_path / 'legacy.pth', tmp_path / 'good.pth'
    torch.save({'state_dict': {'backbone.w': torch.ones(1), 'head.w': torch.ones(1)}}, good)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    urls = dict(evil=legacy.as_uri(), good=good.as_uri())
    monkeypatch.setattr(mmseg_volo.checkpoints.reading, 'get_torchvision_models', lambda: urls)
    monkeypatch.setattr(mmseg_volo.checkpoints.reading, 'get_mmcls_models', lambda: urls)
    places = dict(evil='legacy.pth', good='good.pth', evil_url='http://x/legacy.pth', good_url='http://x/good.pth')
    monkeypatch.setattr(mmseg_volo.checkpoints.reading, 'get_external_models', lambda: places)
    monkeypatch.setattr(mmseg_volo.checkpoints.reading, 'get_deprecated_model_names', lambda: dict(old='good'))
    copied = lambda url, path, *_, **__: Path(path).write_bytes((tmp_path / Path(url).name).read_bytes())  # noqa: E731
    monkeypatch.setattr(torch.hub, 'download_url_to_file', copied)

    class Backend:
        def get(self, url):
            return (tmp_path / Path(url).name).read_bytes()

    monkeypatch.setattr(mmseg_volo.checkpoints.reading, 'get_file_backend', lambda *_, **__: Backend())
    cloud = SimpleNamespace(get=lambda name: SimpleNamespace(download=lambda to: copied(name, to)))
    monkeypatch.setitem(sys.modules, 'pavi', SimpleNamespace(modelcloud=cloud))
    by_name = [
        'torchvision://{}',
        'modelzoo://{}',
        'mmcls://{}',
        'open-mmlab://{}',
        'openmmlab://{}',
        'openmmlab://{}_url',
    ]
    for form in by_name:
        with pytest.raises(CheckpointError, match='refused, because'):
            CheckpointLoader.load_checkpoint(form.format('evil'))
        state = CheckpointLoader.load_checkpoint(form.format('good'))['state_dict']
        assert list(state) == (['w'] if form.startswith('mmcls') else ['backbone.w', 'head.w'])
        if 'url' not in form:
            with pytest.raises(CheckpointError, match=rf'{form.format("goof")}: mmengine knows no .*similar.*good'):
                CheckpointLoader.load_checkpoint(form.format('goof'))
    assert CheckpointLoader.load_checkpoint('openmmlab://old')['meta'] == {}
    for form in ('s3://b/{}.pth', 'cluster:s3://b/{}.pth', 'petrel://b/{}.pth', 'pavi://b/{}.pth'):
        with pytest.raises(CheckpointError, match=f'^{form.format("legacy")}: refused, because'):
            CheckpointLoader.load_checkpoint(form.format('legacy'))
        assert len(CheckpointLoader.load_checkpoint(form.format('good'))['state_dict']) == 2
        with pytest.raises(CheckpointError, match=f'^{form.format("gone")}: could not be fetched.*by hand'):
            CheckpointLoader.load_checkpoint(form.format('gone'))


@pytest.mark.parametrize('url', ['s3://bucket/x.pth', 'petrel://bucket/x.pth', 'pavi://x.pth'])
def test_schemes_whose_clients_are_not_installed(url):
    with pytest.raises(CheckpointError, match=f'{url}: could not be fetched .*(install|No module named)'):
        CheckpointLoader.load_checkpoint(url)


def test_config_texts_in_checkpoints_run_no_code(tmp_path, log):
    """mmengine runs ``meta.config`` on resume, and ``cfg`` when MMSegInferencer gets only weights."""
    trace = tmp_path / 'code-ran'
    plain = config().pretty_text
    state = MODELS.build(config().model).state_dict()
    for text in (
        f'import os\nos.mkdir({str(trace)!r})\nmodel = dict()',
        f'model = dict(type=__import__("os").mkdir({str(trace)!r}))',
        f'model = [open({str(trace)!r}, "w") for _ in (1,)]',
        "_base_ = './other.py'",
        'model = (',
    ):
        torch.save(
            dict(state_dict=state, meta=dict(cfg=text, config=text), message_hub=dict(runtime_info=dict(cfg=text))),
            tmp_path / 'x.pth',
        )
        content = load_from_local(str(tmp_path / 'x.pth'))
        assert content['meta'] == {} and content['message_hub'] == dict(runtime_info={})
        assert 'its config text is left out, because it holds code' in log()[-1]
        with pytest.raises(ValueError, match='Cannot find the config'):
            MMSegInferencer(None, str(tmp_path / 'x.pth'), device='cpu')
    assert not trace.exists()
    torch.save(
        dict(state_dict=state, meta=dict(cfg=plain), message_hub=dict(runtime_info=dict(cfg=plain))), tmp_path / 'y.pth'
    )
    assert MMSegInferencer(None, str(tmp_path / 'y.pth'), device='cpu', show_progress=False).model.cfg.model.type
    assert literals(load_from_local(str(tmp_path / 'y.pth'))['meta']['cfg']) == literals(plain)


def random_image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_images_of_every_kind_become_bgr():
    image = random_image()
    assert as_bgr(image) is image
    alpha = np.dstack([image, image[..., 0]])
    same = [alpha, image.astype(np.uint16) * 257, image / 255, image.astype(np.float32), image.astype(np.int64)]
    same += [image.astype(np.uint16), (image / 255).astype(np.float32), np.asfortranarray(image)]
    for other in same:
        assert np.array_equal(as_bgr(other), image) and as_bgr(other).dtype == np.uint8
    grey = image[..., 0]
    for other in (grey, grey[..., None], grey / 255, grey.astype(np.uint16) * 257):
        assert np.array_equal(as_bgr(other), np.dstack([grey] * 3))


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (np.zeros((0, 5, 3), np.uint8), r'shape \(0, 5, 3\), uint8: it has no pixels'),
        (np.zeros((5, 0), np.uint8), r'shape \(5, 0\), uint8: it has no pixels'),
        (np.zeros((5, 5, 2), np.uint8), r'shape \(5, 5, 2\), uint8: expected \(H, W, 3\), BGR'),
        (np.zeros((3, 50, 50), np.uint8), r'shape \(3, 50, 50\), uint8: expected \(H, W, 3\)'),
        (np.zeros((1, 5, 5, 3), np.uint8), r'shape \(1, 5, 5, 3\), uint8: expected'),
        (np.zeros(5, np.uint8), r'shape \(5,\), uint8: expected'),
        (np.zeros((5, 5, 3), bool), 'bool: expected'),
        (np.zeros((5, 5, 3), complex), 'complex128: expected'),
        (np.full((5, 5, 3), None), 'object: expected'),
        (np.full((5, 5, 3), np.nan), 'float64: values from nan to nan, expected 0 to 255'),
        (np.full((5, 5, 3), np.inf), 'float64: values from inf to inf'),
        (np.full((5, 5, 3), -1, np.int16), 'int16: values from -1 to -1'),
        (np.full((5, 5, 3), 70000), 'int64: values from 70000 to 70000'),
        ([[1]], 'got list'),
        (torch.zeros(5, 5, 3), 'got Tensor'),
        ('x.png', 'got str'),
    ],
    ids=str,
)
def test_arrays_that_are_no_image(image, message):
    with pytest.raises(ValueError, match=message):
        as_bgr(image)


@pytest.fixture(scope='module')
def predictor(tmp_path_factory) -> Predictor:
    return Predictor(config(), saved(tmp_path_factory.mktemp('model') / 'x.pth'), 'cpu')


def test_the_predictor_accepts_images_of_every_kind(predictor):
    image = random_image()
    expected = predictor(image)
    for other in (np.dstack([image, image[..., 0]]), image / 255, image.astype(np.uint16) * 257):
        assert np.array_equal(predictor(other), expected)
    assert predictor(image[..., 0]).shape == (40, 60) and predictor(image[:1, :1]).shape == (1, 1)
    with pytest.raises(ValueError, match=r'cannot resize 3000 x 1 pixels \(a side may shrink to nothing\)'):
        predictor(image[:1].repeat(50, axis=1))


def test_mmsegs_inference_says_what_is_wrong_with_an_array(tmp_path):
    model = mmseg_init_model(config(), saved(tmp_path / 'x.pth'), 'cpu')
    predict, image = partial(inference_model, model), random_image()
    grey = predict(np.dstack([image[..., 0]] * 3)).pred_sem_seg.data
    assert torch.equal(predict(image[..., 0]).pred_sem_seg.data, grey)
    as_float = predict(image.astype(np.float32)).pred_sem_seg.data  # resized without rounding
    assert (as_float == predict(image).pred_sem_seg.data).float().mean() > 0.95
    for message, wrong in {
        r'an image of shape \(4, .*uint8: expected \(3, H, W\); mmseg takes arrays as': np.dstack(
            [image, image[..., 0]]
        ),
        'uint16: values from .* expected 0 to 255; mmseg_volo.inference.Predictor': image.astype(np.uint16) * 257,
        'float32: values from .* expected 0 to 255': (image / 255).astype(np.float32),
        'float64: values from -0.9.* to 0.99': image / 127.5 - 1,
        'has values that are not finite': np.full((40, 60, 3), np.nan),
    }.items():
        with pytest.raises(ValueError, match=message):
            predict(wrong)


def train_head(head: nn.Module, images: int) -> None:
    maps = [torch.randn(images, c, 4, 4) for c in (32, 64, 64, 64)]
    head.train()(maps)


@pytest.mark.parametrize('kind', ['BN', 'SyncBN'])
def test_training_on_one_image_per_device_is_refused(kind, monkeypatch):
    norm = dict(type=kind, requires_grad=True)
    head = MODELS.build(dict(config().model.decode_head, norm_cfg=norm))
    message = r'cannot train on one image per device.*batch_size=2 or more.*SyncBN.*GN'
    with pytest.raises(ConfigError, match=message):
        train_head(head, 1)
    if kind == 'BN':
        train_head(head, 2)
    head.eval()([torch.randn(1, c, 4, 4) for c in (32, 64, 64, 64)])
    train_head(MODELS.build(dict(config().model.decode_head, norm_cfg=dict(type='GN', num_groups=4))), 1)
    if kind == 'SyncBN':  # works with several processes
        monkeypatch.setattr('mmseg_volo.models.heads.get_world_size', lambda: 2)
        head.train()._check_norms()


def test_backends_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    backend = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    cfg = train_config(tmp_path)
    cfg.visualizer.vis_backends = backend
    with pytest.raises(
        ConfigError, match='TensorboardVisBackend, but tensorboard is not installed: pip install tensorb'
    ):
        build_runner(cfg)


def test_a_wrong_checkpoint_is_one_line_for_users_of_the_tools(tmp_path):
    """Run tools/predict.py; tools/test.py adds the hook that is tested above."""
    cfg = tmp_path / 'small.py'
    config().dump(cfg)
    path = saved(tmp_path / 'camvid.pth', classes=11)
    cv2.imwrite(str(tmp_path / 'a.png'), random_image())
    command = 'predict.py', cfg, path, tmp_path / 'a.png', '--out', tmp_path / 'out'
    output = tool(*command, fails=True)
    assert 'Traceback' not in output
    assert re.search(r"error: .*camvid\.pth: not the weights of the config's model \(2 of other shape", output)
    tool(*command, '--allow-mismatch')
    assert (tmp_path / 'out/a.png').is_file()
