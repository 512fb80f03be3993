"""A web page to try a model on one's own images: what ``tools/demo.py`` opens."""

import importlib.util

from ..errors import ConfigError


def check_installed() -> None:
    """Raise ConfigError if Gradio, the extra ``demo``, is not installed."""
    if importlib.util.find_spec('gradio') is None:
        raise ConfigError("the page needs gradio: pip install -e '.[demo]' in the clone")
