"""Faults in names: types that are not registered, and keys that no constructor or runner knows."""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from mmengine import hooks
from mmengine.runner import Runner
from mmseg.engine import SegVisualizationHook
from mmseg.registry import MODELS
from torch.utils.data import DataLoader

from ..utils.config import READ_KEYS, used_variables
from .lookup import UNKNOWN, accepted, find, nearest, registered
from .parts import ANY, Part
from .pipelines import check_dataset
from .values import check_values

# What mmengine's Runner takes out of a data loader's config itself.
_LOADER_KEYS = {
    *inspect.signature(DataLoader).parameters,
    'num_batch_per_epoch',
    'disable_subprocess_warning',
}
_NEAR = 0.9  # similarity from which a key that may be unknown is taken for a mistyped one
_DEFAULT_HOOKS = dict(
    runtime_info=hooks.RuntimeInfoHook,
    timer=hooks.IterTimerHook,
    sampler_seed=hooks.DistSamplerSeedHook,
    logger=hooks.LoggerHook,
    param_scheduler=hooks.ParamSchedulerHook,
    checkpoint=hooks.CheckpointHook,
    visualization=SegVisualizationHook,
)
_PARAMWISE = (
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
)
_ENVIRONMENT = 'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'  # what mmengine's Runner reads of env_cfg
# Where MMSegmentation 0.x had a key that 1.x has elsewhere.
_MOVED = dict(classes='metainfo=dict(classes=...)', palette='metainfo=dict(palette=...)')


def check_part(part: Part) -> Iterator[str]:
    """The fault in the type and in the keys of a part."""
    if part.kind is UNKNOWN or (part.kind is not None and ANY in part.extra):
        return
    if part.kind is None:
        kind = part.cfg.get('type')
        if 'type' not in part.cfg:
            group, _, name = part.key.rpartition('.')
            hint = nearest(name, _DEFAULT_HOOKS) if group == 'default_hooks' and name not in _DEFAULT_HOOKS else ''
            yield f'{part.key}: has no type{hint or "; add one"}'
        elif not isinstance(kind, str):
            yield f'{part.type_key}: {kind!r} is no name of a class'
        elif find(part.registry, kind, 'mmseg') is not None and '.' not in kind:
            yield f"{part.type_key}: {kind!r} is registered in mmseg; set default_scope = 'mmseg' in the config"
        else:
            hint = nearest(kind.rpartition('.')[2], registered(part.registry))
            yield f'{part.type_key}: {kind!r} is not registered{hint or "; import its module in custom_imports"}'
        return
    group, _, name = part.key.rpartition('.')
    if group == 'default_hooks' and name not in _DEFAULT_HOOKS:
        same = [usual for usual, kind in _DEFAULT_HOOKS.items() if part.is_a(kind)]
        if hint := nearest(name, same):
            yield f'{part.key}: would be a second {part.kind.__name__}{hint}'
    keys, is_open = accepted(part.kind)
    for name in part.cfg:
        if name in keys or name == 'type' or name in part.extra:
            continue
        if is_open and not difflib.get_close_matches(name, keys, 1, _NEAR):  # it is for the constructor's **kwargs
            continue
        hint = f'; mmseg 1.x has it in {_MOVED[name]}' if name in _MOVED else nearest(name, [*keys, *part.extra])
        kind = getattr(part.kind, '__name__', part.kind)
        yield f'{part.key}.{name}: {kind} has no such argument{hint or "; remove it"}'
    yield from check_values(part)


def check_paramwise(config: Mapping) -> Iterator[str]:
    """Mistyped keys of ``optim_wrapper.paramwise_cfg``, which mmengine's own constructor would ignore."""
    wrapper = config.get('optim_wrapper')
    given = wrapper.get('paramwise_cfg') if isinstance(wrapper, Mapping) else None
    known = dict(DefaultOptimWrapperConstructor=_PARAMWISE, VOLOLayerDecayConstructor=(*_PARAMWISE, 'layer_decay_rate'))
    constructor = wrapper.get('constructor') or 'DefaultOptimWrapperConstructor' if given else None
    known = known.get(constructor) if isinstance(constructor, str) else None
    if not isinstance(given, Mapping) or known is None:
        return
    key = 'optim_wrapper.paramwise_cfg'
    for name in given:
        if name not in known and (hint := nearest(name, known)):
            yield f'{key}.{name}: nothing reads this key{hint}'
    custom, known = given.get('custom_keys'), ('lr_mult', 'decay_mult')
    for part, options in custom.items() if isinstance(custom, Mapping) else ():
        for name in options if isinstance(options, Mapping) else ():  # others are options of the optimizer
            if name not in known and (hint := nearest(name, known, 0.75)):
                yield f'{key}.custom_keys.{part}.{name}: nothing reads this key{hint}'


def check_loader(key: str, loader: Mapping) -> Iterator[str]:
    """The faults in the keys of a data loader."""
    for name in loader:
        if name not in _LOADER_KEYS:
            yield f'{key}.{name}: a data loader has no such argument{nearest(name, _LOADER_KEYS) or "; remove it"}'
    for name in ('dataset', 'sampler'):
        if name not in loader:
            yield f'{key}: has no {name}'
    yield from check_dataset(loader, f'{key}.dataset')


def check_text(key: str, value: Any) -> Iterator[str]:
    """The values that cannot be written as a config's text, which each run logs and each checkpoint holds."""
    if isinstance(value, PurePath | np.ndarray | torch.Tensor):
        yield f'{key}: {value!r:.80} cannot be written as text; use texts, numbers, lists and dicts only'
    inner = value.items() if isinstance(value, Mapping) else ()
    for name, one in enumerate(value) if isinstance(value, list | tuple) else inner:
        yield from check_text(f'{key}.{name}', one)


def check_top_level(config: Mapping, task: str | None) -> Iterator[str]:
    """Top-level keys that the config's files do not use, and that look like one that the task reads."""
    candidates = {}
    for name in config:
        if name not in READ_KEYS:
            near = difflib.get_close_matches(name, READ_KEYS, 1, _NEAR)
            of_test = bool(near) and near[0].startswith(('test_', 'tta_'))
            if near and of_test == (task == 'test') and not re.search(r'\d', name):
                candidates[name] = near[0]
    used = used_variables(config) if candidates else set()
    for name, near in candidates.items():
        if name not in used:
            yield f'{name}: nothing reads this key; did you mean {near!r}?'
    scopes = {*MODELS.root.children, MODELS.root.scope}
    scope = config.get('default_scope')
    if isinstance(scope, str) and scope not in scopes and (hint := nearest(scope, scopes)):
        yield f'default_scope: {scope!r} is no package with registered types{hint}'
    if not isinstance(config.get('resume', False), bool | None):
        yield f'resume: {config["resume"]!r} is neither True nor False; load_from names the file to resume from'
    environment = config.get('env_cfg')
    for name in environment if isinstance(environment, Mapping) else ():
        if name not in _ENVIRONMENT and (hint := nearest(name, _ENVIRONMENT)):
            yield f'env_cfg.{name}: nothing reads this key{hint}'
    randomness = config.get('randomness')
    allowed = set(inspect.signature(Runner.set_randomness).parameters) - {'self'}
    for name in randomness if isinstance(randomness, Mapping) else ():
        if name not in allowed:
            yield f'randomness.{name}: there is no such setting{nearest(name, allowed) or "; remove it"}'
