"""A page about training and test runs, made of what they left in their work dirs."""

from .page import write_report

__all__ = ['write_report']
