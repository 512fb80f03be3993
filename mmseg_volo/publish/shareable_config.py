"""Make a run's config shareable: plain data in one text, without paths, credentials or names of people."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import urlsplit

from mmengine.config import Config

from ..checkpoints.config_gate import checked_config, config_text
from ..checkpoints.config_text import literals, strings
from ..errors import ConfigError
from ..utils.config import load_config

# What mmengine's Runner, the tools and mmseg's inference read. Other keys are private to their author.
_KEPT = (
    *('default_scope', 'custom_imports', 'runner_type', 'model', 'data_preprocessor', 'crop_size'),
    *('train_dataloader', 'val_dataloader', 'test_dataloader', 'train_pipeline', 'val_pipeline', 'test_pipeline'),
    *('tta_model', 'tta_pipeline', 'val_evaluator', 'test_evaluator', 'train_cfg', 'val_cfg', 'test_cfg'),
    *('optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'model_wrapper_cfg', 'watch_patience', 'default_hooks'),
    *('custom_hooks', 'env_cfg', 'log_processor', 'log_level', 'visualizer', 'randomness'),
)
# Keys with output folders or credentials of this machine.
_PRIVATE = {
    *('work_dir', 'out_dir', 'save_dir', 'output_dir', 'show_dir', 'out_file', 'output_file', 'outfile_prefix'),
    *('backend_args', 'file_client_args', 'allow_mismatch'),
}
# Schemes of weights that anybody can download by the same name.
_PUBLIC = ('timm', 'http', 'https', 'torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls')
_ABSOLUTE = re.compile(r'[/~\\]|[A-Za-z]:[\\/]|file:')
# Data folders of this project's configs; other data sets get a folder named after their class.
_DATA = {'ADE20KDataset': 'data/ade/ADEChallengeData2016', 'StreetSceneDataset': 'data/street_scenes'}


def read_config(path: str | None, embedded: object, source: Path) -> dict:
    """Read the config of a checkpoint as plain data.

    The text in the checkpoint comes from an unknown author. It is parsed and never run, and must pass
    :func:`~mmseg_volo.checkpoints.config_gate.checked_config`.

    Args:
        path: config file of the user, which is run like every config; None for the text in the checkpoint.
        embedded: that text.
        source: the checkpoint, for messages.

    Raises:
        FileNotFoundError: no such config.
        ConfigError: the config cannot be read or holds more than data, or the checkpoint has none.
    """
    if path is not None:
        return _plain(load_config(path).to_dict())
    remedy = 'give the one that it was trained with as --config FILE'
    return foreign_config(embedded, str(source), remedy)


def foreign_config(text: object, source: str, remedy: str) -> dict:
    """Parse the config text of an unknown author; see :func:`read_config`.

    Args:
        text: the text; None or another object if there is none.
        source: where it is from, for messages.
        remedy: what a user can do without this text, for messages.

    Raises:
        ConfigError: there is no text, or it holds more than data.
    """
    if not isinstance(text, str):
        raise ConfigError(f'{source}: holds no config; {remedy}')
    try:
        return checked_config(text)
    except ConfigError as error:
        raise ConfigError(
            f'{source}: its config is refused ({error}), because it could run any code; {remedy}, if you trust it'
        ) from error


def _plain(value: object, where: str = '') -> object:
    if isinstance(value, Mapping):
        return {key: _plain(inner, f'{where}.{key}'.lstrip('.')) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(inner, f'{where}.{i}') for i, inner in enumerate(value))
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ConfigError(f'{where} is {value!r}: a published config may hold text, numbers, lists and dicts only')


def shareable(config: dict) -> dict:
    """A config without what belongs to a machine or a person.

    Data folders become ``data/NAME``. Weights to start from stay only where anybody can download them. Credentials,
    output folders, loggers that send data elsewhere and keys that no tool reads are removed.
    """
    kept = {key: config[key] for key in _KEPT if key in config}
    imports = dict(kept.get('custom_imports') or {})
    imports['imports'] = list(dict.fromkeys(['mmseg_volo', *(imports.get('imports') or [])]))
    kept['custom_imports'] = dict(imports, allow_failed_imports=False)
    if 'visualizer' in kept:
        local = dict(name='visualizer', vis_backends=[dict(type='LocalVisBackend')])
        kept['visualizer'] = dict(kept['visualizer'] or {}, **local)
    environment = kept.get('env_cfg') or {}
    if environment:
        backend = (environment.get('dist_cfg') or {}).get('backend', 'nccl')
        kept['env_cfg'] = {k: v for k, v in environment.items() if k in ('cudnn_benchmark', 'mp_cfg')}
        kept['env_cfg']['dist_cfg'] = dict(backend=backend)
    kept = _without_places(kept)
    if isinstance(kept.get('model'), dict):
        kept['model'].pop('pretrained', None)
    return dict(kept, load_from=None, resume=False)


def _without_places(value: object, key: str = '', kind: str = '') -> object:
    if isinstance(value, dict):
        if value.get('type') == 'Pretrained' and not is_public(value.get('checkpoint')):
            return None
        kind = str(value.get('type', kind))
        return {name: _without_places(inner, name, kind) for name, inner in value.items() if name not in _PRIVATE}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_places(inner, key, kind) for inner in value)
    if not isinstance(value, str) or not is_place(value):
        return value
    return data_folder(kind) if key == 'data_root' else last_part(value)


def data_folder(kind: str) -> str:
    """Default folder of a data set's class: 'data/camvid' for CamVidDataset."""
    return _DATA.get(kind) or f'data/{kind.rpartition(".")[2].removesuffix("Dataset").lower() or "images"}'


def is_place(text: str) -> bool:
    """Whether a text names a place on one machine or network: an absolute path, one with '..', or a private URL."""
    if '://' in text:
        return not is_public(text)
    return bool(_ABSOLUTE.match(text)) or '..' in re.split(r'[\\/]', text)


def is_public(source: object) -> bool:
    """Whether anybody can download weights by this name: a URL without credentials, or a known library's scheme."""
    if not isinstance(source, str) or '://' not in source:
        return False
    parts = urlsplit(source)
    return parts.scheme in _PUBLIC and not parts.query and '@' not in parts.netloc


def last_part(place: str) -> str:
    """The last component of a path or URL, without a query."""
    path = urlsplit(place).path if '://' in place else place
    return PureWindowsPath(path).name if '\\' in path else PurePosixPath(path).name


def as_text(config: dict) -> str:
    """A config as text in mmengine's layout.

    Raises:
        ConfigError: mmengine would not read it as the same data, as with nan.
    """
    text = Config(config).pretty_text
    if re.search(r'\binf\b', text):  # mmengine writes inf as a name, which it cannot read
        text = config_text(config)
    try:
        same = literals(text) == config and '{{' not in text  # mmengine would replace {{...}}
    except (SyntaxError, ValueError):
        same = False
    if not same:
        raise ConfigError('the config cannot be written as plain data; look for nan and for {{ in it')
    return text


def check_nothing_private(config: dict, places: list[str]) -> None:
    """Raise ConfigError where a text in the config still holds one of these folders."""
    for key, text in strings(config):
        found = next((place for place in places if place in text), None)
        if found:
            raise ConfigError(
                f'{key}={text!r} would give away {found}; remove it from the config and pass that as --config FILE'
            )
