"""``tools/benchmark.py suite``: every part leaves its rows, and what fails, hangs or has no time stops nothing."""

import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_benchmark import ROOT, _one_thread, run  # noqa: F401  (the fixture is for all tests)

from mmseg_volo.benchmark import PARTS, Plan, device_checks, run_suite
from mmseg_volo.benchmark.device_checks import CHECKS, Skipped, run_checks
from mmseg_volo.benchmark.profiling import profile_call
from mmseg_volo.benchmark.suite import Part, Task
from mmseg_volo.benchmark.suite_parts import _goal, correctness
from mmseg_volo.datasets.street_drawing import draw_scene


def works(task: Task) -> None:
    task.table('what', 'found')
    task.row('a figure', '42')


def fails(task: Task) -> None:
    task.write('found before the end')
    raise RuntimeError('broken in the middle')


def hangs(task: Task) -> None:
    task.write('found before it hung')
    if os.fork() == 0:  # a process of its own, as workers are
        (task.plan.out / 'child').write_text(str(os.getpid()))
        time.sleep(600)
    time.sleep(600)


def part(function, share: float = 1) -> Part:
    return Part(function.__name__, f'What {function.__name__}', function, share)


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    """Its parts may be functions of this file."""
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    return Plan('cpu', tmp_path / 'out', threads=1)


def alive(pid: int) -> bool:
    try:
        return 'Z' not in Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[:1]
    except OSError:
        return False


def test_a_part_that_fails_or_hangs_stops_nothing(plan, monkeypatch):
    monkeypatch.setattr('mmseg_volo.benchmark.suite._GRACE', 0)
    monkeypatch.setattr('mmseg_volo.benchmark.suite._LEAST', 0.5)
    parts = [part(fails, 50), part(hangs, 1), part(works, 50)]
    start = time.monotonic()
    assert run_suite(parts, plan, 1.5, 'the command') == 1
    assert time.monotonic() - start < 90
    text = (plan.out / 'suite.md').read_text()
    assert '| fails | **failed (RuntimeError: broken in the middle)** |' in text
    assert '| hangs | **stopped after ' in text
    assert '| works | ran |' in text and '| a figure | 42 |' in text
    assert 'found before the end' in text and 'found before it hung' in text and 'the command' in text
    assert 'Traceback' in (plan.out / 'logs/fails.log').read_text()
    assert not alive(int((plan.out / 'child').read_text()))
    assert sorted(path.name for path in plan.out.iterdir()) == ['child', 'logs', 'suite.md']


def test_without_time_parts_are_skipped(plan):
    assert run_suite([part(works), part(fails)], plan, 0.05, 'the command') == 0
    text = (plan.out / 'suite.md').read_text()
    assert '| works | no time left | 0 |' in text and '| fails | no time left | 0 |' in text
    assert list((plan.out / 'logs').iterdir()) == []


def test_the_command_on_a_cpu(tmp_path):
    """One part and one that has nothing to do; all of them are in test_every_part."""
    status = suite(tmp_path, '--parts', 'op', 'camvid', '--minutes', 2, '--camvid', tmp_path / 'none')
    text = (tmp_path / 'suite.md').read_text()
    assert status == 0 and all(f'| {name} | ran |' in text for name in ('op', 'camvid')), text
    for mode in ('forward', 'full'):
        assert text.count(f'| d1@64, batch 1, fp32, {mode} |') == 2
    assert '× unfold/fold: not judged' in text
    assert 'Skipped: needs CamVid-11' in text and 'PyTorch ' + torch.__version__ in text
    assert (tmp_path / 'op.csv').is_file() and len(list((tmp_path / 'logs').iterdir())) == 2


def suite(out: Path, *arguments) -> int:
    common = '--device', 'cpu', '--threads', 1, '--no-compiled', '--out', out
    return run('suite', *common, *arguments)


@pytest.mark.slow
def test_every_part(tmp_path):
    status = suite(tmp_path / 'out', '--minutes', 10, '--camvid', draw_camvid(tmp_path / 'camvid'))
    text = (tmp_path / 'out/suite.md').read_text()
    assert status == 0, text
    assert all(f'| {part.name} | ran |' in text and f'### {part.title}' in text for part in PARTS)
    assert all(f'| {name} |' in text for name in CHECKS) and ' 0 BAD' in text
    for row in ('Backbone, VOLO-D1', 'Training step, VOLO-D1', 'Prediction, VOLO-D1', '| iterations |'):
        assert row in text, row
    for name in ('op', 'backbone', 'train', 'inference', 'models', 'saving'):
        assert (tmp_path / f'out/{name}.csv').is_file()


def draw_camvid(folder: Path) -> Path:
    """Six pictures in the folders of CamVid-11, as JPEG, with some of its classes."""
    for split, count in (('train', 4), ('val', 2)):
        for kind in ('images', 'labels'):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            image, label = draw_scene(i, (96, 128))
            cv2.imwrite(str(folder / f'images/{split}/{i}.jpg'), image)
            cv2.imwrite(str(folder / f'labels/{split}/{i}.png'), np.where(label > 10, 255, label).astype(np.uint8))
    return folder


def test_checks_find_what_is_wrong(monkeypatch):
    """The quick ones pass here, and are BAD where an operation is wrong."""
    quick = [name for name in CHECKS if name.startswith(('operation', 'head', 'loss'))]
    findings = {finding.name: finding for finding in run_checks('cpu', lambda finding: None, names=quick)}
    assert {finding.verdict for finding in findings.values()} == {'ok', 'skipped'}
    assert [f.name for f in findings.values() if f.verdict == 'skipped'] == [
        name for name in quick if '2**31' in name or 'stream' in name or 'CUDA graph' in name
    ]

    real = device_checks.outlook_attention

    def wrong(v, logits, impl='auto', **options):
        return real(v, logits, impl=impl, **options) * (1.01 if impl == 'fused' else 1)

    monkeypatch.setattr(device_checks, 'outlook_attention', wrong)
    monkeypatch.setattr(device_checks.LeanUPerHead, 'forward', lambda self, maps: self.conv_seg(self.bottleneck(maps)))
    names = [name for name in quick if findings[name].verdict == 'ok']
    again = {f.name: f.verdict for f in run_checks('cpu', lambda finding: None, names=names)}
    unaffected = [name for name in names if 'loss' in name or 'autocast' in name or 'compile' in name]
    assert {name for name, verdict in again.items() if verdict == 'BAD'} == set(names) - set(unaffected)


def test_a_wrong_result_is_no_success(tmp_path, monkeypatch):
    for name in list(CHECKS):
        monkeypatch.delitem(CHECKS, name)
    monkeypatch.setitem(CHECKS, 'one', lambda place: (True, 'as it should be'))
    task = Task(Plan('cpu', tmp_path), tmp_path / 'section.md', 100)
    correctness(task)
    assert task.fine and '| one | ok | as it should be |' in (tmp_path / 'section.md').read_text()
    monkeypatch.setitem(CHECKS, 'other', lambda place: (False, 'off | by one'))
    correctness(task)
    text = (tmp_path / 'section.md').read_text()
    assert not task.fine and '| other | **BAD** | off \\| by one |' in text and '1 ok, 1 BAD, 0 skipped.' in text


def test_checks_without_time_are_skipped(monkeypatch):
    def cannot(place):
        raise Skipped('not here')

    monkeypatch.setitem(CHECKS, 'cannot', cannot)
    (finding,) = run_checks('cpu', lambda finding: None, names=['cannot'])
    assert finding[:3] == ('cannot', 'skipped', 'not here')
    assert {f.what for f in run_checks('cpu', lambda finding: None, lambda: 0.0)} == {'no time left'}


def test_goals(tmp_path):
    gpu = Task(Plan('cuda', tmp_path), tmp_path / 'x.md', 1)
    assert _goal(gpu, 1.5, '× stock', least=1.5) == '≥ 1.5 × stock: met'
    assert _goal(gpu, 1.4, '× stock', least=1.5) == '≥ 1.5 × stock: **not met**'
    assert _goal(gpu, 27.0, 'ms', most=26) == '≤ 26 ms: **not met**'
    assert _goal(gpu, None, 'ms', most=26) == '≤ 26 ms: not judged'
    tiny = Task(Plan('cpu', tmp_path), tmp_path / 'x.md', 1)
    assert _goal(tiny, 1.5, '× stock', least=1.5) == '≥ 1.5 × stock: not judged'


def test_profile_of_a_call():
    x = torch.randn(200, 200)
    found = profile_call(lambda: (x @ x).relu(), 'cpu', rows=3)
    assert len(found.lines) == 3 and sum(line.share for line in found.lines) <= 1.001
    assert any(line.name == 'aten::mm' and line.count == 1 for line in found.lines) and found.seconds > 0


@pytest.mark.gpu
def test_profile_on_a_gpu(gpu):
    x = torch.randn(512, 512, device=gpu)
    found = profile_call(lambda: ((x @ x).relu().sum() > 0).item(), gpu)
    assert found.launches >= 3 and found.busy > 0 and found.waits['aten::_local_scalar_dense'] == 1
    assert 0.99 < sum(line.share for line in found.lines) <= 1.001
