"""CUDA graphs of a network with few input shapes: one launch instead of one per kernel."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LIMIT = 8  # maximum of graphs
_IDLE = 64  # forward passes after which an unused graph may be replaced; fewer would thrash when many shapes alternate
_COUNTED = 256  # maximum of shapes whose uses are counted


class Graph(NamedTuple):
    """A captured forward pass: ``replay`` computes ``output`` from ``input`` and the memory ``reads``."""

    replay: Callable[[], None]
    input: Tensor
    output: Tensor
    reads: list[torch.UntypedStorage]


class Graphs:
    """The graphs of one network, by input shape.

    A graph stores addresses, not tensors: it sees in-place updates of weights, but no other change. Therefore
    :meth:`follow` takes a mark of the network's state and drops the graphs when the mark changes.

    Attributes:
        refused: whether a capture has failed, so that no further graphs are captured.
    """

    def __init__(self):
        self.clear()
        self.refused = False

    def __reduce__(self) -> tuple:
        return type(self), ()  # a copied network has other addresses

    def clear(self) -> bool:
        """Drop all graphs and return whether there were any; ``refused`` is kept."""
        had_any = bool(getattr(self, '_graphs', None))
        self._graphs: dict[tuple, Graph] = {}
        self._used: dict[tuple, int] = {}
        self._uses: Counter = Counter()
        self._passes = 0
        self._mark: object = None
        self._stream: torch.cuda.Stream | None = None  # stream of the last run
        self._stream_and_pool: tuple = ()  # capture stream and shared memory pool
        self._weights: dict[torch.dtype, HalfWeights] = {}
        return had_any

    def follow(self, mark: object, device: torch.device) -> None:
        """Drop the graphs if ``mark`` has changed. Call it before each series of runs, since the stream may differ."""
        if mark != self._mark:
            self.clear()
            self._mark = mark
        if mark is not None and device.type == 'cuda':
            stream = torch.cuda.current_stream(device)
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)  # the old stream may still read what the next run overwrites
            self._stream = stream

    def weights(self, network: nn.Module, dtype: torch.dtype, without: tuple[type, ...]) -> 'HalfWeights':
        """Current weights of the network in ``dtype``, always at the same addresses."""
        if dtype not in self._weights:
            self._weights[dtype] = HalfWeights(network, dtype, without)
        self._weights[dtype].refresh()
        return self._weights[dtype]

    def run(
        self,
        key: tuple,
        windows: Sequence[Tensor],
        forward: Callable[[Tensor], Tensor],
        uncompiled: Callable[[Tensor], Tensor],
        uses: int,
    ) -> Tensor:
        """Run ``forward`` on the stacked windows, by replaying a graph if there is one.

        Args:
            key: what distinguishes passes besides number, shape and dtype of the windows.
            windows: tensors of one shape and dtype.
            forward: the forward pass; it always runs the same operations and returns one tensor.
            uncompiled: ``forward`` without ``torch.compile``, so that its operations can be inspected.
            uses: number of passes after which a graph is captured.

        Returns:
            The result of ``forward``. The next run may overwrite it.
        """
        key = *key, len(windows), windows[0].shape, windows[0].dtype
        graph = self._graphs.get(key)
        self._passes += 1
        if graph is None:
            stacked = torch.stack(tuple(windows))
            output = forward(stacked)  # also fills the network's caches before a capture
            if self._is_due(key, uses):
                self._capture(key, stacked, forward, uncompiled)
            return output
        self._used[key] = self._passes
        torch.stack(tuple(windows), out=graph.input)
        graph.replay()
        return graph.output

    def _is_due(self, key: tuple, uses: int) -> bool:
        if self.refused:
            return False
        if len(self._uses) >= _COUNTED and key not in self._uses:
            self._uses.clear()
        self._uses[key] += 1
        if self._uses[key] < uses:
            return False
        if len(self._graphs) >= _LIMIT:
            oldest = min(self._used, key=self._used.get)
            if self._passes - self._used[oldest] < _IDLE:
                return False
            del self._graphs[oldest], self._used[oldest]
        return True

    def _capture(self, key: tuple, windows: Tensor, forward: Callable, uncompiled: Callable) -> None:
        del self._uses[key]
        try:
            if not self._stream_and_pool:
                self._stream_and_pool = new_stream_and_pool(windows.device)
            self._graphs[key] = capture(windows, forward, uncompiled, *self._stream_and_pool)
            self._used[key] = self._passes
        except RuntimeError as error:  # out of memory, or an operation that a graph cannot contain
            reason = str(error).strip().splitlines()[0]
            print_log(f'no CUDA graph of {tuple(windows.shape)}: {reason}', 'current', logging.WARNING)
            self.clear()
            self.refused = True
            if windows.is_cuda:
                torch.cuda.empty_cache()


def can_capture(device: torch.device) -> bool:
    """Whether the device supports graphs."""
    return device.type == 'cuda'


def new_stream_and_pool(device: torch.device) -> tuple:
    """A capture stream, and a memory pool that all graphs share, since no two of them run at the same time."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


def capture(
    windows: Tensor,
    forward: Callable[[Tensor], Tensor],
    uncompiled: Callable[[Tensor], Tensor],
    stream: torch.cuda.Stream,
    pool: tuple,
) -> Graph:
    """Capture ``forward``, which must have run on windows of this shape, so that all caches are filled."""
    reads = _Reads(windows)
    with reads:
        uncompiled(windows)
    with torch.inference_mode(False):  # an inference tensor could be written only in inference mode
        static = torch.empty_like(windows)
    graph = torch.cuda.CUDAGraph()
    # 'thread_local': other threads may run operations that cannot be captured.
    options = dict(pool=pool, stream=stream, capture_error_mode='thread_local')
    # Restores the current stream, which a failed capture does not.
    before = torch.cuda.stream(torch.cuda.current_stream(windows.device))
    with torch.cuda.device(windows.device), before, torch.cuda.graph(graph, **options):
        output = forward(static)
    return Graph(graph.replay, static, output, reads.storages())


class _Reads(TorchDispatchMode):
    """Record the memory that operations read but did not allocate: weights and caches of modules.

    A graph holds references to it, so that it is not reused even if the module frees it.
    """

    def __init__(self, windows: Tensor):
        super().__init__()
        self._made = {windows.untyped_storage().data_ptr()}
        self._found: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in _storages((*args, *kwargs.values())):
            if storage.data_ptr() not in self._made:
                self._found[storage.data_ptr()] = storage
        out = func(*args, **kwargs)
        self._made.update(storage.data_ptr() for storage in _storages(out))
        return out

    def storages(self) -> list[torch.UntypedStorage]:
        return list(self._found.values())


def _storages(values: object) -> list[torch.UntypedStorage]:
    if isinstance(values, Tensor):
        return [values.untyped_storage()]
    if isinstance(values, (list, tuple)):
        return [storage for value in values for storage in _storages(value)]
    return []


def mark_of(network: nn.Module) -> tuple | None:
    """Addresses and versions of all weights and buffers of a network.

    Returns:
        None if a graph could miss a change: a module is in training mode or has forward hooks, or a tensor was created
        in ``torch.inference_mode`` and so has no version.
    """
    found: list[int] = []
    modules: list[nn.Module] = [network]
    try:
        while modules:
            module = modules.pop()
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                return None
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        found += tensor.data_ptr(), tensor._version
            modules += [child for child in module._modules.values() if child is not None]
    except RuntimeError:  # an inference tensor
        return None
    return tuple(found)


class HalfWeights:
    """Copies of a network's weights in autocast's dtype, cast at once by few kernels.

    Autocast casts each weight separately and frees the copy when its outermost context ends, so a graph could not read
    it again. These copies keep their addresses. As a context manager, it puts them in the weights' places.

    Args:
        network: the network; the float32 weights of its linear layers and convolutions are copied.
        dtype: dtype of the copies.
        without: types of modules that keep float32 weights, as they compute with them.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, without: tuple[type, ...] = ()):
        kept = {part for module in network.modules() if isinstance(module, without) for part in module.modules()}
        self._places = [
            (module._parameters, name)
            for module in network.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in kept
            for name, weight in module._parameters.items()
            if weight is not None and weight.dtype == torch.float32
        ]
        with torch.inference_mode(False):
            self._copies = [
                torch.empty_like(params[name], dtype=dtype, requires_grad=False) for params, name in self._places
            ]
        self._originals: list[nn.Parameter] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights."""
        if self._places:
            torch._foreach_copy_(self._copies, [params[name] for params, name in self._places])

    def __enter__(self) -> None:
        self._originals = [params[name] for params, name in self._places]
        for (params, name), copy in zip(self._places, self._copies, strict=True):
            params[name] = copy

    def __exit__(self, *_) -> None:
        for (params, name), original in zip(self._places, self._originals, strict=True):
            params[name] = original
        self._originals = []
