"""The content of a file: what the registered readers return, and its form as a checkpoint of OpenMMLab."""

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mmengine.logging import print_log

from ..errors import CheckpointError, ConfigError
from .config_gate import checked_config, config_text

# mmengine has the weights under the first key; files of other trainers have them under the others.
WEIGHT_KEYS = ('state_dict', 'model', 'state_dict_ema')
_LONGEST_JSON = 2**20  # characters


class Content(OrderedDict):
    """The dict of a file. A missing ``meta`` reads as empty, because :func:`mmseg.apis.init_model` expects it.

    It is pickled as an ordinary OrderedDict.
    """

    def __missing__(self, key: str) -> dict:
        if key == 'meta':
            return {}
        raise KeyError(key)

    def __reduce__(self) -> tuple:
        return OrderedDict, *super().__reduce__()[1:]


def as_read(content: object, source: str) -> object:
    """Make the content of a file safe for mmengine and mmseg, and note the file's name with the weights.

    The weights stay where they are. Config texts are replaced by what :mod:`mmseg_volo.checkpoints.config_gate` lets
    through, or left out with a warning.

    Args:
        content: what the file holds.
        source: the file.

    Raises:
        CheckpointError: the content has a form that makes mmengine fail.
    """
    if content is None:  # mmengine would take it for no checkpoint, and keep random weights
        raise CheckpointError(f'{source}: expected a dict of weights, found nothing')
    if not isinstance(content, dict):
        return content
    state = content.get('state_dict')
    if isinstance(state, dict):
        content = _named(Content(content), source)
        content['state_dict'] = with_source(state, source)
    elif 'state_dict' in content:
        raise CheckpointError(f'{source}: state_dict is {type(state).__name__}, expected a dict of tensors')
    else:
        content = with_source(content, source)
    _leave_out_what_is_no_dict(content, source)
    _replace_config_texts(content, source)
    return content


def _leave_out_what_is_no_dict(content: Content, source: str) -> None:
    hub = content.get('message_hub')
    allowed = dict if 'state_dict' in content else (dict, torch.Tensor)  # a weight may have such a name
    for holder, key in ((content, 'meta'), (hub, 'runtime_info'), (content, 'message_hub')):
        if isinstance(holder, dict) and not isinstance(holder.get(key, {}), allowed):
            print_log(f'{source}: {key} is left out, because it is no dict', 'current', logging.WARNING)
            del holder[key]
    meta = content.get('meta')
    if isinstance(meta, dict) and not isinstance(meta.get('dataset_meta'), (dict, type(None))):
        print_log(f'{source}: meta.dataset_meta is left out, because it is no dict', 'current', logging.WARNING)
        del meta['dataset_meta']


def _replace_config_texts(content: Content, source: str) -> None:
    """Replace the config texts that mmengine runs: in the inferencer, and ``meta.config`` on resume."""
    hub = content.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    seen: dict[str, str | None] = {}
    for holder, key in ((info, 'cfg'), (content.get('meta'), 'cfg'), (content.get('meta'), 'config')):
        if not isinstance(holder, dict) or key not in holder:
            continue
        given = holder.pop(key)
        text = seen[given] if isinstance(given, str) and given in seen else _gated(given, source, key == 'cfg')
        if isinstance(given, str):
            seen[given] = text
        if text is not None:
            holder[key] = text


def _gated(text: object, source: str, warns: bool) -> str | None:
    try:
        return config_text(checked_config(text))
    except ConfigError as error:
        if warns and text is not None:
            print_log(
                f'{source}: its config text is left out, because it holds code or could run some ({error}). If you '
                'trust it, give the config that the file was trained with by its path',
                'current',
                logging.WARNING,
            )
        return None


def as_checkpoint(content: object, source: str | None = None) -> dict:
    """Arrange content as a checkpoint: weights under ``state_dict``, wherever the file has them, and a dict ``meta``.

    Args:
        content: what :func:`as_read` returned.
        source: the file; by default the name that :func:`as_read` noted.

    Raises:
        CheckpointError: there are no weights.
    """
    if source is None:
        state = content.get('state_dict', content) if isinstance(content, dict) else None
        source = getattr(state, '_metadata', {}).get('', {}).get('source', 'the checkpoint')
    if not isinstance(content, dict):
        raise CheckpointError(f'{source}: expected a dict of weights, found {type(content).__name__}')
    key = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), None)
    if key is None:
        state = OrderedDict((name, value) for name, value in content.items() if isinstance(value, torch.Tensor))
        if not state:
            found = ', '.join(list(map(str, content))[:4]) or 'nothing'
            raise CheckpointError(
                f'{source}: no weights found; expected a dict of tensors, bare or under state_dict or model, found '
                f'{found}'
            )
        state._metadata = getattr(content, '_metadata', {})
        content = {}
    else:
        state = content[key]
    meta = content.get('meta')
    meta = _with_usable_classes(meta if isinstance(meta, dict) else {}, source)
    return {**content, 'state_dict': with_source(state, source), 'meta': meta}


def weights_in(state: Mapping, own: Mapping) -> dict:
    """The weights in the dict of a file, wherever it has them; ``own`` is the state dict of the model that takes them.

    mmengine takes the whole dict of a file without ``state_dict`` for the weights.
    """
    key = next((key for key in WEIGHT_KEYS if isinstance(state.get(key), dict)), None)
    if key is not None:
        return {str(name).removeprefix('module.'): value for name, value in state[key].items()}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor) or name in own}


def _with_usable_classes(meta: dict, source: str) -> dict:
    """Copy ``meta``, with class names as texts. Names and colours that are none are left out with a warning."""
    meta = dict(meta)
    if isinstance(meta.get('dataset_meta'), dict):
        meta['dataset_meta'] = dict(meta['dataset_meta'])
    for holder in (meta, meta.get('dataset_meta')):
        for key in ('classes', 'palette') if holder is not meta else ('CLASSES', 'PALETTE'):
            value = (holder or {}).get(key)
            if value is None:
                continue
            fits, what = (
                (_is_name, 'class names') if key.lower() == 'classes' else (_is_colour, 'colours (red, green, blue)')
            )
            if not isinstance(value, (list, tuple)) or not all(map(fits, value)):
                print_log(
                    f'{source}: {key}={value!r:.60} is left out: expected a list of {what}', 'current', logging.WARNING
                )
                del holder[key]
            elif fits is _is_name:
                holder[key] = (list if isinstance(value, list) else tuple)(map(str, value))
    return meta


def _is_name(value: object) -> bool:
    return isinstance(value, (str, int, float, np.generic))


def _is_colour(value: object) -> bool:
    try:
        numbers = value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value
    except RuntimeError:  # a tensor without values
        return False
    return (
        isinstance(numbers, (list, tuple))
        and len(numbers) == 3
        and all(isinstance(one, (int, float, np.number)) and 0 <= one <= 255 for one in numbers)
    )


def with_source(state: Mapping, source: str) -> Content:
    """Copy a state dict, and add the file's name to its metadata, which modules receive when they load it.

    Raises:
        CheckpointError: a name of the state dict is no text.
    """
    out = _named(Content(state), source)
    known = getattr(state, '_metadata', None)
    known = known if isinstance(known, dict) else {}
    root = known.get('')
    out._metadata = OrderedDict((name, value) for name, value in known.items() if isinstance(value, dict))
    out._metadata[''] = {**(root if isinstance(root, dict) else {}), 'source': source}
    return out


def _named(state: Content, source: str) -> Content:
    other = next((name for name in state if not isinstance(name, str)), None)
    if other is not None:
        raise CheckpointError(f'{source}: expected weights under names, found {type(other).__name__} {other!r:.60}')
    return state


def meta_of_texts(texts: Mapping[str, str]) -> dict:
    """Turn the texts that tools/publish.py stores in a .safetensors file into the ``meta`` of a .pth file."""
    info = {name: value for name in ('classes', 'palette') if isinstance(value := _list(texts.get(name)), list)}
    meta = dict(dataset_meta=info) if info.get('classes') else {}
    return dict(meta, cfg=texts['config']) if 'config' in texts else meta


def _list(text: str | None) -> Sequence | None:
    """The value of a JSON text; None for texts of other tools under the same name."""
    try:
        return json.loads(text) if text and len(text) <= _LONGEST_JSON else None
    except (ValueError, RecursionError):
        return None
