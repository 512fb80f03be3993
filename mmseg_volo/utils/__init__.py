"""Helpers that every other part may import."""
