"""The page to try a model on one's own pictures: what ``tools/demo.py`` opens."""

import importlib.util

from ..errors import ConfigError


def check_installed() -> None:
    """Raise ConfigError where the page's libraries, the extra ``demo``, are missing."""
    missing = [name for name in ('gradio', 'uvicorn') if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the page needs {' and '.join(missing)}: pip install -e '.[demo]' in the clone")
