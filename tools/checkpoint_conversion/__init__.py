"""Conversion between formats and layouts: convert.py, and the scripts that call it."""
