"""The gate for config texts that come in a file: what passes runs no code in mmengine, mmcv or mmseg.

mmengine executes a config text. Plain data alone is not safe either, because data names code and files:

- mmengine replaces ``{{$NAME:default}}`` and ``{{ fileDirname }}`` in the text before it parses it;
- a ``type`` that no registry knows is imported as a module, and so are ``custom_imports`` and the package of a
  ``_scope_``;
- other keys end in a registry too (``ema_type``, ``resize_type``, ``padding_mode``, ``norm_layer``, ...);
- mmseg unpickles a ``class_weight`` or ``ann_file`` that names a file or URL, and an image with
  ``decode_backend='pickle'``; storage clients take a ``sys_path``; some loggers run programs.

So a text is parsed as plain data, its values are checked, and what passes is written again from the data.
"""

import importlib.util
import math
import re
import sys
from functools import cache

import mmengine.registry
import mmseg.registry
from mmengine.config.config import RESERVED_KEYS
from mmengine.registry import Registry

from ..errors import ConfigError
from .config_text import literals

_LARGEST = 2**19  # characters of a text; the largest of mmseg's own configs has 25,000
_DEEPEST = 40
_LONGEST_WORD, _LONGEST_TEXT = 120, 1000  # characters of a string
# Without one of these, a config would mean something else. Other top-level keys are variables of config files.
_NEEDED = {
    *('model', 'data_preprocessor', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'test_pipeline'),
    *('tta_model', 'tta_pipeline', 'train_cfg', 'val_cfg', 'test_cfg', 'val_evaluator', 'test_evaluator'),
    *('optim_wrapper', 'param_scheduler', 'default_hooks', 'custom_hooks', 'default_scope', 'custom_imports'),
    *('visualizer', 'runner_type', 'model_wrapper_cfg'),
}
_RESERVED = {*RESERVED_KEYS, 'dict', 'float'}  # a text that sets dict could not be read
_SCOPES = 'mmseg', 'mmengine', 'mmcv'
_TYPES = 'type', 'runner_type'
# Where and how the trainer's machine stores files. Some storage clients import what these name, mmseg's inferencer
# would write images into save_dir, and CityscapesMetric deletes its output_dir.
_LEFT_OUT = {
    *('backend_args', 'file_client_args', 'filename_tmpl', 'save_dir', 'out_dir', 'output_dir', 'show_dir'),
    *('out_file', 'output_file', 'outfile_prefix', 'out_file_path', 'json_trace_path', 'result_path'),
    'checkpoint_path',  # timm reads it by itself, while it builds the model
}
# Weights are read by mmseg_volo.checkpoints.reading, which runs no code.
_WEIGHTS = {'checkpoint', 'pretrained', 'load_from', 'resume_from'}
# Folders, lists of files and names. mmengine opens them as text, images or output.
_TEXTS = {
    *('data_root', 'ann_file', 'img_dir', 'ann_dir', 'split', 'classes', 'palette', 'CLASSES', 'PALETTE'),
    *('img_suffix', 'img_suffix2', 'seg_map_suffix', 'depth_map_suffix', 'prefix', 'name', 'experiment_name'),
    'work_dir',
}
_TEXTS_BELOW = {'data_prefix', 'metainfo'}  # every string in these
_UNPICKLED = {'pkl', 'pickle', 'yml', 'yaml'}  # mmengine.load runs code in files with these suffixes
_WORD = re.compile(r'[\w +,()/-]*')
_INSTRUCTION = re.compile(r'_.*\w_')  # _base_, _delete_, ...
_KEY = re.compile(r'[^{}]{1,200}')


def checked_config(text: object) -> dict:
    """Parse a config text from a file, and check that nothing in it can run code.

    Args:
        text: assignments of plain data, as mmengine dumps a config.

    Returns:
        The config. Keys that only describe the trainer's storage are left out, and so is an ``ann_file`` that mmengine
        would unpickle. Of the loggers only the local one stays. Variables of config files stay if they are harmless.

    Raises:
        ConfigError: names the key and what is wrong with it.
    """
    if not isinstance(text, str):
        raise ConfigError(f'it is {type(text).__name__}, not text')
    if len(text) > _LARGEST:
        raise ConfigError(f'it has {len(text):,} characters, and at most {_LARGEST:,} are read')
    try:
        given = literals(text)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f'it is more than plain data ({str(error).splitlines()[0] if str(error) else error!r})'
        ) from error
    config = {}
    for key, value in given.items():
        if key in _RESERVED or _INSTRUCTION.fullmatch(key):
            raise ConfigError(f'{key} would change how mmengine reads the config')
        if key.startswith('_'):  # a variable of the config file, such as that of a loop
            continue
        try:
            config[key] = _imports(value) if key == 'custom_imports' else _checked(value, key, key)
        except ConfigError:
            if key in _NEEDED:
                raise
    return config


def config_text(config: dict) -> str:
    """Write a config of :func:`checked_config` as a text that mmengine reads as exactly this data."""
    return ''.join(f'{key} = {_written(value)}\n' for key, value in config.items())


def _imports(value: object) -> dict | None:
    names = value.get('imports') if isinstance(value, dict) else value
    names = [names] if isinstance(names, str) else names or []
    if names not in ([], ['mmseg_volo'], ('mmseg_volo',)):
        raise ConfigError(f'custom_imports={names!r} imports code')
    return dict(imports=['mmseg_volo'], allow_failed_imports=False) if names else None


def _checked(value: object, key: str, where: str, depth: int = 0, albu: bool = False) -> object:
    """Check one value; ``albu`` is true inside mmseg's Albu, which takes types of albumentations by name."""
    if depth > _DEEPEST:
        raise ConfigError(f'{where[:100]}... is nested more than {_DEEPEST} levels deep')
    if key == 'vis_backends':
        return [dict(type='LocalVisBackend')] if value else None
    if isinstance(value, dict):
        out = {}
        inner_albu = albu or value.get('type') == 'Albu'
        for name, inner in value.items():
            inside = f'{where}.{name}'
            if not isinstance(name, int) and not (isinstance(name, str) and _KEY.fullmatch(name)):
                raise ConfigError(f'{where} has the key {name!r:.100}, which is no name')
            if isinstance(name, str) and name.startswith('_') and name != '_scope_':
                raise ConfigError(f'{inside} would change how mmengine reads the config')
            if name not in _LEFT_OUT and not (name == 'ann_file' and _is_unpickled(inner)):
                inner_key = 'type of albumentations' if albu and name == 'type' else name
                inner_key = key if key in _TEXTS_BELOW and name not in ('type', '_scope_') else inner_key
                out[name] = _checked(inner, inner_key, inside, depth + 1, inner_albu)
        if str(out.get('type')).rpartition('.')[2] == 'TIMMBackbone':
            out['pretrained'] = False  # by default it downloads weights while it is built
        return out
    if isinstance(value, (list, tuple)):
        return type(value)(_checked(inner, key, f'{where}.{i}', depth + 1, albu) for i, inner in enumerate(value))
    if isinstance(value, str):
        problem = _problem(value, key)
        if problem:
            raise ConfigError(f'{where}={value!r:.100} {problem}')
    return value


def _problem(value: str, key: object) -> str | None:
    """What a string may do under a key, if it is more than a word; None for harmless ones."""
    if '{{' in value or '}}' in value or not value.isprintable():
        return 'has double braces or characters that cannot be seen'
    if key in _TYPES:
        if not _is_registered(value):
            return 'is no type of mmengine, mmcv, mmseg or mmseg_volo'
        return 'would be imported as a module' if '.' not in value and _is_module(value) else None
    if key in ('_scope_', 'default_scope'):
        return None if value in _SCOPES else f'is none of {", ".join(_SCOPES)}'
    if key in _WEIGHTS or key in _TEXTS or key in _TEXTS_BELOW:
        if len(value) > _LONGEST_TEXT:
            return f'has more than {_LONGEST_TEXT} characters'
        return 'would be unpickled' if key not in _WEIGHTS and _is_unpickled(value) else None
    if len(value) > _LONGEST_WORD or value.startswith('/') or not _WORD.fullmatch(value):
        return 'is no plain word, but may name a file, an address or code'
    if value.lower() in _UNPICKLED:
        return 'would unpickle files'
    return 'would be imported as a module' if value.isidentifier() and _is_module(value) else None


def _is_unpickled(value: object) -> bool:
    return isinstance(value, str) and value.rpartition('.')[2].lower() in _UNPICKLED


def _is_module(name: str) -> bool:
    """Whether importing this name would run code: a module that is there and was not imported yet."""
    if name in sys.modules:
        return False
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder without __init__.py has nothing to run


def _is_registered(name: str) -> bool:
    """Whether a registry of mmengine or mmseg knows a type; imports only the modules of mmengine and mmseg.

    Args:
        name: as ``VOLO``; or with its scope, as ``mmseg.VOLO``; or with its module, as mmengine writes a class of a
            config that was imported.
    """
    place, _, short = name.rpartition('.')
    for find_all in (False, True):
        for registry in _registries():
            if find_all:
                registry.import_from_location()
            if (not place or (place in _SCOPES and place == registry.scope)) and short in registry.module_dict:
                return True
        if place in sys.modules:
            # Looked up without code: a module may import more when it is asked for a name.
            found = vars(sys.modules[place]).get(short)
            if any(found is one for registry in _registries() for one in registry.module_dict.values()):
                return True
    return False


@cache
def _registries() -> list[Registry]:
    places = [*vars(mmengine.registry).values(), *vars(mmseg.registry).values()]
    return [one for one in places if isinstance(one, Registry)]


def _written(value: object) -> str:
    if isinstance(value, dict):
        # As dict({...}), because {{ would be replaced, and because keys need not be Python names.
        return f'dict({{{", ".join(f"{key!r}: {_written(inner)}" for key, inner in value.items())}}})'
    if isinstance(value, list):
        return f'[{", ".join(map(_written, value))}]'
    if isinstance(value, tuple):
        return f'({"".join(f"{_written(inner)}, " for inner in value)})'
    if isinstance(value, float) and not math.isfinite(value):
        return f'float({str(value)!r})'
    return repr(value)
