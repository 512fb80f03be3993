"""Checkpoint files: read without running code, checked against a model, written whole.

Importing this package registers its readers with mmengine, which would run code that a file holds.
"""

from . import reading  # noqa: F401
