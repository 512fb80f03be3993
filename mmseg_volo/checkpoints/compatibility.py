"""Check a checkpoint against the model that loads it, and against the class names of the data set."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from mmengine.logging import print_log
from torch import nn

from ..errors import CheckpointError
from .content import weights_in

Mode = Literal['train', 'resume', 'infer']
_REMEDY = (
    'Take the config that it was trained with, or allow it with --allow-mismatch or model.test_cfg.allow_mismatch=True'
)


class Difference(NamedTuple):
    """Differences between the weights of a file and of a model; false if there are none, ``str`` gives a clause.

    Attributes:
        missing: names that the file lacks, except ``num_batches_tracked``.
        unexpected: names that the model lacks.
        reshaped: names of tensors whose shapes differ, each followed by both shapes.
        fitting: number of entries that fit.
    """

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    fitting: int

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        parts = listed('missing', self.missing) + listed('unexpected', self.unexpected)
        return (parts + listed('of other shape', self.reshaped)).removeprefix('; ')


def compare(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], ignore: str = '\0') -> Difference:
    """Compare the state dicts of a model and of a file, except names that begin with ``ignore``."""
    given = {name.removeprefix('module.'): value for name, value in given.items()}
    names = [name for name in own if not name.startswith(ignore)]
    missing = [name for name in names if name not in given and not name.endswith('num_batches_tracked')]
    unexpected = [name for name in given if name not in own and not name.startswith(ignore)]
    both = [name for name in names if name in given]
    reshaped = [
        f'{n} is {tuple(getattr(given[n], "shape", ()))}, expected {tuple(own[n].shape)}'
        for n in both
        if not (isinstance(given[n], torch.Tensor) and fits(n, given[n], own[n]))
    ]
    return Difference(missing, unexpected, reshaped, len(both) - len(reshaped))


def check_checkpoint(model: nn.Module, content: dict, mode: Mode, classes: Sequence[str] | None = None) -> None:
    """Reject a checkpoint whose weights do not fit ``model``, or whose class names are not ``classes``.

    Args:
        model: the segmentor, without wrappers.
        content: the content of a file, from :func:`~mmseg_volo.checkpoints.content.as_checkpoint`.
        mode: 'infer' rejects every difference, except in the auxiliary head, unless ``test_cfg.allow_mismatch`` is
            true. 'train' loads what fits and logs the rest, since fine-tuning changes the classes. 'resume' rejects
            every difference.
        classes: class names of the data set to predict. A file without class names passes.

    Raises:
        CheckpointError: weights are missing, unexpected or of other shape, or the class names differ.
    """
    source = source_of(content['state_dict'])
    check_weights(model, content['state_dict'], mode)
    given = dataset_meta_of(content).get('classes')
    if mode == 'infer' and given and classes and not allows_mismatch(model):
        check_class_names(given, classes, source)
    _notes_of(content['state_dict']).pop('source', None)  # the segmentor need not check it again on loading


def check_weights(segmentor: nn.Module, state: dict[str, torch.Tensor], mode: Mode) -> None:
    """Reject or log weights that do not fit ``segmentor``; see :func:`check_checkpoint`.

    Only state dicts read from a file carry ``source``; others are not checked. In 'infer' mode the auxiliary head is
    not compared, because only training uses it. Where mmengine takes the whole dict of a file for its weights,
    ``state`` is reduced to these.

    Raises:
        CheckpointError: weights are missing, unexpected or of other shape.
    """
    source = _notes_of(state).get('source')
    if source is None:
        return
    own = segmentor.state_dict()
    weights = weights_in(state, own)
    if weights.keys() != state.keys():
        state.clear()
        state.update(weights)
    found = compare(own, state, ignore='auxiliary_head.' if mode == 'infer' else '\0')
    if not found:
        return
    if mode == 'train' or (mode == 'infer' and allows_mismatch(segmentor)):
        print_log(
            f'{source}: {found.fitting} of its {len(state)} entries are loaded. The rest is left out or keeps its '
            f'initial values: {found}',
            logger='current',
            level=logging.WARNING,
        )
        return
    remedy = _REMEDY
    if mode == 'resume':
        remedy = 'To start from the weights that fit, use --cfg-options load_from=FILE instead of --resume'
    elif any(f'backbone.{name}' in segmentor.state_dict() for name in found.unexpected):
        remedy = 'It holds a backbone alone, which model.backbone.init_cfg.checkpoint loads for training'
    raise CheckpointError(f"{source}: not the weights of the config's model ({found}). {remedy}.")


def allows_mismatch(segmentor: nn.Module) -> bool:
    """Whether ``test_cfg`` of a segmentor allows checkpoints that do not fit."""
    return bool((getattr(segmentor, 'test_cfg', None) or {}).get('allow_mismatch'))


def source_of(state: Mapping) -> str:
    """The file that weights were read from, if they were not checked yet."""
    return _notes_of(state).get('source', 'the checkpoint')


def _notes_of(state: Mapping) -> dict:
    """The entry of the root module in a state dict's metadata, where PyTorch keeps module versions."""
    return getattr(state, '_metadata', {}).get('', {})


def dataset_meta_of(content: dict) -> dict:
    """Class names and colours that a file holds, under ``classes`` and ``palette``; either may be missing."""
    meta = content.get('meta') or {}
    found = meta.get('dataset_meta')
    found = found if isinstance(found, dict) else {}
    both = dict(classes=found.get('classes') or meta.get('CLASSES'), palette=found.get('palette'))
    if both['palette'] is None:
        both['palette'] = meta.get('PALETTE')
    return {name: value for name, value in both.items() if value is not None}


def check_class_names(given: Sequence[str], expected: Sequence[str], source: str) -> None:
    """Raise CheckpointError if the class names of a file and of the data set differ, apart from case."""
    given, expected = [str(name) for name in given], [str(name) for name in expected]
    other = [i for i, (a, b) in enumerate(zip(given, expected, strict=False)) if a.casefold() != b.casefold()]
    if len(given) == len(expected) and not other:
        return
    if len(given) != len(expected):
        problem = f'{len(given)} classes, the data set {len(expected)}'
    else:
        i = other[0]
        problem = f'other classes than the data set: {len(other)} of {len(given)}, as {given[i]!r} for {expected[i]!r}'
    raise CheckpointError(f'{source}: has {problem}. {_REMEDY}.')


def fits(name: str, given: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether an ordinary tensor can replace another: same shape, or another grid of a ``pos_embed``."""
    if given.layout is not torch.strided or given.is_quantized or given.is_meta:
        return False
    if name.rpartition('.')[2] == 'pos_embed' and given.dim() == own.dim() == 4:
        return given.shape[-1] == own.shape[-1]
    return given.shape == own.shape


def listed(what: str, names: Sequence[str]) -> str:
    """Clause for a message, such as '; 4 missing: a, b, c, ...'; empty without names."""
    return f'; {len(names)} {what}: {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}' if names else ''
