"""Check a config before anything is built from it."""

from .building import NamedBuildErrors, building
from .checking import check_config, check_model, check_tta_pipeline, settle

__all__ = ['NamedBuildErrors', 'building', 'check_config', 'check_model', 'check_tta_pipeline', 'settle']
