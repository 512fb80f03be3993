"""Turn errors of constructors that are built from a config into one line with the key."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import BaseLoop
from torch import nn

from ..errors import USER_ERRORS, ConfigError

# Raised outside a constructor too, by the runner that reads the config.
_BUILD_ERRORS = ValueError, TypeError, KeyError, AttributeError, AssertionError


@contextmanager
def building(config: Mapping, key: str) -> Iterator[None]:
    """Raise what a constructor raises as a ConfigError 'CONFIG: KEY: reason'. For building only, never for training.

    Args:
        config: the whole config; its ``filename`` is named.
        key: the part that is built. An inner part of it is named instead if the error came from there.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except Exception as error:
        place = _place(config, error)
        if isinstance(error, torch.OutOfMemoryError) or not (place or isinstance(error, _BUILD_ERRORS)):
            raise
        reason = error.args[0] if isinstance(error, KeyError) and error.args else str(error) or 'is not accepted'
        where = f'{source_of(config)}{place or key}'
        raise ConfigError(f'{where}: {_one_line(reason)} ({type(error).__name__})') from error


class NamedBuildErrors:
    """Mixin for mmengine's Runner, first in the bases: what a run builds is built inside :func:`building` too.

    A build method that is called by itself raises what mmengine's raises.
    """

    _runs = False

    def train(self) -> nn.Module:
        with self._run():
            return super().train()

    def val(self) -> dict:
        with self._run():
            return super().val()

    def test(self) -> dict:
        with self._run():
            return super().test()

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        with self._named('train_cfg'):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        with self._named('val_cfg'):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        with self._named('test_cfg'):
            return super().build_test_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        with self._named('optim_wrapper'):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        with self._named('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def call_hook(self, fn_name: str, **kwargs) -> None:
        with self._named('default_hooks or custom_hooks') if fn_name == 'before_run' else nullcontext():
            super().call_hook(fn_name, **kwargs)

    @contextmanager
    def _run(self) -> Iterator[None]:
        self._runs = True
        try:
            yield
        finally:
            self._runs = False

    def _named(self, key: str) -> AbstractContextManager:
        return building(self.cfg, key) if self._runs else nullcontext()


def source_of(config: Mapping) -> str:
    """The file of a config, as the beginning of a message; empty if it has none."""
    filename = getattr(config, 'filename', None)
    return f'{Path(filename).name}: ' if filename else ''


def _one_line(reason: Any) -> str:
    text = ' '.join(str(reason).split())
    return text if len(text) <= 400 else f'{text[:400]}...'


# Functions of mmengine that build from a config, and their argument with the config.
_BUILDERS = dict(build_from_cfg='cfg', build_dataloader='dataloader')


def _place(config: Mapping, error: BaseException) -> str | None:
    """The key of the innermost part that mmengine was building from its config when the error was raised."""
    found, trace = None, error.__traceback__
    whole = dict(config.items())
    while trace is not None:
        frame = trace.tb_frame
        part = frame.f_locals.get(_BUILDERS.get(frame.f_code.co_name, ''))
        if isinstance(part, Mapping):
            found = _key_of(part, whole, '', same=True) or _key_of(part, whole, '') or found
        trace = trace.tb_next
    return found


def _key_of(part: Mapping, within: Any, key: str, same: bool = False) -> str | None:
    """Where a nested config has ``part``, which may have got or lost keys on the way to its constructor.

    With ``same``, all keys must be there.
    """
    if isinstance(within, Mapping):
        if (
            key
            and (not same or {*within} == {*part})
            and within.get('type') == part.get('type')
            and {*within} & {*part}
            and _agree(part, within)
        ):
            return key
        items = list(within.items())
    elif isinstance(within, list | tuple):
        items = list(enumerate(within))
    else:
        return None
    return next((at for name, value in items if (at := _key_of(part, value, f'{key}.{name}'.lstrip('.'), same))), None)


def _agree(part: Mapping, within: Mapping) -> bool:
    both = ({*part} & {*within}) - {'dataset'}  # a data set is built before its loader
    if 'type' not in part and len(both) < len(within) - 1:
        return False
    return all(part[name] == within[name] for name in both)
