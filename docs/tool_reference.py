"""Sphinx directives that generate text from the code, and a check of the names in docstrings.

- ``{tool} NAME.py`` writes the description and options of a tool, from its own parser.
- ``{modules}`` writes a table of the package's modules, with the first paragraph of each docstring.
- A docstring may refer to a name that is on no page, such as a name of another package. If the name exists, it is shown
  without a link; otherwise ``sphinx-build -n`` warns.
"""

import argparse
import ast
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


class _Found(BaseException):
    """Carries a parser out of a tool; a BaseException, so that the tool does not catch it."""


def parser_of(script: Path) -> argparse.ArgumentParser:
    """Run a tool until it parses its command line, and return its parser.

    Raises:
        ValueError: the tool ended without parsing a command line.
    """

    def stop(parser: argparse.ArgumentParser, *args, **kwargs) -> None:
        raise _Found(parser)

    argv = [str(script)]
    with mock.patch.object(argparse.ArgumentParser, 'parse_args', stop), mock.patch.object(sys, 'argv', argv):
        try:
            runpy.run_path(str(script), run_name='__main__')
        except _Found as found:
            parser = found.args[0]
            parser.prog = script.name
            return parser
    raise ValueError(f'{script} does not parse a command line')


def describe(parser: argparse.ArgumentParser, name: str) -> Iterator[nodes.Node]:
    """Yield the description, options and epilog of a parser, then those of its subcommands."""
    formatter = argparse.HelpFormatter(prog=name, width=88)
    yield from _paragraphs(parser.description)
    options = nodes.definition_list()
    commands = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands += action.choices.items()
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            options += _option(action, formatter)
    if options.children:
        yield options
    yield from _paragraphs(parser.epilog)
    for command, subparser in commands:
        yield nodes.rubric('', '', nodes.literal(text=f'{name} {command}'))
        yield from describe(subparser, f'{name} {command}')


def _paragraphs(text: str | None) -> Iterator[nodes.Node]:
    for paragraph in text.strip().split('\n\n') if text else ():
        yield nodes.paragraph(text=' '.join(paragraph.split()).replace('`', ''))


def _option(action: argparse.Action, formatter: argparse.HelpFormatter) -> nodes.definition_list_item:
    values = (
        '' if action.nargs == 0 else formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    )
    names = ', '.join(action.option_strings)
    if not names:
        names, values = action.metavar or action.dest, ''
    term = nodes.term('', '', nodes.literal(text=f'{names} {values}'.strip()))
    text = formatter._expand_help(action) if action.help else ''
    if action.choices and not text:
        text = ', '.join(map(str, action.choices))
    return nodes.definition_list_item('', term, nodes.definition('', nodes.paragraph(text=text)))


class Tool(SphinxDirective):
    """``{tool} NAME.py``: the reference of a tool."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        script = TOOLS / self.arguments[0]
        self.env.note_dependency(str(script))
        return list(describe(parser_of(script), f'tools/{script.name}'))


class Modules(SphinxDirective):
    """``{modules}``: a table of the package's modules."""

    def run(self) -> list[nodes.Node]:
        package = TOOLS.parent / 'mmseg_volo'
        lines = ['| module | |', '|---|---|']
        for path in sorted(package.rglob('*.py'), key=lambda path: (path.parent, path.name)):
            self.env.note_dependency(str(path))
            text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
            if text and path != package / '__init__.py':
                first = re.sub(r':\w+:`~?(.+?)`', r'`\1`', ' '.join(text.split('\n\n')[0].split()))
                lines.append(f'| `{path.relative_to(package)}` | {first} |')
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, source=''), self.content_offset, parent)
        return parent.children


def _resolve_missing(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """Show a reference that has no target without a link if the name exists; None makes Sphinx warn."""
    if node.get('refdomain') != 'py':
        return None
    name, module = node['reftarget'], node.get('py:module')
    return content if any(map(_exists, (name, f'{module}.{name}', f'builtins.{name}'))) else None


def _exists(name: str) -> bool:
    """Whether a dotted name exists: its longest prefix that is a module, then attributes."""
    parts = name.split('.')
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def setup(app: Sphinx) -> dict:
    app.add_directive('tool', Tool)
    app.add_directive('modules', Modules)
    app.connect('missing-reference', _resolve_missing)
    return dict(parallel_read_safe=True)
