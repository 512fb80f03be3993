"""Predicting whole images: stock mmseg against this package, and the cost against the size of the image."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmseg.models import EncoderDecoder, SegTTAModel
from torch import Tensor, nn

from ..models.segmentors import StreamingTTAModel
from ..models.volo import STRIDE
from . import plots, tables
from .comparison import COMPILED, MEMORY_NOTES, SHOWN, SIDES, Comparison, Found, Settings, check_size, compare
from .inputs import VIEWS, draw, prepare, view_pixels
from .machine import on_gpu
from .memory import NOT_MEASURED, memory_alone, memory_here, memory_kind
from .stock import compiled, copy_weights, segmentor
from .tables import EMPTY, Columns, text
from .timing import UNTIL_GRAPHS, autocast


@dataclass(frozen=True, kw_only=True)
class InferenceCase(Comparison):
    """A network, an image and how it is predicted.

    Args:
        arch, classes: of the network.
        size: (height, width) of the image.
        window, stride: of the sliding windows, in pixels.
        views: 10, or 1 for a plain prediction.
        precision: 'fp32', 'bf16' or 'fp16'.
        window_batch, compile, channels_last: options of our side only, see
            :class:`~mmseg_volo.models.segmentors.StreamingEncoderDecoder`.
        others: see :class:`Comparison`.

    Raises:
        ValueError: numbers that do not go together.
    """

    arch: str = 'd1'
    classes: int = 150
    precision: str = 'fp32'
    size: tuple[int, int] = (512, 1024)
    window: int = 512
    stride: int = 341
    views: int = VIEWS
    window_batch: int | None = None
    compile: bool = False
    channels_last: bool = False

    NAME = 'inference'
    FROM_FIRST_CALL = ('ours',)

    def __post_init__(self):
        super().__post_init__()
        if self.views not in (1, VIEWS):
            raise ValueError(f'views must be 1 or {VIEWS}, got {self.views}')
        check_size(self.size)
        if self.window < 2 * STRIDE or self.window % STRIDE:
            raise ValueError(f'window must be a multiple of {STRIDE}, {2 * STRIDE} or more, got {self.window}')
        if not 0 < self.stride <= self.window:
            raise ValueError(f'stride must be within 1...window, got stride {self.stride} with window {self.window}')
        if self.classes < 2:
            raise ValueError(f'classes must be 2 or more, got {self.classes}')

    @staticmethod
    def label(row: dict) -> str:
        return f'VOLO-{row["arch"].upper()}, {row["classes"]} classes, {row["precision"]}'

    @staticmethod
    def title(row: dict) -> str:
        return (
            f'{row["height"]} x {row["width"]} pixels, {row["views"]} view{"s" * (row["views"] > 1)}, windows of '
            f'{row["window"]} at stride {row["stride"]}; median (least–greatest) of {row["rounds"]}'
        )

    # Networks

    def build(self) -> dict[str, nn.Module]:
        models = {side: self.segmentor(side) for side in ('ours', 'stock') if side in self.sides}
        spread_classes(models['ours'], draw(self.size)[0])
        if 'stock' in models:
            copy_weights(models['ours'], models['stock'])
        return {side: self.ready(model, side) for side, model in models.items()}

    def build_alone(self, side: str) -> nn.Module:
        model = self.ready(self.segmentor(side), side)
        return compiled(model) if side == COMPILED else model

    def build_compiled(self, models: dict[str, nn.Module]) -> nn.Module:
        return compiled(models['stock'])

    def segmentor(self, side: str) -> EncoderDecoder:
        """The segmentor of one side on the CPU, with random weights, in eval mode."""
        test_cfg = dict(mode='slide', crop_size=(self.window,) * 2, stride=(self.stride,) * 2)
        if side == 'ours':
            test_cfg.update(precision=self.precision, compile=self.compile, channels_last=self.channels_last)
            test_cfg.update(window_batch=self.window_batch)
        return segmentor(side, self.arch, self.classes, test_cfg).eval()

    def ready(self, model: EncoderDecoder, side: str) -> nn.Module:
        """The segmentor on its device, for several views inside the model for test-time augmentation."""
        if self.views > 1:
            model = (StreamingTTAModel if side == 'ours' else SegTTAModel)(model)
        return model.to(self.device).eval()

    # Predictions

    def inputs(self, model: nn.Module) -> dict:
        return prepare(draw(self.size)[0], self.views)

    @torch.no_grad()
    def run(self, model: nn.Module, side: str, data: dict) -> Tensor:
        """Class ids (H, W); ``data`` is not changed."""
        data = dict(data, data_samples=copy.deepcopy(data['data_samples']))
        # Our side reads the precision from test_cfg.
        with autocast('fp32' if side == 'ours' else self.precision, self.device):
            return model.test_step(data)[0].pred_sem_seg.data.squeeze(0)

    def warm_up(self, model: nn.Module, side: str, data: dict) -> None:
        """One window; the whole image if kernels are compiled or chosen by shape."""
        if self.compile or side == COMPILED or torch.device(self.device).type != 'cpu':
            for _ in range(UNTIL_GRAPHS if side == 'ours' else 1):
                self.run(model, side, data)
            return
        window = prepare(draw((min(self.size[0], self.window), min(self.size[1], self.window)))[0], self.views)
        if self.views > 1:  # the view of scale 1
            window = {name: values[2:3] for name, values in window.items()}
        self.run(model, side, window)

    # Table

    def take_memory(self, found: Found, settings: Settings) -> None:
        """As of every comparison, and besides that the memory of the same image in one view."""
        super().take_memory(found, settings)
        one = replace(self, views=1)
        for side in SIDES:
            if not settings.memory or self == one:
                memory = found.memory.get(side, NOT_MEASURED)
            elif on_gpu(self.device):
                model = found.models[side]
                call = partial(one.run, model.module, side, one.inputs(model))
                memory = memory_here(
                    lambda call=call: [call() for _ in range(UNTIL_GRAPHS)], self.device, self.held(model, None)
                )
            else:
                memory = memory_alone(one, side)
            found.memory[f'{side}_1_view'] = memory

    def extra(self, found: Found, settings: Settings) -> dict:
        return dict(equal_pixels=(found.results['stock'] == found.results['ours']).double().mean().item())

    def columns(self) -> Columns:
        kind = memory_kind(self.device)
        columns = super().columns()
        if self.views > 1:
            columns.update(
                {f'one view, {shown}': tables.size(f'{side}_1_view_{kind}_mb') for side, shown in SHOWN.items()}
            )
        return {**columns, 'equal pixels': text('{equal_pixels:.3%}')}


@torch.no_grad()
def spread_classes(model: EncoderDecoder, image: np.ndarray) -> None:
    """Scale the last layer so that a random network finds many classes: logits of mean 0 and deviation 3 for each."""
    inputs = model.data_preprocessor(prepare(image, 1), False)['inputs']
    logits = model(inputs[:, :, :256, :256], mode='tensor')
    last = model.decode_head.conv_seg
    scale = 3 / logits.std((0, 2, 3)).clamp_min(1e-6)
    last.weight *= scale[:, None, None, None]
    last.bias += (last.bias - logits.mean((0, 2, 3))) * scale - last.bias


@dataclass(frozen=True, kw_only=True)
class ScalingCase(InferenceCase):
    """One run of this package on an image of 3:2."""

    sides: tuple[str, ...] = ('ours',)
    views: int = 1

    NAME = 'scaling'
    MEMORY_ALONE = True

    def rows(self, settings: Settings) -> list[dict]:
        found = compare(self, settings)
        self.take_memory(found, settings)
        megapixels, (seconds,) = self.size[0] * self.size[1] / 1e6, found.seconds['ours']
        row = dict(megapixels=megapixels, seconds=seconds, seconds_per_megapixel=seconds / megapixels)
        row.update(found.memory.get('ours', NOT_MEASURED).columns())
        # 8 bits a channel, and 64 bits for a class id.
        row['data_mb'] = (3 * view_pixels(self.size, self.views) + 8 * self.size[0] * self.size[1]) / 1e6
        return [{**self.case_columns(), **row}]

    take_memory = Comparison.take_memory

    @staticmethod
    def title(row: dict) -> str:
        views = f'{row["views"]} view{"s" * (row["views"] > 1)}'
        return f'3:2 images, {views}, windows of {row["window"]} at stride {row["stride"]}; one run each'

    def columns(self) -> Columns:
        columns = {
            'network': self.label,
            'megapixels': text('{megapixels:.3g}'),
            'seconds': text('{seconds:.3g}'),
            's per megapixel': text('{seconds_per_megapixel:.3g}'),
        }
        memory = f'{memory_kind(self.device)}_mb'
        measured = dict(memory=tables.size(memory))
        measured['views and classes'] = lambda row: EMPTY if row[memory] is None else tables.size_text(row['data_mb'])
        return {**columns, **measured}

    def notes(self, rows: Sequence[dict]) -> list[str]:
        lines = []
        for name, group in self._groups(rows).items():
            slope, deviation = slope_of(group)
            lines.append(f'{name}: {slope:.3g} s per megapixel; the line through 0 is off by {deviation:.1%} at most')
        kind = memory_kind(self.device)
        return [*lines, *[f'memory: {MEMORY_NOTES[kind]}'] * (rows[0][f'{kind}_mb'] is not None)]

    def plot(self, rows: Sequence[dict], path: Path) -> None:
        groups = self._groups(rows)
        slopes = {name: slope_of(group)[0] for name, group in groups.items()}
        plots.growth(path, rows, groups, slopes, f'{memory_kind(self.device)}_mb')

    def _groups(self, rows: Sequence[dict]) -> dict[str, list[dict]]:
        return {name: [row for row in rows if self.label(row) == name] for name in dict.fromkeys(map(self.label, rows))}


def slope_of(rows: Sequence[dict]) -> tuple[float, float]:
    """Least squares of seconds against megapixels, through 0: the slope, and the largest relative deviation."""
    x, y = (np.array([row[name] for row in rows]) for name in ('megapixels', 'seconds'))
    slope = float((x * y).sum() / (x * x).sum())
    return slope, float(np.abs(slope * x / y - 1).max())


def sizes_of(megapixels: Sequence[float]) -> list[tuple[int, int]]:
    """(height, width) of 3:2 images."""
    heights = [round((amount * 1e6 / 1.5) ** 0.5) for amount in megapixels]
    return [(height, round(height * 1.5)) for height in heights]
