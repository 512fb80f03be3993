"""Our VOLO against timm's with the same weights: the stage maps of a batch, without head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.volo import VOLO
from ..ops import use_fused_outlook
from .comparison import COMPILED, BatchComparison, Found, Settings, tensors_of
from .inputs import noise
from .machine import on_gpu
from .stock import TimmVOLO, compiled
from .tables import text
from .timing import autocast


@dataclass(frozen=True, kw_only=True)
class BackboneCase(BatchComparison):
    """One backbone and its input.

    Args:
        arch: 'd1'...'d5'.
        compile: our side through ``torch.compile``.
        channels_last: our weights in that memory format.
        cuda_graph: every side as a CUDA graph, without the time that launching takes on the host.
        timm: our side is timm's VOLO too, with :func:`mmseg_volo.ops.use_fused_outlook`.
        others: see :class:`BatchComparison`.
    """

    arch: str = 'd1'
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False
    timm: bool = False

    NAME = 'backbone'
    SHORT_CALLS = True
    EXTRA_COLUMNS = {'largest difference': text('{largest_difference:.2g}')}
    NOTES = ('largest difference: of the four maps, relative to the largest value of a map',)

    def __post_init__(self):
        super().__post_init__()
        if self.cuda_graph and not on_gpu(self.device):
            raise ValueError(f'CUDA graphs need a GPU, got device {self.device}')

    @staticmethod
    def label(row: dict) -> str:
        options = [name for name in ('compile', 'channels_last', 'cuda_graph', 'timm') if row[name]]
        return ', '.join([f'VOLO-{row["arch"].upper()}, batch {row["batch"]}, {row["precision"]}', *options])

    def build(self) -> dict[str, nn.Module]:
        models = {side: self._build(side) for side in ('stock', 'ours')}
        if not self.timm:  # else both are timm's, of one seed
            models['stock'].load_backbone(models['ours'].state_dict())
        return {side: self._ready(model, side) for side, model in models.items()}

    def build_alone(self, side: str) -> nn.Module:
        model = self._ready(self._build(side), side)
        return compiled(model) if side == COMPILED else model

    def build_compiled(self, models: dict[str, nn.Module]) -> nn.Module:
        return compiled(models['stock'])

    def _build(self, side: str) -> VOLO | TimmVOLO:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind = VOLO if side == 'ours' and not self.timm else TimmVOLO
            model = kind(self.arch, img_size=self.size, out_norm=False)
            nn.init.trunc_normal_(model.pos_embed, std=0.02)
        if side == 'ours' and self.timm:
            use_fused_outlook(model)
        return model.eval()

    def _ready(self, model: nn.Module, side: str) -> nn.Module | Callable:
        model = model.to(self.device)
        if side == 'ours' and self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return torch.compile(model) if side == 'ours' and self.compile else model

    def inputs(self, model: nn.Module) -> Tensor:
        return noise(self.batch, self.size, self.device)

    def held(self, model: nn.Module, data: Tensor) -> list[Tensor]:
        return [*tensors_of(model), data]

    @torch.no_grad()
    def run(self, model: nn.Module, side: str, data: Tensor) -> Sequence[Tensor]:
        with autocast(self.precision, self.device):
            return model(data)

    def extra(self, found: Found, settings: Settings) -> dict:
        pairs = zip(found.results['stock'], found.results['ours'], strict=True)
        return dict(largest_difference=max(((b - a).abs().max() / a.abs().max()).item() for a, b in pairs))
