"""The part of the suite that checks results on the device: it runs ``tests/device``, which a clone has."""

import importlib.util
from collections import Counter

from .machine import ROOT
from .suite import Task


def correctness(task: Task) -> None:
    """Run ``tests/device``, with a row for each test as soon as it has run."""
    tests = ROOT / 'tests/device'
    if not tests.is_dir() or importlib.util.find_spec('pytest') is None:
        task.write('Skipped: needs pytest, and tests/ of a clone of the repository.')
        return
    import pytest

    task.write("Each result is compared with float64, timm's VOLO or stock mmseg; TF32 is off.")
    task.table('check', '', 'found', 's')
    report = _Report(task)
    options = f'--device={task.plan.device}', '-o', 'addopts=', '-q', '-p', 'no:cacheprovider'
    task.fine = pytest.main([str(tests), *options], [report]) == pytest.ExitCode.OK
    counts = (f'{report.counts[verdict]} {verdict}' for verdict in report.VERDICTS.values())
    task.write('', ', '.join(counts) + '.')


class _Report:
    """Plugin of pytest that writes the rows, and skips tests for which there is no time left."""

    VERDICTS = dict(passed='ok', failed='BAD', skipped='skipped')

    def __init__(self, task: Task):
        self.task, self.counts, self._names = task, Counter(), {}

    def pytest_addoption(self, parser) -> None:
        parser.addoption('--device')

    def pytest_collection_modifyitems(self, items) -> None:
        self._names = {item.nodeid: item.obj.__doc__ or item.name for item in items}

    def pytest_runtest_setup(self, item) -> None:
        import pytest

        if self.task.left() <= 0:
            pytest.skip('no time left')

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != 'call' and report.passed:  # setting up and taking down
            return
        verdict = self.VERDICTS[report.outcome]
        self.counts[verdict] += 1
        found = dict(report.user_properties).get('found', '')
        if report.skipped:
            found = report.longrepr[2].removeprefix('Skipped: ')
        elif report.failed:
            verdict = f'**{verdict}**'
            found = ' '.join([found, *getattr(report.longrepr, 'reprcrash', report.longrepr).message.split()])[:200]
        self.task.row(self._names.get(report.nodeid, report.nodeid), verdict, found, f'{report.duration:.1f}')
