"""Two Sphinx directives that write what the code already says, and a check of the names in docstrings.

``{tool} NAME.py``: description and options of a command in tools/, from its own parser. ``{modules}``: a table of the
package's modules with the first paragraph of each docstring. A name that a docstring refers to and that is on no page,
as those of other packages, is left without a link if there is such a thing; else ``sphinx-build -n`` warns of it.
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
    """Carries a parser out of the tool that built it, past whatever the tool catches."""


def parser_of(script: Path) -> argparse.ArgumentParser:
    """The parser of a tool, as it stands when the tool asks it for the command line.

    Raises:
        ValueError: the tool ended without asking.
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
    raise ValueError(f'{script} reads no command line')


def describe(parser: argparse.ArgumentParser, name: str) -> Iterator[nodes.Node]:
    """Description, options and closing words of a parser, and of its commands below."""
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
    for command, sub in commands:
        yield nodes.rubric('', '', nodes.literal(text=f'{name} {command}'))
        yield from describe(sub, f'{name} {command}')


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
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        script = TOOLS / self.arguments[0]
        self.env.note_dependency(str(script))
        return list(describe(parser_of(script), f'tools/{script.name}'))


class Modules(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        package = TOOLS.parent / 'mmseg_volo'
        lines = ['| module | |', '|---|---|']
        for path in sorted(package.rglob('*.py'), key=lambda path: (path.parent, path.name)):
            self.env.note_dependency(str(path))
            text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
            if text and path != package / '__init__.py':
                first = re.sub(r':\w+:`~?(.+?)`', r'`\1`', ' '.join(text.split('\n\n')[0].split()))
                lines.append(f'| `{path.relative_to(package)}` | {first} |')
        inside = nodes.Element()
        self.state.nested_parse(StringList(lines, source=''), self.content_offset, inside)
        return inside.children


def _leave_names(app: Sphinx, env: BuildEnvironment, node: nodes.Element, shown: nodes.Node) -> nodes.Node | None:
    if node.get('refdomain') != 'py':
        return None
    name, module = node['reftarget'], node.get('py:module')
    return shown if any(map(_exists, (name, f'{module}.{name}', f'builtins.{name}'))) else None


def _exists(name: str) -> bool:
    """Whether a dotted name can be imported, looked up as far as modules go and then in them."""
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
    app.connect('missing-reference', _leave_names)
    app.add_directive('modules', Modules)
    return dict(parallel_read_safe=True)
