"""Find the checkpoint from which an interrupted run continues."""

import math
import re
from collections.abc import Iterable
from logging import Logger
from pathlib import Path

import numpy as np

from ..checkpoints.content import as_checkpoint
from ..checkpoints.reading import load_from_local, read_meta
from ..checkpoints.writing import is_sealed
from ..errors import CheckpointError

_NAME = re.compile(r'(iter|epoch)_(\d+)\.pth')


def newest_checkpoint(
    folders: Iterable[Path], logger: Logger, templates: Iterable[str] = ()
) -> tuple[str, dict] | None:
    """Find and read the newest complete checkpoint of a training run.

    The time noted inside each file decides, not the file's own time, which copying changes, and not the file
    ``last_checkpoint``, which may be missing or name a folder that was moved. Only the chosen file's tensors are read.

    Args:
        folders: where to look.
        logger: logs each file that is skipped, and why.
        templates: names of checkpoints besides ``iter_{}.pth`` and ``epoch_{}.pth``; {} stands for a number.

    Returns:
        Path and content of the checkpoint, or None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but none is complete.
    """
    names = [_NAME, *(re.compile(r'\d+'.join(map(re.escape, template.split('{}')))) for template in templates)]
    there = {file for folder in folders if folder.is_dir() for file in folder.iterdir()}
    files = {file for file in there if any(name.fullmatch(file.name) for name in names)}
    broken: list[str] = []
    dated = []
    for file in sorted(files):
        try:
            dated.append((*(_saved_at(file) if len(files) > 1 else ()), file))
        except (CheckpointError, OSError) as error:
            broken.append(str(error))
    for *_, file in sorted(dated, reverse=True):
        try:
            content = as_checkpoint(load_from_local(str(file), 'cpu'))
            if 'sealed_by' in content['meta'] and not is_sealed(file):
                raise CheckpointError(f'{file}: was saved with a seal, which is missing now; copy it again')
            check_resumable(content, file)
        except (CheckpointError, OSError) as error:
            broken.append(str(error))
            continue
        for error in broken:
            logger.warning(f'RESUME: skipped {error}')
        logger.info(f'RESUME: continuing from {file}, the newest complete one of {len(files)} checkpoints')
        return str(file), content
    if broken:
        raise CheckpointError(
            f'--resume: none of {len(broken)} checkpoints is complete: {"; ".join(broken)}. Copy them again, or move '
            'them away to start from iteration 0.'
        )
    return None


def check_resumable(content: dict, file: Path) -> None:
    """Raise CheckpointError unless ``content``, read from ``file``, holds the state of a training run."""
    missing = [key for key in ('meta', 'state_dict', 'optimizer', 'message_hub') if key not in content]
    if missing or 'iter' not in content['meta']:
        raise CheckpointError(
            f'{file}: holds weights, but no state of a training run ({", ".join(missing) or "iteration"} missing); to '
            'start from these weights, use --cfg-options load_from=FILE instead of --resume'
        )
    name, meta = _NAME.fullmatch(file.name), content['meta']
    wrong = _of_wrong_type(content)
    if wrong:
        raise CheckpointError(
            f'{file}: {wrong} is not what a training run saves; to start from its weights, use --cfg-options '
            'load_from=FILE instead of --resume'
        )
    if name and meta.get(name[1]) != int(name[2]):
        raise CheckpointError(
            f'{file}: was saved at {name[1]} {meta.get(name[1])}, but its name says {name[2]}; restore its name'
        )


def _of_wrong_type(content: dict) -> str | None:
    """The first part of a run's state that mmengine could not use."""

    def is_optimizer(state: object) -> bool:
        if isinstance(state, dict) and {'state', 'param_groups'} <= state.keys():
            groups = state['param_groups']
            if not isinstance(groups, (list, tuple)) or not isinstance(state['state'], dict):
                return False
            known = all(isinstance(one, dict) and isinstance(one.get('params'), (list, tuple)) for one in groups)
            return known and all(isinstance(one, dict) for one in state['state'].values())
        parts = [part for part in state.values() if isinstance(part, dict)] if isinstance(state, dict) else []
        return bool(parts) and all(map(is_optimizer, parts))  # one for each part of the model

    def is_list_of_dicts(value: object) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(one, dict) for one in value)

    def is_count(value: object) -> bool:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0

    def are_files(info: dict) -> bool:
        best = [value for key, value in info.items() if str(key).startswith('best_ckpt')]
        kept = info.get('keep_ckpt_ids', [])
        return all(isinstance(path, (str, type(None))) for path in best) and (
            isinstance(kept, (list, tuple)) and all(map(is_count, kept))
        )

    meta, hub, steps = content['meta'], content['message_hub'], content.get('param_schedulers', [])
    parts = [hub.get(key) for key in ('log_scalars', 'runtime_info', 'resumed_keys')]
    right = {
        **{f'meta.{key}': is_count(meta.get(key)) for key in ('iter', 'epoch')},
        **{f'meta.{key}': meta.get(key) is None or is_count(meta[key]) for key in ('seed', 'world_size')},
        'message_hub': all(isinstance(part, dict) for part in parts) and are_files(parts[1]),
        'optimizer': is_optimizer(content['optimizer']),
        'param_schedulers': is_list_of_dicts(steps)
        or (isinstance(steps, dict) and all(map(is_list_of_dicts, steps.values()))),
    }
    return next((key for key, fits in right.items() if not fits), None)


def _saved_at(file: Path) -> tuple[float, int]:
    """Time and iteration at which a checkpoint was saved; its tensors are not read."""
    meta = read_meta(file)
    saved_at, step = meta.get('saved_at'), meta.get('iter')
    dated = isinstance(saved_at, (int, float)) and math.isfinite(saved_at)
    return saved_at if dated else file.stat().st_mtime, step if isinstance(step, int) else 0
