"""Recipes of low precision, none of which can be used here: annotations name them."""


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
