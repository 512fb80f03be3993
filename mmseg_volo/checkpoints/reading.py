"""Read checkpoints of every scheme without running code.

Importing this module registers the safe readers with mmengine's :class:`CheckpointLoader`, in place of all of its own
and for ``timm://`` names. Every entry point that uses it (``init_model``, ``MMSegInferencer``, ``load_from``,
``--resume``, ``init_cfg``) then refuses a file that holds anything but tensors and plain data. mmengine itself would
read such a file a second time and run its code.
"""

import difflib
import json
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from mmengine.runner.checkpoint import _get_mmengine_home

from ..errors import CheckpointError
from .config_text import literals, strings
from .writing import seal_holds

# What mmengine loads is what is under the first; other trainers' files have it elsewhere.
_WEIGHT_KEYS = ('state_dict', 'model', 'state_dict_ema')
TIMM_NAMES = (
    'volo_d1_224, volo_d1_384, volo_d2_224, volo_d2_384, volo_d3_224, volo_d3_448, volo_d4_224, volo_d4_448, '
    'volo_d5_224, volo_d5_448, volo_d5_512'
)
MapLocation = str | torch.device | Callable | None
_BROKEN = 'the file is cut off or is no checkpoint; copy or download it again'
# How torch words it when a file asks for something that is not data.
_UNSAFE = re.compile(r'GLOBAL|[Uu]nsupported class|unrecognized function|Can only (build|create)')


def _statistic_of_history(owner: type, name: str):
    """Stand-in for a file's getattr, by which mmengine's log histories name their own statistics, and only those."""
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'GLOBAL getattr was asked for {name} of {owner}')


def _safe_globals() -> list:
    """What mmengine's checkpoints hold besides tensors: log histories and NumPy numbers. Nothing that runs code."""
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    kinds = {type(np.dtype(kind)) for kind in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1')}
    functions = (multiarray.scalar, multiarray._reconstruct)
    # NumPy 1 and 2 know these two by different names; a file of either is read by both.
    old_names = [(function, f'numpy.core.multiarray.{function.__name__}') for function in functions]
    new_names = [(function, f'numpy._core.multiarray.{function.__name__}') for function in functions]
    history = [HistoryBuffer, (_statistic_of_history, 'builtins.getattr')]
    return [np.ndarray, np.dtype, slice, *kinds, *old_names, *new_names, *history]


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: MapLocation = None) -> dict:
    """Read a ``.pth``, ``.pth.tar`` or ``.safetensors`` file.

    Args:
        filename: path of the file.
        map_location: where tensors go, as in :func:`torch.load`.

    Returns:
        The file's dict with ``state_dict`` and ``meta``: bare weights, or those under ``model``, come back there too.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is cut off or broken, holds objects that would run code, or holds no weights.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        kind = 'is a folder' if path.is_dir() else 'does not exist'
        raise FileNotFoundError(f'checkpoint {filename} {kind}; expected a .pth, .pth.tar or .safetensors file')
    if path.suffix == '.safetensors':
        content = _read_safetensors(path, map_location)
    else:
        content = _read_torch(path, map_location)
    return _in_order(content, str(path))


def _in_order(content: object, source: str) -> dict:
    """What a file holds as mmengine's entries expect it: weights under ``state_dict``, and a dict under ``meta``."""
    if not isinstance(content, dict):
        raise CheckpointError(f'{source}: expected a dict of weights, found {type(content).__name__}')
    key = next((key for key in _WEIGHT_KEYS if isinstance(content.get(key), dict)), None)
    if key is None:
        weights = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if not weights:
            found = ', '.join(list(map(str, content))[:4]) or 'nothing'
            raise CheckpointError(
                f'{source}: no weights found; expected a dict of tensors, bare or under state_dict or model, found '
                f'{found}'
            )
        content, state = {}, OrderedDict(weights)
    else:
        state = content[key]
    meta = content.get('meta')
    content = {**content, 'state_dict': _with_source(state, source), 'meta': meta if isinstance(meta, dict) else {}}
    return _without_code(content, source)


def _with_source(state: dict, source: str) -> OrderedDict:
    """The weights, and the file's name where torch keeps notes on a state dict: modules see them on loading."""
    known = getattr(state, '_metadata', None)
    known = known if isinstance(known, dict) else {}
    out = OrderedDict((str(name), value) for name, value in state.items())
    out._metadata = OrderedDict(known)
    out._metadata[''] = {**(known.get('') or {}), 'source': source}
    return out


def _without_code(content: dict, source: str) -> dict:
    """Without a config that is more than data: mmengine runs a checkpoint's config text, to resume or to build from."""
    # No version of mmengine writes this one, but all of them run it when resuming.
    content['meta'] = {name: value for name, value in content['meta'].items() if name != 'config'}
    hub = content.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    for holder in (content['meta'], info):
        if isinstance(holder, dict) and 'cfg' in holder and not _is_plain(holder['cfg']):
            del holder['cfg']
            print_log(f'{source}: its config text is left out, because it holds code', 'current', logging.WARNING)
    return content


def _is_plain(text: object) -> bool:
    """Whether a config's text is assignments of data, as mmengine writes it, which name nothing by its Python path."""
    try:
        config = literals(text)
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return False
    # A base is another file, which would be run; a dotted type is what mmengine's registries import and call.
    return '_base_' not in config and not any(key == 'type' and '.' in value for key, value in strings(config))


def _read_safetensors(path: Path, map_location: MapLocation) -> dict:
    from safetensors import SafetensorError, safe_open

    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    try:
        with safe_open(path, 'pt', device=str(device)) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return dict(state_dict=weights, meta=_meta_of_texts(file.metadata() or {})) if weights else {}
    except SafetensorError as error:
        raise CheckpointError(f'{path}: {_BROKEN} ({error})') from error


def _meta_of_texts(texts: Mapping[str, str]) -> dict:
    """What tools/publish.py writes beside the weights, as a .pth file has it; other files have none of it."""
    meta, info = {}, {}
    for name in ('classes', 'palette'):
        try:
            value = json.loads(texts.get(name) or 'null')
        except ValueError:  # another's text by that name
            continue
        if isinstance(value, list):
            info[name] = value
    if info.get('classes'):
        meta['dataset_meta'] = info
    if 'config' in texts:
        meta['cfg'] = texts['config']
    return meta


def read_meta(path: Path) -> dict:
    """The ``meta`` of a checkpoint, without reading its tensors and without checking that they are whole.

    Raises:
        CheckpointError: the file is broken or holds no dict.
    """
    content = _parse(path, 'cpu', mmap=zipfile.is_zipfile(path))
    meta = content.get('meta') if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def _read_torch(path: Path, map_location: MapLocation):
    sealed = _check_bytes(path)
    content = _parse(path, map_location)
    meta = content.get('meta') if isinstance(content, dict) else None
    if not sealed and isinstance(meta, dict) and 'sealed_by' in meta:
        raise CheckpointError(f'{path}: {_BROKEN} (its seal is missing)')
    return content


def _check_bytes(path: Path) -> bool:
    """Raises CheckpointError where the file's checksums do not hold; returns whether it has a seal of ours."""
    holds = seal_holds(path)
    if holds is False:
        raise CheckpointError(f'{path}: {_BROKEN} (its bytes are not those that were saved, by their SHA-256)')
    if holds is None and zipfile.is_zipfile(path):
        try:
            # torch.load itself does not look at the checksums that torch.save wrote.
            with zipfile.ZipFile(path) as records:
                broken = records.testzip()
        except Exception as error:  # a parser of foreign bytes fails in any way
            raise CheckpointError(f'{path}: {_BROKEN} ({error})') from error
        if broken:
            raise CheckpointError(f'{path}: {_BROKEN} (wrong checksum of {broken})')
    return bool(holds)


def _parse(path: Path, map_location: MapLocation, mmap: bool = False):
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path}: the file is empty; copy or download it again')
    if map_location is None and not torch.cuda.is_available():
        map_location = 'cpu'  # a file saved on a GPU otherwise asks for one
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a parser of foreign bytes fails in any way
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        unsafe = next((line for line in lines if _UNSAFE.search(line)), None)
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise CheckpointError(
                f'{path}: refused, because it holds more than tensors and plain data and could run code when read '
                f'({unsafe}). Ask for the weights alone, as torch.save(model.state_dict(), ...) or .safetensors.'
            ) from error
        raise CheckpointError(f'{path}: {_BROKEN} ({lines[0]})') from error


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_http(url: str, map_location: MapLocation = None) -> dict:
    """Download a checkpoint once into torch's hub cache, then read it like a local file.

    Raises:
        CheckpointError: the download failed, or as :func:`load_from_local`.
    """
    path = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name
    # The main process downloads for everybody; a node with a disk of its own does it itself after that.
    try:
        if is_main_process():
            _download(url, path)
    finally:
        barrier()
    _download(url, path)
    return load_from_local(str(path), map_location)


def _download(url: str, path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    hash_in_name = torch.hub.HASH_REGEX.search(path.name)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_in_name[1] if hash_in_name else None, progress=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f'{url}: the download failed ({error}). Fetch the file by hand and give its path instead.'
        ) from error


@CheckpointLoader.register_scheme(prefixes=('modelzoo://', 'torchvision://'), force=True)
def load_from_torchvision(name: str, map_location: MapLocation = None) -> dict:
    """Download the weights of a torchvision model by mmengine's name for it, as ``torchvision://resnet50``.

    Raises:
        CheckpointError: no such name, or as :func:`load_from_http`.
    """
    return load_from_http(_looked_up(name, get_torchvision_models()), map_location)


@CheckpointLoader.register_scheme(prefixes=('open-mmlab://', 'openmmlab://'), force=True)
def load_from_openmmlab(name: str, map_location: MapLocation = None) -> dict:
    """Read weights by OpenMMLab's name for them: a URL, or a file in ``MMENGINE_HOME`` that its list names.

    Raises:
        CheckpointError, FileNotFoundError: no such name, or as :func:`load_from_http` and :func:`load_from_local`.
    """
    scheme, _, short = name.partition('://')
    place = _looked_up(f'{scheme}://{get_deprecated_model_names().get(short, short)}', get_external_models())
    if place.startswith(('http://', 'https://')):
        return load_from_http(place, map_location)
    return load_from_local(str(Path(_get_mmengine_home()) / place), map_location)


@CheckpointLoader.register_scheme(prefixes='mmcls://', force=True)
def load_from_mmcls(name: str, map_location: MapLocation = None) -> dict:
    """Download a classifier of MMClassification's, as ``mmcls://convnext-tiny``, and keep its backbone.

    Raises:
        CheckpointError: no such name, or as :func:`load_from_http`.
    """
    url = _looked_up(name, get_mmcls_models())
    state = load_from_http(url, map_location)['state_dict']
    backbone = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    return dict(state_dict=_with_source(backbone, url), meta={})


def _looked_up(name: str, known: Mapping[str, str]) -> str:
    short = name.partition('://')[2]
    if short not in known:
        near = difflib.get_close_matches(short, known, 3, 0.4) or list(known)[:3]
        raise CheckpointError(f'{name}: mmengine knows no weights by that name; names near it: {", ".join(near)}')
    return known[short]


@CheckpointLoader.register_scheme(prefixes=(r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), force=True)
def load_from_ceph(url: str, map_location: MapLocation = None) -> dict:
    """Fetch a checkpoint through mmengine's Petrel backend, then read it like a local file.

    Raises:
        CheckpointError: the backend cannot be used or has no such file, or as :func:`load_from_local`.
    """

    def fetch(target: Path) -> None:
        target.write_bytes(get_file_backend(url, backend_args=dict(backend='petrel')).get(url))

    return _fetched(url, fetch, map_location)


@CheckpointLoader.register_scheme(prefixes='pavi://', force=True)
def load_from_pavi(url: str, map_location: MapLocation = None) -> dict:
    """Fetch a checkpoint from Pavi, then read it like a local file.

    Raises:
        CheckpointError: Pavi cannot be used or has no such file, or as :func:`load_from_local`.
    """

    def fetch(target: Path) -> None:
        from pavi import modelcloud

        modelcloud.get(url.removeprefix('pavi://')).download(str(target))

    return _fetched(url, fetch, map_location)


def _fetched(url: str, fetch: Callable[[Path], None], map_location: MapLocation) -> dict:
    with TemporaryDirectory() as folder:
        path = Path(folder) / (Path(url).name or 'checkpoint')
        try:
            fetch(path)
        except Exception as error:  # the clients' errors are their own, or that they are not installed
            raise CheckpointError(
                f'{url}: could not be fetched ({error}). Fetch the file by hand and give its path instead.'
            ) from error
        try:
            return load_from_local(str(path), map_location)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(path), url)) from error


@CheckpointLoader.register_scheme(prefixes='timm://', force=True)
def load_from_timm(name: str, map_location: MapLocation = None) -> dict:
    """Read the weights of a timm model, as ``timm://volo_d4_448.sail_in1k``, from the Hugging Face hub or its cache.

    Raises:
        CheckpointError: timm knows no such weights, or they can be had neither from the hub nor from the cache.
    """
    from huggingface_hub import hf_hub_download
    from timm.models import get_pretrained_cfg

    name = name.removeprefix('timm://')
    try:
        config = get_pretrained_cfg(name) if '.' in name else None
    except RuntimeError:  # a model of timm's, without weights by that tag
        config = None
    if config is None or not config.hf_hub_id:
        raise CheckpointError(
            f'timm://{name}: timm has no such weights; expected timm://MODEL.sail_in1k with MODEL one of {TIMM_NAMES}'
        )
    try:
        path = hf_hub_download(config.hf_hub_id, 'model.safetensors')
    except Exception as error:  # the hub client raises errors of several libraries, none shared
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f'timm://{name}: could not fetch {config.hf_hub_id}/model.safetensors ({first}). Fetch it by hand, or an '
            f'official .pth.tar, and give its path instead.'
        ) from error
    return load_from_local(path, map_location)
