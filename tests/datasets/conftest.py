"""Fixtures of the tests of data sets."""

from pathlib import Path

import pytest
from faulty_data import write_data


@pytest.fixture
def data(tmp_path) -> Path:
    """A small valid data set: six images with labels for training, three for validation."""
    return write_data(tmp_path)
