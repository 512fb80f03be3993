"""Everything that is worth knowing of a device, in one command and a given time, as one Markdown file.

Each part (:mod:`mmseg_volo.benchmark.parts`) runs in a process of its own, with its share of the time: what fails or
hangs is reported, and the next part goes on. What a part has found is written at once, so that nothing is lost.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.registry import init_default_scope

from ..utils.files import atomic_write
from .machine import describe, environment, on_gpu, process_context, title, use
from .tables import markdown_row
from .timing import progress

_LEAST = 8  # seconds in which no part achieves anything
_GRACE = 10  # seconds after its time until a part is killed
_END = 1.5  # seconds for writing at the end
_AHEAD = 0.35  # share of the time in which compiling ahead has to end
_AHEAD_NEEDS = 60e9  # bytes of the GPU: several networks are there at once


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
    """A part while it runs: the time that it has left, and where it writes."""

    def __init__(self, plan: Plan, section: Path, seconds: float):
        self.plan, self.fine = plan, True
        self._section, self._end = section, time.monotonic() + seconds
        self.folder = section.parent  # for temporary files, on the disk of the report

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def write(self, *lines: str) -> None:
        """Append lines of Markdown to the section."""
        with self._section.open('a', encoding='utf-8') as file:
            file.writelines(f'{line}\n' for line in lines)
        print(*lines, sep='\n', flush=True)

    def table(self, *fields: str) -> None:
        """Write the head of a table; its rows follow by :meth:`row`."""
        self.write('', markdown_row(fields), markdown_row(['---'] * len(fields)))

    def row(self, *cells: str) -> None:
        self.write(markdown_row(cells))


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Args:
        name: of the part, and of its log.
        title: of its section.
        run: does it; must be picklable. ``task.fine = False`` says that a result is wrong.
        share: of the time, among the parts that are still to come.
        compile: by name of their logs, what compiles what this part will need, beside the first part.
    """

    name: str
    title: str
    run: Callable[[Task], None]
    share: float
    compile: Sequence[tuple[str, Callable[[Task], None]]] = ()


class _Process:
    """A process that imports everything, and waits until its time begins."""

    def __init__(self, function: Callable[[Task], None], plan: Plan, section: Path, log: Path):
        self.section, self.log = section, log
        context = process_context(plan.device)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(function, plan, section, log, theirs))
        self._process.start()
        theirs.close()

    def wait_until_ready(self, end: float) -> None:
        """Wait until it has imported everything, which does not count as time of its part, or has died."""
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll(max(end - time.monotonic(), 0)):
                self._pipe.recv()

    def begin(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(seconds)

    def wait(self, seconds: float) -> int | None:
        """The exit status; None if it had to be killed."""
        end = time.monotonic() + seconds
        while self._process.exitcode is None and time.monotonic() < end:
            time.sleep(0.02)
        status = self._process.exitcode
        if status is None:
            self.end()
        return status

    def end(self) -> None:
        """Kill it and every process that it has started."""
        if hasattr(os, 'killpg'):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def last_line(self) -> str:
        lines = self.log.read_text(encoding='utf-8', errors='replace').splitlines() if self.log.is_file() else []
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), '')


def _child(function: Callable[[Task], None], plan: Plan, section: Path, log: Path, pipe: Connection) -> None:
    """The process of a part; exit status 0 says that all is well."""
    if hasattr(os, 'setsid'):
        os.setsid()  # so that it can be killed with every process that it starts
    with log.open('w', encoding='utf-8') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    pipe.send('ready')
    try:
        seconds = pipe.recv()
    except EOFError:  # nobody waits for it any more
        sys.exit(1)
    task = Task(plan, section, seconds)
    try:
        init_default_scope('mmseg')
        use(plan.device, plan.threads)
        function(task)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0 if task.fine else 1)


class _Result(NamedTuple):
    part: Part
    outcome: str
    fine: bool
    seconds: float
    left: float  # seconds that it had and did not need
    text: str


def run_suite(parts: Sequence[Part], plan: Plan, minutes: float, command: str) -> int:
    """Run the parts; 0 if all for which there was time ran, and no result is wrong.

    Args:
        parts: in their order.
        plan: what they share.
        minutes: for all of it.
        command: for the report.
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
        self._environment = environment(plan.device, plan.threads)
        self._results: list[_Result] = []

    def run(self, minutes: float) -> int:
        gpu = on_gpu(self.plan.device)
        end = time.monotonic() + 60 * minutes - _END
        compiling = self._compile_ahead() if gpu and self.plan.compiled else []
        following: _Process | None = None
        for i, part in enumerate(self.parts):
            process, following = following or self._start(part.name, part.run), None
            if gpu and i + 1 < len(self.parts):  # it imports on idle cores while this one runs
                following = self._start(self.parts[i + 1].name, self.parts[i + 1].run)
            self._results.append(self._finish(part, process, end, sum(p.share for p in self.parts[i:])))
            self._end_all(compiling, max(time.monotonic() + self._results[-1].left, end - (1 - _AHEAD) * 60 * minutes))
            self._write()
        return 0 if all(result.fine for result in self._results) else 1

    def _start(self, name: str, function: Callable[[Task], None]) -> _Process:
        process = _Process(function, self.plan, self._folder / f'{name}.md', self.plan.out / 'logs' / f'{name}.log')
        self._started.callback(process.end)
        return process

    def _finish(self, part: Part, process: _Process, end: float, shares: float) -> _Result:
        """Give a part its share of the time that is left, and wait for it."""
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
        """Fill PyTorch's cache of compiled code for later parts, beside the first part if that one is not timed."""
        first, *others = self.parts
        memory = torch.cuda.get_device_properties(self.plan.device).total_memory
        if first.name != 'correctness' or memory < _AHEAD_NEEDS:
            return []
        processes = [self._start(name, function) for part in others for name, function in part.compile]
        for process in processes:
            process.begin(0)
        return processes

    def _end_all(self, processes: list[_Process], until: float) -> None:
        """Wait until then and kill what is left: nothing else may run while times are taken."""
        while processes:
            process = processes.pop()
            status = process.wait(until - time.monotonic())
            progress(f'{process.log.stem}: {"done" if status == 0 else "not done"}')
            if status == 0:
                process.log.unlink(missing_ok=True)

    def _write(self) -> None:
        """Write the report of the parts that have run so far."""
        heading = title(self._environment)
        lines = [f'## {heading}', '', f'{describe(self._environment)}.', '']
        lines += [f'<!-- run: {heading}, {self._environment["date"][:10]} -->', '```bash', self.command, '```', '']
        lines += [markdown_row(['part', 'result', 's']), markdown_row(['---'] * 3)]
        for result in self._results:
            outcome = result.outcome if result.fine else f'**{result.outcome}**'
            lines.append(markdown_row([result.part.name, outcome, f'{result.seconds:.0f}']))
        lines += [markdown_row([part.name, 'to come', '']) for part in self.parts[len(self._results) :]]
        for result in self._results:
            if result.text:
                lines += ['', f'### {result.part.title}', '', result.text.strip()]
        with atomic_write(self.plan.out / 'suite.md') as part:
            part.write_text('\n'.join(lines) + '\n', encoding='utf-8')
