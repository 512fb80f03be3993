"""The documents tell the truth: the site builds, links lead somewhere, commands and code run as they stand there."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from drawn_polygons import write_coco
from drawn_videos import draw_video
from local_hub import LocalHub
from markdown_it import MarkdownIt
from mmengine.config import Config
from mmseg.registry import MODELS

from mmseg_volo.datasets.street_scenes import draw_street_scenes

# Sphinx warns its own extensions and MyST of its next versions.
pytestmark = pytest.mark.filterwarnings('ignore::PendingDeprecationWarning')

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
DOCUMENTS = [ROOT / 'README.md', ROOT / 'configs/README.md', *PAGES]
SHELL = ('bash', 'sh', 'console')
# Pages whose marked commands run one after the other in one folder.
RUN = ('first_steps', 'own_data', 'bands', 'inference', 'deployment')
RUN_HERE = 'tests/test_docs.py::test_the_commands_run'
PYTHON_HERE = 'tests/test_docs.py::test_python_blocks_run'
SMALL = """
_base_ = './full_NAME'
arch = dict(depths=(1, 1, 1, 1), dims=(24, 48, 48, 48), heads=(1, 2, 2, 2), mlp_ratios=1, stem_width=8)
model = dict(
    backbone=dict(arch=dict(_delete_=True, **arch), init_cfg=None),
    decode_head=dict(in_channels=[24, 48, 48, 48], channels=16),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""
SCENES = dict(train=4, val=2, size=(64, 128))
SMALL_SCENES = f"""
train_dataloader = dict(batch_size=2, dataset=dict(**{SCENES}))
val_dataloader = dict(dataset=dict(**{SCENES}))
test_dataloader = val_dataloader
"""
# Cityscapes' train ids, which the scenes are drawn with, as CamVid's.
CAMVID_IDS = np.full(256, 255, np.uint8)
CAMVID_IDS[:19] = [3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10]


class Block(NamedTuple):
    """A code block: its document, line, language, text and the marks that the comment before it makes."""

    document: Path
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        return f'{self.document.relative_to(ROOT)}:{self.line}'


@cache
def tokens(document: Path) -> list:
    return MarkdownIt('commonmark').enable('table').parse(document.read_text(encoding='utf-8'))


@cache
def blocks(document: Path) -> list[Block]:
    found, before = [], ''
    for token in tokens(document):
        if token.type == 'fence' and not token.info.startswith('{'):
            marks = re.findall(r'<!--\s*(tested|run|not run): (.+?)\s*-->', before, re.DOTALL)
            language = token.info.strip().split(' ')[0]
            found.append(Block(document, token.map[0] + 1, language, token.content, dict(marks)))
        before = token.content if token.type == 'html_block' else ''
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, as words, without what goes before and after: variables, pipes, comments."""
    out = []
    for line in block.text.replace('\\\n', ' ').splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line.removeprefix('$ '), posix=True, punctuation_chars='&|;')
        lexer.whitespace_split = True
        for word in [*lexer, ';']:
            if word and set(word) <= set('&|;'):
                out += [words] if words else []
                words = []
            elif words or not re.fullmatch(r'[A-Z_]+=\S*', word):
                words.append(word)
    return out


def shell_blocks(documents: list[Path]) -> list[Block]:
    return [block for document in documents for block in blocks(document) if block.language in SHELL]


def python_blocks(documents: list[Path]) -> list[Block]:
    return [block for document in documents for block in blocks(document) if block.language == 'python']


def inlines(document: Path):
    for token in tokens(document):
        yield from token.children or ()


@cache
def anchors(document: Path) -> set[str]:
    """Of a document's headings, and of those it includes, as GitHub makes them."""
    found, names = set(), tokens(document)
    for token in names:
        if token.type == 'fence' and token.info.startswith('{include}'):
            found |= anchors((document.parent / token.info.split()[1]).resolve())
    for heading, text in pairwise(names):
        if heading.type == 'heading_open':
            title = ''.join(part.content for part in text.children)
            found.add(re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-'))
    return found


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = [token.attrs.get('href') or token.attrs.get('src') for token in inlines(document)]
    links = [link for link in links if link and not re.match(r'\w+:', link)]
    wrong = []
    for link in links:
        path, _, anchor = link.partition('#')
        target = (document.parent / path).resolve() if path else document
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong
    assert links or document.name not in ('README.md', 'index.md') or document.parent.name == 'configs'


def test_pictures_have_a_text_and_are_small():
    for document in DOCUMENTS:
        for token in inlines(document):
            if token.type == 'image':
                assert len(token.content) > 10, (document, token.attrs)
    for picture in (ROOT / 'docs').rglob('*.png'):
        assert picture.stat().st_size < 700_000, picture


def test_files_that_are_named_are_there():
    pattern = r'(?<![\w/.-])(?:configs|tools|docs|mmseg_volo|tests)/[\w/]+\.(?:py|sh|md|png)\b'
    for document in DOCUMENTS:
        text = document.read_text(encoding='utf-8')
        made = {'configs/mine.py', 'configs/fields.py'}  # by the reader of the page
        missing = {name for name in re.findall(pattern, text) if not (ROOT / name).is_file()} - made
        assert not missing, document


def test_every_shell_block_says_how_it_was_tried():
    for block in shell_blocks(PAGES):
        assert len(block.marks) == 1, f'{block.place}: one of <!-- tested: … -->, <!-- run: … -->, <!-- not run: … -->'
        for name in filter(None, re.split(r',\s*', block.marks.get('tested', ''))):
            file, _, function = name.partition('::')
            tree = ast.parse((ROOT / file).read_text(encoding='utf-8'))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function.startswith('test_') and function in functions, f'{block.place}: {name}'
        if RUN_HERE in block.marks.get('tested', ''):
            assert block.document.stem in RUN, block.place


@cache
def tool_reference():
    sys.path.insert(0, str(ROOT / 'docs'))
    try:
        return pytest.importorskip('tool_reference', reason='needs Sphinx: pip install -e ".[docs]"')
    finally:
        del sys.path[0]


@cache
def parser_of(name: str):
    return tool_reference().parser_of(ROOT / 'tools' / name)


def as_python(words: list[str]) -> list[str] | None:
    """Name and arguments of the Python tool behind a command; None where there is none."""
    before = {
        'tools/dist_train.sh': ('train.py', 0, 1),
        'tools/dist_test.sh': ('test.py', 0, 2),
        'tools/slurm_train.sh': ('train.py', 2, 3),
        'tools/slurm_test.sh': ('test.py', 2, 4),
    }
    if words[0] in before:
        name, first, last = before[words[0]]
        rest = words[1:]
        assert len(rest) > last - (first > 0), words
        # The words of the launcher itself are left out: GPUS, or PARTITION and JOB_NAME.
        return [name, *(rest[2:] if first else rest[:last] + rest[last + 1 :])]
    if words[0] == 'python' and len(words) > 1 and words[1].startswith('tools/'):
        return [words[1].removeprefix('tools/'), *words[2:]]
    return None


def test_the_tools_take_the_arguments(capsys):
    tried = set()
    for block in shell_blocks(DOCUMENTS):
        for words in commands(block):
            command = as_python(words)
            if command is None:
                continue
            # [--option] in a command is one that may be left out
            name, *arguments = (word.strip('[]') for word in command)
            try:
                parser_of(name).parse_args(arguments)
            except SystemExit:
                pytest.fail(f'{block.place}: {shlex.join(words)}\n{capsys.readouterr().err}')
            tried.add(name)
    assert len(tried) >= 8, tried


def test_wrong_arguments_are_seen(capsys):
    with pytest.raises(SystemExit):
        parser_of('train.py').parse_args(['config.py', '--no-such-option'])
    assert 'no-such-option' in capsys.readouterr().err


def test_all_tools_are_in_the_reference():
    text = (ROOT / 'docs/commands.md').read_text(encoding='utf-8')
    for tool in (ROOT / 'tools').iterdir():
        if tool.suffix in ('.py', '.sh'):
            assert (f'{{tool}} {tool.name}' if tool.suffix == '.py' else f'`tools/{tool.name} ') in text, tool.name


def test_python_compiles():
    found = python_blocks(DOCUMENTS)
    for block in found:
        compile(block.text, block.place, 'exec')
        if block.document in PAGES:
            assert block.marks.get('tested') in (PYTHON_HERE, RUN_HERE), block.place
    assert len(found) > 5


def make_place(folder: Path) -> Path:
    """A folder like a clone with data in it: the tools, drawn pictures, the configs with a tiny VOLO in them."""
    (folder / 'configs').mkdir(parents=True)
    shutil.copytree(ROOT / 'tools', folder / 'tools')  # the quickstart looks for its config beside itself
    for path in (ROOT / 'configs').iterdir():
        (folder / 'configs' / path.name).symlink_to(path)
    shrink(folder / 'configs/volo_d1_camvid_laptop.py', '')
    shrink(folder / 'configs/volo_d1_quickstart.py', SMALL_SCENES)
    draw_street_scenes(folder / 'data/street_scenes', **SCENES)
    for split in ('train', 'val'):
        for kind in ('images', 'labels'):
            (folder / 'data/camvid' / kind / split).mkdir(parents=True)
    draw_street_scenes(folder / 'drawn', train=6, val=3, size=(90, 120), seed=1)
    for image in (folder / 'drawn/leftImg8bit').rglob('*.png'):
        split, name = image.parts[-3], image.name.replace('_leftImg8bit', '')
        label = str(image).replace('leftImg8bit.png', 'gtFine_labelTrainIds.png').replace('leftImg8bit', 'gtFine')
        image.rename(folder / 'data/camvid/images' / split / name)
        ids = CAMVID_IDS[cv2.imread(label, cv2.IMREAD_GRAYSCALE)]
        cv2.imwrite(str(folder / 'data/camvid/labels' / split / name), ids)
    write_coco(folder / 'annotated')
    draw_video(folder / 'drive.mp4')
    return folder


def shrink(config: Path, more: str) -> None:
    content = config.read_text(encoding='utf-8')
    config.unlink()
    config.with_name(f'full_{config.name}').write_text(content, encoding='utf-8')
    config.write_text(SMALL.replace('NAME', config.name) + more, encoding='utf-8')


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(make_place(tmp_path / 'clone'))
    return Path.cwd()


def test_python_blocks_run(place):
    """Page by page, on models with random weights where the pages have trained ones."""
    for name, iterations in (('volo_d1_quickstart', 240), ('volo_d1_camvid_laptop', 500)):
        config = Config.fromfile(f'configs/{name}.py')
        checkpoint = Path(f'work_dirs/{name}/iter_{iterations}.pth')
        checkpoint.parent.mkdir(parents=True)
        torch.save(dict(state_dict=MODELS.build(config.model).state_dict()), checkpoint)
    for page in PAGES:
        names: dict = {}
        for block in python_blocks([page]):
            if block.marks.get('tested') == PYTHON_HERE:
                exec(compile(block.text, block.place, 'exec'), names)


OWN = """
max_iters = 6
model.update(auxiliary_head=None)
train_cfg = dict(max_iters=max_iters, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=3))
"""


@pytest.fixture
def local_hub():
    with LocalHub() as hub:
        yield hub


@pytest.mark.slow
def test_the_commands_run(place, local_hub):
    """Each command that is marked with this test's name, in the order of the pages, and that it leaves what it says."""
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    env.update(local_hub.environment(place / 'home'))
    ran = 0
    for page in (ROOT / 'docs' / f'{name}.md' for name in RUN):
        for block in blocks(page):
            if RUN_HERE not in block.marks.get('tested', ''):
                continue
            shell = ['bash', '-euo', 'pipefail', '-c'] if block.language in SHELL else [sys.executable, '-c']
            done = subprocess.run(
                [*shell, block.text], capture_output=True, text=True, env=env, timeout=900, check=False
            )
            assert done.returncode == 0, f'{block.place}\n{block.text}\n{done.stdout[-3000:]}{done.stderr[-5000:]}'
            for words in commands(block) if block.language in SHELL else ():
                for option, value in pairwise(words):
                    if option in ('--out', '--plot', '--fix-report'):
                        assert Path(value).exists(), f'{block.place}: {option} {value} is not there'
            if Path('configs/mine.py').is_file() and not Path('configs/full_mine.py').is_file():
                shrink(Path('configs/mine.py'), OWN)
            ran += 1
    assert ran >= 8


@pytest.mark.parametrize(
    ('name', 'there'),
    [
        ('mmseg_volo.inference.Predictor.predict', True),
        ('torch.nn.Module', True),
        ('mmseg_volo.inference.predictor.Predict', False),
    ],
)
def test_names_in_docstrings_are_looked_up(name, there):
    assert tool_reference()._exists(name) is there


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """The site, built without a warning."""
    build = pytest.importorskip('sphinx.cmd.build', reason='needs Sphinx: pip install -e ".[docs]"')
    out = tmp_path_factory.mktemp('site')
    options = ['-n', '-W', '--keep-going', '-q', '-E', '-d', str(out / 'doctrees')]
    assert build.build_main([*options, str(ROOT / 'docs'), str(out / 'html')]) == 0
    return out / 'html'


def test_the_site_builds_without_warnings(site):
    for page in PAGES:
        assert (site / f'{page.stem}.html').is_file()
    commands = (site / 'commands.html').read_text(encoding='utf-8')
    assert '--allow-mismatch' in commands and '--fix-report' in commands


def test_the_site_needs_no_network(site):
    loaded = re.compile(r'<(?:link|script|img|iframe)[^>]+(?:href|src)="(?:https?:)?//[^"]+"')
    for page in site.rglob('*.html'):
        assert not loaded.findall(page.read_text(encoding='utf-8')), page.name
    for style in site.rglob('*.css'):
        assert not re.search(r'(?:@import|url\()\s*["\']?https?:', style.read_text(encoding='utf-8')), style.name
