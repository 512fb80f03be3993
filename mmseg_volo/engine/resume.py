"""Find the checkpoint from which an interrupted run continues."""

import re
from collections.abc import Iterable
from logging import Logger
from pathlib import Path

from ..checkpoints.reading import load_from_local, read_meta
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
            content = load_from_local(str(file), 'cpu')
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
    if name and meta.get(name[1]) != int(name[2]):
        raise CheckpointError(
            f'{file}: was saved at {name[1]} {meta.get(name[1])}, but its name says {name[2]}; restore its name'
        )


def _saved_at(file: Path) -> tuple[float, int]:
    """Time and iteration at which a checkpoint was saved; its tensors are not read."""
    meta = read_meta(file)
    return meta.get('saved_at', file.stat().st_mtime), meta.get('iter', 0)
