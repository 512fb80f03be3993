"""VOLO-D1 beside what mmseg offers in its place: images a second, memory and published accuracy on ADE20K.

A network can run in three ways (:data:`RUNS`): up to logits in the size of the images; as this package's prediction
runs it, batches of windows through ``WindowNetwork``, which is faster; and end to end, from prepared images to class
ids. Of other networks the second way is a plain forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import ConfigDict
from mmseg.models import EncoderDecoder
from mmseg.models.backbones import MixVisionTransformer, SwinTransformer, TIMMBackbone
from mmseg.models.decode_heads import SegformerHead, UPerHead
from mmseg.models.utils import resize
from torch import Tensor, nn

from . import plots, tables
from .comparison import MEMORY_NOTES, BatchComparison, Found, Settings, compare, tensors_of
from .inputs import noise
from .machine import on_gpu
from .memory import NOT_MEASURED, memory_kind
from .stock import compiled, segmentor
from .tables import Columns, Spread, text, times_faster
from .timing import UNTIL_GRAPHS, autocast

CLASSES = 150  # of ADE20K
RUNS = 'logits', 'network', 'predict'
OURS, STOCK, COMPILED = 'volo-d1', 'volo-d1-timm', 'volo-d1-timm-compiled'


class Network(NamedTuple):
    """What mmseg's ADE20K config makes of a backbone, and the mIoU published for it, in percent.

    ``miou`` is at a single scale, ``miou_multi`` at several with flip; None if no figure could be verified.
    """

    backbone: dict
    head: dict
    miou: float | None
    miou_multi: float | None
    source: str


def _swin(depths: Sequence[int]) -> dict:
    return dict(type=SwinTransformer, embed_dims=96, depths=depths, num_heads=(3, 6, 12, 24), window_size=7)


def _convnext(name: str) -> dict:
    # mmseg's config takes mmpretrain's ConvNeXt, which has a LayerNorm on each map besides.
    return dict(type=TIMMBackbone, model_name=name, features_only=True, pretrained=False)


_UPER = dict(type=UPerHead, in_channels=[96, 192, 384, 768], pool_scales=(1, 2, 3, 6), channels=512)
_MIT_B5 = dict(
    type=MixVisionTransformer,
    embed_dims=64,
    num_layers=[3, 6, 40, 3],
    num_heads=[1, 2, 5, 8],
    patch_sizes=[7, 3, 3, 3],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratio=4,
    qkv_bias=True,
)
_SEGFORMER = dict(type=SegformerHead, in_channels=[64, 128, 320, 512], channels=256)
# The abstract of arXiv:2106.13112 gives 54.3 mIoU for the best variant; for D1 no figure could be verified.
_VOLO = Network({}, {}, None, None, 'none')
# The figures are mmsegmentation's own, from configs/*/metafile.yaml: 160k iterations at 512 x 512, from ImageNet-1K.
NETWORKS = {
    OURS: _VOLO,
    STOCK: _VOLO,
    COMPILED: _VOLO,
    'swin-t': Network(_swin((2, 2, 6, 2)), _UPER, 44.41, 45.79, 'mmseg configs/swin/metafile.yaml'),
    'swin-s': Network(_swin((2, 2, 18, 2)), _UPER, 47.72, 49.24, 'mmseg configs/swin/metafile.yaml'),
    'convnext-t': Network(_convnext('convnext_tiny'), _UPER, 46.11, 46.62, 'mmseg configs/convnext/metafile.yaml'),
    'convnext-s': Network(_convnext('convnext_small'), _UPER, 48.56, 49.02, 'mmseg configs/convnext/metafile.yaml'),
    'mit-b5': Network(_MIT_B5, _SEGFORMER, 49.13, 50.22, 'mmseg configs/segformer/metafile.yaml'),
}


@dataclass(frozen=True, kw_only=True)
class ModelsCase(BatchComparison):
    """Networks and their input.

    Args:
        sides: names in :data:`NETWORKS`; the first is what the others are compared with.
        run_as: one of :data:`RUNS`.
        others: see :class:`BatchComparison`.
    """

    sides: tuple[str, ...] = tuple(NETWORKS)
    run_as: str = 'logits'

    NAME = 'models'
    COMPILED = COMPILED
    SHORT_CALLS = True
    FROM_FIRST_CALL = (OURS,)

    @staticmethod
    def label(row: dict) -> str:
        return f'batch {row["batch"]}, {row["precision"]}, {row["run"]}'

    @staticmethod
    def title(row: dict) -> str:
        return (
            f'{row["height"]} x {row["width"]} pixels, {CLASSES} classes; median (least–greatest) of {row["rounds"]}; '
            'mIoU: published, on ADE20K'
        )

    def case_columns(self) -> dict:
        columns = super().case_columns()
        columns['run'] = columns.pop('run_as')
        return columns

    def build(self) -> dict[str, EncoderDecoder]:
        return {side: self.build_alone(side) for side in self.sides if side != COMPILED}

    def build_alone(self, side: str) -> EncoderDecoder:
        """The segmentor with random weights on the device, in eval mode, without the head that only trains."""
        if side == COMPILED:
            return self.build_compiled({})
        if side in (OURS, STOCK):
            model = segmentor('ours' if side == OURS else 'stock', 'd1', CLASSES)
            if side == OURS:
                model.test_cfg.precision = self.precision  # for what does not run under the caller's autocast
        else:
            network = NETWORKS[side]
            head = dict(in_index=[0, 1, 2, 3], num_classes=CLASSES, norm_cfg=dict(type='BN'), align_corners=False)
            head.update(network.head, loss_decode=dict(type='CrossEntropyLoss'))
            model = EncoderDecoder(network.backbone, head, test_cfg=ConfigDict(mode='whole'))
        return model.to(self.device).eval()

    def build_compiled(self, models: dict[str, EncoderDecoder]) -> EncoderDecoder:
        return compiled(models.get(STOCK) or self.build_alone(STOCK))

    def inputs(self, model: EncoderDecoder) -> Tensor:
        return noise(self.batch, self.size, self.device)

    def held(self, model: nn.Module, data: Tensor) -> list[Tensor]:
        return [*tensors_of(model), data]

    @torch.no_grad()
    def run(self, model: EncoderDecoder, side: str, data: Tensor) -> None:
        """As ``run_as`` says; nothing is returned, since the logits of all models together are large."""
        if side == OURS and self.run_as == 'network':
            with model.network.running():
                model.network.run(list(data))
        elif side == OURS and self.run_as == 'predict':
            model.predict(data)
        else:
            with autocast(self.precision, self.device):
                if self.run_as == 'predict':
                    model.predict(data)
                    return
                logits = model(data, mode='tensor')
                if self.run_as == 'logits':
                    resize(logits, data.shape[2:], mode='bilinear', align_corners=False)

    def warm_up(self, model: EncoderDecoder, side: str, data: Tensor) -> None:
        model.eval()  # drops the CUDA graphs of other cases
        for _ in range(UNTIL_GRAPHS if side == OURS and on_gpu(self.device) else 1):
            self.run(model, side, data)

    def sides_alone(self, sides: Sequence[str]) -> list[str]:
        return list(sides)

    def rows(self, settings: Settings, models: dict[str, EncoderDecoder] | None = None) -> list[dict]:
        """A row for each network.

        Args:
            settings: how they are measured.
            models: networks that are already built, by name; those that are missing are added.
        """
        if models is not None:
            for side in self.sides:
                if side not in models and side != COMPILED:
                    models[side] = self.build_alone(side)
        found = compare(self, settings, models)
        parameters = {side: sum(p.numel() for p in found.models[side].parameters()) for side in found.seconds}
        self.take_memory(found, settings)
        return [self._row(found, settings, side, parameters[side]) for side in found.seconds]

    def _row(self, found: Found, settings: Settings, side: str, parameters: int) -> dict:
        network = NETWORKS[side]
        return dict(
            **self.case_columns(),
            model=side,
            classes=CLASSES,
            parameters_m=parameters / 1e6,
            rounds=settings.rounds,
            **Spread.of([self.batch / spent for spent in found.seconds[side]]).columns('images_per_s'),
            **times_faster(found.seconds, side, next(iter(found.seconds))).columns('times_faster'),
            ade20k_miou=network.miou,
            ade20k_miou_multi_scale=network.miou_multi,
            miou_source=network.source,
            **found.memory.get(side, NOT_MEASURED).columns(),
        )

    def columns(self) -> Columns:
        return {
            'network': text('{model}'),
            'run': text('{run}'),
            'batch': text('{batch}'),
            'precision': text('{precision}'),
            'parameters (M)': text('{parameters_m:.1f}'),
            'images / s': tables.spread('images_per_s'),
            f'times faster than {self.sides[0]}': tables.spread('times_faster'),
            'memory': tables.size(f'{memory_kind(self.device)}_mb'),
            'mIoU, one scale': text('{ade20k_miou:.2f}'),
            'several': text('{ade20k_miou_multi_scale:.2f}'),
        }

    def notes(self, rows: Sequence[dict]) -> list[str]:
        kind = memory_kind(self.device)
        return [f'memory: {MEMORY_NOTES[kind]}'] * (rows[0][f'{kind}_mb'] is not None)

    def plot(self, rows: Sequence[dict], path: Path) -> None:
        """A panel for each batch, precision and run."""
        groups = dict.fromkeys(map(self.label, rows))
        plots.accuracy(path, rows, {name: [row for row in rows if self.label(row) == name] for name in groups})
