"""Sphinx settings of the documentation: `sphinx-build -n -W docs docs/_build`. Building and reading need no network."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]

from mmseg_volo import __version__  # noqa: E402

project = 'mmseg_volo'
author = 'the authors of mmseg_volo'
copyright = f'{author}, Apache-2.0'
version = release = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
    'tool_reference',
]
exclude_patterns = ['_build']
smartquotes = False  # would turn the two hyphens of --option into a dash

myst_heading_anchors = 3  # the same anchors as on GitHub, so that links work in both places

autodoc_inherit_docstrings = False
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [('Attributes', 'params_style')]  # like Args: allows several names in one entry

html_theme = 'furo'
html_title = f'mmseg_volo {release}'
html_copy_source = False
html_show_sphinx = False
