"""Weights of every official form load; other files are rejected with a clear message, and none runs code."""

import logging
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from evil import Evil
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.runner import CheckpointLoader, load_checkpoint, save_checkpoint
from mmseg.apis import MMSegInferencer, init_model
from mmseg.registry import MODELS
from safetensors.torch import save_file
from small_runs import checkpoint

from mmseg_volo import VOLO, CheckpointError
from mmseg_volo.checkpoints.pretrained import CLASSIFIER
from mmseg_volo.checkpoints.writing import save
from mmseg_volo.engine.resume import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def official() -> dict:
    """The weights of timm's D1 classifier, under their official names."""
    torch.manual_seed(1)
    return timm.create_model('volo_d1_224', pretrained=False).state_dict()


def load(checkpoint, **kwargs) -> VOLO:
    model = VOLO('d1', init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)), **kwargs)
    model.init_weights()
    return model


def assert_loaded(model: VOLO, official: dict) -> None:
    own = model.state_dict()
    same = [k for k in official if k in own]
    assert len(same) == len([k for k in official if not k.startswith(CLASSIFIER)])
    assert all(torch.equal(own[k], official[k]) for k in same)


FORMS = {
    'bare': lambda s: s,
    'state_dict': lambda s: {'state_dict': s, 'epoch': 300, 'arch': 'volo_d1'},
    'module': lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}},
    'ema': lambda s: {'state_dict': {k: torch.zeros_like(v) for k, v in s.items()}, 'state_dict_ema': s},
    'segmentor': lambda s: {
        'state_dict': {**{f'backbone.{k}': v for k, v in s.items()}, 'decode_head.x': torch.ones(1)}
    },
}


@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_pth_tar(form, official, tmp_path):
    torch.save(FORMS[form](official), tmp_path / 'd1_224_84.2.pth.tar')
    assert_loaded(load(tmp_path / 'd1_224_84.2.pth.tar'), official)


def test_the_old_file_format_of_torch(official, tmp_path):
    torch.save(official, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert_loaded(load(tmp_path / 'old.pth'), official)


def test_safetensors(official, tmp_path):
    save_file({k: v.contiguous() for k, v in official.items()}, tmp_path / 'model.safetensors')
    assert_loaded(load(tmp_path / 'model.safetensors'), official)


def test_the_log_names_skipped_weights(official, tmp_path, caplog):
    torch.save(official, tmp_path / 'd1.pth')
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        load(tmp_path / 'd1.pth')
        load(tmp_path / 'd1.pth', out_indices=(0, 1), out_norm=False)
    finally:
        logger.removeHandler(caplog.handler)
    full, part = [r.getMessage() for r in caplog.records if 'Loaded' in r.getMessage()]
    assert 'Loaded 231 of 260 entries of VOLO-D1 (blocks 4-4-8-2, widths 192/384)' in full
    assert 'aux_head, cls_token, head, post_network of the classifier (29 entries)' in full
    assert 'kept at their initial values: norm0.weight, norm0.bias' in full
    assert 'entries of stages or norms that are not built' in part


def test_pos_embed_is_resized_to_the_image_size(official, tmp_path):
    torch.save(official, tmp_path / 'd1.pth')
    model = load(tmp_path / 'd1.pth', img_size=(128, 256))
    expected = torch.nn.functional.interpolate(
        official['pos_embed'].permute(0, 3, 1, 2), (8, 16), mode='bicubic', align_corners=False
    )
    torch.testing.assert_close(model.pos_embed.detach().permute(0, 3, 1, 2), expected)


def test_url_is_downloaded_once(official, tmp_path, monkeypatch):
    torch.save(official, tmp_path / 'd1_224_84.2.pth.tar')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/d1_224_84.2.pth.tar?download=1'
        assert_loaded(load(url), official)
        with pytest.raises(CheckpointError, match=r'missing\.pth: the download failed.*404'):
            load(f'http://127.0.0.1:{server.server_port}/missing.pth')
        server.shutdown()
    assert_loaded(load(url), official)  # from the cache


def test_timm_weights_are_read_from_the_hub_cache(official, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    # The layout of the hub's cache: a snapshot folder named by the commit in refs/main.
    repo = tmp_path / 'models--timm--volo_d1_224.sail_in1k'
    (repo / 'refs').mkdir(parents=True)
    (repo / 'refs/main').write_text('a' * 40)
    (repo / 'snapshots' / ('a' * 40)).mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in official.items()}, repo / 'snapshots' / ('a' * 40) / 'model.safetensors')
    assert_loaded(load('timm://volo_d1_224.sail_in1k'), official)
    with pytest.raises(CheckpointError, match=r'timm://volo_d2_224.sail_in1k: could not fetch.*give its path'):
        load('timm://volo_d2_224.sail_in1k')


@pytest.mark.parametrize('name', ['volo_d9_224.sail_in1k', 'volo_d1_224', 'volo_d1_224.nobody'])
def test_unknown_timm_names(name):
    with pytest.raises(CheckpointError, match=f'timm://{name}: timm has no such weights; expected .*volo_d4_448'):
        load(f'timm://{name}')


@pytest.mark.parametrize('name', ['volo_d1_384', 'volo_d2_384', 'volo_d3_448', 'volo_d4_448', 'volo_d5_512'])
def test_the_configs_weights_exist_in_timm(name):
    assert timm.get_pretrained_cfg(f'{name}.sail_in1k').hf_hub_id == f'timm/{name}.sail_in1k'


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth does not exist; expected a \.pth'):
        load(tmp_path / 'nowhere.pth')
    with pytest.raises(FileNotFoundError, match='is a folder'):
        load(tmp_path)


def test_another_variant_is_named_and_the_backbone_stays_unchanged(tmp_path):
    torch.save(timm.create_model('volo_d2_224', pretrained=False).state_dict(), tmp_path / 'x.pth')
    model = VOLO('d1', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'x\.pth: expected weights of VOLO-D1 .*found VOLO-D2 .*6-4-10-4'):
        model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_and_unknown_weights_are_named(official, tmp_path):
    torch.save({k: v for k, v in official.items() if k != 'network.2.1.attn.qkv.weight'}, tmp_path / 'less.pth')
    with pytest.raises(CheckpointError, match=r'1 missing: network\.2\.1\.attn\.qkv\.weight'):
        load(tmp_path / 'less.pth')
    torch.save({**official, 'network.0.0.extra': torch.ones(1)}, tmp_path / 'more.pth')
    with pytest.raises(CheckpointError, match=r'1 unknown: network\.0\.0\.extra'):
        load(tmp_path / 'more.pth')
    torch.save({k: v for k, v in official.items() if not k.startswith('norm.')}, tmp_path / 'nonorm.pth')
    with pytest.raises(CheckpointError, match=r'2 missing: norm\.weight, norm\.bias'):
        load(tmp_path / 'nonorm.pth')
    stem = torch.zeros(64, 5, 7, 7)
    torch.save({**official, 'patch_embed.conv.0.weight': stem}, tmp_path / 'five.pth')
    with pytest.raises(CheckpointError, match=r'conv\.0\.weight is \(64, 5, 7, 7\), expected \(64, 4, 7, 7\)'):
        load(tmp_path / 'five.pth', in_channels=4)


def test_weights_of_another_model(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'linear.pth')
    with pytest.raises(CheckpointError, match=r'linear\.pth: expected the weights of a VOLO .*found weight, bias'):
        load(tmp_path / 'linear.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match=r'list\.pth: expected a dict of weights, found list'):
        load(tmp_path / 'list.pth')


@pytest.mark.parametrize('keep', [0, 10, 1000, 0.5, 0.999])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_truncated_files(keep, suffix, official, tmp_path):
    path = tmp_path / f'cut{suffix}'
    if suffix == '.pth':
        torch.save(official, path)
    else:
        save_file({k: v.contiguous() for k, v in official.items()}, path)
    os.truncate(path, int(keep * path.stat().st_size) if keep < 1 else keep)
    with pytest.raises(CheckpointError, match=r'cut\.(pth|safetensors): the file is (empty|cut off)'):
        load(path)


def test_noise_is_rejected(tmp_path):
    (tmp_path / 'noise.pth').write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(CheckpointError, match='the file is cut off or is no checkpoint'):
        load(tmp_path / 'noise.pth')
    (tmp_path / 'page.pth').write_text('<html>404 Not Found</html>')
    with pytest.raises(CheckpointError, match='the file is cut off or is no checkpoint'):
        load(tmp_path / 'page.pth')


@pytest.fixture
def evil(tmp_path):
    """Files that would create a folder if their code ran; checks afterwards that it did not."""
    trace = tmp_path / 'code-ran'
    torch.save({'state_dict': {}, 'meta': Evil(trace)}, tmp_path / 'evil.pth')
    (tmp_path / 'plain.pth').write_bytes(pickle.dumps({'state_dict': Evil(trace)}, protocol=2))
    yield [tmp_path / 'evil.pth', tmp_path / 'plain.pth']
    assert not trace.exists()


def tiny_config() -> Config:
    config = Config.fromfile(ROOT / 'configs/volo_d1_quickstart.py')
    arch = dict(depths=(1, 1, 1, 1), dims=(24, 48, 48, 48), heads=(1, 2, 2, 2), mlp_ratios=1, stem_width=8)
    config.model.backbone.arch = arch
    config.model.decode_head.update(in_channels=[24, 48, 48, 48], channels=8)
    return config


def test_code_is_rejected_at_every_entry_point(evil):
    for path in evil:
        entries = [
            lambda p=path: load(p),
            lambda p=path: init_model(tiny_config(), str(p), device='cpu'),
            lambda p=path: MMSegInferencer(model=tiny_config(), weights=str(p), device='cpu'),
            lambda p=path: load_checkpoint(torch.nn.Linear(1, 1), str(p)),
            lambda p=path: CheckpointLoader.load_checkpoint(str(p)),
        ]
        for entry in entries:
            with pytest.raises(
                CheckpointError, match=r'(evil|plain)\.pth: refused, because it holds more than tensors'
            ):
                entry()


def test_checkpoints_of_mmengine_are_read(tmp_path):
    """They hold log histories and NumPy numbers; every dtype of number must pass."""
    scalars = {kind: np.dtype(kind).type(1) for kind in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'b1')}
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(state_dict={'w': torch.ones(2)}, meta=scalars, message_hub=dict(log=history, array=np.arange(3.0)))
    torch.save(content, tmp_path / 'run.pth')
    read = CheckpointLoader.load_checkpoint(str(tmp_path / 'run.pth'))
    assert read['meta'] == scalars and read['message_hub']['log'].mean() == 1.5
    assert (read['message_hub']['array'] == np.arange(3)).all()


def test_bare_weights_of_a_segmentor_load_through_init_model(tmp_path):
    model = init_model(tiny_config(), device='cpu')
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    again = init_model(tiny_config(), str(tmp_path / 'bare.pth'), device='cpu')
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_files_come_back_as_they_are(tmp_path):
    """mmengine's own ``test_load_checkpoint`` asks for this, and PIDNet, SAN and CLIP rely on it."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    contents = [model.state_dict(), [1, torch.ones(2)], torch.ones(3), dict(a=dict(b=1)), (1, 'x'), dict(model={}, x=3)]
    contents += [dict(state_dict=model.state_dict()), dict(state_dict=model.state_dict(), meta=dict(cfg='a = 1\n'))]
    for content in contents:
        torch.save(content, tmp_path / 'x.pth')
        expected = torch.load(tmp_path / 'x.pth', weights_only=True)
        found = CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))
        assert same(found, expected)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    prefixed = torch.nn.ModuleDict(dict(backbone=torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))))
    read = load_checkpoint(prefixed, str(tmp_path / 'x.pth'), revise_keys=[(r'^', 'backbone.')])
    assert read.keys() == model.state_dict().keys() and read._metadata['1']['version'] == 2
    assert all(torch.equal(prefixed.state_dict()[f'backbone.{name}'], value) for name, value in read.items())


def same(found: object, expected: object) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_a_backbone_that_reads_bare_weights_itself(tmp_path):
    options = dict(type='PIDNet', channels=8, ppm_channels=16, num_stem_blocks=1, num_branch_blocks=1)
    weights = {name: torch.full_like(value, 3) for name, value in MODELS.build(options).state_dict().items()}
    torch.save(weights, tmp_path / 'pidnet.pth')
    save_file(weights, tmp_path / 'pidnet.safetensors')
    for path in tmp_path.glob('pidnet*'):
        model = MODELS.build(dict(options, init_cfg=dict(type='Pretrained', checkpoint=str(path))))
        model.init_weights()
        assert all((value == 3).all() for value in model.state_dict().values())


def test_a_checkpoint_that_was_read_is_saved_again_by_other_means(tmp_path):
    content = checkpoint()
    save(content, tmp_path / 'iter_10.pth')
    read = CheckpointLoader.load_checkpoint(str(tmp_path / 'iter_10.pth'))
    assert read['meta']['sealed_by']
    save_checkpoint(read, str(tmp_path / 'mmengine.pth'))
    torch.save(read, tmp_path / 'torch.pth')
    torch.save(read, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    torch.save({key: read[key] for key in ('meta', 'state_dict')}, tmp_path / 'published.pth')
    torch.save(read['state_dict'], tmp_path / 'weights.pth')
    for path in tmp_path.glob('[!i]*.pth'):
        torch.load(path, weights_only=True)
        again = CheckpointLoader.load_checkpoint(str(path))
        assert same(again.get('state_dict', again), content['state_dict']), path
    # Only the search for the newest whole checkpoint of a run asks for the seal.
    (tmp_path / 'mmengine.pth').rename(tmp_path / 'iter_10.pth')
    with pytest.raises(CheckpointError, match=r'iter_10\.pth: was saved with a seal, which is missing now'):
        newest_checkpoint([tmp_path], logging.getLogger('test_reading'))
