"""Run the windows of an image through a segmentor's network, in batches."""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import FunctionType

import torch
from mmseg.models import EncoderDecoder
from torch import Tensor, nn

from .graphs import Graphs, HalfWeights, can_capture, mark_of
from .overrides import has_plain_head, is_standard
from .streaming import View, stream
from .volo import VOLO, Block, PatchEmbed, call_block, call_stem

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_BATCH_PIXELS = {'cpu': 2**18, 'cuda': 2**21}  # default pixel budget of one batch of windows
# Batches of more pixels use no graph: it would hold much memory and save little. VOLO-D1 takes 15.7 ms for 16 windows
# of 512 x 512 without and 15.1 ms with a graph; for one window 15.4 and 2.8 ms.
_GRAPH_PIXELS = 2**22


class WindowNetwork:
    """Run windows through a segmentor in batches, with the options of its ``test_cfg``.

    Args:
        segmentor: the segmentor.
        follows_training: whether the segmentor clears ``graphs`` when it starts to train or moves its weights. Without
            that, CUDA graphs are not used.
    """

    def __init__(self, segmentor: EncoderDecoder, follows_training: bool = False):
        self.segmentor = segmentor
        self._follows_training = follows_training
        # Called after each batch with the number of windows done and of all windows.
        self.progress: Callable[[int, int], None] | None = None
        # Whether predictions have the logits of every SAMPLE_STEP-th pixel; evaluation sets it.
        self.sampled = False
        # Whether predictions have all logits, whatever `test_cfg` says; test-time augmentation sets it.
        self.logits = False
        self.graphs = Graphs()
        self._done, self._total = 0, 0
        self._fits: dict[tuple[int, int], int] = {}  # reduced batch size after an out-of-memory error, by window shape
        self._compiled: dict[tuple, Callable] = {}
        self._weights: HalfWeights | None = None  # weights of the current images, if they may use graphs

    def __getstate__(self) -> dict:
        # A copy compiles its own functions, casts its own weights and reports to nobody.
        return {**self.__dict__, '_compiled': {}, '_weights': None, 'progress': None}

    @property
    def device(self) -> torch.device:
        return next(self.segmentor.parameters()).device

    def stream(self, images: list[list[View]]):
        """See :func:`mmseg_volo.models.streaming.stream`."""
        self._done = 0
        self._total = sum(len(view.along.starts) * len(view.across.starts) for views in images for view in views)
        return stream(images, self._encode, self.segmentor.out_channels, self.device)

    @contextmanager
    def running(self):
        """Context for all windows of one call: set the options once, and use full precision outside the network."""
        with self.options(), torch.autocast(self.device.type, enabled=False):
            yield

    @contextmanager
    def options(self):
        """Context in which the network has the options of ``test_cfg``."""
        cfg = self.segmentor.test_cfg or {}
        precision = cfg.get('precision')
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f'test_cfg.precision must be one of {", ".join(PRECISIONS)}, got {precision!r}')
        if cfg.get('channels_last'):
            self._make_channels_last()
        device = self.device
        kind = device.type
        outer = torch.is_autocast_enabled(kind)
        enabled = outer if precision is None else precision != 'fp32'
        dtype = torch.get_autocast_dtype(kind) if precision in (None, 'fp32') else PRECISIONS[precision]
        self._autocast = dict(device_type=kind, enabled=enabled, dtype=dtype)
        # Plain heads return logits before the resize, which is then part of the streaming. Other heads and cascades
        # resize them on their own.
        self._plain = has_plain_head(self.segmentor)
        mark = mark_of(self.segmentor) if self._may_use_graphs(device) else None
        self.graphs.follow(mark, device)
        self._uses_graphs, self._weights = mark is not None, None
        if self._uses_graphs and enabled:
            self._weights = self.graphs.weights(self.segmentor, dtype, without=(PatchEmbed,))
        # Autocast caches cast weights until the outermost context ends: with this one they are cast once per call.
        with self._compiled_parts(), torch.autocast(**self._autocast):
            yield

    @contextmanager
    def _compiled_parts(self):
        """Let VOLO call its blocks and its stem compiled, if ``test_cfg`` asks for it."""
        backbone = self.segmentor.backbone
        if not (self.segmentor.test_cfg or {}).get('compile') or not isinstance(backbone, VOLO):
            yield
            return
        before = backbone.calls
        backbone.calls = {Block: self._compile(call_block), PatchEmbed: self._compile(call_stem)}
        try:
            yield
        finally:
            backbone.calls = before

    def _compile(self, function: Callable) -> Callable:
        """Compile a copy of the function for this network and precision, for windows of any size.

        It is a copy, since PyTorch recompiles the same code only a few times and then runs it uncompiled.
        """
        key = function.__name__, *self._autocast.values()
        if key not in self._compiled:
            own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self._compiled[key] = torch.compile(own, dynamic=True)
        return self._compiled[key]

    def _make_channels_last(self) -> None:
        weights = (module.weight for module in self.segmentor.modules() if isinstance(module, nn.Conv2d))
        if not all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights):
            self.segmentor.to(memory_format=torch.channels_last)

    def _may_use_graphs(self, device: torch.device) -> bool:
        """Whether the device, the segmentor and ``test_cfg`` allow graphs."""
        cfg, segmentor = self.segmentor.test_cfg or {}, self.segmentor
        wanted = cfg.get('cuda_graph')
        if wanted is None:
            own_steps = self._plain and is_standard(segmentor, 'extract_feat')  # no other code, which may have a state
            wanted = own_steps and isinstance(segmentor.backbone, VOLO) and not cfg.get('compile')
        usable = self._follows_training and can_capture(device) and not self.graphs.refused
        return bool(wanted) and usable and not torch.is_grad_enabled()

    def _encode(self, due: list[tuple[View, int, int]]) -> None:
        by_shape: dict[tuple[int, int], list] = {}
        for window in due:
            by_shape.setdefault(window[0].window_shape, []).append(window)
        for shape, windows in by_shape.items():
            if self.device.type == 'cpu':
                _trim_heap()
            while windows:
                size = self._batch(shape)
                batch, windows = windows[:size], windows[size:]
                try:
                    logits = self._logits([view.window(i, j) for view, i, j in batch], batch[0][0].known)
                except torch.cuda.OutOfMemoryError:
                    if self.graphs.clear():  # retry first without the memory of graphs, then with fewer windows
                        self.graphs.refused, self._uses_graphs, self._weights = True, False, None
                    elif len(batch) == 1:
                        raise
                    else:
                        self._fits[shape] = len(batch) // 2
                    torch.cuda.empty_cache()
                    windows = batch + windows
                    continue
                for (view, i, j), of_window in zip(batch, logits, strict=True):
                    view.put(i, j, of_window)
                self._done += len(batch)
                if self.progress:
                    self.progress(self._done, self._total)

    def _batch(self, shape: tuple[int, int]) -> int:
        size = self.segmentor.test_cfg.get('window_batch')
        if size is None:
            pixels = _BATCH_PIXELS.get(self.device.type, _BATCH_PIXELS['cuda'])
            size = max(pixels // (shape[0] * shape[1]), 1)
        return min(size, self._fits.get(shape, size))

    def _logits(self, windows: Sequence[Tensor], known: dict[tuple, Tensor] | None) -> Tensor:
        """As :meth:`run`, but with ``known``, see :class:`View`, a batch of one colour is computed only once."""
        if known is None:
            return self.run(windows)
        first = windows[0][:, :1, :1]
        if not all((window == first).all() for window in windows):
            return self.run(windows)
        key = len(windows), windows[0].shape, *first.flatten().tolist()
        if key not in known:
            known.clear()  # a scene with many colours does not fill the memory
            known[key] = self.run(windows).clone()
        return known[key]

    def run(self, windows: Sequence[Tensor]) -> Tensor:
        """Logits of preprocessed windows, each (3, height, width), of one shape; call it within :meth:`running`.

        Returns:
            (N, C, h, w) in the decode head's size. The next call may overwrite it.
        """
        cfg = self.segmentor.test_cfg
        pixels = len(windows) * windows[0].shape[1] * windows[0].shape[2]
        if not self._uses_graphs or (pixels > _GRAPH_PIXELS and not cfg.get('cuda_graph')):
            return self._pass(torch.stack(tuple(windows)))
        # A smaller last batch gets its own graph: padding it to the usual number would take longer.
        key = bool(cfg.get('compile')), *self._autocast.values()
        uses = 1 if cfg.get('cuda_graph') else 3
        return self.graphs.run(key, windows, self._pass, self._uncompiled_pass, uses)

    def _pass(self, windows: Tensor) -> Tensor:
        forward = self._forward
        if self.segmentor.test_cfg.get('compile') and not isinstance(self.segmentor.backbone, VOLO):
            forward = partial(self._compile(_call_network), self)
        return self._with_options(forward, windows)

    def _uncompiled_pass(self, windows: Tensor) -> Tensor:
        backbone = self.segmentor.backbone
        if not isinstance(backbone, VOLO):
            return self._with_options(self._forward, windows)
        calls, backbone.calls = backbone.calls, {}
        try:
            return self._with_options(self._forward, windows)
        finally:
            backbone.calls = calls

    def _with_options(self, forward: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
        # Autocast frees its cached weights after the call, but a graph lives longer.
        weights = nullcontext() if self._weights is None else self._weights
        with torch.autocast(**self._autocast, cache_enabled=not self._uses_graphs), weights:
            return forward(windows)

    def _forward(self, windows: Tensor) -> Tensor:
        if self._plain:
            return self.segmentor.decode_head.forward(self.segmentor.extract_feat(windows))
        shape = windows.shape[2:]
        meta = dict(img_shape=shape, pad_shape=shape, ori_shape=tuple(shape))
        return self.segmentor.encode_decode(windows, [dict(meta) for _ in windows])


def _call_network(network: WindowNetwork, windows: Tensor) -> Tensor:
    return network._forward(windows)


def _trim_heap() -> None:
    """Return free pages of the C heap to the system, if the C library can (glibc).

    Windows of several shapes fragment the heap. Ten views (VOLO-D1, 512 x 1024) made a process grow by 380 to 560 MB,
    and with this by 360 to 410 MB. Trimming before each window instead of each shape saves little more and costs 10 %
    of the time.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
