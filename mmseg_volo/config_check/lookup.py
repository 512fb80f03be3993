"""Find the class that a config's ``type`` names, and the keys that its constructor takes, without an import."""

import ast
import difflib
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmengine.registry import Registry

NOTHING = object()  # no default, where None may be one
UNKNOWN = object()  # a type that could only be found by an import


def find(registry: Registry, kind: Any, scope: str) -> Any:
    """Return the class or function that ``registry.build`` would use, None if there is none, or ``UNKNOWN``.

    Args:
        registry: one of :mod:`mmseg.registry`.
        kind: the value of ``type``: a name, a name with its scope ('mmdet.X'), a dotted path, or a class.
        scope: the default scope of the config, such as 'mmseg'.
    """
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    prefix, _, rest = kind.rpartition('.')
    if prefix:
        child = _of_scope(registry, prefix)
        if child is not None:
            child.import_from_location()
            return child.module_dict.get(rest)
        return vars(sys.modules[prefix]).get(rest, UNKNOWN) if prefix in sys.modules else UNKNOWN
    registry = _of_scope(registry, scope)
    if registry is None:
        return UNKNOWN
    registry.import_from_location()
    while registry is not None:
        if kind in registry.module_dict:
            return registry.module_dict[kind]
        registry = registry.parent
    return None


def registered(registry: Registry) -> set[str]:
    """All names in a registry and its parents."""
    names: set[str] = set()
    while registry is not None:
        names.update(registry.module_dict)
        registry = registry.parent
    return names


def _of_scope(registry: Registry, scope: str) -> Registry | None:
    for one in (registry, registry.root):
        if one.scope == scope:
            return one
    return registry.root.children.get(scope)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A clause for a message, such as "; did you mean 'drop_path_rate'?", empty if no name is near."""
    found = difflib.get_close_matches(str(name), list(known), 1, cutoff)
    return f'; did you mean {found[0]!r}?' if found else ''


@functools.lru_cache(None)
def accepted(kind: Callable) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """Return the keys that a constructor takes, each with its parameter, and whether it may take others.

    The arguments of the base classes count as far as each constructor passes its ``**kwargs`` on.
    """
    keys: dict[str, inspect.Parameter] = {}
    if not inspect.isclass(kind):
        return keys, _add(keys, kind) is not None
    for base in kind.__mro__:
        init = base.__dict__.get('__init__')
        if init is None:
            continue
        if init is object.__init__:
            return keys, False
        if not inspect.isfunction(init):
            return keys, True
        rest = _add(keys, init)
        if rest is None:
            return keys, False
        if not _passes_on(inspect.unwrap(init), rest):
            return keys, True
    return keys, False


def default_of(kind: Callable, name: str) -> Any:
    """The default of a constructor's argument, or ``NOTHING``."""
    parameter = accepted(kind)[0].get(name) if callable(kind) else None
    return NOTHING if parameter is None or parameter.default is parameter.empty else parameter.default


def _add(keys: dict[str, inspect.Parameter], function: Callable) -> str | None:
    """Add the arguments of a function to ``keys``; return the name of its ``**kwargs``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no signature, as of some functions in C
        return 'kwargs'
    rest = None
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = parameter.name
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name != 'self':
            keys.setdefault(parameter.name, parameter)
    return rest


def _passes_on(init: Callable, rest: str) -> bool:
    """Whether a constructor does nothing with its ``**kwargs`` but pass them to the ``__init__`` of its base class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(init)))
    except (OSError, TypeError, SyntaxError):
        return False
    uses = sum(isinstance(node, ast.Name) and node.id == rest for node in ast.walk(tree))
    passed = sum(
        isinstance(keyword.value, ast.Name) and keyword.arg is None and keyword.value.id == rest
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == '__init__'
        for keyword in node.keywords
    )
    return 0 < passed == uses
