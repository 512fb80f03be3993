"""The model card states the facts, and no value from a file becomes Markdown, HTML or a shell command."""

import re
import shlex
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from mmengine.config import Config
from small_runs import ROOT
from timm.models import get_pretrained_cfg

from mmseg_volo.publish.card import facts_of, metafile, model_card
from mmseg_volo.publish.results import Result
from mmseg_volo.publish.shareable_config import shareable

EVIL = '<script>alert(1)</script> ![x](http://e.vil) [a](b) `code` | $(touch EVIL) "\'&lt;\n\n# H\n---\n```\n- \u202e'
META = dict(iter=160000, seed=0, world_size=4, sealed_by='mmseg_volo 0.1', mmengine_version='0.10', experiment_name='x')


def config_of(name: str = 'volo_d1_ade20k') -> dict:
    return Config.fromfile(ROOT / f'configs/{name}.py').to_dict()


def result(**changes) -> Result:
    values = dict(
        aug_test=False,
        dataset='CamVid',
        folder='images/val',
        data='CamVid val',
        images=1,
        date='2026-01-01',
        classes=['road', 'car'],
        iou=np.array([61.25, np.nan]),
        pixels=np.array([30, 0]),
        miou=61.25,
        pixel_accuracy=70.0,
        mean_accuracy=65.0,
        missed=['car'],
        views='',
        options=[],
        how='single-scale',
        device='cpu',
    )
    return Result(**{**values, **changes})


def facts(trained: dict | None = None, meta: dict | None = None, **changes) -> dict:
    trained = trained or config_of()
    others = dict(
        name='tiny',
        repo=None,
        weights='tiny-01234567.pth',
        safetensors='tiny-89abcdef.safetensors',
        classes=['road', 'car'],
        parameters=33_700_000,
        precision='float32',
        averaged=False,
        best=False,
        license='apache-2.0',
        hardware=dict(devices='4 × NVIDIA H100', PyTorch='2.6.0'),
        results=[result()],
    )
    return {**facts_of(shareable(trained), trained, META if meta is None else meta), **others, **changes}


def row(card: str, name: str) -> str | None:
    found = re.search(rf'^\| {name} \| (.*) \|$', card, re.MULTILINE)
    return found and found[1]


def test_the_training_is_that_of_the_config():
    config = config_of()
    card = model_card(facts(config))
    assert row(card, 'data') == 'ADE20K (`ADE20KDataset`, `images/training`)'
    assert row(card, 'iterations') == f'160,000 of {config["train_cfg"]["max_iters"]:,}'
    assert row(card, 'batch') == f'{4 * config["train_dataloader"]["batch_size"]} images (4 processes)'
    assert row(card, 'crops') == '512 × 512 (height × width)'
    assert f'lr {config["optim_wrapper"]["optimizer"]["lr"]:g}' in row(card, 'optimizer')
    assert 'fused' not in row(card, 'optimizer')
    for step in config['param_scheduler']:
        assert f'{step["type"]} (iteration {step["begin"]:,} to {step["end"]:,}, ' in row(card, 'schedule')
    assert row(card, 'start') == 'a backbone from `' + config['model']['backbone']['init_cfg']['checkpoint'] + '`'
    assert (row(card, 'seed'), row(card, 'hardware')) == ('0', '4 × NVIDIA H100')
    assert row(card, 'software') == r'mmseg\_volo 0.1, mmengine 0.10, PyTorch 2.6.0'
    assert 'VOLO-D1 and a UPerNet head, 33.7 M parameters, trained on ADE20K' in card


def test_the_start_is_stated_as_far_as_it_is_known():
    config = config_of()
    init = config['model']['backbone'].pop('init_cfg')
    assert row(model_card(facts(config)), 'start') == 'random weights'
    assert row(model_card(facts(config, meta={})), 'start') is None  # not the checkpoint of a run
    assert row(model_card(facts(config, meta={})), 'software') == 'PyTorch 2.6.0'
    config['load_from'] = '/home/alice/run/iter_9.pth'
    assert row(model_card(facts(config)), 'start') == 'the weights of another run, `iter_9.pth`'
    config['model']['backbone']['init_cfg'] = dict(init, checkpoint='/home/alice/d1.pth.tar')
    config['resume'] = True  # load_from was not used
    card = model_card(facts(config))
    assert row(card, 'start') == 'a backbone from `d1.pth.tar`' and 'alice' not in card


def test_the_terms_of_the_pretrained_weights_are_stated():
    terms = 'asks people to contact the authors for commercial use'
    config = config_of()
    for meta in (META, {}):
        assert terms in model_card(facts(config, meta=meta))
    assert all(
        get_pretrained_cfg(f'volo_{size}.sail_in1k').license == 'apache-2.0'
        for size in ('d1_224', 'd1_384', 'd2_384', 'd3_448', 'd4_448', 'd5_512')
    )
    config['model']['backbone'].pop('init_cfg')
    assert terms not in model_card(facts(config))
    config['model']['backbone'] = dict(type='ResNetV1c')  # neither VOLO's terms nor its citation
    card = model_card(facts(config, meta={}))
    assert terms not in card and 'VOLO: Vision' not in card and 'volo' not in ModelCard(card).data.tags
    assert yaml.safe_load(metafile(facts(config)))['Collections'] == []


def test_limits_and_licence_follow_the_facts():
    config = config_of()
    config['model']['test_cfg'] = dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    config['custom_imports'] = dict(imports=['mmseg_volo', 'mine'])
    config['val_dataloader']['dataset']['data_prefix'] = dict(img_path='images/val/')
    card = model_card(facts(config, license=None, best=True, averaged=True))
    for words in (
        'windows of 512 × 512 pixels',
        '`config.py` imports `mine`',
        '`images/val` were the validation set of the training, and this checkpoint was kept as the best',
        'No licence is stated yet',
        'exponential moving average',
        'evaluated on CamVid val (`images/val`).',
        '- single-scale: CamVid val (`images/val`), 1 image; 2026-01-01, on a CPU',
    ):
        assert words in card
    card = model_card(facts(results=[], classes=None))
    assert 'No evaluation came with this checkpoint' in card and 'Its files hold no evaluation' in card
    assert 'one of 150 classes; no file names them' in card and 'names and colours' not in card
    assert 'tools/test.py' not in card


def hostile(other: bool = False) -> dict:
    """Facts with a hostile text in every value that a file provides; ``other`` takes the template's other branches."""
    config = config_of()
    for which in ('train', 'val', 'test'):
        config[f'{which}_dataloader']['dataset'].update(
            type=f'{EVIL}Dataset', data_prefix=dict(img_path=EVIL), data_root=EVIL
        )
    config['test_dataloader']['dataset']['pipeline'] = [dict(type='Resize', scale=(EVIL, EVIL))]
    config['model']['decode_head'].update(type=EVIL, num_classes=EVIL)
    config['model']['test_cfg'] = dict(mode='slide', crop_size=(EVIL, EVIL))
    config['optim_wrapper'] = dict(type=EVIL, accumulative_counts=EVIL, optimizer=dict(type=EVIL, **{EVIL: EVIL}))
    config['param_scheduler'] = [dict(type=EVIL, by_epoch=False, **{EVIL: EVIL})]
    config['train_cfg'], config['crop_size'] = dict(max_iters=EVIL), (EVIL, EVIL)
    config['load_from'], config['custom_imports'] = EVIL, dict(imports=[EVIL])
    meta = dict(iter=EVIL, seed=EVIL, world_size=1, sealed_by=EVIL, mmengine_version=EVIL)
    one = result(
        dataset=EVIL, folder=EVIL, data=EVIL, date=EVIL, classes=[EVIL, 'car'], missed=[EVIL], how=EVIL, device=EVIL,
        views=EVIL, options=[f'a={EVIL}', f'{EVIL}=1'],
    )  # fmt: skip
    if other:
        del config['load_from']
        config['model']['backbone'] = dict(type=EVIL, init_cfg=dict(type='Pretrained', checkpoint=EVIL))
        one.options = ['a=1']
    given = dict(
        hardware=dict(devices=EVIL, PyTorch=EVIL), results=[one, one], classes=None if other else [EVIL, 'car']
    )
    return facts() | facts_of(config, config, meta) | given


@pytest.mark.parametrize('other', [False, True])
def test_values_from_files_are_shown_as_text(other):
    card = ModelCard(model_card(hostile(other))).text
    tokens = MarkdownIt('commonmark').enable('table').parse(card)
    inner = [token for block in tokens for token in (block, *(block.children or ()))]
    kinds = {token.type for token in inner}
    assert not kinds & {'html_block', 'html_inline', 'image', 'code_block', 'blockquote_open', 'hr'}
    links = {token.attrs['href'] for token in inner if token.type == 'link_open'}
    assert {re.match('https://[^/]+', link)[0] for link in links} <= {'https://arxiv.org', 'https://github.com'}
    benign = MarkdownIt('commonmark').enable('table').parse(ModelCard(model_card(facts(license=None))).text)

    def headings(parsed):
        return [text.content for one, text in pairwise(parsed) if one.type == 'heading_open']

    assert headings(tokens) == [heading for heading in headings(benign) if not (other and heading == 'Citation')]
    rows = ''.join(token.type[0:2] for token in tokens if token.type in ('tr_open', 'td_open', 'th_open'))
    assert set(rows.replace('tr', ' ').split()) == {'thth', 'tdtd', 'th' * 5, 'td' * 5, 'th' * 4, 'td' * 4}
    fences = [token.info for token in tokens if token.type == 'fence']
    assert fences == (['bash', 'python', 'python', 'bash'] if other else ['python', 'python', 'bash', 'bibtex'])
    # No command with an option that cannot be shown on one line.
    assert ('tools/test.py' in card) == other and '\u202e' not in card
    shown = ''.join(token.content for token in inner if token.type == 'text')
    assert '<script>alert(1)</script> ![x](http://e.vil) [a](b) `code` | $(touch EVIL)' in shown


def test_values_from_files_are_shown_as_text_in_the_metadata():
    data = ModelCard(model_card(hostile())).data
    assert data.eval_results[0].dataset_name == EVIL and data.license == 'apache-2.0'
    model = yaml.safe_load(metafile(hostile()))['Models'][0]
    assert model['Results'][0]['Dataset'] == EVIL and model['Weights'] == 'tiny-01234567.pth'


@pytest.mark.parametrize(
    'value', ['$(touch EVIL)', '`touch EVIL`', '"; touch EVIL; "', "'; touch EVIL #", '(64, 64)', '!!']
)
def test_commands_are_quoted_for_the_shell(value, tmp_path):
    option = f'model.test_cfg.mode={value}'
    card = model_card(facts(results=[result(), result(aug_test=True, options=[option])]))
    block = re.findall(r'```bash\n(.*?)```', card, re.DOTALL)[0]
    fake = 'python() { printf "%s\\n" "$@"; }\n'
    done = subprocess.run(['bash', '-c', fake + block], cwd=tmp_path, capture_output=True, text=True, check=True)
    first = ['tools/test.py', 'config.py', 'tiny-01234567.pth']
    assert done.stdout.splitlines() == [*first, *first, '--aug-test', '--cfg-options', option]
    assert not list(tmp_path.iterdir()) and len(block.splitlines()) == 2
    assert shlex.split(block.splitlines()[0]) == ['python', *first]


def test_the_metadata_is_the_hubs():
    one = result(aug_test=True, views='scales 0.5, 1.0', options=['model.test_cfg.precision=bf16'])
    data = ModelCard(model_card(facts(results=[result(), one]))).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        'apache-2.0',
        'mmseg_volo',
        'image-segmentation',
    )
    names = [found.metric_name for found in data.eval_results]
    assert [found.metric_value for found in data.eval_results] == [61.25, 70.0] * 2 and len(set(names)) == 4
    assert names[2] == 'mIoU in percent, multi-scale, scales 0.5, 1.0, model.test_cfg.precision=bf16, images: 1'
    assert data.eval_results[0].dataset_split == 'val' and data.datasets == ['ade20k']
    assert 'model-index' not in model_card(facts(results=[]))
    model = yaml.safe_load(metafile(facts(results=[result(), one])))['Models'][0]
    assert [found['Metrics'] for found in model['Results']] == [{'mIoU': 61.25}, {'mIoU(ms+flip)': 61.25}]
    assert model['Metadata']['Architecture'] == ['VOLO-D1', 'UPerNet'] and model['License'] == 'apache-2.0'
