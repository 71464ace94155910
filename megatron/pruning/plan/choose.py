"""Choosing what to keep: criteria give scores by axis and layer, and the best scores become kept indices.

*Balance* takes the same number inside each tensor-parallel block, *unbalance* the best anywhere. Kept indices are
always ascending. A new criterion is one function and one entry of `CRITERIA` or `LAYER_CRITERIA`; the help texts and
the checks of plan files follow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron.pruning.model.axes import AXIS
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.plan.magnitude import magnitude
from megatron.pruning.plan.scores import Array, AxisScores, Scores
from megatron.pruning.storage.views import Index

# What holds unless something else is asked for: the seed of a random choice, and the two criteria without scores and
# with them.
SEED = 1234
CRITERION, CRITERION_BY_SCORES = "random", "contribution"
LAYER_CRITERION, LAYER_CRITERION_BY_SCORES = "spaced", "block_influence"


def random(parent: Checkpoint, seed: int, _: Scores | None) -> AxisScores:
    """Return uniform scores drawn from (seed, axis, layer): the same for any number of processes and any layout.

    Philox's raw output is a stream that numpy promises not to change, unlike its distributions.
    """
    sizes = parent.config.sizes

    def scores(axis: str, layer: int | None) -> Array:
        key = np.random.SeedSequence([seed, AXIS[axis].stream or 0, 0 if layer is None else layer + 1])
        raw = np.random.Philox(key).random_raw(sizes[axis])
        return np.asarray(raw, dtype=np.uint64) / 2.0**64

    return scores


def activation(_: Checkpoint, seed: int, scores: Scores | None) -> AxisScores:
    """Return the scores of what the model did when it read text."""
    assert scores is not None  # a criterion that needs them gets them
    return scores.activations


def contribution(_: Checkpoint, seed: int, scores: Scores | None) -> AxisScores:
    """Return the scores of what each head, query group or ffn channel added when the model read text."""
    assert scores is not None
    return scores.contributions


@dataclass(frozen=True)
class Criterion:
    """A way to score the indices of the axes: `of(parent, seed, scores)` gives the scores by axis and layer.

    `summary` says in a few words what is kept, and `cost` what that does to a model, where it does much. A criterion
    that is `seeded` tells nothing of an index's worth, so that a plan reports no share of it.
    """

    summary: str
    of: Callable[[Checkpoint, int, Scores | None], AxisScores]
    needs_scores: bool = False
    seeded: bool = False
    cost: str = ""


CRITERIA: dict[str, Criterion] = {
    "random": Criterion(
        "a random choice",
        random,
        seeded=True,
        cost="note: a random choice leaves a model that guesses until it is trained",
    ),
    "magnitude": Criterion(
        "the largest L2 norm of all weights that an index touches",
        magnitude,
        cost="warning: by magnitude alone a model is left worse than by a random choice",
    ),
    "activation": Criterion("the largest activations in --scores", activation, needs_scores=True),
    "contribution": Criterion(
        "what adds most to the hidden states, in --scores; hidden channels as by activation",
        contribution,
        needs_scores=True,
    ),
}


def spaced(layers: int, drop: int, _: Scores | None = None) -> tuple[int, ...]:
    """Drop evenly spaced layers: never the first, nor the last unless only the first remains."""
    return tuple((i + 1) * layers // (drop + 1) for i in range(drop))


def block_influence(_: int, drop: int, scores: Scores | None) -> tuple[int, ...]:
    """Drop the layers that change their input least."""
    assert scores is not None
    return _lowest(scores.block_influence, drop)


def contiguous(_: int, drop: int, scores: Scores | None) -> tuple[int, ...]:
    """Drop the block of layers that changes its input least."""
    assert scores is not None
    first = int(np.argmin(scores.block_distance(drop)))
    return tuple(range(first, first + drop))


def loss(_: int, drop: int, scores: Scores | None) -> tuple[int, ...]:
    """Drop the layers without which the loss rises least."""
    assert scores is not None
    return _lowest(scores.loss_rise, drop)


def _lowest(scores: Array, drop: int) -> tuple[int, ...]:
    return tuple(sorted(np.argsort(scores, kind="stable")[:drop].tolist()))


@dataclass(frozen=True)
class LayerCriterion:
    """A way to say which layers go: `drop(layers, number, scores)` gives the numbers of those that do, ascending."""

    summary: str
    drop: Callable[[int, int, Scores | None], tuple[int, ...]]
    needs_scores: bool = True


LAYER_CRITERIA: dict[str, LayerCriterion] = {
    "spaced": LayerCriterion("evenly spaced ones", spaced, needs_scores=False),
    "block_influence": LayerCriterion("those that change their input least, by --scores", block_influence),
    "contiguous": LayerCriterion("the block that changes its input least, by --scores", contiguous),
    "loss": LayerCriterion("those that the loss misses least, by --scores", loss),
}


def best(scores: Array, keep: int, blocks: int = 1) -> Index:
    """Return the indices of the `keep` best scores, the same number in each of `blocks` equal blocks of the axis.

    `blocks` must divide both the number of scores and `keep`. Of equal scores the first wins.
    """
    size = len(scores) // blocks
    order = np.argsort(-scores.reshape(blocks, size), axis=1, kind="stable")[:, : keep // blocks]
    chosen: Index = np.sort((order + size * np.arange(blocks)[:, None]).ravel())
    return chosen


def best_in_groups(scores: Array, groups: Index, heads_per_group: int, keep_per_group: int) -> Index:
    """Return, in each of the kept `groups`, the `keep_per_group` best query heads by `scores[heads]`."""
    by_group = scores.reshape(-1, heads_per_group)[groups]
    order = np.sort(np.argsort(-by_group, axis=1, kind="stable")[:, :keep_per_group], axis=1)
    return (groups[:, None] * heads_per_group + order).ravel()
