"""Time and memory of calls, and the machine that they ran on."""

import contextlib
import gc
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.windows import PRECISIONS
from .cases import COMPILED, SIDES, check_device
from .reporting import progress

# Seconds that a timed round of short calls takes at least: the clock, and whatever else runs, then weigh little.
_LEAST_ROUND = 0.05
# Predictions of a picture until all CUDA graphs are there: a batch's shape gets one when it comes for the third time.
UNTIL_GRAPHS = 4
_TOO_LONG = 'compiling takes longer than there is time'

# The machine


def set_threads(threads: int | None) -> None:
    """PyTorch's threads; None leaves them."""
    if threads is not None:
        torch.set_num_threads(threads)


def environment(device: str, threads: int | None) -> dict:
    """What figures depend on besides the configuration; sets the number of threads.

    Raises:
        ValueError: no such device.
    """
    check_device(device)
    set_threads(threads)
    packages = dict(mmseg='onedl-mmsegmentation', timm='timm', triton='triton', numba='numba', mmseg_volo='mmseg_volo')
    return dict(
        device=device,
        device_name=_device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **{name: _version(package) for name, package in packages.items()},
        load=round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        date=datetime.now().astimezone().isoformat(timespec='seconds'),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    return next(named, '') or platform.processor() or platform.machine()


def autocast(precision: str, device: str) -> torch.autocast:
    """The context for a precision of :data:`~mmseg_volo.models.windows.PRECISIONS`; fp32 changes nothing."""
    low = precision != 'fp32'
    return torch.autocast(torch.device(device).type, PRECISIONS[precision] if low else None, enabled=low)


# Time


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that a call takes, work on the device included, and what it returns."""
    _synchronise(device)
    start = time.perf_counter()
    result = function()
    _synchronise(device)
    return time.perf_counter() - start, result


def _synchronise(device: str) -> None:
    kind = torch.device(device).type
    if kind == 'cuda':
        torch.cuda.synchronize(device)
    elif kind != 'cpu':
        getattr(torch, kind).synchronize()


def take_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, device: str, label: str, repeats: dict[str, int] | None = None
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time the calls of all sides, one after the other in every round, in every second round backwards.

    Args:
        calls: of each side, warmed up.
        rounds: how often each side is timed.
        device: where they run.
        label: of the lines that tell the progress.
        repeats: how many calls of a side make one timed round (:func:`repeats_for`); by default one.

    Returns:
        The seconds of one call in each round, and the last results, by side.
    """
    repeats = repeats or dict.fromkeys(calls, 1)
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    results: dict[str, Any] = {}
    for i in range(rounds):
        for side in list(calls)[:: 1 if i % 2 == 0 else -1]:
            spent, results[side] = timed(partial(repeat, calls[side], repeats[side]), device)
            seconds[side].append(spent / repeats[side])
        taken = ', '.join(f'{side} {seconds[side][-1]:.3g} s' for side in calls)
        progress(f'{label}: round {i + 1} of {rounds}: {taken}')
    return seconds, results


def repeat(call: Callable[[], Any], times: int) -> Any:
    """What the last of so many calls returns."""
    for _ in range(times - 1):
        call()
    return call()


def as_graph(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A call captured as a CUDA graph: what the device takes, without the time that launching takes on the host.

    Every replay returns the tensors of the captured call, with new numbers.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def repeats_for(call: Callable[[], Any], device: str) -> int:
    """How many calls a timed round needs to be long enough; warms the call up."""
    call()
    times = 1
    while (spent := timed(partial(repeat, call, times), device)[0]) < _LEAST_ROUND:
        times *= min(max(math.ceil(1.2 * _LEAST_ROUND / max(spent, 1e-9)), 2), 100)
    return times


def add_compiled(
    calls: dict[str, Callable[[], Any]], make: Callable[[], Callable[[], Any]], label: str, seconds: float = math.inf
) -> tuple[dict[str, Callable[[], Any]], str | None]:
    """The calls of all sides with the compiled peer between them, which is called once.

    Args:
        calls: of stock and ours.
        make: builds the compiled peer and returns its call.
        label: of the line that says why it is missing.
        seconds: that compiling may take.

    Returns:
        The calls, and None or the reason why there is no compiled peer: a compiler that is not there or fails never
        stops a table.
    """
    try:
        with time_limit(seconds):
            call = make()
            call()
    except Exception as error:
        reason = why_not_compiled(error)
        progress(f'{label}: no compiled peer: {reason}')
        return calls, reason
    return {'stock': calls['stock'], COMPILED: call, **calls}, None


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the midst of what takes longer, where the system has signals."""
    if math.isinf(seconds) or not hasattr(signal, 'setitimer'):
        yield
        return

    fired = False

    def stop(*_: Any) -> None:
        nonlocal fired
        fired = True
        raise TimeoutError(_TOO_LONG)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)  # and again, should somebody have caught it
    try:
        yield
    except Exception as error:
        if fired:  # whatever the compiler has made of it
            raise TimeoutError(_TOO_LONG) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget_compiled() -> None:
    """To be called before a case: what earlier ones have compiled counts towards a limit of PyTorch's, over which code
    runs uncompiled."""
    torch.compiler.reset()


def why_not_compiled(error: Exception) -> str:
    """In one line."""
    text = str(error)
    if text == _TOO_LONG:
        return text
    if 'C++ compiler' in text or 'CxxCompiler' in text:
        return 'needs a C++ compiler'
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f'{type(error).__name__}: {" ".join(lines[:2])[:200]}'


# Memory


class Memory(NamedTuple):
    """Peak of a call, in MB: above what the built model takes, and in all. None where the process was killed."""

    growth: float | None
    peak: float | None

    def columns(self, side: str = '') -> dict[str, float | None]:
        prefix = f'{side}_' if side else ''
        return {f'{prefix}growth_mb': self.growth, f'{prefix}peak_mb': self.peak}


NOT_MEASURED = Memory(None, None)


def in_process(device: str) -> bool:
    """Whether memory can be taken in the process that takes the time: PyTorch counts what it allocates on a GPU."""
    return torch.device(device).type == 'cuda'


def memory_here(call: Callable[[], Any], device: str, *held: Any) -> Memory:
    """Peak of a call on a GPU, in this process.

    Args:
        call: made once.
        device: where it runs.
        held: the models, optimizers and tensors that this side needs besides: other sides have theirs there too, so
            what counts is the growth in the call and the size of these.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    growth = torch.cuda.max_memory_allocated(device) - before
    return Memory(growth / 1e6, (growth + _bytes_of(held)) / 1e6)


def memory_columns(found: dict[str, Memory]) -> dict[str, float | None]:
    """Columns of all sides; empty for those that were not measured."""
    columns = {}
    for side in (*SIDES, COMPILED):
        columns.update(found.get(side, NOT_MEASURED).columns(side))
    return columns


def larger(first: Memory, second: Memory) -> Memory:
    """The one with the higher peak."""
    return max(first, second, key=lambda memory: memory.peak or 0)


def _bytes_of(held: Any) -> int:
    """Of the tensors in there; what several share counts once."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.nn.Module):
            value = [*value.parameters(), *value.buffers()]
        elif isinstance(value, torch.optim.Optimizer):
            value = list(value.state.values())
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for part in value:
                walk(part)

    walk(held)
    return sum(found.values())


def memory_of(steps: Callable[..., Iterator[None]], case: Any, *arguments: Any) -> Memory:
    """Peak memory of a call in a process of its own: resident, or on a GPU what PyTorch has allocated there.

    Args:
        steps: a generator function of a module, called with the case and the arguments. It builds the model and
            yields, makes the input and yields, then makes the call.
        case: has ``device`` and ``threads``.
        arguments: like the case, must be picklable.

    Raises:
        RuntimeError: the call failed for another reason than memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'task.pkl'
        path.write_bytes(pickle.dumps((steps, case, arguments)))
        code = 'import sys; from mmseg_volo.benchmark.measuring import probe; probe(sys.argv[1])'
        command = [sys.executable, '-W', 'ignore', '-c', code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:  # by a signal: the kernel's, out of memory
        return NOT_MEASURED
    if done.returncode:
        raise RuntimeError(f'measuring memory failed: {done.stderr.strip()}')
    return Memory(*json.loads(done.stdout.splitlines()[-1]))


def probe(path: str) -> None:
    """The process of :func:`memory_of`: prints a :class:`Memory` as JSON."""
    steps, case, arguments = pickle.loads(Path(path).read_bytes())
    set_threads(case.threads)
    running = steps(case, *arguments)
    next(running)
    gc.collect()
    cuda = torch.device(case.device).type == 'cuda'
    baseline = torch.cuda.memory_allocated(case.device) if cuda else _resident()
    next(running)
    if cuda:
        torch.cuda.reset_peak_memory_stats(case.device)
    else:
        gc.collect()
        _reset_peak()
    try:
        next(running, None)
    except torch.cuda.OutOfMemoryError:
        print(json.dumps(NOT_MEASURED))
        return
    peak = torch.cuda.max_memory_allocated(case.device) if cuda else _peak()
    print(json.dumps([(peak - baseline) / 1e6, peak / 1e6]))


def _resident() -> int:
    found = _proc_status('VmRSS')
    return _peak() if found is None else found


def _peak() -> int:
    """Bytes. Linux's getrusage also counts the process that started this one, so it is asked only elsewhere."""
    found = _proc_status('VmHWM')
    if found is not None:
        return found
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def _reset_peak() -> None:
    """Forget the peak of building the model, where the system can; elsewhere it counts if it is the higher one."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def _proc_status(name: str) -> int | None:
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{name}:')), None)
