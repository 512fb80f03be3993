"""Times of calls, the limit of compiling, the profile of a call."""

import time

import pytest
import torch

from mmseg_volo.benchmark.profiling import profile_call
from mmseg_volo.benchmark.tables import Spread, times_faster
from mmseg_volo.benchmark.timing import calls_per_round, seconds_of, take_turns, time_limit


def test_rounds_are_long_enough():
    assert 10 <= calls_per_round(lambda: time.sleep(0.002)) <= 100
    assert calls_per_round(lambda: time.sleep(0.06)) == 1


def test_seconds_are_those_of_one_call():
    assert 0.01 <= seconds_of(lambda: time.sleep(0.01), 3) < 0.03


def test_sides_take_turns():
    order, seconds = [], iter([1.0, 2.0, 4.0, 1.0, 2.0, 3.0])

    def timer(side: str) -> float:
        order.append(side)
        return next(seconds)

    found = take_turns({side: lambda side=side: timer(side) for side in ('stock', 'ours')}, 3, 'sides')
    assert order == ['stock', 'ours', 'ours', 'stock', 'stock', 'ours']
    times = {side: measurement.times for side, measurement in found.items()}
    assert times == dict(stock=[1, 1, 2], ours=[2, 4, 3])
    assert times_faster(times, 'ours', 'stock') == Spread(0.5, 0.25, pytest.approx(2 / 3))
    assert times_faster(times, 'ours', 'compiled').median is None


def test_the_time_limit_interrupts():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match='compiling takes longer'), time_limit(0.1):
        time.sleep(5)
    assert time.monotonic() - start < 2


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
