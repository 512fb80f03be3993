"""Timing: the sides of a comparison take turns in one process; CUDA graphs; a time limit for compiling.

``torch.utils.benchmark`` gives the clock, which waits for the GPU, and the record of the times. Its ``Timer`` is not
used: it makes two calls before every measurement, so that rounds of a training step that takes seconds would take three
times as long, and its ``Compare`` shows neither the spread of the rounds nor ratios.
"""

import contextlib
import math
import signal
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.benchmark import timer as synchronised_clock

from ..models.windows import PRECISIONS

# A round of short calls lasts at least this many seconds, so that the clock and other processes weigh little.
_LEAST_ROUND = 0.05
# Predictions of an image until all its CUDA graphs exist: a batch shape is captured when it occurs for the third time.
UNTIL_GRAPHS = 4
_TOO_LONG = 'compiling takes longer than there is time'


def progress(line: str) -> None:
    """Print a line of progress on stderr, so that stdout can be piped."""
    print(line, file=sys.stderr, flush=True)


def autocast(precision: str, device: str) -> torch.autocast:
    """The context for a precision of :data:`~mmseg_volo.models.windows.PRECISIONS`; fp32 changes nothing."""
    low = precision != 'fp32'
    return torch.autocast(torch.device(device).type, PRECISIONS[precision] if low else None, enabled=low)


def seconds_of(call: Callable[[], Any], calls: int = 1) -> float:
    """Mean seconds of so many calls, work on the GPU included; Python's garbage collector is off meanwhile."""
    return timeit.Timer(call, timer=synchronised_clock).timeit(calls) / calls


def calls_per_round(call: Callable[[], Any]) -> int:
    """How many calls make a round that is long enough."""
    call()  # warms up
    calls = 1
    while (spent := calls * seconds_of(call, calls)) < _LEAST_ROUND:
        calls *= min(max(math.ceil(1.2 * _LEAST_ROUND / max(spent, 1e-9)), 2), 100)
    return calls


def take_turns(timers: dict[str, Callable[[], float]], rounds: int, label: str) -> dict[str, Measurement]:
    """Time all sides, one after the other in every round, in every second round backwards.

    Args:
        timers: of each side, a function that times one call and returns its seconds.
        rounds: how often each side is timed.
        label: of the lines of progress.
    """
    threads = torch.get_num_threads()
    found = {side: Measurement(1, [], TaskSpec(label, '', description=side, num_threads=threads)) for side in timers}
    for i in range(rounds):
        for side in list(timers)[:: 1 if i % 2 == 0 else -1]:
            found[side].raw_times.append(timers[side]())
        taken = ', '.join(f'{side} {found[side].raw_times[-1]:.3g} s' for side in timers)
        progress(f'{label}: round {i + 1} of {rounds}: {taken}')
    return found


def as_graph(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Capture a call as a CUDA graph: its time is that of the device, without launching kernels from the host.

    Every replay returns the tensors of the captured call, with new values.
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


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the middle of what takes longer, if the system has signals."""
    if math.isinf(seconds) or not hasattr(signal, 'setitimer'):
        yield
        return

    fired = False

    def stop(*_: Any) -> None:
        nonlocal fired
        fired = True
        raise TimeoutError(_TOO_LONG)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)  # and again every 5 s, in case the error is swallowed
    try:
        yield
    except Exception as error:
        if fired:  # whatever the compiler turned the error into
            raise TimeoutError(_TOO_LONG) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Not the default, which would end the process if an alarm is still on its way to another thread.
        signal.signal(signal.SIGALRM, before if callable(before) else signal.SIG_IGN)


def reason_of(error: Exception) -> str:
    """Why a side cannot run, in one line."""
    text = str(error).strip()
    if text == _TOO_LONG or isinstance(error, ValueError):
        return text.splitlines()[0]
    if 'C++ compiler' in text or 'CxxCompiler' in text:
        return 'needs a C++ compiler'
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f'{type(error).__name__}: {" ".join(lines[:2])[:200]}'
