"""Find the checkpoint from which an interrupted run goes on."""

import re
from collections.abc import Iterable
from logging import Logger
from pathlib import Path

from ..checkpoints.reading import load_from_local, read_meta
from ..errors import CheckpointError

_NAME = re.compile(r'(iter|epoch)_(\d+)\.pth')


def newest_checkpoint(folders: Iterable[Path], logger: Logger) -> tuple[str, dict] | None:
    """The newest whole checkpoint of a training run.

    Newest is what was saved last, by the time noted inside the file. Neither ``last_checkpoint``, which may be missing
    or name a folder that was moved, nor the times of the files are needed. The tensors of one file are read, once.

    Args:
        folders: where to look.
        logger: told of every file that is passed over, and why.

    Returns:
        Its path and its content, or None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    files = {file for folder in folders if folder.is_dir() for file in folder.iterdir() if _NAME.fullmatch(file.name)}
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
            logger.warning(f'RESUME: passed over {error}')
        logger.info(f'RESUME: going on from {file}, the newest whole one of {len(files)} checkpoints')
        return str(file), content
    if broken:
        raise CheckpointError(
            f'--resume: none of {len(broken)} checkpoints is whole: {"; ".join(broken)}. Copy them again, or move them '
            'away to start from zero.'
        )
    return None


def check_resumable(content: dict, file: Path) -> None:
    """Raises CheckpointError unless training can go on from what ``file`` holds."""
    missing = [key for key in ('meta', 'state_dict', 'optimizer', 'message_hub') if key not in content]
    if missing or 'iter' not in content['meta']:
        raise CheckpointError(
            f'{file}: holds weights, but no state of a training run ({", ".join(missing) or "iteration"} missing); to '
            'start from these weights give --cfg-options load_from=FILE in place of --resume'
        )
    name, meta = _NAME.fullmatch(file.name), content['meta']
    if name and meta.get(name[1]) != int(name[2]):
        raise CheckpointError(
            f'{file}: was saved at {name[1]} {meta.get(name[1])}, its name says {name[2]}; give it its name back'
        )


def _saved_at(file: Path) -> tuple[float, int]:
    """When a checkpoint was saved, and at which iteration, without reading its tensors."""
    meta = read_meta(file)
    return meta.get('saved_at', file.stat().st_mtime), meta.get('iter', 0)
