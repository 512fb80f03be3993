"""VOLO-D1 beside what mmseg offers in its place: images a second, memory and published accuracy on ADE20K.

A network can run in three ways (:data:`RUNS`): up to logits in the pictures' size; as this package's prediction runs
it, batches of windows through ``WindowNetwork`` with what that does for speed; and end to end, from prepared pictures
to class ids. Of other networks the second way is a plain forward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import ConfigDict
from mmseg.models import EncoderDecoder
from mmseg.models.backbones import MixVisionTransformer, SwinTransformer, TIMMBackbone
from mmseg.models.decode_heads import SegformerHead, UPerHead
from mmseg.models.utils import resize
from torch import Tensor

from ..models.segmentors import StreamingEncoderDecoder
from .cases import BatchCase, columns_of
from .measuring import (
    NOT_MEASURED,
    UNTIL_GRAPHS,
    autocast,
    forget_compiled,
    in_process,
    memory_here,
    memory_of,
    repeat,
    repeats_for,
    take_turns,
    time_limit,
    why_not_compiled,
)
from .peer import compiled, segmentor
from .pictures import noise
from .reporting import MEMORY_NOTES, Spread, figure, mb, memory_kind, print_table, progress, times_faster, write_csv

CLASSES = 150  # of ADE20K
RUNS = 'logits', 'network', 'predict'
COMPILED = 'volo-d1-timm-compiled'


class Network(NamedTuple):
    """What mmseg's ADE20K config makes of a backbone, and the mIoU published for it, in percent.

    ``miou`` is at a single scale, ``miou_multi`` at several with flip; None where no figure could be verified.
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
# The figures are mmsegmentation's own, from configs/*/metafile.yaml: 160k iterations at 512 x 512, from ImageNet-1K.
NETWORKS = {
    # The abstract of arXiv:2106.13112 gives 54.3 for the best variant; for D1 no figure could be verified.
    'volo-d1': Network({}, {}, None, None, 'none'),
    # timm's VOLO in stock mmseg, and that through torch.compile.
    'volo-d1-timm': Network({}, {}, None, None, 'none'),
    COMPILED: Network({}, {}, None, None, 'none'),
    'swin-t': Network(_swin((2, 2, 6, 2)), _UPER, 44.41, 45.79, 'mmseg configs/swin/metafile.yaml'),
    'swin-s': Network(_swin((2, 2, 18, 2)), _UPER, 47.72, 49.24, 'mmseg configs/swin/metafile.yaml'),
    'convnext-t': Network(_convnext('convnext_tiny'), _UPER, 46.11, 46.62, 'mmseg configs/convnext/metafile.yaml'),
    'convnext-s': Network(_convnext('convnext_small'), _UPER, 48.56, 49.02, 'mmseg configs/convnext/metafile.yaml'),
    'mit-b5': Network(
        dict(
            type=MixVisionTransformer,
            embed_dims=64,
            num_layers=[3, 6, 40, 3],
            num_heads=[1, 2, 5, 8],
            patch_sizes=[7, 3, 3, 3],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratio=4,
            qkv_bias=True,
        ),
        dict(type=SegformerHead, in_channels=[64, 128, 320, 512], channels=256),
        49.13,
        50.22,
        'mmseg configs/segformer/metafile.yaml',
    ),
}


@dataclass(frozen=True)
class ModelCase(BatchCase):
    """One of :data:`NETWORKS` and its input.

    Args:
        model: its name.
        run: one of :data:`RUNS`.
        size, batch, precision, device, threads: see :class:`BatchCase`.
    """

    model: str = 'volo-d1'
    run: str = 'logits'


def measure_models(cases: Sequence[ModelCase], rounds: int, memory: bool, out: Path, environment: dict) -> None:
    """Measure the cases; those that differ by their model alone take turns.

    The table, the CSV file and the figure go to ``out``.
    """
    rows = []
    for _, group in groupby(cases, lambda case: (case.size, case.batch, case.precision, case.run)):
        for row, case in compare(list(group), rounds, memory):
            if memory and not in_process(case.device):
                row.update(memory_of(forward_steps, case).columns())
            rows.append({**row, **environment})
            write_csv(out / 'models.csv', rows)
    _print(rows, memory)
    _plot(rows, out / 'models.png')


def compare(
    cases: Sequence[ModelCase],
    rounds: int,
    memory: bool = False,
    compile_seconds: float = inf,
    built: dict[str, EncoderDecoder] | None = None,
) -> list[tuple[dict, ModelCase]]:
    """A row for each case, with its speed beside the first one's; the compiled peer only where it runs.

    Networks are taken from ``built``, by name, and put there.
    """
    first, x = cases[0], noise(cases[0])
    models, calls, found = {}, {}, {}
    built = {} if built is None else built
    for case in cases:
        try:
            with time_limit(compile_seconds if case.model == COMPILED else inf):
                if case.model not in built:
                    built[case.model] = build_network(case)
                # Nothing that other cases have left there, as CUDA graphs.
                model = built[case.model].eval()
                call = partial(_run, model, case, x)
                if case.model == 'volo-d1' and memory and in_process(case.device):
                    calls_until_graph = partial(repeat, call, UNTIL_GRAPHS)
                    found[case.model] = memory_here(calls_until_graph, case.device, model, x)
                call()
        except Exception as error:
            if case.model != COMPILED:
                raise
            progress(f'{case.model}: does not run here: {why_not_compiled(error)}')
            continue
        models[case.model], calls[case.model] = model, call
        if memory and in_process(case.device) and case.model not in found:
            found[case.model] = memory_here(call, case.device, model, x)
    repeats = {name: repeats_for(call, first.device) for name, call in calls.items()}
    label = f'batch {first.batch}, {first.precision}'
    seconds, _ = take_turns(calls, rounds, first.device, label, repeats)
    rows = []
    for case in (case for case in cases if case.model in models):
        network = NETWORKS[case.model]
        parameters = sum(parameter.numel() for parameter in models[case.model].parameters())
        row = dict(**columns_of(case), classes=CLASSES, parameters_m=parameters / 1e6, rounds=rounds)
        row.update(Spread.of([case.batch / spent for spent in seconds[case.model]]).columns('images_per_s'))
        row.update(times_faster(seconds, case.model, first.model).columns('times_faster'))
        row.update(ade20k_miou=network.miou, ade20k_miou_multi_scale=network.miou_multi, miou_source=network.source)
        rows.append(({**row, **found.get(case.model, NOT_MEASURED).columns()}, case))
    return rows


def build_network(case: ModelCase) -> EncoderDecoder:
    """The segmentor of a case on its device, with random weights, in eval mode, without the head that only trains."""
    if case.model.startswith('volo-d1'):
        model = segmentor('ours' if case.model == 'volo-d1' else 'stock', 'd1', CLASSES)
        if case.model == 'volo-d1':
            model.test_cfg.precision = case.precision  # for what does not run under the caller's autocast
    else:
        network = NETWORKS[case.model]
        head = dict(in_index=[0, 1, 2, 3], num_classes=CLASSES, norm_cfg=dict(type='BN'), align_corners=False)
        head.update(network.head, loss_decode=dict(type='CrossEntropyLoss'))
        model = EncoderDecoder(network.backbone, head, test_cfg=ConfigDict(mode='whole'))
    model = model.to(case.device).eval()
    if case.model != COMPILED:
        return model
    forget_compiled()
    return compiled(model)


@torch.no_grad()
def _run(model: EncoderDecoder, case: ModelCase, x: Tensor) -> None:
    """As ``case.run`` says; nothing is returned, since the logits of all models together are large."""
    ours = isinstance(model, StreamingEncoderDecoder)
    if ours and case.run == 'network':
        network = model.network
        with network.running():
            network.run(list(x))
    elif ours and case.run == 'predict':
        model.predict(x)
    else:
        with autocast(case.precision, case.device):
            if case.run == 'predict':
                model.predict(x)
                return
            logits = model(x, mode='tensor')
            if case.run == 'logits':
                resize(logits, x.shape[2:], mode='bilinear', align_corners=False)


def forward_steps(case: ModelCase) -> Iterator[None]:
    """For :func:`~mmseg_volo.benchmark.measuring.memory_of`."""
    model = build_network(case)
    yield
    x = noise(case)
    yield
    _run(model, case, x)


def _print(rows: Sequence[dict], memory: bool) -> None:
    first, kind = rows[0], memory_kind(rows[0])
    cells = []
    for row in rows:
        speeds = [str(Spread.in_row(row, name)) for name in ('images_per_s', 'times_faster')]
        taken = [mb(row[f'{kind}_mb'])] if memory else []
        published = [_percent(row[name]) for name in ('ade20k_miou', 'ade20k_miou_multi_scale')]
        head = [row['model'], row['run'], str(row['batch']), row['precision'], f'{row["parameters_m"]:.1f}']
        cells.append([*head, *speeds, *taken, *published])
    fields = [
        'model',
        'run',
        'batch',
        'precision',
        'parameters (M)',
        'images / s',
        f'times faster than {first["model"]}',
    ]
    fields += ['memory (MB)'] if memory else []
    print(
        f'{first["height"]} x {first["width"]} pixels, {CLASSES} classes; '
        f'median (least–greatest) of {first["rounds"]}; mIoU: published, on ADE20K'
    )
    print_table([*fields, 'mIoU, one scale', 'several'], cells)
    if memory:
        print(f'MB: {MEMORY_NOTES[kind]}')


def _percent(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


def _plot(rows: Sequence[dict], path: Path) -> None:
    """A panel for each batch, precision and run; a line where the accuracy is not known."""
    key = itemgetter('batch', 'precision', 'run')
    groups = [list(group) for _, group in groupby(rows, key)]
    drawn, axes = figure(len(groups), rows, 4)
    for axis, group in zip(axes, groups, strict=True):
        for i, row in enumerate(group):
            if row['ade20k_miou'] is None:
                axis.axvline(row['images_per_s'], color=f'C{i}', linestyle='--', label=row['model'])
            else:
                axis.plot(row['images_per_s'], row['ade20k_miou'], 'o', color=f'C{i}', label=row['model'])
        axis.set(title=', '.join(map(str, key(group[0]))), xlabel='images / s', xlim=(0, None))
        axis.set_ylabel('published ADE20K mIoU, one scale')
        axis.legend()
    drawn.savefig(path, dpi=120)
