"""Check a config before anything is built from it."""

from .building import building
from .checking import check_config, check_model, settle

__all__ = ['building', 'check_config', 'check_model', 'settle']
