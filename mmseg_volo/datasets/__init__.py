"""Data sets, their preparation and their checks."""
