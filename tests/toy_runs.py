"""Runs of one linear layer, for tests of hooks and loops: each takes a fraction of a second."""

import itertools
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import BaseLoop
from torch import nn
from torch.utils.data import Dataset

from mmseg_volo.engine.runner import VOLORunner

_NUMBERS = itertools.count()


class Toy(BaseModel):
    """One linear layer with dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs, labels, mode='tensor'):
        outputs = self.layer(nn.functional.dropout(torch.stack(inputs), 0.5, self.training))
        return dict(loss=(torch.stack(labels) - outputs).square().mean()) if mode == 'loss' else list(outputs)


class Points(Dataset):
    """Eight points."""

    metainfo = dict(classes=('a', 'b'))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=torch.tensor([index / 8, 1.0]), labels=torch.tensor([index % 3.0]))


class Scores(BaseMetric):
    """A metric whose score depends only on the iteration of the run."""

    runner: VOLORunner

    def __init__(self, score):
        super().__init__()
        self.score = score

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        score = self.score(self.runner.iter if isinstance(self.runner._train_loop, BaseLoop) else 0)
        return dict(score=score, other=-score)


class Cut(Exception):
    """Stands for a power cut."""


class CutHook(Hook):
    """Raise Cut, or call something else, in a stage such as ``after_val_iter`` of one iteration."""

    def __init__(self, stage: str, iteration: int, action=None, priority: str = 'LOWEST'):
        self.stage, self.iteration, self.priority = stage, iteration, priority
        self.action = action
        setattr(self, stage, self._cut)

    def get_triggered_stages(self) -> list[str]:
        return [self.stage]

    def _cut(self, runner, *args, **kwargs):
        if runner.iter + (self.stage == 'after_train_iter') == self.iteration:
            if self.action is None:
                raise Cut
            self.action(runner)


def toy_run(
    folder: Path,
    hooks: list = (),
    checkpoint: dict | None = None,
    score=lambda step: 0.5,
    kind: type[VOLORunner] = VOLORunner,
    **options,
) -> VOLORunner:
    """Build a runner that trains eight iterations and validates after every second one.

    Args:
        folder: the work dir.
        hooks: custom hooks, as objects or dicts.
        checkpoint: arguments of the AtomicCheckpointHook.
        score: gives the score of a validation for its iteration.
        kind: class of the runner.
        options: other arguments of the runner.
    """
    metric = Scores(score)
    loader = dict(batch_size=2, num_workers=0)
    arguments = dict(
        model=Toy(),
        work_dir=str(folder),
        train_dataloader=dict(loader, dataset=Points(), sampler=dict(type='ResumableSampler', shuffle=True)),
        train_cfg=dict(type='ResumableTrainLoop', max_iters=8, val_interval=2),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[dict(type='PolyLR', by_epoch=False, begin=0, end=20)],
        val_dataloader=dict(loader, dataset=Points(), sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(),
        val_evaluator=[metric],
        default_hooks=dict(checkpoint={**CHECKPOINT, **(checkpoint or {})}),
        custom_hooks=list(hooks),
        randomness=dict(seed=3),
        experiment_name=f'toy{next(_NUMBERS)}',  # mmengine shares message hubs of the same name
        default_scope='mmseg',
    )
    metric.runner = kind(**{**arguments, **options})
    return metric.runner


CHECKPOINT = dict(type='AtomicCheckpointHook', by_epoch=False, interval=2, save_best='score', rule='greater')
EPOCHS = dict(
    train_cfg=dict(by_epoch=True, max_epochs=4, val_interval=1),
    param_scheduler=[dict(type='PolyLR', by_epoch=True, begin=0, end=5)],
)
