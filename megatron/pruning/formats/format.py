"""What a format is: how a directory of it is known, opened and written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.storage.output import OutputFile

SHARD_BYTES = 5_000_000_000  # of a file, where a format may have several

# The files of weights, and the small files beside them by name.
Output = tuple[Sequence[OutputFile], Mapping[str, bytes]]


def in_shards[T](items: Iterable[tuple[T, int]], most: int = SHARD_BYTES) -> list[list[T]]:
    """Deal items with their bytes out to lists of at most so many bytes, in order; a larger item has one to itself."""
    shards: list[list[T]] = [[]]
    size = 0
    for item, nbytes in items:
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    return shards


@dataclass(frozen=True)
class SaveOptions:
    """How to save, where the format has a choice.

    `layout` is for Megatron's formats; `dtype` None keeps every tensor's own; `transformer_impl` says whose layers are
    to load Megatron shards, None: those that the source is of.
    """

    layout: Layout = field(default_factory=Layout)
    dtype: str | None = None
    transformer_impl: str | None = None


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    `detect(path, iteration)` returns the directory of weights if `path` is a checkpoint of this format, and `open(path,
    directory)` opens it, reading headers only. `write(checkpoint, options)` returns what is to be written, or raises
    ValueError for what the format cannot hold. `mark` is a file that every directory of the format has, `weights` are
    patterns of which one is of something in it. A format that is `parallel` is written for a layout of model ranks; one
    that is `sharded` has files by rank.
    """

    name: str
    summary: str
    mark: str
    detect: Callable[[Path, int | None], Path | None]
    open: Callable[[Path, Path], Checkpoint]
    write: Callable[[Checkpoint, SaveOptions], Output]
    parallel: bool = True
    sharded: bool = False
    weights: Sequence[str] = ("*",)
