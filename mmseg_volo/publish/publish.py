"""Write the folder of a published model: weights alone, one config, a model card and a metafile."""

import filecmp
import io
import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from safetensors.torch import save as to_safetensors
from torch import nn

from ..checkpoints.compatibility import compare, dataset_meta_of
from ..checkpoints.content import as_checkpoint
from ..checkpoints.reading import load_from_local
from ..checkpoints.writing import save
from ..errors import CheckpointError, ConfigError, SaveError
from ..inference.model import dataset_meta, init_model
from ..utils.files import sha256
from ..version import __version__
from .card import facts_of, metafile, model_card
from .results import find_results, hardware_of, run_of
from .shareable_config import as_text, check_nothing_private, read_config, shareable

# torch.hub reads the hash between the first hyphen and a dot, so a name has no dots.
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]*')
_HASHED = re.compile(r'-[0-9a-f]{8}\.(pth|safetensors)$')
_TEXT_FILES = ('config.py', 'metafile.yml', 'README.md')


class Published(NamedTuple):
    """What :func:`publish` wrote.

    Attributes:
        weights, safetensors: paths of the two weight files.
        unchanged: whether the folder already held exactly these files.
        measured: number of evaluations on the card.
        notes: for each evaluation record that was skipped, its path and the reason.
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
    repo: str | None = None,
) -> Published:
    """Write a folder that shares the model of a checkpoint.

    The folder holds ``NAME-HASH.pth`` and ``NAME-HASH.safetensors`` (the model's weights and nothing else of the
    checkpoint; HASH is the start of the file's own SHA-256), ``config.py``, ``README.md`` (the model card) and
    ``metafile.yml``. The same checkpoint gives the same bytes. Both weight files are loaded and compared with the
    checkpoint before the folder appears under its name.

    Args:
        checkpoint: checkpoint of a training run with this package or plain mmengine.
        out: folder to write. A folder that holds the same model is updated; any other content is an error.
        config: config file that the checkpoint was trained with. Default: the config text in the checkpoint.
        name: name of the model: letters, digits, - and _. Default: the name of the config.
        work_dir: folder with the run's evaluations and logs. Default: the folder of the checkpoint.
        license: identifier as on the Hugging Face hub: 'apache-2.0', 'cc-by-nc-4.0', 'other'. None: the card says that
            no licence is stated.
        repo: ``user/name`` of its repository on the hub, which the card loads it from.

    Raises:
        CheckpointError, FileNotFoundError: the checkpoint cannot be read safely, holds no segmentor, or does not fit
            the config.
        ConfigError: there is no config, or it cannot be shared; a bad name or licence; ``out`` holds something else or
            cannot be written. No partial folder is left behind.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    work_dir = checkpoint.parent if work_dir is None else Path(work_dir)
    license = license and license.strip().lower()
    if license is not None and not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', license):
        raise ConfigError(
            f"--license {license!r}: expected an identifier as the hub's: apache-2.0, cc-by-nc-4.0, other"
        )
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(f'--name {name!r}: expected letters, digits, - and _, without dots, which end the hash')
    if not work_dir.is_dir():
        raise FileNotFoundError(f'work dir {work_dir} does not exist')
    if out.exists() and not out.is_dir():
        raise ConfigError(f'{out} is a file; give a folder')

    content = as_checkpoint(load_from_local(str(checkpoint), 'cpu'))
    state, meta = content['state_dict'], content['meta']
    if not any(str(key).removeprefix('module.').startswith('decode_head.') for key in state):
        raise CheckpointError(
            f'{checkpoint}: has no decode_head, so it is a classifier or a backbone alone; give a checkpoint of a '
            'trained segmentor'
        )
    info = (content.get('message_hub') or {}).get('runtime_info') or {}
    trained = read_config(config, meta.get('cfg') or info.get('cfg'), checkpoint)
    given, averaged = dataset_meta_of(content), 'ema_state_dict' in content
    del content  # the optimizer state may be large
    origin = config or f'the config in {checkpoint}'
    with _of_known_form(origin):
        shared = shareable(trained)
    model = _build(shared, origin)
    weights = _weights(state, model, checkpoint, config)
    with _of_known_form(origin):
        classes, palette = _classes(given, shared, model, checkpoint)
        _name_classes(shared, classes, palette)
        known = facts_of(shared, trained, meta)
    text = as_text(shared)
    places = {str(Path.home()), os.getcwd(), str(checkpoint.resolve().parent), str(work_dir.resolve())}
    check_nothing_private(shared, [place for place in places if len(place) > 1])

    name = name or _default_name(config, meta, checkpoint)
    results, notes = find_results(checkpoint, work_dir, meta, shared, classes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as beside:
            folder = Path(beside, 'model')
            folder.mkdir()  # TemporaryDirectory's own folder is private to the user
            files = _write_weights(folder, name, weights, meta, classes, palette, text)
            (folder / 'config.py').write_text(text, encoding='utf-8')
            _check_weights(folder, files, weights)
            dtypes = {str(v.dtype).removeprefix('torch.') for v in weights.values() if v.is_floating_point()}
            facts = dict(
                known,
                name=name,
                repo=repo,
                weights=files[0],
                safetensors=files[1],
                classes=classes,
                parameters=sum(p.numel() for p in model.parameters()),
                precision=', '.join(sorted(dtypes)),
                averaged=averaged,
                best=checkpoint.name.startswith('best_'),
                license=license,
                hardware=hardware_of(work_dir, meta),
                results=results,
            )
            (folder / 'metafile.yml').write_text(metafile(facts), encoding='utf-8')
            (folder / 'README.md').write_text(model_card(facts), encoding='utf-8')
            unchanged = _move(folder, out, weights)
    except (OSError, SaveError) as error:
        cause = error.__cause__ or error
        raise ConfigError(f'{out}: could not be written ({getattr(cause, "strerror", None) or cause})') from error
    return Published(out / files[0], out / files[1], unchanged, len(results), notes)


@contextmanager
def _of_known_form(source: str) -> Iterator[None]:
    """Raise ConfigError where a config has a value of another type than a config of mmengine."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f'{source}: is no config of mmengine ({type(error).__name__}: {error})') from error


def _build(config: dict, source: str) -> nn.Module:
    if not isinstance(config.get('model'), dict):
        raise ConfigError(f'{source}: has no model')
    try:
        return init_model(Config(config), None, 'cpu')
    except Exception as error:  # constructors of its parts may raise anything
        raise ConfigError(f'{source}: its model cannot be built ({type(error).__name__}: {error})') from error


def _weights(state: Mapping, model: nn.Module, checkpoint: Path, config: str | None) -> OrderedDict:
    """The model's tensors as they are in the file, each with its own storage, without entries that the model lacks."""
    own = model.state_dict()
    difference = compare(own, state, ignore='auxiliary_head.')
    if difference:
        remedy = '' if config else '; give the one that it was trained with as --config FILE'
        raise CheckpointError(
            f'{checkpoint}: not the weights of the model of {config or "its config"} ({difference}){remedy}'
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
    # Module versions: some modules use them to load older weights.
    out._metadata = OrderedDict(
        (str(key), dict(version=value['version']))
        for key, value in getattr(state, '_metadata', {}).items()
        if isinstance(value, dict) and isinstance(value.get('version'), int)
    )
    return out


def _classes(
    given: Mapping, config: dict, model: nn.Module, checkpoint: Path
) -> tuple[list[str] | None, list[list[int]] | None]:
    """Class names and palette of the checkpoint, else of the config's data set; None where neither has them."""
    known = dataset_meta(Config(config))
    names = [str(name) for name in given.get('classes') or ()]
    expected = [str(name) for name in known.get('classes') or ()]
    if names and expected and [n.casefold() for n in names] != [n.casefold() for n in expected]:
        raise CheckpointError(
            f'{checkpoint}: its classes ({", ".join(names[:4])}, ...) are not those of the data set in the config '
            f'({", ".join(expected[:4])}, ...); give the config that it was trained with as --config FILE'
        )
    if not names and len(expected) == len(model.dataset_meta['classes']):  # as many as the head predicts
        names = expected
    if not names:
        return None, None
    palettes = [given.get('palette'), known.get('palette')]
    palette = next((p for p in palettes if p is not None and len(p) == len(names)), None)
    return names, palette and [[int(value) for value in colour] for colour in palette]


def _name_classes(config: dict, classes: list[str] | None, palette: list[list[int]] | None) -> None:
    """Write the class names into data sets that would read them from a file, because that file is not published."""
    for which in ('train', 'val', 'test'):
        dataset = (config.get(f'{which}_dataloader') or {}).get('dataset') or {}
        info = dataset.get('metainfo')
        if isinstance(info, dict) and any(isinstance(value, str) for value in info.values()):
            dataset['metainfo'] = {k: v for k, v in (('classes', classes), ('palette', palette)) if v}


def _default_name(config: str | None, meta: Mapping, checkpoint: Path) -> str:
    run = run_of(meta)
    name = Path(config).stem if config else str(meta['experiment_name']).removesuffix(f'_{run}') if run else ''
    name = name or re.sub(r'-[0-9a-f]{8}$', '', checkpoint.stem)  # the checkpoint was itself published
    return re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_-') or 'model'


def _write_weights(folder: Path, name: str, weights: Mapping, meta: Mapping, classes, palette, text: str) -> list[str]:
    """Write both weight files; returns their names, ``.pth`` first."""
    about = dict(task='semantic segmentation', mmseg_volo_version=__version__)
    new = dict(cfg=text, **about, sealed_by=f'mmseg_volo {__version__}')
    texts = dict(config=text, format='pt', **about)
    if classes:
        new['dataset_meta'] = dict(classes=classes, **(dict(palette=palette) if palette else {}))
        texts.update(classes=json.dumps(classes), palette=json.dumps(palette))
    new.update({key: meta[key] for key in ('iter', 'epoch', 'seed', 'world_size') if isinstance(meta.get(key), int)})
    save(dict(meta=new, state_dict=weights), folder / 'weights.pth')

    # safetensors writes its metadata in random order: write the header again, so that the bytes are reproducible.
    data = memoryview(to_safetensors(dict(weights)))
    size = 8 + int.from_bytes(data[:8], 'little')
    header = {'__metadata__': dict(sorted(texts.items())), **json.loads(bytes(data[8:size]))}
    header = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    header += b' ' * (-len(header) % 8)
    with (folder / 'weights.safetensors').open('wb') as file:
        file.writelines([len(header).to_bytes(8, 'little'), header, data[size:]])

    names = []
    for path in (folder / 'weights.pth', folder / 'weights.safetensors'):
        names.append(f'{name}-{sha256(path)[:8]}{path.suffix}')
        path.rename(folder / names[-1])
    return names


def _check_weights(folder: Path, files: list[str], weights: Mapping[str, torch.Tensor]) -> None:
    """Load the files as users will and compare their weights with the checkpoint's."""
    for file in files:
        with redirect_stdout(io.StringIO()):  # mmengine prints the path of the temporary folder
            state = init_model(str(folder / 'config.py'), folder / file, 'cpu').state_dict()
        other = [key for key, value in weights.items() if not torch.equal(state[key], value)]
        if other:
            raise CheckpointError(f'{file}: reads back with other weights ({other[0]}, ...); nothing was published')


def _move(folder: Path, out: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Move the new files into ``out``; returns whether ``out`` already held the same files."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(folder, out)
        return False
    new = {file.name: file for file in folder.iterdir()}
    there = [file for file in out.iterdir() if not file.name.startswith(('.', 'LICENSE'))]
    models = [f for f in there if f.name not in _TEXT_FILES and (f.name in new or _same_model(f, weights))]
    foreign = sorted(file.name for file in there if file not in models and file.name not in _TEXT_FILES)
    if foreign or (there and not models):
        raise ConfigError(
            f'{out} holds something else ({(foreign or [there[0].name])[0]}); give another folder, or empty it'
        )
    same = all((out / name).is_file() and filecmp.cmp(out / name, file, shallow=False) for name, file in new.items())
    # The card is moved last, because it names the other files.
    for name in sorted(new, key=lambda name: (name in _TEXT_FILES, name == 'README.md')):
        os.replace(new[name], out / name)
    for file in models:
        if file.name not in new:  # the same weights, published by another version of this package
            file.unlink()
    return same


def _same_model(file: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file is a published one with exactly these weights; a run's checkpoint holds more and never is."""
    if not _HASHED.search(file.name) or not _has_its_hash(file):
        return False
    try:
        state = as_checkpoint(load_from_local(str(file), 'cpu'))['state_dict']
    except (CheckpointError, OSError):
        return False
    return state.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in state.items())


def _has_its_hash(file: Path) -> bool:
    return file.stem.endswith(sha256(file)[:8])


def published_files(folder: Path) -> list[str]:
    """Names of the files in a folder that :func:`publish` wrote, and of licence texts beside them.

    The ``.pth`` file and ``metafile.yml`` may have been removed. Hidden files are left out.

    Raises:
        ConfigError: the folder has other files, lacks some, or has more than one model.
        CheckpointError: a weight file does not have the SHA-256 that its name begins with.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith('.'))
    weights = [name for name in names if _HASHED.search(name)]
    missing = [name for name in ('config.py', 'README.md') if name not in names]
    if not any(name.endswith('.safetensors') for name in weights):
        missing.append('.safetensors file with its hash in its name')
    if missing:
        raise ConfigError(f'{folder}: has no {missing[0]}, so tools/publish.py did not write it; publish a checkpoint')
    foreign = [name for name in names if not (name in weights or name in _TEXT_FILES or name.startswith('LICENSE'))]
    if foreign:
        raise ConfigError(f'{folder}: holds {foreign[0]}, which is no part of a published model; move it elsewhere')
    if len({Path(name).suffix for name in weights}) < len(weights):
        raise ConfigError(f'{folder}: holds more than one model ({", ".join(weights)}); keep one')
    broken = next((name for name in weights if not _has_its_hash(folder / name)), None)
    if broken:
        raise CheckpointError(f'{folder / broken}: is not the file that was published under this name; publish again')
    return names
