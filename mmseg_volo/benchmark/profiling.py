"""Where the time of a call goes: kernels on a GPU, operators on a CPU, by :mod:`torch.profiler`."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from .machine import on_gpu
from .timing import seconds_of

_LAUNCHES = 'cudaLaunchKernel', 'cudaLaunchKernelExC', 'cuLaunchKernel', 'cuLaunchKernelEx'
# Calls that wait for the device; item(), bool() and the like call the last one.
_WAITS = (
    'cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize', 'cudaMemcpy', 'aten::_local_scalar_dense'
)  # fmt: skip
_REGION = 'mmseg_volo: the profiled call'


class Line(NamedTuple):
    """A kernel or operator: its name, how often it ran, its seconds and its share of all."""

    name: str
    count: int
    seconds: float
    share: float


class Profile(NamedTuple):
    """What one call does.

    ``seconds`` is its time without the profiler; ``busy`` the seconds in which the device computes or copies, None on
    a CPU; ``graphs`` the CUDA graphs replayed; ``waits`` counts what waits for the device, by name.
    """

    seconds: float
    busy: float | None
    launches: int
    graphs: int
    waits: dict[str, int]
    lines: list[Line]


def profile_call(call: Callable[[], Any], device: str, rows: int = 15, warm: int = 3) -> Profile:
    """Profile a call, after ``warm`` others; ``rows`` kernels or operators that take longest."""
    for _ in range(warm):
        call()
    seconds = min(seconds_of(call) for _ in range(2))
    cuda = on_gpu(device)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        with record_function(_REGION):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    if not cuda:
        operators = [e for e in found.key_averages() if e.key != _REGION]
        spent = {e.key: (e.count, e.self_cpu_time_total / 1e6) for e in operators}
        return Profile(seconds, None, 0, 0, {}, _lines(spent, rows))
    events = found.events()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and e.name != _REGION and not _is_annotation(e)]
    region = next(e for e in events if e.name == _REGION and e.device_type == DeviceType.CPU).time_range
    inside = Counter(
        e.name for e in events if e.device_type == DeviceType.CPU and region.start <= e.time_range.start <= region.end
    )
    spent = {}
    for event in kernels:
        count, total = spent.get(event.name, (0, 0.0))
        spent[event.name] = count + 1, total + event.time_range.elapsed_us() / 1e6
    waits = {name: inside[name] for name in _WAITS if inside[name]}
    launches = sum(inside[name] for name in _LAUNCHES)
    busy = _covered([(e.time_range.start, e.time_range.end) for e in kernels]) / 1e6
    return Profile(seconds, busy, launches, inside['cudaGraphLaunch'], waits, _lines(spent, rows))


def _is_annotation(event: Any) -> bool:
    return bool(getattr(event, 'is_user_annotation', False))


def _lines(spent: dict[str, tuple[int, float]], rows: int) -> list[Line]:
    total = sum(seconds for _, seconds in spent.values()) or 1
    longest = sorted(spent.items(), key=lambda item: -item[1][1])[:rows]
    return [Line(name, count, seconds, seconds / total) for name, (count, seconds) in longest]


def _covered(ranges: list[tuple[float, float]]) -> float:
    """Length of the union: kernels of several streams overlap."""
    covered, reached = 0.0, float('-inf')
    for start, end in sorted(ranges):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered
