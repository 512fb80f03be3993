"""Checkpoint files: read without running code, checked against a model, written atomically.

Importing this package registers its safe readers with mmengine, whose own readers run code from a file.
"""

from . import reading  # noqa: F401
