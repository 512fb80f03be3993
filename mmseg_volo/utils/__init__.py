"""Helpers for all other folders."""
