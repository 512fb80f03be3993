"""Measurements of inference, for ``tools/benchmark.py``: time, peak memory, and whether predictions change.

The peer, "stock", is what mmseg users have without this package: timm's VOLO in mmseg's EncoderDecoder, UPerHead and
SegTTAModel. Both sides get the same random weights and the same drawn picture. Times are taken in one process, where
the sides take turns; memory is taken in a process for each side. MB are 10^6 bytes.
"""

import contextlib
import copy
import csv
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cv2
import numpy as np
import timm
import torch
from mmcv.transforms import RandomFlip, Resize, TestTimeAug
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModule
from mmseg.datasets.transforms import LoadImageFromNDArray, PackSegInputs
from mmseg.models import EncoderDecoder, SegDataPreProcessor, SegTTAModel
from mmseg.models.decode_heads import UPerHead
from prettytable import PrettyTable
from torch import Tensor, nn

from .config import load_config
from .data.street_drawing import draw_scene
from .heads import LeanUPerHead
from .inference import Predictor, find_images
from .segmentors import PRECISIONS, StreamingEncoderDecoder, StreamingTTAModel
from .volo import ARCHS, STRIDE, VOLO, resize_pos_embed

SIDES = 'stock', 'ours'
SCALES = 0.75, 1.0, 1.25, 1.5, 1.75  # of the ten views, each with its mirror image: as configs/_base_ has them
OPTIONS = {
    **{name: dict(precision=name) for name in PRECISIONS},
    'channels-last': dict(precision='fp32', channels_last=True),
    'compile': dict(precision='fp32', compile=True),
}
_DRAWN = 1024, 2048  # larger pictures are enlarged ones
_MIN_SIDE = 64  # of a picture that can be drawn; its views then have the 32 pixels that VOLO needs
_PREPROCESSOR = dict(
    type=SegDataPreProcessor,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    test_cfg=dict(size_divisor=STRIDE),
)


@dataclass(frozen=True)
class Case:
    """One configuration: a network, a picture and how it is predicted.

    Args:
        arch, classes: of the network.
        size: (height, width) of the picture.
        window, stride: of the sliding windows, in pixels.
        views: 10, or 1 for a plain prediction.
        precision: 'fp32', 'bf16' or 'fp16'.
        device: 'cpu', 'cuda', 'cuda:1', ...
        threads: of PyTorch on a CPU; None leaves them.
        window_batch, compile, channels_last: options of :class:`StreamingEncoderDecoder`, for our side only.

    Raises:
        ValueError: numbers that do not go together, or a device that is not there.
    """

    arch: str = 'd1'
    classes: int = 150
    size: tuple[int, int] = (512, 1024)
    window: int = 512
    stride: int = 341
    views: int = 10
    precision: str = 'fp32'
    device: str = 'cpu'
    threads: int | None = None
    window_batch: int | None = None
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self):
        check_device(self.device)
        if self.views not in (1, 2 * len(SCALES)):
            raise ValueError(f'views must be 1 or {2 * len(SCALES)}, got {self.views}')
        if min(self.size) < _MIN_SIDE:
            raise ValueError(f'pictures need at least {_MIN_SIDE} pixels a side, got {self.size[0]} x {self.size[1]}')
        if self.window < 2 * STRIDE or self.window % STRIDE:
            raise ValueError(f'window must be a multiple of {STRIDE}, {2 * STRIDE} or more, got {self.window}')
        if not 0 < self.stride <= self.window:
            raise ValueError(f'stride must be within 1...window, got stride {self.stride} with window {self.window}')
        if self.classes < 2:
            raise ValueError(f'classes must be 2 or more, got {self.classes}')


def check_device(device: str) -> None:
    """Raise ValueError where there is no such device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA asserts
        raise ValueError(f'device {device} cannot be used: {str(error).splitlines()[0]}') from error


# The two sides


class TimmVOLO(BaseModule):
    """timm's VOLO as an mmseg backbone: its four stages, each through the LayerNorm that our VOLO has there."""

    def __init__(self, arch: str):
        super().__init__()
        self.volo = timm.create_model(f'volo_{arch}_224', num_classes=0)
        self.volo.post_network = self.volo.cls_token = None  # classification only
        # timm adds pos_embed as it is, so it is exchanged for one that fits. This name keeps the pretrained one.
        self.pos_embed = self.volo.pos_embed
        self._grids: dict[tuple[int, int], nn.Parameter] = {}
        for i, dim in enumerate(ARCHS[arch]['dims'][:-1]):
            self.add_module(f'norm{i}', nn.LayerNorm(dim))

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Take the weights of our VOLO."""
        own = {name: value for name, value in state.items() if name.split('.')[0] in ('norm0', 'norm1', 'norm2')}
        rest = {name: value for name, value in state.items() if name not in own}
        self.volo.load_state_dict(rest)
        for i in range(3):
            part = {name.split('.')[1]: value for name, value in own.items() if name.startswith(f'norm{i}.')}
            getattr(self, f'norm{i}').load_state_dict(part)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        grid = x.shape[2] // STRIDE, x.shape[3] // STRIDE
        if grid not in self._grids:
            self._grids[grid] = nn.Parameter(resize_pos_embed(self.pos_embed, grid), requires_grad=False)
        self.volo.pos_embed = self._grids[grid]
        maps = self.volo.forward_intermediates(x, intermediates_only=True)
        norms = self.norm0, self.norm1, self.norm2, self.volo.norm
        return tuple(norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(norms, maps, strict=True))


def build(case: Case, side: str) -> EncoderDecoder:
    """The segmentor of one side on the CPU, with random weights, in eval mode."""
    test_cfg = ConfigDict(mode='slide', crop_size=(case.window,) * 2, stride=(case.stride,) * 2)
    ours = side == 'ours'
    if ours:
        test_cfg.update(precision=case.precision, compile=case.compile, channels_last=case.channels_last)
        test_cfg.window_batch = case.window_batch
    head = dict(
        type=LeanUPerHead if ours else UPerHead,
        in_channels=list(ARCHS[case.arch]['dims']),
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        num_classes=case.classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (StreamingEncoderDecoder if ours else EncoderDecoder)(
            backbone=dict(type=VOLO if ours else TimmVOLO, arch=case.arch),
            decode_head=head,
            data_preprocessor=_PREPROCESSOR,
            test_cfg=test_cfg,
        )
        nn.init.trunc_normal_(model.backbone.pos_embed, std=0.02)
    return model.eval()


def ready(model: EncoderDecoder, case: Case, side: str) -> nn.Module:
    """The segmentor on its device, and inside the model for test-time augmentation where there are several views."""
    if case.views > 1:
        model = (StreamingTTAModel if side == 'ours' else SegTTAModel)(model)
    return model.to(case.device).eval()


def copy_weights(ours: EncoderDecoder, stock: EncoderDecoder) -> None:
    """Give the stock model the weights of ours."""
    stock.backbone.load_backbone(ours.backbone.state_dict())
    stock.decode_head.load_state_dict(ours.decode_head.state_dict())


@torch.no_grad()
def spread_classes(model: EncoderDecoder, picture: np.ndarray) -> None:
    """Scale the last layer so that the random network finds many classes: each one's logits get mean 0, deviation 3."""
    inputs = model.data_preprocessor(prepare(picture, 1), False)['inputs']
    logits = model(inputs[:, :, :256, :256], mode='tensor')
    last = model.decode_head.conv_seg
    scale = 3 / logits.std((0, 2, 3)).clamp_min(1e-6)
    last.weight *= scale[:, None, None, None]
    last.bias += (last.bias - logits.mean((0, 2, 3))) * scale - last.bias


def build_both(case: Case, picture: np.ndarray) -> dict[str, nn.Module]:
    """Both sides with the same weights, ready to predict."""
    models = {side: build(case, side) for side in SIDES}
    spread_classes(models['ours'], picture)
    copy_weights(models['ours'], models['stock'])
    return {side: ready(model, case, side) for side, model in models.items()}


# Pictures and predictions


def draw(size: tuple[int, int]) -> np.ndarray:
    """A street scene (H, W, 3), uint8, always the same."""
    scale = min(1, *(limit / length for limit, length in zip(_DRAWN, size, strict=True)))
    drawn = draw_scene(0, tuple(max(round(length * scale), _MIN_SIDE) for length in size))[0]
    return cv2.resize(drawn, size[::-1]) if drawn.shape[:2] != tuple(size) else drawn


def prepare(picture: np.ndarray, views: int) -> dict:
    """What mmseg's test pipeline gives for a picture, or with ten views its ``TestTimeAug``."""
    steps = [
        [dict(type=Resize, scale_factor=scale, keep_ratio=True) for scale in SCALES],
        [dict(type=RandomFlip, prob=p, direction='horizontal') for p in (0.0, 1.0)],
        [dict(type=PackSegInputs)],
    ]
    pack = PackSegInputs() if views == 1 else TestTimeAug(steps)
    return pseudo_collate([pack(LoadImageFromNDArray()(dict(img=picture)))])


def view_pixels(size: tuple[int, int], views: int) -> int:
    """Pixels in all views of a picture."""
    if views == 1:
        return size[0] * size[1]
    return sum(2 * int(size[0] * scale + 0.5) * int(size[1] * scale + 0.5) for scale in SCALES)


@torch.no_grad()
def predict(model: nn.Module, case: Case, side: str, data: dict) -> Tensor:
    """Class ids (H, W) from what :func:`prepare` gave, which is not changed."""
    data = dict(data, data_samples=copy.deepcopy(data['data_samples']))
    low = side == 'stock' and case.precision != 'fp32'  # ours takes it from test_cfg
    with torch.autocast(torch.device(case.device).type, PRECISIONS[case.precision] if low else None, enabled=low):
        return model.test_step(data)[0].pred_sem_seg.data.squeeze(0)


def warm_up(model: nn.Module, case: Case, side: str, picture: np.ndarray) -> None:
    """One window; the whole picture where kernels are compiled or chosen by shape."""
    if case.compile or torch.device(case.device).type != 'cpu':
        predict(model, case, side, prepare(picture, case.views))
        return
    data = prepare(picture[: case.window, : case.window], case.views)
    if case.views > 1:  # the picture as it is
        data = {name: values[2:3] for name, values in data.items()}
    predict(model, case, side, data)


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that a call takes, work on the device included, and what it returns."""
    _synchronise(device)
    start = time.perf_counter()
    result = function()
    _synchronise(device)
    return time.perf_counter() - start, result


def _synchronise(device: str) -> None:
    kind = torch.device(device).type
    if kind == 'cuda':
        torch.cuda.synchronize(device)
    elif kind != 'cpu':
        getattr(torch, kind).synchronize()


class Spread(NamedTuple):
    """Median, least and greatest of the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        return cls(median(values), min(values), max(values))

    def columns(self, name: str) -> dict[str, float]:
        return {name: self.median, f'{name}_min': self.least, f'{name}_max': self.greatest}

    def __str__(self) -> str:
        if self.least == self.greatest:
            return f'{self.median:.3g}'
        return f'{self.median:.3g} ({self.least:.3g}–{self.greatest:.3g})'


# Memory


class Memory(NamedTuple):
    """Peak of a prediction, in MB: above what the built model takes, and in all. None where the process was killed."""

    growth: float | None
    peak: float | None


def measure_memory(case: Case, side: str, picture: np.ndarray) -> Memory:
    """Predict the picture in a process of its own: resident memory, or on a GPU what PyTorch has allocated there.

    Raises:
        RuntimeError: the prediction failed for another reason than memory.
    """
    # Passed as a file, so that neither drawing it nor a copy of it counts.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'picture.npy'
        np.save(path, picture)
        task = json.dumps(dict(case=asdict(case), side=side, path=str(path)))
        code = 'import sys; from mmseg_volo.benchmark import probe; probe(sys.argv[1])'
        command = [sys.executable, '-W', 'ignore', '-c', code, task]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:  # by a signal: the kernel's, out of memory
        return Memory(None, None)
    if done.returncode:
        raise RuntimeError(f'measuring memory failed: {done.stderr.strip()}')
    return Memory(*json.loads(done.stdout.splitlines()[-1]))


def probe(task: str) -> None:
    """The process of :func:`measure_memory`: prints a :class:`Memory` as JSON."""
    task = json.loads(task)
    case, side = Case(**{**task['case'], 'size': tuple(task['case']['size'])}), task['side']
    set_threads(case.threads)
    model = ready(build(case, side), case, side)
    gc.collect()
    cuda = torch.device(case.device).type == 'cuda'
    baseline = torch.cuda.memory_allocated(case.device) if cuda else _resident()
    data = prepare(np.load(task['path']), case.views)
    if cuda:
        torch.cuda.reset_peak_memory_stats(case.device)
    else:
        gc.collect()
        _reset_peak()
    try:
        predict(model, case, side, data)
    except torch.cuda.OutOfMemoryError:
        print(json.dumps([None, None]))
        return
    peak = torch.cuda.max_memory_allocated(case.device) if cuda else _peak()
    print(json.dumps([(peak - baseline) / 1e6, peak / 1e6]))


def _resident() -> int:
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
    """Forget the peak of building the model, where the system can; elsewhere it counts if it is the higher one."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def _proc_status(name: str) -> int | None:
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{name}:')), None)


# Commands


def inference(cases: Sequence[Case], rounds: int, memory: bool, out: Path, environment: dict) -> None:
    """Stock mmseg against ours: time, memory and predictions of each case."""
    rows = []
    for case in cases:
        picture = draw(case.size)
        row = {**_case_columns(case), **compare(case, picture, rounds)}
        for side in SIDES:
            found = measure_memory(case, side, picture) if memory else Memory(None, None)
            one = measure_memory(replace(case, views=1), side, picture) if memory and case.views > 1 else found
            row.update({f'{side}_growth_mb': found.growth, f'{side}_peak_mb': found.peak})
            row.update({f'{side}_1_view_growth_mb': one.growth, f'{side}_1_view_peak_mb': one.peak})
        rows.append({**row, **environment})
        write_csv(out / 'inference.csv', rows)  # after each case: a run that is stopped leaves what it has
    _print_inference(rows, memory)
    _plot_inference(rows, out / 'inference.png')


def compare(case: Case, picture: np.ndarray, rounds: int) -> dict:
    """Time both sides in turns, and compare what they predict."""
    models, data = build_both(case, picture), prepare(picture, case.views)
    for side in SIDES:
        warm_up(models[side], case, side, picture)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    maps: dict[str, Tensor] = {}
    for i in range(rounds):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            spent, maps[side] = timed(lambda side=side: predict(models[side], case, side, data), case.device)
            seconds[side].append(spent)
        taken = ', '.join(f'{side} {seconds[side][-1]:.3g} s' for side in SIDES)
        _progress(f'{_label(_case_columns(case))}: round {i + 1} of {rounds}: {taken}')
    row = {'rounds': rounds}
    for side in SIDES:
        row.update(Spread.of(seconds[side]).columns(f'{side}_s'))
    faster = [stock / ours for stock, ours in zip(seconds['stock'], seconds['ours'], strict=True)]
    row.update(Spread.of(faster).columns('times_faster'))
    return {**row, 'equal_pixels': _equal(maps['stock'], maps['ours'])}


def scaling(cases: Sequence[Case], memory: bool, out: Path, environment: dict) -> None:
    """Time and memory of our side as the picture grows, one run of each case."""
    rows = []
    for case in cases:
        picture = draw(case.size)
        megapixels = picture.shape[0] * picture.shape[1] / 1e6
        seconds = _seconds_of_ours(case, picture)
        _progress(f'{_label(_case_columns(case))}: {megapixels:.3g} megapixels in {seconds:.3g} s')
        found = measure_memory(case, 'ours', picture) if memory else Memory(None, None)
        row = dict(megapixels=megapixels, seconds=seconds, seconds_per_megapixel=seconds / megapixels)
        row.update(growth_mb=found.growth, peak_mb=found.peak)
        # 8 bits a channel, and 64 bits for a class id.
        row['data_mb'] = (3 * view_pixels(case.size, case.views) + 8 * case.size[0] * case.size[1]) / 1e6
        rows.append({**_case_columns(case), **row, **environment})
        write_csv(out / 'scaling.csv', rows)
    _print_scaling(rows, memory)
    _plot_scaling(rows, out / 'scaling.png')


def _seconds_of_ours(case: Case, picture: np.ndarray) -> float:
    model = build(case, 'ours')
    spread_classes(model, picture)
    model = ready(model, case, 'ours')
    warm_up(model, case, 'ours', picture)
    data = prepare(picture, case.views)
    return timed(lambda: predict(model, case, 'ours', data), case.device)[0]


def sizes_of(megapixels: Sequence[float]) -> list[tuple[int, int]]:
    """(height, width) of 3:2 pictures."""
    heights = [round((amount * 1e6 / 1.5) ** 0.5) for amount in megapixels]
    return [(height, round(height * 1.5)) for height in heights]


def precision(
    config: str,
    checkpoint: str,
    sources: Sequence[str],
    options: Sequence[str],
    rounds: int,
    aug_test: bool,
    limit: int,
    out: Path,
    environment: dict,
) -> None:
    """What each of :data:`OPTIONS` changes on a user's model and pictures, against fp32.

    An option that PyTorch cannot run on this device is reported and left out.

    Raises:
        CheckpointError, ConfigError, FileNotFoundError: see :class:`mmseg_volo.inference.Predictor`.
    """
    load_config(config)  # a wrong name is said before pictures are read
    pictures = _read_pictures(sources, limit)
    device = environment['device']
    predictors = _predictors(config, checkpoint, options, aug_test, device, pictures[0])
    changed = _changed_pixels(predictors, pictures)
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for i in range(rounds):
        for name, predictor in predictors.items():
            spent = 0.0
            for picture in pictures:
                data = predictor.prepare(picture)
                spent += timed(lambda run=predictor.predict, data=data: run(data), device)[0]
            seconds[name].append(spent / len(pictures))
        _progress(f'round {i + 1} of {rounds}: ' + ', '.join(f'{name} {s[-1]:.3g} s' for name, s in seconds.items()))
    rows = []
    for name, of_option in seconds.items():
        faster = [reference / s for reference, s in zip(seconds['fp32'], of_option, strict=True)]
        row = dict(option=name, pictures=len(pictures), views='aug-test' if aug_test else 1, rounds=rounds)
        row.update({**Spread.of(of_option).columns('seconds'), **Spread.of(faster).columns('times_faster')})
        rows.append({**row, 'changed_pixels': changed[name], **environment})
    write_csv(out / 'precision.csv', rows)
    _print_precision(rows)
    _plot_precision(rows, out / 'precision.png')


def _read_pictures(sources: Sequence[str], limit: int) -> list[np.ndarray]:
    paths = list(find_images(sources))
    read = {path: cv2.imread(str(path)) for path in paths[:limit]}
    for path, picture in read.items():
        if picture is None:
            _progress(f'skipped {path}: it is no image, or broken')
    pictures = [picture for picture in read.values() if picture is not None]
    if not pictures:
        raise FileNotFoundError(f'none of the first {limit} pictures could be read')
    _progress(f'{len(pictures)} of {len(paths)} pictures')
    return pictures


def _predictors(
    config: str, checkpoint: str, options: Sequence[str], aug_test: bool, device: str, picture: np.ndarray
) -> dict[str, Predictor]:
    """A predictor for fp32, which all is held against, and for each option that runs here."""
    found = {}
    for name in dict.fromkeys(['fp32', *options]):
        predictor = Predictor(load_config(config), checkpoint, device, aug_test, **OPTIONS[name])
        try:
            predictor(picture)
        except RuntimeError as error:
            if name == 'fp32':
                raise
            _progress(f'{name} does not run here: {str(error).strip().splitlines()[0]}')
        else:
            found[name] = predictor
    return found


def _changed_pixels(predictors: dict[str, Predictor], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of all pixels whose class differs from fp32's. It also warms up every option on every picture's shape."""
    changed, total = dict.fromkeys(predictors, 0), 0
    for picture in pictures:
        maps = {name: predictor(picture) for name, predictor in predictors.items()}
        for name, ids in maps.items():
            changed[name] += int((ids != maps['fp32']).sum())
        total += maps['fp32'].size
    return {name: count / total for name, count in changed.items()}


def _equal(one: Tensor, other: Tensor) -> float:
    return (one == other).double().mean().item()


# Output


def set_threads(threads: int | None) -> None:
    """PyTorch's threads; None leaves them."""
    if threads is not None:
        torch.set_num_threads(threads)


def environment(device: str, threads: int | None) -> dict:
    """What figures depend on besides the configuration; sets the number of threads.

    Raises:
        ValueError: no such device.
    """
    check_device(device)
    set_threads(threads)
    packages = dict(mmseg='onedl-mmsegmentation', timm='timm', triton='triton', mmseg_volo='mmseg_volo')
    return dict(
        device=device,
        device_name=_device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **{name: _version(package) for name, package in packages.items()},
        load=round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        date=datetime.now().astimezone().isoformat(timespec='seconds'),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    return next(named, '') or platform.processor() or platform.machine()


def print_header(environment: dict, command: str) -> None:
    """The command and what its figures depend on."""
    versions = [f'{name} {environment[name]}' for name in ('torch', 'mmseg', 'timm', 'triton', 'mmseg_volo')]
    print(f'$ {command}')
    # What else runs on the machine can slow either side down many times.
    load = '' if environment['load'] is None else f', load average {environment["load"]} before the start'
    print(f'{environment["device_name"]} ({environment["device"]}), threads: {environment["threads"]}{load}')
    print(f'{", ".join(v for v in versions if not v.endswith(" None"))}; {environment["date"]}', flush=True)


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """One row for each configuration; what was not measured is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {name: f'{value:.6g}' if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # so that stdout can be piped


def _case_columns(case: Case) -> dict:
    columns = dict(arch=case.arch, classes=case.classes, height=case.size[0], width=case.size[1])
    for name in ('window', 'stride', 'views', 'precision', 'window_batch', 'compile', 'channels_last'):
        columns[name] = getattr(case, name)
    return columns


def _label(row: dict) -> str:
    return f'VOLO-{row["arch"].upper()}, {row["classes"]} classes, {row["precision"]}'


def _setting(row: dict) -> str:
    views = '1 view' if row['views'] == 1 else f'{row["views"]} views'
    return f'{views}, windows of {row["window"]} at stride {row["stride"]}'


def _spread(row: dict, name: str) -> str:
    return str(Spread(*(row[f'{name}{end}'] for end in ('', '_min', '_max'))))


def _mb(value: float | None) -> str:
    if value is None:
        return 'out of memory'
    return f'{value:,.0f}' if value >= 10 else f'{value:.2g}'


def _memory_kind(row: dict) -> str:
    """GPUs are asked for by their peak, resident memory by what a prediction adds."""
    return 'peak' if torch.device(row['device']).type == 'cuda' else 'growth'


def _print_inference(rows: Sequence[dict], memory: bool) -> None:
    views, kind = rows[0]['views'], _memory_kind(rows[0])
    kinds = [f'{side}_{kind}_mb' for side in SIDES]
    if views > 1:
        kinds += [f'{side}_1_view_{kind}_mb' for side in SIDES]
    of_memory = [name.replace('_', ' ').replace(f' {kind} mb', ' (MB)') for name in kinds] if memory else []
    table = PrettyTable(['network', 'stock (s)', 'ours (s)', 'times faster', 'equal pixels', *of_memory], align='r')
    for row in rows:
        cells = [_spread(row, name) for name in ('stock_s', 'ours_s', 'times_faster')]
        cells += [f'{row["equal_pixels"]:.3%}', *([_mb(row[name]) for name in kinds] if memory else [])]
        table.add_row([_label(row), *cells])
    first = rows[0]
    print(
        f'{first["height"]} x {first["width"]} pixels, {_setting(first)}; median (least–greatest) of {first["rounds"]}'
    )
    print(table.get_string())
    if memory:
        print(f'MB: {_MEMORY_NOTES[kind]}')


_MEMORY_NOTES = dict(
    growth='peak resident memory of a prediction above what the process with the built model takes',
    peak="peak of PyTorch's memory on the device, the model included",
)


_MEMORY_AXES = dict(growth='peak memory above the built model (MB)', peak='peak memory on the device (MB)')


def _print_scaling(rows: Sequence[dict], memory: bool) -> None:
    first, kind = rows[0], _memory_kind(rows[0])
    of_memory = ['memory (MB)', 'of it views and classes (MB)'] if memory else []
    table = PrettyTable(['network', 'megapixels', 'seconds', 's / megapixel', *of_memory], align='r')
    for row in rows:
        cells = [f'{row[name]:.3g}' for name in ('megapixels', 'seconds', 'seconds_per_megapixel')]
        cells += [_mb(row[f'{kind}_mb']), _mb(row['data_mb'])] if memory else []
        table.add_row([_label(row), *cells])
    print(f'3:2 pictures, {_setting(first)}; one run each')
    print(table.get_string())
    for label, group in _groups(rows):
        slope, deviation = fit(group)
        print(f'{label}: {slope:.3g} s per megapixel; the line through 0 is off by {deviation:.1%} at most')
    if memory:
        print(f'MB: {_MEMORY_NOTES[kind]}')


def _groups(rows: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    labels = dict.fromkeys(map(_label, rows))
    return [(label, [row for row in rows if _label(row) == label]) for label in labels]


def fit(rows: Sequence[dict]) -> tuple[float, float]:
    """Least squares of seconds against megapixels, through 0: the slope, and the largest relative deviation."""
    x, y = (np.array([row[name] for row in rows]) for name in ('megapixels', 'seconds'))
    slope = float((x * y).sum() / (x * x).sum())
    return slope, float(np.abs(slope * x / y - 1).max())


def _print_precision(rows: Sequence[dict]) -> None:
    table = PrettyTable(['option', 's / picture', 'times faster', 'changed pixels'], align='r')
    for row in rows:
        changed = f'{row["changed_pixels"]:.3%}'
        table.add_row([row['option'], _spread(row, 'seconds'), _spread(row, 'times_faster'), changed])
    print(f'pictures: {rows[0]["pictures"]}; median (least–greatest) of {rows[0]["rounds"]}; against fp32')
    print(table.get_string())


def _figure(panels: int, rows: Sequence[dict], height: float):
    from matplotlib.figure import Figure  # slow to import

    figure = Figure((5 * panels, height), layout='constrained')
    figure.suptitle(f'{rows[0]["device_name"]}, PyTorch {rows[0]["torch"]}', fontsize=9)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _plot_inference(rows: Sequence[dict], path: Path) -> None:
    kind = _memory_kind(rows[0])
    panels = {'seconds': '{}_s'}
    if any(row[f'ours_{kind}_mb'] is not None for row in rows):
        panels[_MEMORY_AXES[kind]] = f'{{}}_{kind}_mb'
    figure, axes = _figure(len(panels), rows, 1.6 + 0.6 * len(rows))
    places = np.arange(len(rows))
    for axis, (title, name) in zip(axes, panels.items(), strict=True):
        for i, side in enumerate(SIDES):
            axis.barh(places + 0.4 * i - 0.2, [row[name.format(side)] or 0 for row in rows], 0.4, label=side)
        axis.set(xlabel=title, yticks=places, yticklabels=map(_label, rows))
        axis.invert_yaxis()
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _plot_scaling(rows: Sequence[dict], path: Path) -> None:
    kind = _memory_kind(rows[0])
    figure, (left, right) = _figure(2, rows, 4)
    for i, (label, group) in enumerate(_groups(rows)):
        x = [row['megapixels'] for row in group]
        slope, _ = fit(group)
        left.plot(x, [row['seconds'] for row in group], 'o', color=f'C{i}', label=label)
        left.plot([0, max(x)], [0, slope * max(x)], color=f'C{i}', label=f'{slope:.3g} s per megapixel')
        measured = [(row['megapixels'], row[f'{kind}_mb']) for row in group if row[f'{kind}_mb'] is not None]
        right.plot(*(zip(*measured, strict=True) if measured else ([], [])), 'o-', color=f'C{i}', label=label)
    right.plot(x, [row['data_mb'] for row in group], 'k--', label='the picture and its classes')
    left.set(xlabel='megapixels', ylabel='seconds', xlim=(0, None), ylim=(0, None))
    right.set(xlabel='megapixels', ylabel=_MEMORY_AXES[kind], xlim=(0, None), ylim=(0, None))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


def _plot_precision(rows: Sequence[dict], path: Path) -> None:
    figure, axes = _figure(2, rows, 1.2 + 0.4 * len(rows))
    names = [row['option'] for row in rows]
    axes[0].barh(names, [row['seconds'] for row in rows])
    axes[1].barh(names, [100 * row['changed_pixels'] for row in rows])
    for axis, title in zip(axes, ('seconds per picture', '% of pixels that change'), strict=True):
        axis.set(xlabel=title)
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)
