"""Everything that is worth knowing of a device, in one command and a given time, as one Markdown file.

Each part (:mod:`mmseg_volo.benchmark.suite_parts`) runs in a process of its own, with its share of the time: what fails
or hangs is reported, and the next part goes on. What a part has found is written as it comes, so that nothing is lost.
"""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.registry import init_default_scope

from .measuring import environment, set_threads
from .reporting import progress

_LEAST = 8  # seconds in which no part comes to anything
_GRACE = 10  # seconds over its time after which a part is ended
_END = 1.5  # seconds for writing at the end


@dataclass(frozen=True)
class Plan:
    """What all parts share.

    Args:
        device: 'cpu', 'cuda', 'cuda:1', ...; on a CPU everything is tiny.
        out: folder for the tables.
        threads: of PyTorch on a CPU.
        compiled: measure the peer through ``torch.compile`` too.
        camvid: folder of CamVid-11 as ``tools/prepare_data.py`` makes it, or None.
    """

    device: str
    out: Path
    threads: int | None = None
    compiled: bool = True
    camvid: Path | None = None

    @property
    def tiny(self) -> bool:
        return torch.device(self.device).type == 'cpu'


class Task:
    """A part at work: its time, and where it writes."""

    def __init__(self, plan: Plan, section: Path, seconds: float):
        self.plan, self.fine = plan, True
        self._section, self._end = section, time.monotonic() + seconds
        self.folder = section.parent  # for what may go in the end, on the disk of the report

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def write(self, *lines: str) -> None:
        """Lines of Markdown, there at once."""
        with self._section.open('a', encoding='utf-8') as file:
            file.writelines(f'{line}\n' for line in lines)
        print(*lines, sep='\n', flush=True)

    def table(self, *fields: str) -> None:
        """The head of a table; its rows follow by :meth:`row`."""
        self.write('', _row(fields), _row(['---'] * len(fields)))

    def row(self, *cells: str) -> None:
        self.write(_row([' '.join(cell.replace('|', '\\|').split()) for cell in cells]))


def _row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Args:
        name: of the part, and of its log.
        title: of its section.
        run: does it; a function of a module, as it is pickled. ``task.fine = False`` says that something is wrong.
        share: of the time, among the parts that are still to come.
        compile: functions of the plan that compile what this part will need, beside the first part.
    """

    name: str
    title: str
    run: Callable[[Task], None]
    share: float
    compile: Sequence[Callable[[Plan], None]] = ()


class _Process:
    """A process that is started, imports everything, and waits for its time to begin."""

    def __init__(self, function: Callable, plan: Plan, section: Path, log: Path):
        self.section, self.log = section, log
        self._ready, task = section.with_suffix('.ready'), section.with_suffix('.pkl')
        task.write_bytes(pickle.dumps((function, plan, section)))
        code = 'import sys; from mmseg_volo.benchmark.suite import child; sys.exit(child(sys.argv[1]))'
        with log.open('w', encoding='utf-8') as output:
            self._process = subprocess.Popen(
                [sys.executable, '-u', '-W', 'ignore', '-c', code, str(task)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # with all that it starts it can be ended as one
            )

    def wait_until_ready(self, end: float) -> None:
        """Until it has imported what it needs, which the clock of its part does not count, or is no more."""
        while not self._ready.is_file() and self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)

    def begin(self, seconds: float) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f'{json.dumps(seconds)}\n'.encode())
            self._process.stdin.close()

    def wait(self, seconds: float) -> int | None:
        """The exit status; None if it had to be ended."""
        try:
            return self._process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def end(self) -> None:
        """End it and what it has started."""
        if hasattr(os, 'killpg'):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def last_line(self) -> str:
        lines = self.log.read_text(encoding='utf-8', errors='replace').splitlines()
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), '')


def child(path: str) -> int:
    """The process of a part: 0 if all is well."""
    function, plan, section = pickle.loads(Path(path).read_bytes())
    section.with_suffix('.ready').touch()
    line = sys.stdin.readline()
    if not line:  # nobody waits for it any more
        return 1
    init_default_scope('mmseg')
    set_threads(plan.threads)
    task = Task(plan, section, json.loads(line))
    try:
        function(task)
    except Exception:
        traceback.print_exc()
        return 1
    return 0 if task.fine else 1


class _Result(NamedTuple):
    part: Part
    outcome: str
    fine: bool
    seconds: float
    left: float  # seconds that it had, and did not take
    text: str


def run_suite(parts: Sequence[Part], plan: Plan, minutes: float, command: str) -> int:
    """Run the parts; 0 if all ran for which there was time, and nothing is wrong.

    Args:
        parts: in their order.
        plan: what they share.
        minutes: for all of it.
        command: as it was called, for the report.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no part is left running
    (plan.out / 'logs').mkdir(parents=True, exist_ok=True)
    folders = tempfile.TemporaryDirectory(prefix='.suite_', dir=plan.out, ignore_cleanup_errors=True)
    with folders as folder, contextlib.ExitStack() as started:
        return _Suite(parts, plan, command, Path(folder), started).run(minutes)


class _Suite:
    def __init__(self, parts: Sequence[Part], plan: Plan, command: str, folder: Path, started: contextlib.ExitStack):
        self.parts, self.plan, self.command = parts, plan, command
        self._folder, self._started = folder, started
        self._cuda = torch.device(plan.device).type == 'cuda'
        self._results: list[_Result] = []

    def run(self, minutes: float) -> int:
        end = time.monotonic() + 60 * minutes - _END
        self._machine = machine(self.plan)
        compiling = self._compile_ahead() if self._cuda and self.plan.compiled else []
        waiting: _Process | None = None
        for i, part in enumerate(self.parts):
            process, waiting = waiting or self._start(part.name, part.run), None
            if self._cuda and i + 1 < len(self.parts):  # imports while this one runs, on cores that are idle
                waiting = self._start(self.parts[i + 1].name, self.parts[i + 1].run)
            self._results.append(self._finish(part, process, end, sum(p.share for p in self.parts[i:])))
            self._wait_for(compiling, max(time.monotonic() + self._results[-1].left, end - (1 - _AHEAD) * 60 * minutes))
            self.write()
        return 0 if all(result.fine for result in self._results) else 1

    def _start(self, name: str, function: Callable[[Task], None]) -> _Process:
        process = _Process(function, self.plan, self._folder / f'{name}.md', self.plan.out / 'logs' / f'{name}.log')
        self._started.callback(process.end)
        return process

    def _finish(self, part: Part, process: _Process, end: float, shares: float) -> _Result:
        process.wait_until_ready(end)
        left = end - time.monotonic()
        limit = min(left * part.share / shares, left - _GRACE) if left > 2 * _GRACE else left
        if limit < _LEAST:
            process.end()
            process.log.unlink(missing_ok=True)
            progress(f'{part.name}: no time left')
            return _Result(part, 'no time left', True, 0.0, 0.0, '')
        progress(f'{part.name}: {limit:.0f} s at most')
        start = time.monotonic()
        process.begin(limit)
        status = process.wait(min(limit + _GRACE, left))
        spent = time.monotonic() - start
        text = process.section.read_text(encoding='utf-8') if process.section.is_file() else ''
        if status == 0:
            outcome = 'ran'
        elif status is None:
            outcome = f'stopped after {spent:.0f} s'
        else:
            outcome = f'failed ({process.last_line() or f"exit status {status}"})'
        progress(f'{part.name}: {outcome}, {spent:.0f} s')
        return _Result(part, outcome, status == 0, spent, max(limit - spent, 0.0), text)

    def _compile_ahead(self) -> list[_Process]:
        """What later parts need compiled comes from a cache on the disk: filled beside the first part, which is not
        timed."""
        first, *others = self.parts
        memory = torch.cuda.get_device_properties(self.plan.device).total_memory
        if first.name != 'correctness' or memory < _AHEAD_NEEDS:
            return []
        processes = []
        for function in (function for part in others for function in part.compile):
            process = self._start(function.__name__, _Ahead(function))
            process.begin(0)
            processes.append(process)
        return processes

    def _wait_for(self, processes: list[_Process], until: float) -> None:
        """Until then, and end them: nothing else may run where times are taken."""
        while processes:
            process = processes.pop()
            status = process.wait(until - time.monotonic())
            progress(f'{process.log.stem}: {"done" if status == 0 else "not done"}')
            if status == 0:
                process.log.unlink(missing_ok=True)

    def write(self) -> None:
        """The report of the parts that have run so far."""
        lines = [f'## {self._machine["title"]}', '', *self._machine['lines'], '']
        lines += [
            f'<!-- run: {self._machine["title"]}, {self._machine["date"]} -->',
            '```bash',
            self.command,
            '```',
            '',
        ]
        lines += [_row(['part', 'result', 's']), _row(['---'] * 3)]
        for result in self._results:
            outcome = result.outcome if result.fine else f'**{result.outcome}**'
            lines.append(_row([result.part.name, outcome.replace('|', '\\|'), f'{result.seconds:.0f}']))
        lines += [_row([part.name, 'to come', '']) for part in self.parts[len(self._results) :]]
        for result in self._results:
            if result.text:
                lines += ['', f'### {result.part.title}', '', result.text.strip()]
        path = self.plan.out / 'suite.md'
        part = path.with_suffix('.part')
        part.write_text('\n'.join(lines) + '\n', encoding='utf-8')
        part.replace(path)


_AHEAD = 0.35  # share of the time in which compiling ahead has to come to its end
_AHEAD_NEEDS = 60e9  # bytes of the device: several networks are there at once


@dataclass(frozen=True)
class _Ahead:
    """A function of the plan as a part."""

    function: Callable[[Plan], None]

    def __call__(self, task: Task) -> None:
        import torch._inductor.config

        # The cores are shared by several of these, and by the checks.
        torch._inductor.config.compile_threads = 2
        self.function(task.plan)


def machine(plan: Plan) -> dict[str, Any]:
    """Title, lines and date of the report."""
    found = environment(plan.device, plan.threads)
    parts = [f'PyTorch {found["torch"]}']
    if torch.device(plan.device).type == 'cuda':
        driver = _output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
        memory = torch.cuda.get_device_properties(plan.device).total_memory
        parts += [f'CUDA {torch.version.cuda}', f'cuDNN {torch.backends.cudnn.version()}']
        parts = [f'{memory / 1e9:.0f} GB', *[f'driver {driver.splitlines()[0]}'] * bool(driver), *parts]
    names = dict(triton='Triton', timm='timm', mmseg='mmsegmentation', mmseg_volo='mmseg_volo')
    parts += [f'{shown} {found[name]}' for name, shown in names.items() if found[name] is not None]
    root = Path(__file__).resolve().parents[2]
    if commit := _output('git', '-C', str(root), 'rev-parse', '--short', 'HEAD'):
        parts.append(f'commit {commit}')
    python = '.'.join(map(str, sys.version_info[:3]))
    parts += [f'Python {python}', f'{os.cpu_count()} CPU cores']
    kind = 'GPU' if torch.device(plan.device).type == 'cuda' else plan.device.upper()
    return dict(
        title=f'{kind}: {found["device_name"]}',
        lines=[f'{", ".join(parts)}; {found["date"]}.'],
        date=found['date'][:10],
    )


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ''
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return done.stdout.strip() if done.returncode == 0 else ''
