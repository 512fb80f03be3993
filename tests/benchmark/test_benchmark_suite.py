"""``tools/benchmark.py suite``: every part leaves its rows, and what fails, hangs or has no time stops nothing."""

import os
import time
from pathlib import Path

import pytest
import torch
from benchmarking import run
from small_camvid import write_camvid

from mmseg_volo.benchmark.parts import PARTS, correctness, goal
from mmseg_volo.benchmark.suite import Part, Plan, Task, run_suite


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
def plan(tmp_path) -> Plan:
    return Plan('cpu', tmp_path / 'out', threads=1)


def alive(pid: int) -> bool:
    try:
        return 'Z' not in Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[:1]
    except OSError:
        return False


def test_a_part_that_fails_or_hangs_stops_nothing(plan, monkeypatch):
    monkeypatch.setattr('mmseg_volo.benchmark.suite._GRACE', 0)
    monkeypatch.setattr('mmseg_volo.benchmark.suite._LEAST', 0.5)
    chosen = [part(fails, 50), part(hangs, 1), part(works, 50)]
    start = time.monotonic()
    assert run_suite(chosen, plan, 1.5, 'the command') == 1
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


def suite(out: Path, *arguments) -> int:
    return run('suite', '--device', 'cpu', '--threads', 1, '--no-compiled', '--out', out, *arguments)


def test_the_command_on_a_cpu(tmp_path):
    """One part and one that has nothing to do; all of them are in test_every_part."""
    status = suite(tmp_path, '--parts', 'op', 'camvid', '--minutes', 2, '--camvid', tmp_path / 'none')
    text = (tmp_path / 'suite.md').read_text()
    assert status == 0 and all(f'| {name} | ran |' in text for name in ('op', 'camvid')), text
    for mode in ('forward', 'full'):
        assert text.count(f'| d1@64, batch 1, fp32, {mode} |') == 2
    assert '× unfold/fold: not judged' in text
    assert 'Skipped: needs CamVid-11' in text and f'torch {torch.__version__}' in text
    assert (tmp_path / 'op.csv').is_file() and len(list((tmp_path / 'logs').iterdir())) == 2


@pytest.mark.slow
def test_every_part(tmp_path):
    write_camvid(tmp_path / 'camvid', (96, 128), train=4, val=2)
    status = suite(tmp_path / 'out', '--minutes', 10, '--camvid', tmp_path / 'camvid')
    text = (tmp_path / 'out/suite.md').read_text()
    assert status == 0, text
    assert all(f'| {part.name} | ran |' in text and f'### {part.title}' in text for part in PARTS)
    assert '| operation: odd sizes, one row, stride 1 | ok |' in text and ' 0 BAD' in text
    for row in ('Backbone, VOLO-D1', 'Training step, VOLO-D1', 'Prediction, VOLO-D1', '| iterations |'):
        assert row in text, row
    for name in ('op', 'backbone', 'train', 'inference', 'models', 'memory', 'saving'):
        assert (tmp_path / f'out/{name}.csv').is_file()


def test_a_wrong_result_is_no_success(tmp_path, monkeypatch):
    """The part of correctness, with tests of its own."""
    tests = tmp_path / 'tests/device'
    tests.mkdir(parents=True)
    (tests / 'test_good.py').write_text(
        'import pytest\n'
        'def test_one(record_property):\n    "one thing"\n    record_property("found", "as it should be")\n'
        'def test_two(request):\n    "not here"\n    pytest.skip("needs a GPU")\n'
        'def test_three(request):\n    assert request.config.getoption("device") == "cpu"\n'
    )
    monkeypatch.setattr('mmseg_volo.benchmark.correctness.ROOT', tmp_path)
    section = tmp_path / 'section.md'
    task = Task(Plan('cpu', tmp_path), section, 100)
    correctness(task)
    text = section.read_text()
    assert (
        task.fine and '| one thing | ok | as it should be |' in text and '| not here | skipped | needs a GPU |' in text
    )
    assert '2 ok, 0 BAD, 1 skipped.' in text

    (tests / 'test_bad.py').write_text('def test_it():\n    "other"\n    assert "a | b" == "a"\n')
    correctness(task)
    text = section.read_text()
    assert not task.fine and '| other | **BAD** | AssertionError: ' in text and "'a \\| b' == 'a'" in text
    assert '2 ok, 1 BAD, 1 skipped.' in text

    late = Task(Plan('cpu', tmp_path), tmp_path / 'late.md', -1)
    correctness(late)
    assert late.fine and (tmp_path / 'late.md').read_text().count('no time left') == 4

    (tests / 'test_broken.py').write_text('import what_is_not_there\n')
    correctness(late)
    assert not late.fine


def test_goals(tmp_path):
    gpu = Task(Plan('cuda', tmp_path), tmp_path / 'x.md', 1)
    assert goal(gpu, 1.5, '× stock', least=1.5) == '≥ 1.5 × stock: met'
    assert goal(gpu, 1.4, '× stock', least=1.5) == '≥ 1.5 × stock: **not met**'
    assert goal(gpu, 27.0, 'ms', most=26) == '≤ 26 ms: **not met**'
    assert goal(gpu, None, 'ms', most=26) == '≤ 26 ms: not judged'
    tiny = Task(Plan('cpu', tmp_path), tmp_path / 'x.md', 1)
    assert goal(tiny, 1.5, '× stock', least=1.5) == '≥ 1.5 × stock: not judged'
