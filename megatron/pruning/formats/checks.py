"""What every format checks of the tensors that it finds."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable

from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.storage.views import Stored, View, equal


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


def ties[K](config: LlamaConfig, found: dict[K, View], embedding: K, head: K) -> LlamaConfig:
    """Return the config as the two matrices say, and leave in `found` what it needs of them.

    A model that calls itself tied has one of them, under either name, or both with the same values. With others it is
    not tied, whatever it says: none of them is dropped.
    """
    if not config.tied or head not in found:
        return config
    if embedding not in found:
        found[embedding] = found.pop(head)
    elif not equal(found[embedding], found[head]):
        return dataclasses.replace(config, tied=False)
    else:
        del found[head]
    return config


def check_keys(where: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError, naming a few, when tensors are missing or unexpected."""
    for problem, keys in (("lacks", expected - found), ("holds unexpected", found - expected)):
        if keys:
            raise ValueError(f"{where} {problem} tensors: {a_few(keys)}")


def a_few(names: Collection[str]) -> str:
    """Return the first three names in words, and how many more there are."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
