"""Faults in names: types that are not registered, and keys that no constructor or runner knows."""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping

from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..utils.config import READ_KEYS, used_variables
from .lookup import UNKNOWN, accepted, find, nearest, registered
from .parts import ANY, Part

# What mmengine's Runner takes out of a data loader's config itself.
_LOADER_KEYS = {
    *inspect.signature(DataLoader).parameters,
    'num_batch_per_epoch',
    'disable_subprocess_warning',
}
_NEAR = 0.9  # similarity from which a key that may be unknown is taken for a mistyped one
_DEFAULT_HOOKS = 'runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint', 'visualization'
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
    keys, is_open = accepted(part.kind)
    for name in part.cfg:
        if name in keys or name == 'type' or name in part.extra:
            continue
        if is_open and not difflib.get_close_matches(name, keys, 1, _NEAR):  # it is for the constructor's **kwargs
            continue
        hint = f'; mmseg 1.x has it in {_MOVED[name]}' if name in _MOVED else nearest(name, [*keys, *part.extra])
        kind = getattr(part.kind, '__name__', part.kind)
        yield f'{part.key}.{name}: {kind} has no such argument{hint or "; remove it"}'


def check_paramwise(config: Mapping) -> Iterator[str]:
    """Mistyped keys of ``optim_wrapper.paramwise_cfg``, which mmengine's own constructor would ignore."""
    wrapper = config.get('optim_wrapper')
    given = wrapper.get('paramwise_cfg') if isinstance(wrapper, Mapping) else None
    if not isinstance(given, Mapping) or wrapper.get('constructor') not in (None, 'DefaultOptimWrapperConstructor'):
        return
    for name in given:
        if name not in _PARAMWISE and (hint := nearest(name, _PARAMWISE)):
            yield f'optim_wrapper.paramwise_cfg.{name}: nothing reads this key{hint}'


def check_loader(key: str, loader: Mapping) -> Iterator[str]:
    """The faults in the keys of a data loader."""
    for name in loader:
        if name not in _LOADER_KEYS:
            yield f'{key}.{name}: a data loader has no such argument{nearest(name, _LOADER_KEYS) or "; remove it"}'
    for name in ('dataset', 'sampler'):
        if name not in loader:
            yield f'{key}: has no {name}'


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
    randomness = config.get('randomness')
    allowed = set(inspect.signature(Runner.set_randomness).parameters) - {'self'}
    for name in randomness if isinstance(randomness, Mapping) else ():
        if name not in allowed:
            yield f'randomness.{name}: there is no such setting{nearest(name, allowed) or "; remove it"}'
