"""Push a published model to the Hugging Face hub, and load one from there, from a folder or from a file."""

import logging
import tempfile
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from ..checkpoints.reading import read_config_text
from ..errors import CheckpointError, ConfigError, HubError
from ..inference.model import init_model
from ..version import __version__
from .publish import publish, published_files
from .shareable_config import foreign_config

_CONFIG = 'config.py'
_LOG_IN = "log in with 'hf auth login' or set HF_TOKEN"
# Weight files of an earlier push, which a new one replaces.
_EARLIER = [f'*-{"[0-9a-f]" * 8}{suffix}' for suffix in ('.pth', '.safetensors')]


def from_pretrained(
    source: str | PathLike,
    device: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    cfg_options: dict | None = None,
) -> nn.Module:
    """Load a model from the Hugging Face hub, a folder of ``tools/publish.py``, or one file.

    Of a repository or folder, ``config.py`` and the only ``.safetensors`` file are read; nothing else is downloaded. Of
    a file, its own config is read. No config is run: see :mod:`mmseg_volo.checkpoints.config_gate`. A config that needs
    your own code is refused; :func:`~mmseg_volo.inference.model.init_model` takes it.

    Args:
        source: a folder, a ``.safetensors`` or ``.pth`` file, or a repository ``user/name``. A folder or file of
            that name here comes first.
        device: 'cpu', 'cuda', 'cuda:1', ...; default: a GPU if there is one, else the CPU.
        revision: branch, tag or commit of the repository; default: its main branch.
        token: for private and gated repositories; default: that of ``HF_TOKEN`` or ``hf auth login``; False: none.
        cache_dir: where downloads are kept; default: the cache of ``huggingface_hub``.
        local_files_only: use the cache alone. It is also used, with a warning, where the hub cannot be reached.
        cfg_options: overrides of the config, as ``dict(model=dict(test_cfg=dict(precision='bf16')))``.

    Returns:
        The model in eval mode, as from :func:`~mmseg_volo.inference.model.init_model`.

    Raises:
        HubError: there is no such repository or revision, no permission, or no network.
        ConfigError: the config is refused because it could run code, or has a fault.
        CheckpointError, FileNotFoundError: there are no weights, they cannot be read, or are not those of the config.
    """
    path = Path(source).expanduser()
    if path.is_file():
        weights, text = path, read_config_text(path)
    else:
        if not path.is_dir():
            path = _download(source, revision, token, cache_dir, local_files_only)
        weights = path / _only_weights((file.name for file in path.iterdir()), source)
        config = path / _CONFIG
        text = config.read_text('utf-8', 'replace') if config.is_file() else read_config_text(weights)
    remedy = 'load it with mmseg_volo.init_model(CONFIG, WEIGHTS)'
    config = foreign_config(text, str(source), remedy)
    model = config.get('model')
    if isinstance(model, dict) and isinstance(model.get('test_cfg'), dict):
        model['test_cfg'].pop('allow_mismatch', None)  # not for the author of the file to say
    try:
        return init_model(Config(config), weights, device, cfg_options)
    except ConfigError as error:
        raise ConfigError(f'{source}: {error}') from error


def push_to_hub(
    source: str | PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    config: str | None = None,
    name: str | None = None,
    work_dir: str | PathLike | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Push the model of a checkpoint, or a published folder, to a repository on the Hugging Face hub.

    The repository is created if it does not exist. One commit adds the files of
    :func:`~mmseg_volo.publish.publish.publish` and deletes the weight files of an earlier push. Other files stay.

    Args:
        source: a checkpoint of a training run, which is published first, or a folder of ``tools/publish.py``.
        repo_id: ``user/name`` or ``organization/name``.
        license, config, name, work_dir: of a checkpoint: see :func:`~mmseg_volo.publish.publish.publish`.
        private: whether a new repository is private; default: as the account has it, which is public for most. True
            refuses a repository that is public.
        token: a token with write access; default: that of ``HF_TOKEN`` or ``hf auth login``.
        revision: an existing branch to commit to; default: the main branch.
        create_pr: open a pull request instead of a commit to the branch.
        commit_message: default: ``Upload`` and the name of the weights.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        HubError: you are not logged in, may not write there, the hub rejects the files or cannot be reached.
        CheckpointError, ConfigError, FileNotFoundError: see :func:`~mmseg_volo.publish.publish.publish` and
            :func:`~mmseg_volo.publish.publish.published_files`.
    """
    check_push(repo_id, token)
    source = Path(source).expanduser()
    if not source.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            done = publish(source, Path(folder, 'model'), config, name, work_dir, license, repo_id)
            for note in done.notes:
                print_log(f'skipped {note}', 'current', logging.WARNING)
            return _push(done.weights.parent, repo_id, private, token, revision, create_pr, commit_message)
    if any(value is not None for value in (license, config, name, work_dir)):
        raise ConfigError(f'{source} is published already; license, config, name and work_dir are for a checkpoint')
    return _push(source, repo_id, private, token, revision, create_pr, commit_message)


def check_push(repo_id: str, token: str | None = None) -> None:
    """Raise what :func:`push_to_hub` would raise before it publishes: a bad name, or no token."""
    if not _is_repository(repo_id):
        raise ConfigError(f'{str(repo_id)!r} is no name of a repository: expected user/name')
    if not (token or get_token()):
        raise HubError(f'{repo_id}: pushing needs a token with write access: {_LOG_IN}')


def _push(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
) -> str:
    files, api = published_files(folder), _api(token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(f'{repo_id}: is public already; make it private in its settings, or give another name')
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            delete_patterns=_EARLIER,
            commit_message=message or f'Upload {Path(_only_weights(files, folder)).stem}',
            revision=revision,
            create_pr=create_pr,
        )
    except HubError:
        raise
    except Exception as error:  # the hub client raises errors of several libraries, without a common base
        raise HubError(_explained(error, api, repo_id, revision, 'push')) from error
    return commit.pr_url or commit.commit_url


def _download(
    source: str | PathLike,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | PathLike | None,
    local_only: bool,
) -> Path:
    """Download the config and the weights of a repository, or find them in the cache; returns their folder."""
    if not isinstance(source, str) or not _is_repository(source) or source.endswith(('.safetensors', '.pth')):
        raise FileNotFoundError(f'{source} does not exist: expected a folder, a file, or user/name on the hub')
    repo_id, local_only = source, local_only or constants.HF_HUB_OFFLINE
    api, wanted, unreachable = _api(token), [_CONFIG, '*.safetensors'], None
    if not local_only:
        try:
            names = [file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or ()]
        except Exception as error:
            if not _is_unreachable(error):
                raise HubError(_explained(error, api, repo_id, revision, 'load')) from error
            unreachable = error
        else:
            wanted = [_CONFIG, _only_weights(names, repo_id)]
    try:
        folder = api.snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=wanted,
            ignore_patterns='*/*',
            local_files_only=local_only or unreachable is not None,
        )
    except Exception as error:
        if local_only:
            remedy = 'load it once without local_files_only and HF_HUB_OFFLINE'
            raise HubError(f'{repo_id}: is not in the cache; {remedy}') from error
        raise HubError(_explained(unreachable or error, api, repo_id, revision, 'load')) from error
    if unreachable is not None:
        print_log(f'{repo_id}: loaded from the cache, because {_failure(unreachable, api)}', 'current', logging.WARNING)
    return Path(folder)


def _only_weights(names: Iterable[str], source: object) -> str:
    names = [name for name in names if name.endswith('.safetensors') and '/' not in name]
    if not names:
        raise CheckpointError(f'{source}: has no .safetensors file; expected the files that tools/publish.py writes')
    if len(names) > 1:
        listed = ', '.join(sorted(names))
        raise CheckpointError(f'{source}: has several .safetensors files; give the path of one of them: {listed}')
    return names[0]


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name='mmseg_volo', library_version=__version__)


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count('/') == 1


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub did not answer, or not as a hub: no network, a timeout, offline mode, a server error."""
    return not isinstance(error, HfHubHTTPError) or _status(error) >= 500 or _status(error) == 429


def _status(error: HfHubHTTPError) -> int:
    return getattr(error.response, 'status_code', 0)


def _failure(error: Exception, api: HfApi) -> str:
    return f'the request to the hub at {api.endpoint} failed ({type(error).__name__}: {_first_line(error)})'


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), 'no reason given').rstrip('.')


def _explained(error: Exception, api: HfApi, repo_id: str, revision: str | None, task: str) -> str:
    """One line for an error of the hub's client: what is wrong, and what to do."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of one file's upload
        error = error.__cause__
    status = _status(error) if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, its base
        return f'{repo_id}: access must be granted: ask for it at {api.endpoint}/{repo_id}, and {_LOG_IN}'
    if isinstance(error, RevisionNotFoundError):
        return f'{repo_id}: has no revision {revision!r}; give a branch, a tag or a commit'
    if isinstance(error, RepositoryNotFoundError) and task == 'load':
        return (
            f'{repo_id}: no such folder here, and no such repository on the hub, or a private one: check the name, '
            f'or {_LOG_IN}'
        )
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f'{repo_id}: the hub does not accept the token: {_LOG_IN}'
    if status == 403:
        return f'{repo_id}: this token may not {task} it ({_message(error)}); {_LOG_IN}, with the permission to {task}'
    if isinstance(error, HfHubHTTPError) and status < 500:
        return f'{repo_id}: the hub refuses to {task} it ({_message(error)})'
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f'{repo_id}: cannot {task} it ({error})'  # a full disk, a cache that cannot be written
    if (
        isinstance(error, ValueError) and task == 'push'
    ):  # the card's metadata, such as a licence that the hub does not know
        return f'{repo_id}: the hub refuses to {task} it ({" ".join(str(error).split())})'
    return f'{repo_id}: {_failure(error, api)}; nothing was {task}ed'


def _message(error: HfHubHTTPError) -> str:
    return ' '.join(str(error.server_message or _first_line(error)).split())
