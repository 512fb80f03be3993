"""Record what a folder of results was made with and what is done, so that an interrupted run can continue."""

import contextlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config

from ..errors import ConfigError
from ..utils.files import atomic_write, sha256
from ..utils.unwrap import bare_dataset
from .options import model_preprocessor

NAME = 'predict.jsonl'


def identity(config: Config, checkpoint: str, aug_test: bool, **options) -> dict:
    """Describe what determines the results: hashes of the model and pipeline config and of the checkpoint, options."""
    dataset = bare_dataset((config.get('test_dataloader') or {}).get('dataset'))
    parts = [config.model, model_preprocessor(config), dataset.get('pipeline')]
    if aug_test:
        parts += [config.get('tta_model'), config.get('tta_pipeline')]
    text = json.dumps(parts, default=str, sort_keys=True)
    content = checkpoint if Path(checkpoint).is_file() else io.BytesIO(checkpoint.encode())  # of a URL its text
    return dict(
        config=[config.filename and Path(config.filename).name, sha256(io.BytesIO(text.encode()))],
        checkpoint=[Path(checkpoint).name, sha256(content)],
        **{'aug-test': aug_test},
        **options,
    )


class Manifest:
    """The file ``predict.jsonl`` in a folder of results.

    Its first line says what the results were made with; each further line says that a source is done.

    Args:
        folder: the output folder.
        made_with: see :func:`identity`.
        resume: continue the manifest in the folder; otherwise :meth:`begin` replaces it.

    Raises:
        ConfigError: the manifest in the folder is of other results, or is damaged.
    """

    def __init__(self, folder: Path, made_with: dict, resume: bool):
        self._folder, self._path, self._made_with = folder, folder / NAME, made_with
        self._done: dict[str, dict] = {}
        self._begun = False
        self._resumes = resume and self._path.exists()
        if self._resumes:
            self._read()

    def _read(self) -> None:
        first, *lines = self._path.read_text(encoding='utf-8', errors='replace').split('\n')
        try:
            before = dict(json.loads(first))
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f'{self._path} is no record of predictions; leave out --resume to predict everything again'
            ) from error
        before.pop('mmseg_volo', None)
        now = self._made_with
        names = [name for name in {**before, **now} if _essence(before.get(name)) != _essence(now.get(name))]
        if names:
            what = ', '.join(f'{name} ({_brief(before.get(name))} then, {_brief(now.get(name))} now)' for name in names)
            raise ConfigError(
                f'{self._path}: the results there were made with something else: {what}. Choose another --out, or use '
                'the same options as then, or leave out --resume to predict everything again'
            )
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # the last line may be cut off
                entry = json.loads(line)
                self._done[entry['source']] = entry

    def begin(self) -> None:
        """Write the first line of a new manifest, or end the last line of an old one. Later calls do nothing."""
        if self._begun:
            return
        self._begun = True
        if self._resumes:
            with self._path.open('a', encoding='utf-8') as file:
                file.write('\n')
            return
        with atomic_write(self._path) as part:
            part.write_text(json.dumps(dict(mmseg_volo='predict', **self._made_with)) + '\n', encoding='utf-8')

    def add(self, source: Path, files: Iterable[str]) -> None:
        """Note that a source is done, with the paths of its results below the output folder."""
        entry = dict(**_mark(source), files=list(files))
        with self._path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')

    def has(self, source: Path) -> bool:
        """Return whether a source is done, is unchanged since, and has all its results."""
        entry = self._done.get(os.path.abspath(source))
        return (
            entry is not None
            and {key: entry.get(key) for key in ('source', 'size', 'time')} == _mark(source)
            and all((self._folder / name).is_file() for name in entry['files'])
        )


def _mark(source: Path) -> dict:
    status = source.stat()
    return dict(source=os.path.abspath(source), size=status.st_size, time=status.st_mtime_ns)


def _essence(value):
    return value[-1] if isinstance(value, list) else value  # of a file the hash, not the name


def _brief(value) -> str:
    if isinstance(value, list):
        return f'{value[0]} {value[-1][:8]}'
    if value is None:
        return 'default'
    return ('no', 'yes')[value] if isinstance(value, bool) else str(value)
