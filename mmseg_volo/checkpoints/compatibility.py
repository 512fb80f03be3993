"""Whether a checkpoint is one of the model: its weights, and the names of its classes."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import nn

from ..errors import CheckpointError

_WAY_ON = (
    'Take the config that it was trained with, or allow it by --allow-mismatch or model.test_cfg.allow_mismatch=True'
)


class Difference(NamedTuple):
    """Where the weights of a file and those of a model differ; false where they do not, in words by ``str``.

    Attributes:
        missing: names that the file lacks; ``num_batches_tracked`` may miss.
        unexpected: names that the model lacks.
        unlike: names of other shape, each with both shapes in words.
        fitting: how many entries fit.
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
    """Compare a model's state dict with a file's, leaving out names that begin with ``ignore``."""
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


def check_weights(segmentor: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse a file's weights where they are not those of ``segmentor``; in training, log what is left out instead.

    Training is told by the model's weights having been initialised before (``load_from``), or by its being the copy in
    which EMAHook averages. Elsewhere what the file lacks would stay random: an error, unless
    ``test_cfg.allow_mismatch`` allows it. The auxiliary head does not matter there.

    Args:
        segmentor: an EncoderDecoder.
        state: the file's weights.
        source: the file's name, for the message.

    Raises:
        CheckpointError: weights are missing, unexpected or of other shape.
    """
    training = getattr(segmentor, 'is_init', False) or not any(p.requires_grad for p in segmentor.parameters())
    found = compare(segmentor.state_dict(), state, ignore='\0' if training else 'auxiliary_head.')
    if not found:
        return
    if training or allows_mismatch(segmentor):
        print_log(
            f'{source}: {found.fitting} of its {len(state)} entries are loaded. Left out, or kept at their start '
            f'values: {found}',
            logger='current',
            level=logging.WARNING,
        )
        return
    way_on = (
        'It holds a backbone alone, which model.backbone.init_cfg.checkpoint takes, for training'
        if any(f'backbone.{name}' in segmentor.state_dict() for name in found.unexpected)
        else _WAY_ON
    )
    raise CheckpointError(f"{source}: not the weights of the config's model ({found}). {way_on}.")


def allows_mismatch(segmentor: nn.Module) -> bool:
    """Whether ``test_cfg`` of a segmentor asks for checkpoints of other models to be taken."""
    return bool((getattr(segmentor, 'test_cfg', None) or {}).get('allow_mismatch'))


def source_of(state: Mapping) -> str:
    """The file that weights were read from."""
    return getattr(state, '_metadata', {}).get('', {}).get('source', 'the checkpoint')


def dataset_meta_of(content: dict) -> dict:
    """Names and colours of the classes, as far as a file that was read holds them: ``classes`` and ``palette``."""
    meta = content.get('meta') or {}
    found = meta.get('dataset_meta')
    found = found if isinstance(found, dict) else {}
    both = dict(classes=found.get('classes') or meta.get('CLASSES'), palette=found.get('palette'))
    if both['palette'] is None:
        both['palette'] = meta.get('PALETTE')
    return {name: value for name, value in both.items() if value is not None}


def check_classes(content: dict, expected: Sequence[str] | None) -> None:
    """Refuse a checkpoint whose classes have other names than those of the data set; unnamed ones pass.

    Raises:
        CheckpointError: the names differ.
    """
    given = dataset_meta_of(content).get('classes')
    if given and expected:
        check_class_names(given, expected, source_of(content.get('state_dict', {})))


def check_class_names(given: Sequence[str], expected: Sequence[str], source: str) -> None:
    """Refuse classes of a file that are not those of the data set.

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
    raise CheckpointError(f'{source}: has {what}. {_WAY_ON}.')


def fits(name: str, given: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a weight can take the place of another: by shape, but the grid of a ``pos_embed`` follows image sizes."""
    if name.rpartition('.')[2] == 'pos_embed' and given.dim() == own.dim() == 4:
        return given.shape[-1] == own.shape[-1]
    return given.shape == own.shape


def listed(what: str, names: Sequence[str]) -> str:
    """A clause for messages, empty without names: '; 4 missing: a, b, c, ...'."""
    return f'; {len(names)} {what}: {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}' if names else ''
