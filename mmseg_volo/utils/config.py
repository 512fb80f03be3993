"""Read a config file and apply command-line options to it."""

import inspect
import io
import logging
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..errors import ConfigError

# Top-level keys that mmengine's runner, mmseg, or the tools and hooks of this package read. Other keys are variables.
READ_KEYS = frozenset(
    {
        *inspect.signature(Runner).parameters,
        'runner_type',
        'custom_imports',
        'model_wrapper_cfg',
        'find_unused_parameters',
        'sync_bn',
        'compile',
        'strategy',
        'auto_resume',
        'tta_model',
        'tta_pipeline',
        'watch_patience',
    }
)
_SHOWN = 4  # places that a message lists


def load_config(path: str, options: dict | None = None, work_dir: str | None = None, launcher: str = 'none') -> Config:
    """Read a config and apply command-line options to it.

    Args:
        path: the config file.
        options: overrides by dotted key.
        work_dir: folder for logs and checkpoints; by default the config's, or ``work_dirs/<name of the config>``.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        FileNotFoundError: the config does not exist.
        ConfigError: the file cannot be read as a config, or an option would change nothing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'config {path} does not exist; the configs of this package are in configs/')
    try:
        config = Config.fromfile(path)
    except OSError:
        raise
    except (Exception, SystemExit) as error:  # the file is Python code, which may raise anything
        reason = ' '.join(str(error).split()) or 'no reason given'
        raise ConfigError(f'{path}: cannot be read ({type(error).__name__}: {reason})') from error
    if options:
        check_options(config, options)
        try:
            config.merge_from_dict(options)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = error.args[0] if error.args else error
            raise ConfigError(f'--cfg-options do not fit {path}: {" ".join(str(reason).split())}') from error
    config.launcher = launcher
    config.work_dir = work_dir or config.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return config


def check_options(config: Config, options: Mapping[str, Any]) -> None:
    """Reject overrides of variables that only the config file itself uses: they would change nothing.

    ``crop_size = (512, 512)`` is such a variable: by the time of an override, its value is already in
    ``model.data_preprocessor.size`` and in a pipeline.

    Args:
        config: read from a file, before the overrides.
        options: overrides by dotted key.

    Raises:
        ConfigError: one line for each such option, with keys that do take effect.
    """
    suspects = {key: name for key in options if (name := key.split('.')[0]) not in READ_KEYS}
    used = used_variables(config) if suspects else set()
    lines = []
    for key, name in suspects.items():
        places = list(dict.fromkeys(_places(config, key))) if name in config else []
        if name in config and (places or name in used):
            shown = ', '.join(places[:_SHOWN]) + (', ...' if len(places) > _SHOWN else '')
            remedy = f'set {shown} instead' if places else 'set the keys in which the config file uses it'
            lines.append(f'--cfg-options {key}: {name} is a variable of the config file only; {remedy}')
        else:  # a custom hook may read it
            print_log(
                f'--cfg-options {key}: nothing in mmengine, mmseg or this package reads {name}',
                logger='current',
                level=logging.WARNING,
            )
    if lines:
        raise ConfigError('\n'.join(lines))


def used_variables(config: Mapping) -> set[str]:
    """Names that a config's files read in their own code, as ``crop_size`` in ``size=crop_size``."""
    if not str(getattr(config, 'filename', None)).endswith('.py'):  # other formats have no variables
        return set()
    text = getattr(config, 'text', None) or ''
    # mmengine joins the texts of all files, each after a line with its path.
    text = '\n'.join(line for line in text.splitlines() if not line.endswith(('.py', '.yaml', '.yml', '.json')))
    tokens = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NAME, tokenize.OP):
                tokens.append(token.string)
    except (tokenize.TokenError, SyntaxError):
        return set()
    found = set()
    for before, base, name, after in zip(['', '', *tokens], ['', *tokens], tokens, [*tokens[1:], ''], strict=False):
        is_read = after != '=' and (base != '.' or before == '_base_')
        if is_read and name.isidentifier():
            found.add(name)
    return found


def _places(config: Mapping, key: str) -> Iterator[str]:
    """Keys below those that are read which hold the value of a variable, so that setting them takes effect."""
    name, _, rest = key.partition('.')
    for place in _equal(config, config[name], name):
        yield f'{place}.{rest}' if rest else place
    value = config[name]
    for part in rest.split('.') if rest else ():
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return
    if rest:
        yield from _equal(config, value, rest.split('.')[-1])


def _equal(config: Mapping, value: Any, name: str) -> list[str]:
    """Keys with this value. Plain numbers and flags must have a similar name too, since many are equal by chance."""
    telling = isinstance(value, list | tuple | dict) or (isinstance(value, str) and value)
    large = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > 16
    found = []

    def walk(inner: Any, key: str) -> None:
        if type(inner) is type(value) and inner == value:
            last = key.rpartition('.')[2]
            if telling or large or last == name:
                found.append((last != name, key))
        if isinstance(inner, Mapping):
            for part, below in inner.items():
                walk(below, f'{key}.{part}')
        elif isinstance(inner, list | tuple):
            for i, below in enumerate(inner):
                walk(below, f'{key}.{i}')

    for key in config:
        if key in READ_KEYS:
            walk(config[key], key)
    return [key for _, key in sorted(found)]
