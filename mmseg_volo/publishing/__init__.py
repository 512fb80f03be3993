"""A trained checkpoint as files to share: weights alone, one config, a model card, a metafile."""

import filecmp
import hashlib
import io
import json
import os
import re
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from safetensors.torch import save as to_safetensors
from torch import nn

from ..checkpoints.compatibility import compare, dataset_meta_of
from ..checkpoints.reading import load_from_local
from ..checkpoints.writing import save
from ..errors import CheckpointError, ConfigError, SaveError
from ..inference.model import dataset_meta, init_model
from ..version import __version__
from . import card, records, settings

__all__ = ['Published', 'publish']

TASK = 'semantic segmentation'
# torch.hub takes what stands between the first hyphen and a dot for the hash: a name may have no dots.
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]*')
_OURS = ('config.py', 'metafile.yml', 'README.md')


class Published(NamedTuple):
    """What :func:`publish` made.

    Attributes:
        weights, safetensors: the two files of weights.
        unchanged: whether the folder held the very same before.
        measured: how many evaluations the card is made of.
        notes: of each record that was passed over, which and why.
    """

    weights: Path
    safetensors: Path
    unchanged: bool
    measured: int
    notes: list[str]


def publish(
    checkpoint: str | Path,
    out: str | Path,
    config: str | None = None,
    name: str | None = None,
    work_dir: str | Path | None = None,
    license: str | None = None,
) -> Published:
    """Make a folder of a checkpoint that can be given away.

    It holds ``NAME-HASH.pth`` and ``NAME-HASH.safetensors``, the same weights as the checkpoint tests with and no more,
    where HASH is the beginning of each file's own SHA-256; ``config.py``, ``README.md`` and ``metafile.yml``. The same
    checkpoint gives the same bytes. All of it is loaded and compared with the checkpoint before it gets its place.

    Args:
        checkpoint: of a training run, of this package or of plain mmengine.
        out: the folder. One that holds the same model is brought up to date; anything else there is an error.
        config: the config that it was trained with, where the checkpoint does not hold its text or another is meant.
        name: letters, digits, - and _; by default that of the config.
        work_dir: where its evaluations and logs are; by default the checkpoint's own folder.
        license: identifier as the hub has it: 'apache-2.0', 'cc-by-nc-4.0', 'other'. None: the card says that one is to
            be chosen.

    Raises:
        CheckpointError, FileNotFoundError: no checkpoint of a segmentor that can be read safely, or not of this config.
        ConfigError: no config, one that cannot be shared, a bad name or licence, or ``out`` holds something else or
            cannot be written; no part of it stays.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    license = _checked_license(license)
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(
            f'--name {name!r}: expected letters, digits, - and _, without dots, which the hash must end at'
        )
    work_dir = Path(work_dir) if work_dir is not None else checkpoint.parent
    if not work_dir.is_dir():
        raise FileNotFoundError(f'work dir {work_dir} does not exist')
    if out.exists() and not out.is_dir():
        raise ConfigError(f'{out} is a file; give a folder')

    content = load_from_local(str(checkpoint), 'cpu')
    state, meta = content['state_dict'], content['meta']
    if not any(str(key).removeprefix('module.').startswith('decode_head.') for key in state):
        raise CheckpointError(
            f'{checkpoint}: has no decode_head, so it is a classifier or a backbone alone; give a checkpoint of a '
            'trained segmentor'
        )
    trained = settings.read_config(config, _embedded(content), checkpoint)
    given, averaged = dataset_meta_of(content), 'ema_state_dict' in content
    del content  # the optimizer may be large
    shared = settings.shareable(trained)
    model = _built(shared, config or f'the config in {checkpoint}')
    weights = _weights(state, model, checkpoint, config)
    classes, palette = _classes(given, shared, model, checkpoint)
    _name_classes(shared, classes, palette)
    text = settings.as_text(shared)
    places = {str(Path.home()), os.getcwd(), str(checkpoint.resolve().parent), str(work_dir.resolve())}
    settings.check_nothing_private(shared, [place for place in places if len(place) > 1])

    name = name or _default_name(config, meta, checkpoint)
    measured, notes = records.measurements(checkpoint, work_dir, meta, shared, classes)
    facts = card.Facts(
        name=name,
        weights='',
        safetensors='',
        config=shared,
        trained=trained,
        meta={key: meta.get(key) for key in ('iter', 'seed', 'world_size', 'mmengine_version', 'sealed_by')},
        checkpoint=checkpoint.name,
        classes=classes,
        parameters=sum(p.numel() for p in model.parameters()),
        precision=_precision(weights),
        averaged=averaged,
        license=license,
        measured=measured,
        hardware=records.hardware_of(work_dir, meta),
    )
    about = dict(task=TASK, mmseg_volo_version=__version__)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as beside:
            folder = Path(beside, 'model')
            folder.mkdir()  # with the permissions that a new folder has
            facts.weights = _write_pth(folder, name, weights, meta, classes, palette, text, about)
            facts.safetensors = _write_safetensors(folder, name, weights, classes, palette, text, about)
            (folder / 'config.py').write_text(text, encoding='utf-8')
            _check(folder, facts, weights)
            (folder / 'metafile.yml').write_text(card.metafile(facts), encoding='utf-8')
            (folder / 'README.md').write_text(card.card(facts), encoding='utf-8')
            unchanged = _put(folder, out, weights)
    except SaveError as error:
        cause = error.__cause__ or error
        raise ConfigError(f'{out}: could not be written ({getattr(cause, "strerror", None) or cause})') from error
    except OSError as error:
        raise ConfigError(f'{out}: could not be written ({error.strerror or error})') from error
    return Published(out / facts.weights, out / facts.safetensors, unchanged, len(measured), notes)


def _checked_license(license: str | None) -> str | None:
    if license is None:
        return None
    if not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', license.strip().lower()):
        raise ConfigError(
            f"--license {license!r}: expected an identifier as the hub's: apache-2.0, cc-by-nc-4.0, other"
        )
    return license.strip().lower()


def _embedded(content: Mapping) -> object:
    info = (content.get('message_hub') or {}).get('runtime_info') or {}
    return content['meta'].get('cfg') or info.get('cfg')


def _built(config: dict, source: str) -> nn.Module:
    if not isinstance(config.get('model'), dict):
        raise ConfigError(f'{source}: has no model')
    try:
        return init_model(Config(config), None, 'cpu')
    except Exception as error:  # whatever the constructors of its parts raise
        raise ConfigError(f'{source}: its model cannot be built ({type(error).__name__}: {error})') from error


def _weights(state: Mapping, model: nn.Module, checkpoint: Path, config: str | None) -> OrderedDict:
    """The tensors as they are in the file, each in memory of its own, without what loading would leave out."""
    own = model.state_dict()
    found = compare(own, state, ignore='auxiliary_head.')
    if found:
        way_on = '' if config else '; give the one that it was trained with as --config FILE'
        raise CheckpointError(
            f'{checkpoint}: not the weights of the model of {config or "its config"} ({found}){way_on}'
        )
    out = OrderedDict()
    for key, value in state.items():
        key = str(key).removeprefix('module.')
        if key not in own:
            continue
        value = value.detach().cpu()
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            value = value.contiguous().clone()
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f'{checkpoint}: {key} is not finite; the training diverged, take an earlier checkpoint'
            )
        out[key] = value
    # Versions of modules, by which some of them load older weights.
    versions = getattr(state, '_metadata', {})
    out._metadata = OrderedDict(
        (str(key), dict(version=value['version']))
        for key, value in versions.items()
        if isinstance(value, dict) and isinstance(value.get('version'), int)
    )
    return out


def _classes(
    given: Mapping, config: dict, model: nn.Module, checkpoint: Path
) -> tuple[list[str] | None, list[list[int]] | None]:
    """Names and colours of the classes, None where no file says them."""
    known = dataset_meta(Config(config))
    names = [str(name) for name in given.get('classes') or ()]
    expected = [str(name) for name in known.get('classes') or ()]
    count = (
        model.decode_head[-1].num_classes
        if isinstance(model.decode_head, nn.ModuleList)
        else (model.decode_head.num_classes)
    )
    if names and expected and [n.casefold() for n in names] != [n.casefold() for n in expected]:
        raise CheckpointError(
            f'{checkpoint}: its classes ({", ".join(names[:4])}, ...) are not those of the data set in the config '
            f'({", ".join(expected[:4])}, ...); give the config that it was trained with as --config FILE'
        )
    if not names and len(expected) == count:
        names = expected
    if not names:
        return None, None
    palettes = [given.get('palette'), known.get('palette')]
    palette = next((p for p in palettes if p is not None and len(p) == len(names)), None)
    return names, palette and [[int(value) for value in colour] for colour in palette]


def _name_classes(config: dict, classes: list[str] | None, palette: list[list[int]] | None) -> None:
    """Put the names into data sets that read them from a file, which does not go with the model."""
    for which in ('train', 'val', 'test'):
        dataset = (config.get(f'{which}_dataloader') or {}).get('dataset') or {}
        info = dataset.get('metainfo')
        if isinstance(info, dict) and any(isinstance(value, str) for value in info.values()):
            dataset['metainfo'] = {k: v for k, v in (('classes', classes), ('palette', palette)) if v}


def _precision(weights: Mapping[str, torch.Tensor]) -> str:
    kinds = {str(value.dtype).removeprefix('torch.') for value in weights.values() if value.is_floating_point()}
    return ', '.join(sorted(kinds))


def _default_name(config: str | None, meta: Mapping, checkpoint: Path) -> str:
    run = records.run_of(meta)
    name = Path(config).stem if config else str(meta['experiment_name']).removesuffix(f'_{run}') if run else ''
    name = name or re.sub(r'-[0-9a-f]{8}$', '', checkpoint.stem)  # one that was published
    return re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_-') or 'model'


def _write_pth(folder: Path, name: str, weights, meta: Mapping, classes, palette, text: str, about: dict) -> str:
    new = dict(cfg=text, **about, sealed_by=f'mmseg_volo {__version__}')
    if classes:
        new['dataset_meta'] = dict(classes=classes, **(dict(palette=palette) if palette else {}))
    numbers = ('iter', 'epoch', 'seed', 'world_size')
    new.update({key: meta[key] for key in numbers if isinstance(meta.get(key), int)})
    path = folder / 'weights.pth'
    save(dict(meta=new, state_dict=weights), path)
    return _named(path, name)


def _write_safetensors(folder: Path, name: str, weights, classes, palette, text: str, about: dict) -> str:
    info = dict(format='pt', config=text, **about)
    if classes:
        info['classes'] = json.dumps(classes)
        info['palette'] = json.dumps(palette)
    data = to_safetensors(dict(weights), info)
    # The library writes the information in another order each time.
    size = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    ordered = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    ordered += b' ' * (-len(ordered) % 8)
    path = folder / 'weights.safetensors'
    with path.open('wb') as file:
        file.write(struct.pack('<Q', len(ordered)) + ordered)
        file.write(memoryview(data)[8 + size :])
    return _named(path, name)


def _named(path: Path, name: str) -> str:
    """Give a file its name with the beginning of its SHA-256 in it."""
    final = f'{name}-{_digest(path)[:8]}{path.suffix}'
    path.rename(path.with_name(final))
    return final


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _check(folder: Path, facts: card.Facts, weights: Mapping[str, torch.Tensor]) -> None:
    """Load what was written as its user will, and compare it with what was meant."""
    for file in (facts.weights, facts.safetensors):
        with redirect_stdout(io.StringIO()):  # mmengine prints the name of the folder, which nobody will see
            state = init_model(str(folder / 'config.py'), folder / file, 'cpu').state_dict()
        other = [key for key, value in weights.items() if not torch.equal(state[key], value)]
        if other:
            raise CheckpointError(f'{file}: reads back with other weights ({other[0]}, ...); nothing was published')


def _put(folder: Path, out: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Bring the new files to their place; returns whether the same were there."""
    new = {file.name: file for file in folder.iterdir()}
    if not out.exists() or not any(out.iterdir()):
        os.replace(folder, out)
        return False
    there = [file for file in out.iterdir() if not file.name.startswith(('.', 'LICENSE'))]
    models = [file for file in there if file.name in new.keys() - {*_OURS} or _holds(file, weights)]
    foreign = sorted(file.name for file in there if file not in models and file.name not in _OURS)
    if foreign or (there and not models):
        raise ConfigError(
            f'{out} holds something else ({(foreign or [file.name for file in there])[0]}); give another folder, or '
            'empty it'
        )
    same = all((out / name).is_file() and filecmp.cmp(out / name, file, shallow=False) for name, file in new.items())
    # The card comes last: it names the others.
    for name in sorted(new, key=lambda name: (name in _OURS, name == 'README.md')):
        os.replace(new[name], out / name)
    for file in models:
        if file.name not in new:  # of another version of this package, under another hash
            file.unlink()
    return same


def _holds(file: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file was published with just these weights; a run's checkpoint, which holds more, never is."""
    if not re.search(r'-[0-9a-f]{8}\.(pth|safetensors)$', file.name) or _digest(file)[:8] not in file.name:
        return False
    try:
        state = load_from_local(str(file), 'cpu')['state_dict']
    except (CheckpointError, OSError):
        return False
    return state.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in state.items())
