"""Models go to a repository on the hub and come back the same; the real client talks to a stand-in of the hub."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import run, tool
from huggingface_hub import ModelCard, constants
from local_hub import LocalHub
from mmengine.config import Config
from mmengine.registry import init_default_scope
from small_models import batch, build, picture, segmentor_config

import mmseg_volo
from mmseg_volo.checkpoints.writing import save
from mmseg_volo.errors import CheckpointError, ConfigError, HubError
from mmseg_volo.publish.hub import check_push, from_pretrained, push_to_hub
from mmseg_volo.publish.publish import publish

CLASSES = ['road', 'sidewalk', 'building', 'wall', 'fence', 'pole', 'sky']
CONFIG = Config(dict(default_scope='mmseg', model=segmentor_config().to_dict())).pretty_text


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Make the client use a hub, with an empty cache and a token that may write."""

    def use_hub(url: str) -> None:
        monkeypatch.setattr(constants, 'ENDPOINT', url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
        monkeypatch.setenv('HF_TOKEN', 'hf_writes')

    return use_hub


@pytest.fixture
def hub(use):
    with LocalHub() as hub:
        use(hub.url)
        yield hub


@pytest.fixture(scope='module')
def trained():
    init_default_scope('mmseg')
    return build()


@pytest.fixture(scope='module')
def checkpoint(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp('run') / 'iter_2.pth'
    meta = dict(cfg=CONFIG, iter=2, experiment_name='tiny_20260101_000000', dataset_meta=dict(classes=CLASSES))
    save(dict(meta=meta, state_dict=trained.state_dict(), optimizer=dict(state={})), path)
    return path


@pytest.fixture(scope='module')
def published(checkpoint):
    return publish(checkpoint, checkpoint.parent / 'published', license='apache-2.0').weights.parent


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(folder: Path) -> Path:
    (found,) = folder.glob('*.safetensors')
    return found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(model.data_preprocessor(batch(picture(96, 160)))['inputs'])


def assert_same(model, trained) -> None:
    own = trained.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(trained)) and not model.training
    assert list(model.dataset_meta['classes']) == CLASSES


def test_three_lines_there_and_back(hub, checkpoint, trained):
    url = mmseg_volo.push_to_hub(checkpoint, 'user/name', license='apache-2.0')
    model = mmseg_volo.from_pretrained('user/name', 'cpu')
    assert_same(model, trained)
    there = hub.repositories['user/name']
    assert url == f'{hub.url}/user/name/commit/{there.refs["main"]}' and not there.private
    names = sorted(there.files)
    assert names[:4] == ['.gitattributes', 'README.md', 'config.py', 'metafile.yml'] and len(names) == 6
    assert there.messages == ['initial commit', f'Upload {Path(names[5]).stem}'] and names[5].endswith('.safetensors')
    assert hub.asked('PUT', '/storage/') == hub.asked('POST', '/storage/') == 2
    # The config and the weights were read, and no pickle.
    assert hub.asked('GET', '/config.py') == hub.asked('GET', '/storage/') == 1 == hub.asked('GET', '/resolve/')
    card = ModelCard(there.files['README.md'].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ('mmseg_volo', 'image-segmentation')
    assert card.data.license == 'apache-2.0' and 'volo' in card.data.tags
    (block, *_) = re.findall(r'```python\n(.*?)```', card.text, re.DOTALL)
    assert "mmseg_volo.from_pretrained('user/name')" in block and compile(block, 'card', 'exec')


def test_a_second_load_downloads_nothing(hub, published, trained):
    push_to_hub(published, 'user/name')
    from_pretrained('user/name', 'cpu')
    assert_same(from_pretrained('user/name', 'cpu'), trained)
    assert hub.asked('GET', '/resolve/') == hub.asked('GET', '/storage/') == 1
    asked = len(hub.requests)
    assert_same(from_pretrained('user/name', 'cpu', local_files_only=True), trained)
    assert len(hub.requests) == asked


def test_without_the_hub_the_cache_is_used(hub, published, trained, use, caplog):
    push_to_hub(published, 'user/name')
    from_pretrained('user/name', 'cpu')
    hub.down = True
    assert_same(from_pretrained('user/name', 'cpu'), trained)
    use('http://127.0.0.1:9')  # nothing answers there
    assert_same(from_pretrained('user/name', 'cpu'), trained)


def test_files_inside_the_commit(use, published, trained, monkeypatch):
    """As the installed client uploads where the server asks for no large files, with Xet at hand."""
    with LocalHub(lfs=False) as hub:
        use(hub.url)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
        push_to_hub(published, 'user/name')
        assert not hub.asked('PUT', '') and files(published).items() <= hub.repositories['user/name'].files.items()
        assert_same(from_pretrained('user/name', 'cpu'), trained)
        there = hub.add('user/other', {})
        assert push_to_hub(published, 'user/other', create_pr=True) == f'{hub.url}/user/other/discussions/1'
        assert 'config.py' not in there.files and 'config.py' in there.commits[there.refs['refs/pr/1']]


def test_a_new_push_replaces_the_model_and_nothing_else(hub, published, checkpoint, tmp_path, trained):
    first = push_to_hub(published, 'user/name', commit_message='The first')
    assert push_to_hub(published, 'user/name') == first  # nothing has changed: no commit
    there = hub.repositories['user/name']
    there.commit({**there.files, 'photo.png': b'mine', 'LICENSE': b'mine'})
    old = set(there.files)
    other = publish(checkpoint, tmp_path / 'other', name='other', license='apache-2.0').weights.parent
    push_to_hub(other, 'user/name')
    kept = {'.gitattributes', 'photo.png', 'LICENSE'}
    assert set(there.files) == kept | {path.name for path in other.iterdir()} != old
    assert (
        there.messages[1] == 'The first' and there.messages[-1].startswith('Upload other-') and len(there.messages) == 4
    )
    assert_same(from_pretrained('user/name', 'cpu', revision=first.rpartition('/')[2]), trained)


def test_branches_and_pull_requests(hub, published, trained):
    there = hub.add('user/name', {'README.md': b'---\n---\n'})
    url = push_to_hub(published, 'user/name', create_pr=True)
    assert url == f'{hub.url}/user/name/discussions/1' and list(there.files) == ['.gitattributes', 'README.md']
    assert_same(from_pretrained('user/name', 'cpu', revision='refs/pr/1'), trained)
    with pytest.raises(CheckpointError, match=r'^user/name: has no .safetensors file; expected the files that tools'):
        from_pretrained('user/name', 'cpu')
    with pytest.raises(HubError, match=r"^user/name: has no revision 'gone'; give a branch, a tag or a commit$"):
        from_pretrained('user/name', 'cpu', revision='gone')
    with pytest.raises(HubError, match=r"^user/name: has no revision 'gone'"):
        push_to_hub(published, 'user/name', revision='gone')
    there.refs['v2'] = there.refs['main']
    push_to_hub(published, 'user/name', revision='v2')
    assert 'config.py' in there.commits[there.refs['v2']] and 'config.py' not in there.files


def test_folders_and_files(published, trained, tmp_path, monkeypatch):
    assert_same(from_pretrained(published, 'cpu'), trained)
    assert_same(from_pretrained(str(weights_of(published)), 'cpu'), trained)
    assert_same(from_pretrained(next(published.glob('*.pth')), 'cpu'), trained)
    shutil.copytree(published, tmp_path / 'user/name')  # looks like a repository: the folder comes first
    monkeypatch.chdir(tmp_path)
    assert_same(from_pretrained('user/name', 'cpu'), trained)
    (tmp_path / 'user/name/config.py').unlink()  # the weights have the config too
    assert_same(from_pretrained('user/name', 'cpu'), trained)
    model = from_pretrained(published, 'cpu', cfg_options=dict(model=dict(test_cfg=dict(precision='bf16'))))
    assert model.test_cfg.precision == 'bf16'
    for source in ('gone', 'a/b/c', './gone', 'user/gone.safetensors', Path('user/gone')):
        with pytest.raises(FileNotFoundError, match='does not exist: expected a folder, a file, or user/name on the'):
            from_pretrained(source)
    shutil.copy(weights_of(published), tmp_path / 'user/name/second.safetensors')
    with pytest.raises(CheckpointError, match=r'several .safetensors files; give the path of one of them: second'):
        from_pretrained('user/name')


def test_private_and_gated_repositories(hub, published, trained, monkeypatch):
    push_to_hub(published, 'user/name', private=True)
    assert hub.repositories['user/name'].private
    assert_same(from_pretrained('user/name', 'cpu', token='hf_reads'), trained)
    unknown = 'no such folder here, and no such repository on the hub, or a private one: check the name, or log in'
    for source, token in (('user/name', False), ('user/gone', None), ('user/gone', False)):
        with pytest.raises(HubError, match=f'^{source}: {unknown}'):
            from_pretrained(source, 'cpu', token=token)
    with pytest.raises(HubError, match=r"^user/name: the hub does not accept the token: log in with 'hf auth login'"):
        from_pretrained('user/name', 'cpu', token='hf_old')
    hub.add('user/gated', files(published), gated=True)
    with pytest.raises(HubError, match=f'^user/gated: access must be granted: ask for it at {hub.url}/user/gated, and'):
        from_pretrained('user/gated', 'cpu')
    hub.add('user/public', {})
    with pytest.raises(HubError, match=r'^user/public: is public already; make it private'):
        push_to_hub(published, 'user/public', private=True)
    assert list(hub.repositories['user/public'].files) == ['.gitattributes']


def test_pushing_is_refused(hub, published, checkpoint, monkeypatch, tmp_path):
    def fails(error, match, *arguments, **options):
        with pytest.raises(error, match=match) as raised:
            push_to_hub(*arguments, **options)
        assert '\n' not in str(raised.value) and 'hf_' not in str(raised.value)

    for name in ('name', 'a/b/c', 'user/na me', '', 'user/'):
        fails(ConfigError, 'is no name of a repository: expected user/name', checkpoint, name)
    fails(HubError, '^user/x: the hub does not accept the token', published, 'user/x', token='hf_old')
    fails(HubError, r'^user/x: this token may not push it \(You don', published, 'user/x', token='hf_reads')
    fails(HubError, r'^other/x: this token may not push it \(You don.*namespace "other"', published, 'other/x')
    fails(ConfigError, 'is published already; license', published, 'user/x', license='other')
    fails(FileNotFoundError, 'gone does not exist', tmp_path / 'gone', 'user/x')
    fails(ConfigError, 'has no config.py, so tools/publish.py did not write it', checkpoint.parent, 'user/x')
    assert not hub.repositories
    fails(
        HubError,
        r'^user/y: the hub refuses to push it .*"license" must be one of',
        checkpoint,
        'user/y',
        license='mine',
    )
    copy = shutil.copytree(published, tmp_path / 'copy')
    (copy / 'secrets.txt').write_text('mine')
    fails(ConfigError, 'holds secrets.txt, which is no part of a published model', copy, 'user/x')
    (copy / 'secrets.txt').rename(copy / '.secrets')
    weights = weights_of(copy)
    weights.write_bytes(weights.read_bytes()[:-1])
    fails(CheckpointError, 'is not the file that was published under this name', copy, 'user/x')
    shutil.copy(weights_of(published), weights)
    push_to_hub(copy, 'user/x')
    assert '.secrets' not in hub.repositories['user/x'].files
    monkeypatch.delenv('HF_TOKEN')
    asked = len(hub.requests)
    fails(HubError, "^user/x: pushing needs a token with write access: log in with 'hf auth login' or", copy, 'user/x')
    with pytest.raises(HubError, match='needs a token'):
        check_push('user/x')
    assert len(hub.requests) == asked


def test_no_network(use, published, monkeypatch):
    use('http://127.0.0.1:9')
    failure = r'^user/name: the request to the hub at http://127.0.0.1:9 failed \(Connect\w+: .*\); nothing was {}ed$'
    with pytest.raises(HubError, match=failure.format('load')):
        from_pretrained('user/name')
    with pytest.raises(HubError, match=failure.format('push')):
        push_to_hub(published, 'user/name')
    absent = '^user/name: is not in the cache; load it once without local_files_only and HF_HUB_OFFLINE$'
    with pytest.raises(HubError, match=absent):
        from_pretrained('user/name', local_files_only=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(HubError, match=absent):
        from_pretrained('user/name')


def test_the_config_of_a_stranger_runs_nothing(hub, published, tmp_path, trained):
    trace = tmp_path / 'code-ran'
    text = (published / 'config.py').read_text()

    def refused(match, error=ConfigError, **changes):
        hub.add('user/name', {**files(published), **changes})
        with pytest.raises(error, match=match) as raised:
            from_pretrained('user/name', 'cpu')
        assert not trace.exists() and '\n' not in str(raised.value)

    remedy = r'could run any code; load it with mmseg_volo.init_model\(CONFIG, WEIGHTS\), if you trust it$'
    for code in (
        f'import os\nos.mkdir({str(trace)!r})\n',
        f"model = dict(type='os.mkdir', path={str(trace)!r})\n",
        "custom_imports = dict(imports=['antigravity'])\n",
    ):
        refused(f'^user/name: its config is refused .*{remedy}', **{'config.py': f'{text}\n{code}'.encode()})
    refused('^user/name: its config is refused', **{'config.py': b'\xff\xfe\0'})
    refused('^user/name: model: not set', **{'config.py': b'a = 1'})
    wider = text.replace('channels=16', 'channels=24')
    allowing = wider.replace("test_cfg=dict(mode='whole')", "test_cfg=dict(mode='whole', allow_mismatch=True)")
    assert wider != text and allowing != wider
    for other in (wider, allowing):
        refused('of other shape', CheckpointError, **{'config.py': other.encode()})
    weights = weights_of(published)
    refused('cut off', CheckpointError, **{weights.name: weights.read_bytes()[:-100]})
    hub.add('user/name', {**files(published), f'x/{weights.name}': b'of another tool'})
    assert_same(from_pretrained('user/name', 'cpu'), trained)
    assert_same(from_pretrained('user/name', 'cpu', local_files_only=True), trained)
    assert not hub.asked('GET', '/x/') and not hub.asked('GET', '.pth')


def test_the_metadata_has_the_hubs_keys(published):
    head = yaml.safe_load((published / 'README.md').read_text().split('---')[1])
    assert head.keys() <= {'license', 'library_name', 'pipeline_tag', 'tags', 'datasets', 'metrics', 'model-index'}
    assert head['tags'] == ['semantic-segmentation', 'volo', 'upernet', 'mmsegmentation', 'pytorch']


THREE_LINES = """
import sys, torch, mmseg_volo

checkpoint, config, first = sys.argv[1:]
print(mmseg_volo.push_to_hub(checkpoint, 'user/second', license='apache-2.0'))
image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected = mmseg_volo.init_model(config, checkpoint, 'cpu')(image)
    assert all(torch.equal(mmseg_volo.from_pretrained(name, 'cpu')(image), expected) for name in (first, 'user/second'))
"""


@pytest.mark.slow
def test_the_tool_and_three_lines(checkpoint, tmp_path):
    """In processes of their own, whose client reads HF_ENDPOINT and HF_TOKEN as a user sets them."""
    config, out = tmp_path / 'config.py', tmp_path / 'out'
    config.write_text(CONFIG)
    push = [checkpoint, out, '--license', 'apache-2.0', '--push-to']
    with LocalHub() as hub:
        env = hub.environment(tmp_path / 'home')
        said = tool('publish.py', *push, 'other/first', fails=True, **env).splitlines()[-1]
        assert said.startswith('error: other/first: this token may not push it (') and not hub.repositories
        said = tool('publish.py', *push, 'user/first', '--private', **env)
        there = hub.repositories['user/first']
        assert there.private and f'\npushed: {hub.url}/user/first/commit/{there.refs["main"]}\n' in said
        assert files(out).items() <= there.files.items()
        said = run(sys.executable, '-W', 'ignore', '-c', THREE_LINES, checkpoint, config, 'user/first', **env)
        assert f'{hub.url}/user/second/commit/' in said
        env['HF_TOKEN'] = ''
        said = tool('publish.py', checkpoint, tmp_path / 'never', '--push-to', 'user/third', fails=True, **env)
        assert said.splitlines()[-1].startswith('error: user/third: pushing needs a token with write access: log in')
        assert not (tmp_path / 'never').exists() and len(hub.repositories) == 2
