"""The report of ``tools/report.py`` on work dirs like those that mmengine and the evaluation hook write."""

import importlib.util
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmseg_volo.errors import ConfigError
from mmseg_volo.report import write_report
from mmseg_volo.report.figures import Series, confusions, curves, heat_map
from mmseg_volo.report.reading import Run, flat_config, read_run, read_runs

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """model = dict(
    backbone=dict(arch='d1', type='VOLO'), decode_head=dict(type='LeanUPerHead'))
optim_wrapper = dict(optimizer=dict(lr=0.001))
train_cfg = dict(max_iters=40)
train_dataloader = dict(batch_size=4, dataset=dict(type='CamVidDataset'))
"""
LOG = """2026/01/01 00:00:00 - mmengine - INFO -
System environment:
    Python: 3.11.7
    PyTorch: 2.15.0

Runtime environment:
    seed: 7
    GPU number: 2
"""
VOID = ('meta', 'img', 'br', 'hr', 'input', 'link')


class Page(HTMLParser):
    """Parse a page and check that it works with a screen reader, without network and without scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ''
        self.summaries = 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.text += ' '
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f'</{tag}> closes {self.open[-1:]}'
        self.open.pop()

    def handle_data(self, data):
        if not any(tag in ('style', 'title') for tag, _ in self.open):
            self.text += data

    def check(self) -> 'Page':
        assert not self.open
        levels = [int(tag[1]) for tag, _ in self.tags if re.fullmatch('h[1-6]', tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert not {'script', 'link', 'iframe', 'object'} & {tag for tag, _ in self.tags}
        ids = [found['id'] for _, found in self.tags if 'id' in found]
        assert len(ids) == len(set(ids))
        for tag, found in self.tags:
            assert not any(name.startswith('on') for name in found)
            if tag == 'img':
                assert found['alt'] and found['src'].startswith('data:image/')
            if found.get('role') in ('img', 'region'):
                assert found['aria-label']
            for name in ('href', 'xlink:href', 'src'):
                target = found.get(name, '#')
                assert target.startswith(('#', 'data:image/'))
                assert not target.startswith('#') or target == '#' or target[1:] in ids
        plots = [i for i, (tag, _) in enumerate(self.tags) if tag == 'svg']
        assert all(self.tags[i - 1][1].get('role') == 'img' for i in plots)
        self.text = re.sub(r'\s+', ' ', self.text)
        return self


def scalar(step: int, **more) -> dict:
    loss = 2 / step
    parts = {'loss': loss, 'decode.loss_ce': 0.75 * loss, 'decode.acc_seg': 50.0, 'aux.loss_ce': 0.25 * loss}
    return dict(base_lr=0.1, lr=0.1, grad_norm=3.0, time=0.5, data_time=0.01, iter=step, step=step, **parts, **more)


def write_stamp(folder: Path, stamp: str, rows=(), log: str = LOG, config: str = CONFIG, tail: str = '') -> Path:
    place = folder / stamp
    (place / 'vis_data').mkdir(parents=True)
    (place / 'vis_data/config.py').write_text(config)
    (place / f'{stamp}.log').write_text(log)
    if rows:
        (place / 'vis_data/scalars.json').write_text('\n'.join(map(json.dumps, rows)) + '\n' + tail)
    return place


def write_record(stamp: Path, name: str = 'test', confusion=((90, 10), (40, 60)), classes=('road', 'sky'), **more):
    """Write a record with two images, of which the second does not exist."""
    place = stamp / 'evaluation'
    (place / 'pictures').mkdir(parents=True, exist_ok=True)
    image = stamp / 'seen.png'
    cv2.imwrite(str(image), np.full((40, 600, 3), 120, np.uint8))
    truth = np.zeros((40, 600), np.uint8)
    truth[:, 300:], truth[:5] = 1, 255
    cv2.imwrite(str(place / 'pictures/truth.png'), truth)
    cv2.imwrite(str(place / 'pictures/prediction.png'), np.where(truth == 255, 0, truth // 2))
    kept = dict(prediction='pictures/prediction.png', truth_map='pictures/truth.png', pixels=100)
    record = dict(
        kind=name.split('_')[0],
        iteration=40,
        checkpoint='iter_40.pth',
        aug_test=False,
        date='2026-01-01T00:00:00+00:00',
        dataset=dict(type='CamVidDataset', data_root='data', img_path='images/val', pictures=2),
        classes=list(classes),
        palette=[[i % 256, 0, 200] for i in range(len(classes))],
        ignore_index=255,
        confusion=np.array(confusion).tolist(),
        metrics=dict(mIoU=59.67, aAcc=75.0, mAcc=75.0),
        pictures=[
            dict(path=str(image), truth=None, mIoU=0.25, accuracy=0.5, **kept),
            dict(path='gone/away.png', truth=None, mIoU=0.75, accuracy=0.9, **kept),
        ],
        calibration=dict(bins=[dict(low=0.8, high=0.9, pixels=200, confidence=0.85, accuracy=0.75)], ece=0.1, step=7),
        boundary=dict(iou=[0.25, None], mIoU=0.125, ratio=0.02),
        mIoU_of_pictures={'5%': 0.2, '50%': 0.5, '95%': 0.75},
        seconds_per_picture=0.25,
        environment=dict(torch='2.15.0', device='cpu'),
    )
    (place / f'{name}.json').write_text(json.dumps({**record, **more}))


def small_run(folder: Path, **more) -> Path:
    rows = [scalar(10), scalar(20), scalar(30), scalar(40, memory=1234)]
    rows.insert(2, {'mIoU': 30.0, 'aAcc': 60.0, 'mAcc': 40.0, 'val/loss': 0.5, 'time': 0.1, 'step': 20})
    rows.append({'mIoU': 25.0, 'aAcc': 61.0, 'mAcc': 41.0, 'val/loss': 0.25, 'time': 0.1, 'step': 40})
    stamp = write_stamp(folder, '20260101_000000', rows)
    write_record(stamp, **more)
    return folder


def page_of(*folders: Path) -> Page:
    return Page(write_report(folders, folders[0] / 'report.html').read_text(encoding='utf-8')).check()


def tool(*arguments) -> int | str | None:
    """Run the tool; return its exit status or message."""
    spec = importlib.util.spec_from_file_location('report_tool', ROOT / 'tools/report.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, ['report.py', *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            module.run_tool(module.main)
        return ended.value.code
    finally:
        sys.argv = before


def test_the_report_of_one_run(tmp_path):
    folder = small_run(tmp_path / 'run')
    (folder / 'iter_40.pth').touch()
    assert tool(folder) == 0
    html = (folder / 'report.html').read_text(encoding='utf-8')
    page = Page(html).check()
    assert not re.search(r'https?:|//[a-z]', re.sub(r'base64,[\w+/=]*', '', html))
    assert 'var(--s0)' in html and 'prefers-color-scheme: dark' in html and '#070800' not in html
    for text in (
        'VOLO d1 LeanUPerHead',
        'CamVidDataset, images/val',
        'Boundary mIoU (%) 12.50 mIoU of single images (%), 5 % are below 20.00 … half are below 50.00',
        'Calibration error (%) 10.00',
        'Best validation mIoU (%) 30.00',
        'Last validation mIoU (%) 25.00',
        'Training: seed 7',
        'Training, images per second 16',  # 4 images on each of 2 processes in half a second
        'Peak GPU memory in training (MB) 1,234',
        'sky taken for road: 40 pixels, 40.0% of sky.',
        'gone/away.png no longer exists.',
        'measured on one labelled pixel in 49, on a regular grid. The model is overconfident.',
        'max_iters=40',
    ):
        assert text in page.text, text
    # IoU, accuracy and pixel counts.
    assert re.search(r'road 64\.29 90\.00 100 130 90', page.text) and re.search(
        r'sky 54\.55 60\.00 100 70 60', page.text
    )
    labels = [found['aria-label'] for _, found in page.tags if found.get('role') == 'img']
    assert 'Training loss. 0.2 at iteration 10, 0.05 at iteration 40, least 0.05 at iteration 40.' in labels
    assert (
        'Loss of the decode head. training: 0.15 at iteration 10, 0.0375 at iteration 40, '
        'least 0.0375 at iteration 40. '
        'validation: 0.5 at iteration 20, 0.25 at iteration 40, least 0.25 at iteration 40.'
    ) in labels

    assert 'Validation mIoU. 30 at iteration 20, 25 at iteration 40, greatest 30 at iteration 20.' in labels
    alts = [found['alt'] for tag, found in page.tags if tag == 'img']
    assert len(alts) == 7  # one of two images does not exist
    assert 'Ground truth: road 44%, sky 44%, not labelled 12%' in alts
    assert 'Errors: 50.0% of the labelled pixels are wrong, most of all sky taken for road (50.0%).' in alts
    sizes = {(found['width'], found['height']) for tag, found in page.tags if tag == 'img'}
    assert sizes == {('480', '32')}


def test_several_runs_are_compared(tmp_path):
    one = small_run(tmp_path / 'a/run')
    two = small_run(tmp_path / 'b/run', confusion=((99, 1), (45, 55)), metrics=dict(mIoU=61.0))
    config = two / '20260101_000000/vis_data/config.py'
    config.write_text(CONFIG.replace('lr=0.001', 'lr=0.5'))
    page = page_of(one, two)
    assert 'Report: a/run, b/run' in page.text
    assert 'mIoU of the evaluation shown (%) 59.67 61.00 (best)' in page.text
    assert re.search(r'road 64\.29 68\.28 \(best\)', page.text) and re.search(r'sky 54\.55 \(best\) 54\.46', page.text)
    assert 'optim_wrapper.optimizer.lr 0.001 0.5' in page.text and 'train_cfg.max_iters 40' not in page.text
    loss = next(
        found['aria-label'] for _, found in page.tags if found.get('aria-label', '').startswith('Training loss.')
    )
    assert 'a/run: 0.2 at iteration 10' in loss and 'b/run: 0.2 at iteration 10' in loss
    assert any('a/run, training: 0.15' in found.get('aria-label', '') for _, found in page.tags)
    # Lines differ in dashes and markers, not only in colour.
    drawn = curves('Loss', 'loss', [Series('a', [(1, 1), (2, 2)]), Series('b', [(1, 2), (2, 1)])], 'least').svg
    assert 'stroke-dasharray' in drawn and 'var(--s0)' in drawn and 'var(--s1)' in drawn
    steep = Series('a', [(1, 1), (2, 2000)])
    assert '>1000<' in curves('Loss', 'loss', [steep], 'least', log=True).svg
    assert [run.name for run in read_runs([one, one])] == ['run (1)', 'run (2)']
    assert [run.name for run in read_runs([one / '20260101_000000'])] == ['run/20260101_000000']


def test_a_resumed_run_is_continued_and_a_new_start_replaces_the_old_one(tmp_path):
    folder = tmp_path / 'run'
    val = dict(mIoU=1.0, time=0.1, step=20)
    write_stamp(folder, '20260101_000000', [scalar(10), scalar(20), val, scalar(30, old=True)], tail='{"lr": 0.1, "it')
    log = LOG + 'mmengine - INFO - resumed epoch: 0, iter: 20\n'
    write_stamp(folder, '20260102_000000', [scalar(30), scalar(40)], log)
    run = read_run(folder)
    assert list(run.train) == [10, 20, 30, 40] and list(run.val) == [20] and run.starts == 2
    assert 'old' not in run.train[30] and not run.notes
    write_stamp(folder, '20260103_000000', [scalar(10)])
    run = read_run(folder)
    assert list(run.train) == [10] and not run.val and run.starts == 1
    assert 'started again' in run.notes[0] and 'up to iteration 40' in run.notes[0]
    page = page_of(folder)
    assert 'started again' in page.text and 'no validation was logged' in page.text


def test_missing_and_broken_files_are_reported(tmp_path):
    folder = tmp_path / 'run'
    rows = [scalar(1), dict(scalar(2), loss=math.nan), dict(scalar(3), loss=math.inf)]
    stamp = write_stamp(folder, '20260101_000000', rows, config='import os\nos.abort()\n')
    scalars = stamp / 'vis_data/scalars.json'
    huge = '1' + '0' * 400
    bad = [f'{{"step": 9, "lr": 1, "epoch": {value}}}' for value in ('NaN', 'Infinity', huge)]
    bad += ['no json', '[' * 100_000, f'{{"step": {huge}, "lr": 1}}', f'{{"step": 9, "lr": {huge}}}']
    scalars.write_text('\n'.join([*bad, '[1]', '{"step": "x"}', scalars.read_text()]) + '{"loss": 0.')
    (stamp / 'evaluation').mkdir()
    (stamp / 'evaluation/test.json').write_text('{"classes": ["a"], "confusion": [[1, 2]], "kind": "test"}')
    odd = [
        dict(confusion=[[2**70, 1], [1, 1]]),
        dict(palette=[[math.inf, 0, 0]] * 2),
        dict(metrics=dict(mIoU=10**400)),
        dict(seconds_per_picture=10**400),
        dict(calibration=dict(ece=10**400, bins=[])),
        dict(pictures=5),
        dict(boundary=dict(mIoU=10**400)),
    ]
    for number, record in enumerate(odd):
        write_record(stamp, f'test_{number}', **record)
    (stamp / 'evaluation/test_deep.json').write_text('[' * 100_000)
    page = page_of(folder)
    assert all(f'test_{name}.json is ignored: no evaluation record' in page.text for name in (*range(7), 'deep'))
    assert f'{len(bad)} broken lines are ignored' in page.text
    assert 'test.json is ignored: no evaluation record (the confusion matrix' in page.text
    assert 'run: not finite at 2 of 3 logged iterations (2, 3).' in page.text
    assert 'There is no evaluation record.' in page.text and 'No predictions were stored.' in page.text


def test_a_record_without_optional_values(tmp_path):
    stamp = write_stamp(tmp_path / 'run', '20260101_000000')
    odd = dict(pictures=['x', {}, dict(mIoU=0.5, prediction='gone.png', path=None)], dataset=None, environment=[])
    write_record(stamp, palette=[[1]], calibration=3, iteration='x', metrics=None, seconds_per_picture=0, **odd)
    write_record(stamp, 'val', calibration=dict(bins=[dict(pixels=1)], ece=0.1))
    page = page_of(tmp_path / 'run')
    assert 'It was not stored, or the file no longer exists.' in page.text and 'None no longer exists.' in page.text
    assert "val.json is ignored: no evaluation record ('low')" in page.text


def test_a_single_iteration_and_only_tests(tmp_path):
    write_stamp(tmp_path / 'one', '20260101_000000', [scalar(1)])
    page = page_of(tmp_path / 'one')
    assert '2 at iteration 1.' in page.text and not any(tag == 'svg' for tag, _ in page.tags)
    stamp = write_stamp(tmp_path / 'tested', '20260101_000000')
    (stamp / f'{stamp.name}.json').write_text('{"mIoU": 12.5, "aAcc": 50.0}')
    page = page_of(tmp_path / 'tested')
    assert 'Test without a record 12.50 50.00 –' in page.text and 'has only tests' in page.text
    write_record(stamp, calibration=None, pictures=[], metrics={})
    page = page_of(tmp_path / 'tested')
    assert 'Test without a record' not in page.text and 'has no confidence' in page.text
    assert 'mIoU of the evaluation shown (%) 59.42' in page.text  # from the confusion matrix


def test_without_scalars_the_log_is_read(tmp_path):
    """Runs with visualizer.vis_backends.0.type=TensorboardVisBackend have none."""
    lines = """
2026/01/01 - mmengine - INFO - Iter(train) [10/40]  base_lr: 1.0e-04 lr: 1.0e-04  eta: 0:08:52  time: 0.5  loss: 2.5000
2026/01/01 - mmengine - INFO - Iter(train) [20/40]  base_lr: 1.0e-04 lr: 1.0e-04  eta: 0:08:00  time: 0.5  loss: nan
2026/01/01 - mmengine - INFO - Iter(val) [ 25/101]    eta: 0:00:13  time: 0.1402  data_time: 0.0069
2026/01/01 - mmengine - INFO - Iter(val) [101/101]    aAcc: 76.6700  mIoU: 34.7800  mAcc: 46.8000  time: 0.1530
"""
    stamp = write_stamp(tmp_path / 'run', '20260101_000000', log=LOG + lines)
    (stamp / 'vis_data/config.py').rename(tmp_path / 'run/small.py')
    run = read_run(tmp_path / 'run')
    assert list(run.train) == [10, 20] and run.train[10]['loss'] == 2.5 and run.train[10]['lr'] == 1e-4
    assert list(run.val) == [20] and run.best == (20, 34.78)
    assert run.config['train_cfg.max_iters'] == 40


def test_the_prefix_of_a_metric_is_no_part_of_its_name():
    run = Run(Path(), 'run', val={1: {'a/mIoU': 3.0, 'b/mIoU': 4.0, 'a/val/loss': 2.0}, 2: {'a/mIoU': 5.0}})
    assert run.points('val', 'mIoU') == [(1, 3.0), (2, 5.0)] and run.best == (2, 5.0)
    assert run.points('val', 'val/loss') == [(1, 2.0)]
    run.val[2]['mIoU'] = 6.0
    assert run.points('val', 'mIoU') == [(2, 6.0)]
    assert run.points('val', 'IoU') == run.points('train', 'mIoU') == []


def test_names_are_escaped(tmp_path):
    bad = '<script>alert(1)</script>"&\'$\\frac$'
    folder = small_run(tmp_path / 'a<b>&$x$', classes=(bad, 'sky'), checkpoint=bad)
    stamp = folder / '20260101_000000'
    record = json.loads((stamp / 'evaluation/test.json').read_text())
    record['pictures'][1]['path'] = f'{bad}.png'
    record['dataset']['type'] = bad
    (stamp / 'evaluation/test.json').write_text(json.dumps(record))
    config = stamp / 'vis_data/config.py'
    config.write_text(config.read_text() + f'name = {bad!r}\n')
    page = page_of(folder)  # checks that there is no script
    assert page.text.count(bad) > 5 and 'Report: a<b>&$x$' in page.text


def test_many_classes(tmp_path):
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 100, (150, 150))
    names = [f'class number {i}' for i in range(150)]
    figure = heat_map('run', names, confusion, confusions(names, confusion, 100))
    assert figure.svg.count('class number 7<') == 4 and 'taken for' in figure.label  # names on all sides
    assert len(figure.rows) == 100 and len(figure.svg) < 400_000
    page = page_of(small_run(tmp_path / 'run', classes=names, confusion=confusion))
    assert page.text.count('class number 149') > 2


def test_confusions_are_the_largest():
    confusion = np.array([[5, 3, 0], [9, 1, 0], [0, 0, 7]])
    found = confusions(['a', 'b', 'c'], confusion, 5)
    assert [(one.truth, one.predicted, one.pixels) for one in found] == [('b', 'a', 9), ('a', 'b', 3)]
    assert str(found[0]) == 'b taken for a: 9 pixels, 90.0% of b.'
    assert confusions(['a'], np.array([[4]]), 5) == []


def test_configs_are_read_and_not_run(tmp_path):
    flat = flat_config("import os\na = dict(b=[1, 2], c={'d': dict(e=None)})\nf = open('x')\ng = dict()\n")
    assert flat == {'a.b': [1, 2], 'a.c.d.e': None, 'g': {}}
    assert flat_config('a = (') == {}
    assert read_run(small_run(tmp_path / 'run')).config['train_dataloader.batch_size'] == 4


@pytest.mark.parametrize('kind', ['missing', 'file', 'empty'])
def test_a_wrong_work_dir_is_one_error(tmp_path, kind):
    place = tmp_path / kind
    if kind == 'file':
        place.touch()
    elif kind == 'empty':
        place.mkdir()
    message = tool(place)
    assert message.startswith(f'error: {place}') and '\n' not in message and 'work dir' in message
    with pytest.raises(ConfigError):
        write_report([place])


def test_an_unwritable_report_is_one_error_and_leaves_no_file(tmp_path):
    folder = small_run(tmp_path / 'run')
    message = tool(folder, '--out', tmp_path / 'nowhere/report.html')
    assert 'the report cannot be written (No such file or directory); give another --out' in message
    assert f'{folder} is a folder; --out is the file' in tool(folder, '--out', folder)
    (tmp_path / 'file').touch()
    assert 'cannot be written' in tool(folder, '--out', tmp_path / 'file/report.html')
    assert {path.name for path in tmp_path.iterdir()} == {'run', 'file'}
    assert {path.name for path in folder.iterdir()} == {'20260101_000000'}
