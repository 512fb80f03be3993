"""Peak memory of a call: on a GPU in the process that takes the time, on a CPU in a process for each side."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from mmengine.registry import init_default_scope

from .machine import on_gpu, process_context, use

if TYPE_CHECKING:
    from .comparison import Comparison


class Memory(NamedTuple):
    """Peak of a call in MB (10^6 bytes).

    ``growth`` is the peak above the process with the built model, ``peak`` all of it. None if not measured; infinite if
    there was not enough memory.
    """

    growth: float | None
    peak: float | None

    def columns(self, side: str = '') -> dict[str, float | None]:
        prefix = f'{side}_' if side else ''
        return {f'{prefix}growth_mb': self.growth, f'{prefix}peak_mb': self.peak}


NOT_MEASURED = Memory(None, None)
OUT_OF_MEMORY = Memory(inf, inf)


def memory_kind(device: str) -> str:
    """The figure that tables show: on a GPU its peak, on a CPU what the call adds to the process."""
    return 'peak' if on_gpu(device) else 'growth'


def memory_here(call: Callable[[], Any], device: str, held: Iterable[torch.Tensor]) -> Memory:
    """Peak of a call on a GPU, in this process.

    Args:
        call: made once.
        device: where it runs.
        held: tensors that this side needs. Other sides have theirs in the same process, so the peak is the size of
            these plus the growth in the call.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    growth = torch.cuda.max_memory_allocated(device) - before
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return Memory(growth / 1e6, (growth + sum(storages.values())) / 1e6)


def larger(first: Memory, second: Memory) -> Memory:
    """The one with the higher peak."""
    return max(first, second, key=lambda memory: memory.peak or 0)


def memory_alone(case: 'Comparison', side: str) -> Memory:
    """Peak memory of one side in a process of its own: resident on a CPU, allocated by PyTorch on a GPU.

    The process builds the side, makes the input, then calls it once as ``case.peak_call`` says.
    """
    with ProcessPoolExecutor(1, process_context(case.device)) as pool:
        try:
            return pool.submit(_probe, case, side).result()
        except BrokenProcessPool:  # the system killed it, for want of memory
            return OUT_OF_MEMORY


def _probe(case: 'Comparison', side: str) -> Memory:
    use(case.device, case.threads)
    init_default_scope('mmseg')
    model = case.build_alone(side)
    gc.collect()
    cuda = on_gpu(case.device)
    baseline = torch.cuda.memory_allocated(case.device) if cuda else _resident()
    data = case.inputs(model)
    if cuda:
        torch.cuda.reset_peak_memory_stats(case.device)
    else:
        gc.collect()
        _reset_peak()
    try:
        case.peak_call(model, side, data)
    except torch.cuda.OutOfMemoryError:
        return OUT_OF_MEMORY
    peak = torch.cuda.max_memory_allocated(case.device) if cuda else _peak()
    return Memory((peak - baseline) / 1e6, peak / 1e6)


def _resident() -> int:
    """Bytes."""
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
    """Forget the peak of building the model, if the system can; elsewhere it counts if it is the higher one."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def _proc_status(name: str) -> int | None:
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{name}:')), None)
