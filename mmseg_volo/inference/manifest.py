"""What a folder of results was made with, and which of them are done: so that a run can go on where it stopped."""

import contextlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config

from ..errors import ConfigError
from ..utils.files import atomic_write, sha256

NAME = 'predict.jsonl'


def identity(config: Config, checkpoint: str, aug_test: bool, **options) -> dict:
    """What decides the results: the config's parts that predict, the checkpoint's bytes, and options."""
    parts = [config.model, config.get('test_dataloader', {}).get('dataset', {}).get('pipeline')]
    if aug_test:
        parts += [config.get('tta_model'), config.get('tta_pipeline')]
    text = json.dumps(parts, default=str, sort_keys=True)
    url = None if Path(checkpoint).is_file() else io.BytesIO(checkpoint.encode())
    digest = sha256(url or checkpoint)
    return dict(
        config=[config.filename and Path(config.filename).name, sha256(io.BytesIO(text.encode()))],
        checkpoint=[Path(checkpoint).name, digest],
        **{'aug-test': aug_test},
        **options,
    )


class Journal:
    """The file ``predict.jsonl`` in a folder of results: a line of what they were made with, and one for each result.

    Args:
        folder: where the results go.
        made_with: see :func:`identity`.
        resume: go on with the journal that is there; else :meth:`begin` puts a new one in its place.

    Raises:
        ConfigError: the journal that is there is of other results, or no journal.
    """

    def __init__(self, folder: Path, made_with: dict, resume: bool):
        self._folder, self._path, self._made_with = folder, folder / NAME, made_with
        self._done: dict[str, dict] = {}
        self._resumes = resume and self._path.exists()
        if self._resumes:
            self._read()

    def _read(self) -> None:
        first, *lines = self._path.read_text(encoding='utf-8', errors='replace').split('\n')
        try:
            before = dict(json.loads(first))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f'{self._path} is no record of what was predicted; leave out --resume to begin again'
            ) from error
        before.pop('mmseg_volo', None)
        now = self._made_with
        names = [name for name in {**before, **now} if _decisive(before.get(name)) != _decisive(now.get(name))]
        if names:
            what = ', '.join(f'{name} ({_brief(before.get(name))} then, {_brief(now.get(name))} now)' for name in names)
            raise ConfigError(
                f'{self._path}: the results there were made with something else: {what}. Take another --out, or the '
                'same as then, or leave out --resume to make all anew'
            )
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the last one may be cut off
                entry = json.loads(line)
                self._done[entry['source']] = entry

    def begin(self) -> None:
        """Write the first line, or make sure of the last one's end."""
        if self._resumes:
            with self._path.open('a', encoding='utf-8') as file:
                file.write('\n')
            return
        with atomic_write(self._path) as part:
            part.write_text(json.dumps(dict(mmseg_volo='predict', **self._made_with)) + '\n', encoding='utf-8')

    def add(self, source: Path, files: Iterable[str]) -> None:
        """Note that a source is done, and the files that it gave, by their place in the folder."""
        entry = dict(**_mark(source), files=list(files))
        with self._path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')

    def has(self, source: Path) -> bool:
        """Whether a source, as it is now, is done and all its files are there."""
        entry = self._done.get(os.path.abspath(source))
        return (
            entry is not None
            and {key: entry.get(key) for key in ('source', 'size', 'time')} == _mark(source)
            and all((self._folder / name).is_file() for name in entry['files'])
        )


def _mark(source: Path) -> dict:
    status = source.stat()
    return dict(source=os.path.abspath(source), size=status.st_size, time=status.st_mtime_ns)


def _decisive(value):
    return value[-1] if isinstance(value, list) else value  # a file's name does not matter, its hash does


def _brief(value) -> str:
    if isinstance(value, list):
        return f'{value[0]} {value[-1][:8]}'
    if value is None:
        return 'default'
    return ('no', 'yes')[value] if isinstance(value, bool) else str(value)
