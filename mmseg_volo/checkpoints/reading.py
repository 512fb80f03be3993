"""Read checkpoints of every scheme without running code.

Importing this module registers safe readers with mmengine's :class:`CheckpointLoader`: they replace all of its own, and
add ``timm://``. So every entry point (``init_model``, ``MMSegInferencer``, ``load_from``, ``--resume``, ``init_cfg``)
rejects a file that holds anything but tensors and plain data. mmengine itself would run the code in such a file.
"""

import difflib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import get_file_backend
from mmengine.runner import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from mmengine.runner.checkpoint import _get_mmengine_home

from ..errors import CheckpointError
from .allowed import allowed_globals
from .content import as_checkpoint, as_read, meta_of_texts, with_source
from .structure import check_structure
from .writing import dump, is_sealed, seal_holds

TIMM_NAMES = (
    'volo_d1_224, volo_d1_384, volo_d2_224, volo_d2_384, volo_d3_224, volo_d3_448, volo_d4_224, volo_d4_448, '
    'volo_d5_224, volo_d5_448, volo_d5_512'
)
MapLocation = str | torch.device | Callable | None
_BROKEN = 'the file is cut off or is no checkpoint; copy or download it again'
_LARGEST_HEADER = 2**24  # bytes, of a .safetensors file
_UNPACKED = 4  # times the size of a compressed file
# Parts of torch's error messages for a file that holds something other than data.
_UNSAFE = re.compile(r'GLOBAL|[Uu]nsupported class|unrecognized function|Can only (build|create)')


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: MapLocation = None) -> object:
    """Read a ``.pth``, ``.pth.tar`` or ``.safetensors`` file.

    Args:
        filename: path of the file.
        map_location: device of the tensors, as in :func:`torch.load`.

    Returns:
        What the file holds, made safe by :func:`~mmseg_volo.checkpoints.content.as_read`. The bare weights of a
        ``.safetensors`` file are a dict, those of ``tools/publish.py`` a checkpoint with ``meta``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is broken or holds objects that would run code.
    """
    path = Path(filename).expanduser()
    _check_is_file(path)
    if path.suffix == '.safetensors':
        content = _read_safetensors(path, map_location)
    else:
        content = _read_torch(path, map_location)
    return as_read(content, str(path))


def load(source: str | Path, map_location: MapLocation = 'cpu') -> object:
    """Read a file or URL of any scheme, as mmengine does."""
    return CheckpointLoader.load_checkpoint(str(source), map_location, 'current')


def load_checkpoint(source: str | Path, map_location: MapLocation = 'cpu') -> dict:
    """Read a file or URL of any scheme as a checkpoint of OpenMMLab, with ``state_dict`` and ``meta``.

    Raises:
        CheckpointError, FileNotFoundError: as :func:`load_from_local` and
            :func:`~mmseg_volo.checkpoints.content.as_checkpoint`.
    """
    return as_checkpoint(load(source, map_location), str(source))


def _read_safetensors(path: Path, map_location: MapLocation) -> dict:
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    with _open_safetensors(path, device) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = meta_of_texts(file.metadata() or {})
    check_structure(meta, str(path), path.stat().st_size)
    return dict(state_dict=weights, meta=meta) if meta else weights


@contextmanager
def _open_safetensors(path: Path, device: str | torch.device = 'cpu') -> Iterator:
    from safetensors import SafetensorError, safe_open

    with path.open('rb') as file:
        header = int.from_bytes(file.read(8), 'little')
    if _LARGEST_HEADER < header < path.stat().st_size:  # safetensors would read it for a minute
        raise CheckpointError(f'{path}: refused, because its header has {header / 2**20:.0f} MiB')
    try:
        with safe_open(path, 'pt', device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f'{path}: {_BROKEN} ({error})') from error


def _check_is_file(path: Path) -> None:
    if not path.is_file():  # opening a pipe would wait for ever
        kind = 'is a folder' if path.is_dir() else 'is no ordinary file' if path.exists() else 'does not exist'
        raise FileNotFoundError(f'checkpoint {path} {kind}; expected a .pth, .pth.tar or .safetensors file')


def read_meta(path: Path) -> dict:
    """Read the ``meta`` of a checkpoint without reading or verifying its tensors.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is broken or unsafe.
    """
    _check_is_file(path)
    content = _parse(path, 'cpu', mmap=zipfile.is_zipfile(path))
    meta = content.get('meta') if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def read_config_text(path: Path) -> object:
    """Read the config text in a checkpoint or a ``.safetensors`` file as it is; None if there is none.

    It may hold code: read it with :func:`~mmseg_volo.checkpoints.config_gate.checked_config`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is broken or unsafe.
    """
    if path.suffix != '.safetensors':
        return read_meta(path).get('cfg')
    _check_is_file(path)
    with _open_safetensors(path) as file:
        return (file.metadata() or {}).get('config')


def is_readable(value: object) -> bool:
    """Whether a value can be saved in a checkpoint and read again: it holds tensors and plain data alone."""
    file = BytesIO()
    try:
        dump(value, file)
        file.seek(0)
        with torch.serialization.safe_globals(allowed_globals()):
            torch.load(file, weights_only=True)
    except Exception:  # the pickler and the parser may raise anything
        return False
    return True


def _read_torch(path: Path, map_location: MapLocation) -> object:
    size = _check_bytes(path)
    content = _parse(path, map_location)
    check_structure(content, str(path), size)
    meta = content.get('meta') if isinstance(content, dict) else None
    if isinstance(meta, dict) and 'sealed_by' in meta and is_sealed(path) is None:
        raise CheckpointError(f'{path}: {_BROKEN} (its seal is missing or broken)')
    return content


def _check_bytes(path: Path) -> int:
    """Return the file's size after decompression; raise CheckpointError if its seal or checksums do not match."""
    size = path.stat().st_size
    holds = seal_holds(path)
    if holds is False:
        raise CheckpointError(f'{path}: {_BROKEN} (its SHA-256 is not that of the saved file)')
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as records:
                unpacked = sum(record.file_size for record in records.infolist())
                if unpacked > _UNPACKED * size + 2**26:  # torch.save does not compress
                    raise CheckpointError(f'{path}: refused, because it unpacks to {unpacked / 2**30:.1f} GiB')
                # torch.load does not check the checksums that torch.save wrote.
                broken = None if holds else records.testzip()
        except CheckpointError:
            raise
        except Exception as error:  # the ZIP parser may raise anything on broken bytes
            raise CheckpointError(f'{path}: {_BROKEN} ({error})') from error
        if broken:
            raise CheckpointError(f'{path}: {_BROKEN} (wrong checksum of {broken})')
        size = max(size, unpacked)
    return size


def _parse(path: Path, map_location: MapLocation, mmap: bool = False) -> object:
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path}: the file is empty; copy or download it again')
    if map_location is None and not torch.cuda.is_available():
        map_location = 'cpu'  # otherwise a file saved on a GPU needs a GPU
    try:
        with torch.serialization.safe_globals(allowed_globals()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except torch.cuda.OutOfMemoryError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f'{path}: refused, because it holds {error}') from error
    except Exception as error:  # the parser may raise anything on broken bytes
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        unsafe = next((line for line in lines if _UNSAFE.search(line)), None)
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise CheckpointError(
                f'{path}: refused, because it holds more than tensors and plain data and could run code when read '
                f'({unsafe}). Ask its author for the weights alone, as torch.save(model.state_dict(), ...) or '
                '.safetensors.'
            ) from error
        raise CheckpointError(f'{path}: {_BROKEN} ({lines[0]})') from error


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_http(url: str, map_location: MapLocation = None) -> object:
    """Download a checkpoint once into torch's hub cache, then read it like a local file.

    Raises:
        CheckpointError: the download failed, or as :func:`load_from_local`.
    """
    path = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name
    # The main process downloads first; a node that does not share its disk downloads after that.
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
            f'{url}: the download failed ({error}). Download the file by hand and give its path instead.'
        ) from error


@CheckpointLoader.register_scheme(prefixes=('modelzoo://', 'torchvision://'), force=True)
def load_from_torchvision(name: str, map_location: MapLocation = None) -> object:
    """Download the weights of a torchvision model by mmengine's name for it, as ``torchvision://resnet50``.

    Raises:
        CheckpointError: no such name, or as :func:`load_from_http`.
    """
    return load_from_http(_look_up(name, get_torchvision_models()), map_location)


@CheckpointLoader.register_scheme(prefixes=('open-mmlab://', 'openmmlab://'), force=True)
def load_from_openmmlab(name: str, map_location: MapLocation = None) -> object:
    """Read weights by OpenMMLab's name for them; its list gives a URL or a file in ``MMENGINE_HOME``.

    Raises:
        CheckpointError, FileNotFoundError: no such name, or as :func:`load_from_http` and :func:`load_from_local`.
    """
    scheme, _, short = name.partition('://')
    source = _look_up(f'{scheme}://{get_deprecated_model_names().get(short, short)}', get_external_models())
    if source.startswith(('http://', 'https://')):
        return load_from_http(source, map_location)
    return load_from_local(str(Path(_get_mmengine_home()) / source), map_location)


@CheckpointLoader.register_scheme(prefixes='mmcls://', force=True)
def load_from_mmcls(name: str, map_location: MapLocation = None) -> object:
    """Download a classifier of MMClassification, as ``mmcls://convnext-tiny``, and keep its backbone.

    Raises:
        CheckpointError: no such name, or as :func:`load_from_http`.
    """
    url = _look_up(name, get_mmcls_models())
    state = as_checkpoint(load_from_http(url, map_location), url)['state_dict']
    backbone = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    return dict(state_dict=with_source(backbone, url))


def _look_up(name: str, known: Mapping[str, str]) -> str:
    short = name.partition('://')[2]
    if short not in known:
        near = difflib.get_close_matches(short, known, 3, 0.4) or list(known)[:3]
        raise CheckpointError(f'{name}: mmengine knows no weights of that name; similar names: {", ".join(near)}')
    return known[short]


@CheckpointLoader.register_scheme(prefixes=(r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), force=True)
def load_from_ceph(url: str, map_location: MapLocation = None) -> object:
    """Fetch a checkpoint through mmengine's Petrel backend, then read it like a local file.

    Raises:
        CheckpointError: the backend is not available or has no such file, or as :func:`load_from_local`.
    """
    backend = dict(backend='petrel')
    return _fetch_to_temporary(
        url, lambda path: path.write_bytes(get_file_backend(url, backend_args=backend).get(url)), map_location
    )


@CheckpointLoader.register_scheme(prefixes='pavi://', force=True)
def load_from_pavi(url: str, map_location: MapLocation = None) -> object:
    """Fetch a checkpoint from Pavi, then read it like a local file.

    Raises:
        CheckpointError: Pavi is not available or has no such file, or as :func:`load_from_local`.
    """

    def fetch(target: Path) -> None:
        from pavi import modelcloud

        modelcloud.get(url.removeprefix('pavi://')).download(str(target))

    return _fetch_to_temporary(url, fetch, map_location)


def _fetch_to_temporary(url: str, fetch: Callable[[Path], None], map_location: MapLocation) -> object:
    with TemporaryDirectory() as folder:
        path = Path(folder) / (Path(url).name or 'checkpoint')
        try:
            fetch(path)
        except Exception as error:  # each client has its own errors, and may not be installed
            raise CheckpointError(
                f'{url}: could not be fetched ({error}). Download the file by hand and give its path instead.'
            ) from error
        try:
            return load_from_local(str(path), map_location)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(path), url)) from error


@CheckpointLoader.register_scheme(prefixes='timm://', force=True)
def load_from_timm(name: str, map_location: MapLocation = None) -> object:
    """Read the weights of a timm model, as ``timm://volo_d4_448.sail_in1k``, from the Hugging Face hub or its cache.

    Raises:
        CheckpointError: timm has no such weights, or neither the hub nor the cache provides them.
    """
    from huggingface_hub import hf_hub_download
    from timm.models import get_pretrained_cfg

    name = name.removeprefix('timm://')
    try:
        config = get_pretrained_cfg(name) if '.' in name else None
    except RuntimeError:  # timm has this model, but no weights with that tag
        config = None
    if config is None or not config.hf_hub_id:
        raise CheckpointError(
            f'timm://{name}: timm has no such weights; expected timm://MODEL.sail_in1k with MODEL one of {TIMM_NAMES}'
        )
    try:
        path = hf_hub_download(config.hf_hub_id, 'model.safetensors')
    except Exception as error:  # the hub client raises errors of several libraries, without a common base
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f'timm://{name}: could not fetch {config.hf_hub_id}/model.safetensors ({first}). Download it or an '
            'official .pth.tar by hand, and give its path instead.'
        ) from error
    return load_from_local(path, map_location)
