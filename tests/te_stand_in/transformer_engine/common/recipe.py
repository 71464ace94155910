"""Recipes of low precision, of which nothing follows here: their names."""

from typing import Any


class Format:
    E4M3, HYBRID = "E4M3", "HYBRID"


class DelayedScaling:
    def __init__(self, **settings: Any) -> None:
        pass


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
