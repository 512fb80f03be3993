"""Write an HTML report on training and test runs from the files in their work dirs."""

from .page import write_report

__all__ = ['write_report']
