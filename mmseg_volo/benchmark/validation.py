"""What the metric, the record and the validation loss cost: a validation with them against one with IoUMetric alone.

Everything of a validation runs but the network: images of random blocks, logits at an eighth of their size, upsampling,
class ids, the metric and the files. Both sides take turns in one process and must give the same figures.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModule
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .tables import Spread, Table, print_table, spread, time, times_faster
from .timing import seconds_of, take_turns

SIDES = {  # the evaluator and the hooks of each side
    'IoUMetric': (dict(type='IoUMetric'), []),
    'record': (dict(type='ConfusionIoUMetric'), [dict(type='EvaluationRecordHook')]),
}
_IMAGES = 4  # in a validation
_STRIDE = 8  # of the logits


class _Blocks(Dataset):
    """Labelled images: blocks of random classes, and an ignored border at the top."""

    def __init__(self, size: tuple[int, int], classes: int):
        self.metainfo = dict(classes=[f'class {i}' for i in range(classes)])
        generator = torch.Generator().manual_seed(0)
        self.labels, self.scores = [], []
        for _ in range(_IMAGES):
            blocks = torch.randint(0, classes, [-(-side // 64) for side in size], generator=generator)
            fine = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[: size[0], : size[1]]
            coarse = fine[::_STRIDE, ::_STRIDE]
            noise = torch.randn(classes, *coarse.shape, generator=generator)
            self.scores.append(noise + 3 * torch.nn.functional.one_hot(coarse, classes).permute(2, 0, 1))
            label = fine.clone()
            label[: size[0] // 16] = 255
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        size = tuple(self.labels[i].shape)
        sample = SegDataSample(metainfo=dict(img_path=f'{i}.png', img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=self.labels[i][None])
        return dict(inputs=torch.full((3, *size), i, dtype=torch.uint8), data_samples=sample)


class _Lookup(BaseModule):
    """A backbone that knows the scores of each image, which it tells by its grey value."""

    def __init__(self, scores: list[Tensor]):
        super().__init__()
        self.scores = torch.nn.ParameterList(torch.nn.Parameter(one, requires_grad=False) for one in scores)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (torch.stack([self.scores[int(image[0, 0, 0])] for image in images]),)


def _segmentor(data: _Blocks) -> torch.nn.Module:
    classes = len(data.metainfo['classes'])
    model = MODELS.build(
        dict(
            type='StreamingEncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor'),
            backbone=dict(type=_Lookup, scores=data.scores),
            decode_head=dict(
                type='LeanFCNHead',
                in_channels=classes,
                channels=classes,
                num_convs=0,
                concat_input=False,
                dropout_ratio=0,
                num_classes=classes,
                norm_cfg=None,
                loss_decode=dict(type='CrossEntropyLoss'),
            ),
            test_cfg=dict(mode='whole'),
        )
    )
    torch.nn.init.eye_(model.decode_head.conv_seg.weight.data[:, :, 0, 0])
    torch.nn.init.zeros_(model.decode_head.conv_seg.bias)
    return model


def _runner(side: str, data: _Blocks, device: str, folder: str) -> Runner:
    evaluator, hooks = SIDES[side]
    runner = Runner(
        _segmentor(data),
        f'{folder}/{side}',
        val_dataloader=DataLoader(data, collate_fn=pseudo_collate),
        val_cfg=dict(),
        val_evaluator=evaluator,
        custom_hooks=hooks,
        default_scope='mmseg',
        log_level='ERROR',
        experiment_name=f'{side} {Path(folder).name}',  # mmengine keeps a visualizer for each name
    )
    runner.model.to(device)
    return runner


def _row(calls: dict[str, Callable[[], object]], rounds: int, per_call: int, what: str) -> dict:
    """Seconds per image of each side, and the ratio within each round."""
    for call in calls.values():
        call()  # warms up
    timers = {side: lambda call=call: seconds_of(call) / per_call for side, call in calls.items()}
    seconds = {side: measured.times for side, measured in take_turns(timers, rounds, what).items()}
    row = dict(what=what)
    for side, times in seconds.items():
        row.update(Spread.of(times).columns(f'{side}_s'))
    return row | times_faster(seconds, 'IoUMetric', 'record').columns('ratio')


def measure_validation(
    size: tuple[int, int], classes: int, rounds: int, device: str, out: Path, environment: dict
) -> None:
    """Measure, print the table, and write ``validation.csv`` to ``out``.

    Args:
        size: (height, width) of the images.
        classes: their number, 2 or more.
        rounds: how often each side is timed.
        device: such as 'cpu' or 'cuda'.
        out: a folder.
        environment: columns to add.

    Raises:
        ValueError: fewer than 2 classes.
        RuntimeError: the two sides give different figures.
    """
    if classes < 2:
        raise ValueError(f'--classes must be 2 or more, got {classes}')
    data = _Blocks(size, classes)
    init_default_scope('mmseg')
    with tempfile.TemporaryDirectory() as folder:
        runners = {side: _runner(side, data, device, folder) for side in SIDES}
        figures = {side: runner.val() for side, runner in runners.items()}
        for name, value in figures['IoUMetric'].items():
            if abs(figures['record'][name] - value) > 0.011:  # both round to two digits, mmseg from float32
                raise RuntimeError(f'{name} is {value} by IoUMetric and {figures["record"][name]} by the other metric')
        calls = {side: runner.val_loop.run for side, runner in runners.items()}
        whole = _row(calls, rounds, _IMAGES, 'validation without the network')
        alone = _row(_metric_calls(runners['record'], data), rounds, 1, 'metric alone')
    about = dict(size=f'{size[0]}x{size[1]}', classes=classes, rounds=rounds)
    rows = Table(out / 'validation.csv', environment).add([alone | about, whole | about])
    print(f'{size[0]} x {size[1]}, {classes} classes: time per image, median (least–greatest) of {rounds} rounds')
    shown = {'IoUMetric': time('IoUMetric_s'), 'with record and loss': time('record_s'), 'ratio': spread('ratio')}
    print_table({'': lambda row: row['what'], **shown}, rows)


def _metric_calls(runner: Runner, data: _Blocks) -> dict[str, Callable[[], object]]:
    """The metric of each side on one prediction, as a first image: its prediction and ground truth are kept as PNG."""
    model = runner.model
    model.network.sampled = True
    samples = model.val_step(pseudo_collate([data[0]]))
    model.network.sampled = False
    calls = {}
    for side, (evaluator, _) in SIDES.items():
        one = Evaluator(evaluator)
        one.dataset_meta = data.metainfo
        if side == 'record':
            one.metrics[0].keep, one.metrics[0].head = 6, model.decode_head

        def call(one: Evaluator = one) -> None:
            one.metrics[0].results.clear()
            one.process(samples)

        calls[side] = call
    return calls
