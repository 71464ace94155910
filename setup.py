"""`pip install -e .` puts megatron.pruning beside pip's megatron.core; everything else is in pyproject.toml."""

from setuptools import setup

setup()
