"""Check a checkpoint against the model that it is loaded into, and against the names of its classes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from mmengine.logging import print_log
from torch import nn

from ..errors import CheckpointError

Mode = Literal['train', 'resume', 'infer']
_REMEDY = (
    'Take the config that it was trained with, or allow it by --allow-mismatch or model.test_cfg.allow_mismatch=True'
)


class Difference(NamedTuple):
    """How the weights of a file and of a model differ. False where they do not; ``str`` gives a sentence part.

    Attributes:
        missing: names that the file lacks; ``num_batches_tracked`` may be missing.
        unexpected: names that the model lacks.
        unlike: names of tensors with another shape, each followed by both shapes.
        fitting: number of entries that fit.
    """

    missing: list[str]
    unexpected: list[str]
    unlike: list[str]
    fitting: int

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.unlike)

    def __str__(self) -> str:
        parts = listed('missing', self.missing) + listed('unexpected', self.unexpected)
        return (parts + listed('of other shape', self.unlike)).removeprefix('; ')


def compare(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], ignore: str = '\0') -> Difference:
    """Compare a model's state dict with a file's, without the names that begin with ``ignore``."""
    given = {name.removeprefix('module.'): value for name, value in given.items()}
    names = [name for name in own if not name.startswith(ignore)]
    missing = [name for name in names if name not in given and not name.endswith('num_batches_tracked')]
    unexpected = [name for name in given if name not in own and not name.startswith(ignore)]
    both = [name for name in names if name in given]
    unlike = [
        f'{n} is {tuple(getattr(given[n], "shape", ()))}, expected {tuple(own[n].shape)}'
        for n in both
        if not (isinstance(given[n], torch.Tensor) and fits(n, given[n], own[n]))
    ]
    return Difference(missing, unexpected, unlike, len(both) - len(unlike))


def check_checkpoint(model: nn.Module, content: dict, mode: Mode, classes: Sequence[str] | None = None) -> None:
    """Refuse a checkpoint that is not one of ``model``, or whose classes have other names than ``classes``.

    Args:
        model: the segmentor, without wrappers.
        content: what :mod:`mmseg_volo.checkpoints.reading` has read.
        mode: 'infer' refuses a file that leaves weights of the model as they are, unless ``test_cfg.allow_mismatch``
            allows it. 'train' loads what fits and logs the rest, since fine-tuning starts from other classes. 'resume'
            refuses every difference.
        classes: names of the classes of the data set, if it is to be predicted. A file without names passes.

    Raises:
        CheckpointError: weights are missing, unexpected or of other shape, or the names of the classes differ.
    """
    source = source_of(content['state_dict'])
    if content['state_dict'] or 'exported' not in content['meta']:  # an exported file runs its own weights
        check_weights(model, content['state_dict'], mode)
    given = dataset_meta_of(content).get('classes')
    if mode == 'infer' and given and classes and not allows_mismatch(model):
        check_class_names(given, classes, source)


def check_weights(segmentor: nn.Module, state: Mapping[str, torch.Tensor], mode: Mode) -> None:
    """Refuse or report weights that are not those of ``segmentor``; see :func:`check_checkpoint`.

    Only a state dict that was read from a file names its source, and only such a one is checked, once: the check
    removes the name. In 'infer' mode the auxiliary head, which only training uses, is not compared.

    Raises:
        CheckpointError: weights are missing, unexpected or of other shape.
    """
    source = _notes_of(state).pop('source', None)
    if source is None:
        return
    found = compare(segmentor.state_dict(), state, ignore='auxiliary_head.' if mode == 'infer' else '\0')
    if not found:
        return
    if mode == 'train' or (mode == 'infer' and allows_mismatch(segmentor)):
        print_log(
            f'{source}: {found.fitting} of its {len(state)} entries are loaded. The rest is left out or keeps its '
            f'start values: {found}',
            logger='current',
            level=logging.WARNING,
        )
        return
    remedy = _REMEDY
    if mode == 'resume':
        remedy = 'To start from the weights that fit, give --cfg-options load_from=FILE in place of --resume'
    elif any(f'backbone.{name}' in segmentor.state_dict() for name in found.unexpected):
        remedy = 'It holds a backbone alone, which model.backbone.init_cfg.checkpoint takes, for training'
    raise CheckpointError(f"{source}: not the weights of the config's model ({found}). {remedy}.")


def allows_mismatch(segmentor: nn.Module) -> bool:
    """Whether ``test_cfg`` of a segmentor asks for checkpoints of other models to be taken."""
    return bool((getattr(segmentor, 'test_cfg', None) or {}).get('allow_mismatch'))


def source_of(state: Mapping) -> str:
    """The file that weights were read from, as long as they are not checked."""
    return _notes_of(state).get('source', 'the checkpoint')


def _notes_of(state: Mapping) -> dict:
    """What a state dict notes about the module at its root, where PyTorch keeps versions of modules."""
    return getattr(state, '_metadata', {}).get('', {})


def dataset_meta_of(content: dict) -> dict:
    """Names and colours of the classes, as far as a file holds them: ``classes`` and ``palette``."""
    meta = content.get('meta') or {}
    found = meta.get('dataset_meta')
    found = found if isinstance(found, dict) else {}
    both = dict(classes=found.get('classes') or meta.get('CLASSES'), palette=found.get('palette'))
    if both['palette'] is None:
        both['palette'] = meta.get('PALETTE')
    return {name: value for name, value in both.items() if value is not None}


def check_class_names(given: Sequence[str], expected: Sequence[str], source: str) -> None:
    """Refuse the classes of a file that are not those of the data set.

    Raises:
        CheckpointError: the names differ.
    """
    given, expected = [str(name) for name in given], [str(name) for name in expected]
    other = [i for i, (a, b) in enumerate(zip(given, expected, strict=False)) if a.casefold() != b.casefold()]
    if len(given) == len(expected) and not other:
        return
    if len(given) != len(expected):
        what = f'{len(given)} classes, the data set {len(expected)}'
    else:
        i = other[0]
        what = f'other classes than the data set: {len(other)} of {len(given)}, as {given[i]!r} for {expected[i]!r}'
    raise CheckpointError(f'{source}: has {what}. {_REMEDY}.')


def fits(name: str, given: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a tensor can replace another: by shape, except that the grid of a ``pos_embed`` follows image sizes."""
    if name.rpartition('.')[2] == 'pos_embed' and given.dim() == own.dim() == 4:
        return given.shape[-1] == own.shape[-1]
    return given.shape == own.shape


def listed(what: str, names: Sequence[str]) -> str:
    """A clause for messages, empty without names: '; 4 missing: a, b, c, ...'."""
    return f'; {len(names)} {what}: {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}' if names else ''
