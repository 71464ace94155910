"""What every format checks of the tensors that it finds."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from megatron.pruning.storage.views import Stored, View


def check_tensor(where: str, key: str, view: View, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless a stored tensor has the shape that the config implies."""
    if view.shape != expected:
        raise ValueError(f"{where}: {key} has shape {view.shape}, but the model's config implies {expected}")


def check_apart(tensors: Iterable[tuple[str, View]]) -> None:
    """Raise ValueError when two of the tensors that lie in files share bytes: an offset is wrong then."""
    places = [
        (str(view.file.path), view.offset, view.offset + view.nbytes, key)
        for key, view in tensors
        if isinstance(view, Stored)
    ]
    for before, after in itertools.pairwise(sorted(places)):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(f"{before[0]}: {before[3]} and {after[3]} share bytes from {after[1]} on")


def check_keys(where: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError, naming a few, when tensors are missing or unexpected."""
    for problem, keys in (("lacks", expected - found), ("holds unexpected", found - expected)):
        if keys:
            raise ValueError(f"{where} {problem} tensors: {a_few(keys)}")


def a_few(names: Collection[str]) -> str:
    """Return the first three names in words, and how many more there are."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def compare_weights(
    source: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless the weights `found` in a checkpoint are those that a model has, by name and shape."""
    differ = {"it lacks": expected.keys() - found.keys(), "this model has no": found.keys() - expected.keys()}
    if parts := [f"{problem} {a_few(names)}" for problem, names in differ.items() if names]:
        raise ValueError(f"the checkpoint in {source} does not fit this model: {'; '.join(parts)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"the checkpoint in {source} does not fit this model: {name} is {found[name]} there and {shape} here"
            )
