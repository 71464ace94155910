"""Choosing what to keep: scores per axis in, kept indices out.

A criterion is one function, `scores(axis, layer) -> array[size of the axis]`, higher is better. *Balance* takes the
same number inside each tensor-parallel block, *unbalance* the best anywhere. Kept indices are always ascending.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.storage.views import Index

Scores = NDArray[np.float64]
Criterion = Callable[[str, int | None], Scores]

_AXIS_CODES = {"hidden": 0, "groups": 1, "heads": 2, "ffn": 3, "layers": 4}


def random_criterion(seed: int, sizes: dict[str, int]) -> Criterion:
    """Return uniform scores drawn from (seed, axis, layer): the same for any number of processes and any layout.

    Philox's raw output is a stream that numpy promises not to change, unlike its distributions.
    """

    def scores(axis: str, layer: int | None) -> Scores:
        key = np.random.SeedSequence([seed, _AXIS_CODES[axis], 0 if layer is None else layer + 1])
        raw = np.random.Philox(key).random_raw(sizes[axis])
        return np.asarray(raw, dtype=np.uint64) / 2.0**64

    return scores


def best(scores: Scores, keep: int, blocks: int = 1) -> Index:
    """Return the indices of the `keep` best scores, the same number in each of `blocks` equal blocks of the axis.

    `blocks` must divide both the number of scores and `keep`. Of equal scores the first wins.
    """
    size = len(scores) // blocks
    order = np.argsort(-scores.reshape(blocks, size), axis=1, kind="stable")[:, : keep // blocks]
    chosen: Index = np.sort((order + size * np.arange(blocks)[:, None]).ravel())
    return chosen


def best_in_groups(scores: Scores, groups: Index, heads_per_group: int, keep_per_group: int) -> Index:
    """Return, in each of the kept `groups`, the `keep_per_group` best query heads by `scores[heads]`."""
    by_group = scores.reshape(-1, heads_per_group)[groups]
    order = np.sort(np.argsort(-by_group, axis=1, kind="stable")[:, :keep_per_group], axis=1)
    return (groups[:, None] * heads_per_group + order).ravel()


def spaced_layers(layers: int, keep: int) -> tuple[int, ...]:
    """Return which of `layers` to drop so that `keep` remain: evenly spaced, never the first, nor the last unless only
    the first remains.
    """
    dropped = layers - keep
    return tuple((i + 1) * layers // (dropped + 1) for i in range(dropped))


def lowest_layers(scores: Scores, drop: int) -> tuple[int, ...]:
    """Return the `drop` layers of the lowest scores, ascending."""
    return tuple(sorted(np.argsort(scores, kind="stable")[:drop].tolist()))


def contiguous_layers(distances: Scores, drop: int) -> tuple[int, ...]:
    """Return the block of `drop` layers that changes its input least, by the distance over the block from each."""
    first = int(np.argmin(distances))
    return tuple(range(first, first + drop))
