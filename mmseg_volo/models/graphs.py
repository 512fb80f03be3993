"""CUDA graphs of a network that sees inputs of few shapes: one launch instead of one for each kernel."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LIMIT = 8  # graphs at a time
_IDLE = 64  # passes without a graph, after which it may make room for another one: shapes that take turns stay apart
_COUNTED = 256  # shapes whose uses are counted


class Graph(NamedTuple):
    """A captured pass. ``replay`` makes ``output`` from what is in ``input``; ``reads`` is what it reads besides."""

    replay: Callable[[], None]
    input: Tensor
    output: Tensor
    reads: list[torch.UntypedStorage]


class Graphs:
    """The graphs of one network, by shape.

    A graph holds addresses, not tensors: it sees what is written into the weights, and nothing else that changes.
    :meth:`follow` therefore takes a mark of all that may change, and forgets the graphs when it is another one.

    Attributes:
        refused: no graphs are made, since one has failed.
    """

    def __init__(self):
        self.clear()
        self.refused = False

    def __reduce__(self) -> tuple:
        return type(self), ()  # a copy of the network has other addresses

    def clear(self) -> bool:
        """Forget all graphs, and say whether there were any; what has failed before is not tried again."""
        held = bool(getattr(self, '_graphs', None))
        self._graphs: dict[tuple, Graph] = {}
        self._used: dict[tuple, int] = {}
        self._uses: Counter = Counter()
        self._passes = 0
        self._mark: object = None
        self._stream: torch.cuda.Stream | None = None  # of the last runs
        self._place: tuple = ()  # the stream that they are captured on and the memory that they share
        self._weights: dict[torch.dtype, HalfWeights] = {}
        return held

    def follow(self, mark: object, device: torch.device) -> None:
        """Keep the graphs only while ``mark`` stays the same; to be called before runs on another stream, too."""
        if mark != self._mark:
            self.clear()
            self._mark = mark
        if mark is not None and device.type == 'cuda':
            stream = torch.cuda.current_stream(device)
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)  # which may still read what the next run writes to
            self._stream = stream

    def weights(self, network: nn.Module, dtype: torch.dtype, without: tuple[type, ...]) -> 'HalfWeights':
        """The network's weights in ``dtype``, as they are now; in the same place each time, for the graphs."""
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
        """``forward`` of the stacked windows, from a graph where there is one.

        Args:
            key: what makes passes differ besides the windows' number, shape and dtype.
            windows: tensors of one shape and dtype.
            forward: the pass; it always takes the same way, and gives one tensor.
            uncompiled: the same without ``torch.compile``, whose operations cannot be looked at.
            uses: the pass that a graph is captured after.

        Returns:
            What ``forward`` gives. The next run writes over it.
        """
        key = *key, len(windows), windows[0].shape, windows[0].dtype
        graph = self._graphs.get(key)
        self._passes += 1
        if graph is None:
            stacked = torch.stack(tuple(windows))
            output = forward(stacked)  # also fills whatever the network keeps between passes, ahead of a capture
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
            if not self._place:
                self._place = new_place(windows.device)
            self._graphs[key] = capture(windows, forward, uncompiled, *self._place)
            self._used[key] = self._passes
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            reason = str(error).strip().splitlines()[0]
            print_log(f'no CUDA graph of {tuple(windows.shape)}: {reason}', 'current', logging.WARNING)
            self.clear()
            self.refused = True
            if windows.is_cuda:
                torch.cuda.empty_cache()


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs on this device."""
    return device.type == 'cuda'


def new_place(device: torch.device) -> tuple:
    """A stream to capture on, and memory that all graphs captured there share: no two of them run at one time."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


def capture(
    windows: Tensor,
    forward: Callable[[Tensor], Tensor],
    uncompiled: Callable[[Tensor], Tensor],
    stream: torch.cuda.Stream,
    pool: tuple,
) -> Graph:
    """Capture ``forward``, which has run on such windows just before: nothing is set up or kept by it any more."""
    reads = _Reads(windows)
    with reads:
        uncompiled(windows)
    with torch.inference_mode(False):  # else it could only be written in that mode
        static = torch.empty_like(windows)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on: only what this one does must be fit for a graph.
    how = dict(pool=pool, stream=stream, capture_error_mode='thread_local')
    # A capture that fails would leave its stream the current one.
    before = torch.cuda.stream(torch.cuda.current_stream(windows.device))
    with torch.cuda.device(windows.device), before, torch.cuda.graph(graph, **how):
        output = forward(static)
    return Graph(graph.replay, static, output, reads.storages())


class _Reads(TorchDispatchMode):
    """Finds the memory that operations read and that none of them has made: weights, and whatever a module keeps.

    While a graph holds it, it is not given to other tensors, even if the module lets it go.
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
    """Where the weights and buffers of a network are, and how often they were written to.

    Returns:
        None where a graph could miss something: a module in training mode or with hooks on its forward pass, or
        tensors of ``torch.inference_mode``, which do not count what is written to them.
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
    """Copies of a network's weights in the precision of autocast, all cast at once by few kernels.

    Autocast casts each weight by itself when it is first used, and lets it go when its outermost context ends: a graph
    could not read it again. These stay where they are.

    Args:
        network: of its linear layers and convolutions the float32 weights are copied.
        dtype: of the copies.
        without: modules, by their type, that keep float32, as they compute with their weights.
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
            self._copies = [torch.empty_like(of[name], dtype=dtype, requires_grad=False) for of, name in self._places]
        self._own: list[nn.Parameter] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights as they are now."""
        if self._places:
            torch._foreach_copy_(self._copies, [of[name] for of, name in self._places])

    def __enter__(self) -> None:
        """Put the copies in the weights' places."""
        self._own = [of[name] for of, name in self._places]
        for (of, name), copy in zip(self._places, self._copies, strict=True):
            of[name] = copy

    def __exit__(self, *_) -> None:
        for (of, name), own in zip(self._places, self._own, strict=True):
            of[name] = own
        self._own = []
