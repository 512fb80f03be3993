"""The site of the documents: `sphinx-build -n -W docs docs/_build`. It is built, and read, without a network."""

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
smartquotes = False  # they would make one dash of two in --option

myst_heading_anchors = 3  # as on GitHub, so that links hold in both places

autodoc_inherit_docstrings = False
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [('Attributes', 'params_style')]  # as Args, several names to a line

html_theme = 'furo'
html_title = f'mmseg_volo {release}'
html_copy_source = False
html_show_sphinx = False
