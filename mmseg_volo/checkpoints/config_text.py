"""Parse the config text in a checkpoint as plain data; mmengine would run it as code."""

import ast
from collections.abc import Iterator

_LONGEST_RANGE = 1000
_LARGEST_INTEGER = 64  # bits; Python refuses to print much longer ones


def literals(text: str) -> dict:
    """Parse the assignments in a text that mmengine's ``Config.pretty_text`` wrote.

    Raises:
        SyntaxError, TypeError, ValueError: the text holds anything but assignments of plain data.
    """
    try:
        out = {}
        for statement in ast.parse(text).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            if len(targets) != 1 or not isinstance(targets[0], ast.Name):
                raise ValueError(f'line {statement.lineno} is not an assignment')
            out[targets[0].id] = _value(statement.value)
        return out
    except (RecursionError, MemoryError) as error:
        raise ValueError('it is nested too deeply') from error


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        # mmengine writes keys that are not Python names as dict({'a.b': 1}).
        if len(node.args) == 1 and isinstance(node.args[0], ast.Dict) and not node.keywords:
            return _value(node.args[0])
        if not node.args:
            return {_name(keyword): _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return (list if isinstance(node, ast.List) else tuple)(map(_value, node.elts))
    special = _float_or_range(node)
    if special is not None:
        return special
    value = ast.literal_eval(node) if isinstance(node, (ast.Constant, ast.UnaryOp)) else node
    if isinstance(value, int) and value.bit_length() > _LARGEST_INTEGER:
        raise ValueError(f'line {node.lineno} holds an integer of more than {_LARGEST_INTEGER} bits')
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f'line {node.lineno} holds more than text, numbers, lists and dicts')
    return value


def _float_or_range(node: ast.expr) -> float | list[int] | None:
    """The value of ``inf``, ``float('inf')`` and ``range(3)``, as mmengine or a person writes them; None for others."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
        found = _float_or_range(node.operand)
        return None if found is None else -found
    if isinstance(node, ast.Name) and node.id in ('inf', 'nan'):
        return float(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
        return None
    given = list(map(_value, node.args))
    if node.func.id == 'float' and given in (['inf'], ['-inf'], ['nan']):
        return float(given[0])
    if node.func.id == 'range' and 0 < len(given) < 4 and all(type(one) is int for one in given):
        numbers = range(*given)
        if len(numbers[: _LONGEST_RANGE + 1]) <= _LONGEST_RANGE:
            return list(numbers)
    return None


def _name(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError(f'line {keyword.lineno} holds more than text, numbers, lists and dicts')
    return keyword.arg


def strings(value: object, key: str = '') -> Iterator[tuple[str, str]]:
    """Yield every string in nested dicts and lists, after its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from strings(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner, key)
    elif isinstance(value, str):
        yield key, value
