"""Deciding: from what the user asked for, and a criterion, to a plan. What cannot be is refused here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.choose import (
    Criterion,
    Scores,
    best,
    best_in_groups,
    contiguous_layers,
    lowest_layers,
    spaced_layers,
)
from megatron.pruning.plan.plan import LAYER_AXES, Plan, check_layout
from megatron.pruning.plan.scores import Calibration
from megatron.pruning.storage.views import Index

FLAG_OF_AXIS = {
    "hidden": "--hidden-size-remain",
    "heads": "--num-attention-heads-remain",
    "groups": "--num-query-groups-remain",
    "ffn": "--ffn-hidden-size-remain",
    "layers": "--drop-layers",
}


@dataclass(frozen=True)
class Target:
    """What the user asked for: sizes that remain (None: unchanged) and layers to drop, numbered as in the parent."""

    hidden: int | None = None
    heads: int | None = None
    groups: int | None = None
    ffn: int | None = None
    drop_layers: tuple[int, ...] = ()


def resolve_target(target: Target, config: LlamaConfig) -> dict[str, int]:
    """Return the pruned model's axis sizes. Raises ValueError, naming the flag and both values, for what cannot be."""
    parent = config.sizes
    sizes = dict(parent)
    for axis in ("hidden", "heads", "groups", "ffn"):
        wanted = getattr(target, axis)
        if wanted is None:
            continue
        if not 1 <= wanted <= parent[axis]:
            raise ValueError(f"{FLAG_OF_AXIS[axis]} {wanted} must lie between 1 and the parent's {parent[axis]}")
        sizes[axis] = wanted
    if parent["groups"] == parent["heads"] and target.groups is None:
        sizes["groups"] = sizes["heads"]  # multi-head attention stays multi-head: each head takes its group along
    _check_heads(sizes, parent)
    dropped = target.drop_layers
    for layer in dropped:
        if not 0 <= layer < parent["layers"]:
            raise ValueError(f"--drop-layers {layer}: the parent's layers are numbered 0 to {parent['layers'] - 1}")
        if dropped.count(layer) > 1:
            raise ValueError(f"--drop-layers names layer {layer} twice")
    sizes["layers"] -= len(dropped)
    if not sizes["layers"]:
        raise ValueError(f"--drop-layers drops all {parent['layers']} layers: keep at least one")
    if sizes == parent:
        flags = ", ".join((*FLAG_OF_AXIS.values(), "--num-layers-remain"))
        raise ValueError(f"nothing to prune: give at least one of {flags} another value")
    return sizes


def _check_heads(sizes: Mapping[str, int], parent: Mapping[str, int]) -> None:
    heads, groups = sizes["heads"], sizes["groups"]
    if heads % groups:
        raise ValueError(
            f"{FLAG_OF_AXIS['heads']} {heads} is not a multiple of the {groups} query groups that remain: "
            f"every group must keep the same number of heads; choose a multiple, or give {FLAG_OF_AXIS['groups']}"
        )
    has = parent["heads"] // parent["groups"]
    if heads // groups > has:
        raise ValueError(
            f"{heads} heads in {groups} query groups need {heads // groups} heads a group, but the parent has {has}: "
            f"give {FLAG_OF_AXIS['heads']} at most {groups * has}, or a larger {FLAG_OF_AXIS['groups']}"
        )


def layers_to_drop(criterion: str, layers: int, keep: int, calibration: Calibration | None) -> tuple[int, ...]:
    """Return which of `layers` to drop so that `keep` remain, by one of `LAYER_CRITERIA`.

    Raises ValueError unless 1 <= keep <= layers, and for a criterion that needs scores when there are none.
    """
    if not 1 <= keep <= layers:
        raise ValueError(f"--num-layers-remain {keep} must lie between 1 and the parent's {layers}")
    if criterion == "spaced":
        return spaced_layers(layers, keep)
    if calibration is None:
        raise ValueError(
            f"--layer-criterion {criterion} needs --scores FILE, which tools/score_importance.py makes from text"
        )
    if keep == layers:
        return ()
    if criterion == "contiguous":
        return contiguous_layers(calibration.block_distance(layers - keep), layers - keep)
    scores = calibration.block_influence if criterion == "block_influence" else calibration.loss_rise
    return lowest_layers(scores, layers - keep)


def make_plan(
    parent: Checkpoint,
    target: Target,
    criterion: Criterion,
    *,
    layout: Layout,
    prune_type: str = "balance",
    criterion_name: str = "random",
    layer_criterion: str | None = None,
    seed: int = 1234,
    scores_digest: str | None = None,
    calibration: Calibration | None = None,
    correct_norms: bool = False,
) -> Plan:
    """Decide what is kept. Raises ValueError for every target that `parent` or `layout` cannot give.

    Args:
        parent: the model to prune.
        target: what is to remain.
        criterion: scores by axis and layer.
        layout: whose tensor-parallel blocks each keep the same number when `prune_type` is balance.
        prune_type: balance or unbalance.
        criterion_name: written into the plan, as are the next three; with random, no scores are reported.
        layer_criterion: how `target.drop_layers` were found; None: the user named them.
        seed: of a random criterion.
        scores_digest: of the scores file that took part.
        calibration: what that file holds; needed for `correct_norms`.
        correct_norms: scale the norms' gains for the mean square that hidden pruning takes away.
    """
    config = parent.config
    sizes = resolve_target(target, config)
    check_layout(sizes, config.sizes, layout, prune_type)
    blocks = layout.tensor if prune_type == "balance" else 1
    layers = np.array([layer for layer in range(config.num_layers) if layer not in target.drop_layers], dtype=np.intp)

    def choose(axis: str, layer: int | None, blocks: int) -> Index:
        if sizes[axis] == config.sizes[axis]:
            return np.arange(sizes[axis])
        return best(criterion(axis, layer), sizes[axis], blocks)

    groups = tuple(choose("groups", int(layer), blocks) for layer in layers)
    per_group = sizes["heads"] // sizes["groups"]
    heads = tuple(
        best_in_groups(criterion("heads", int(layer)), kept, config.heads_per_group, per_group)
        for layer, kept in zip(layers, groups, strict=True)
    )
    kept: dict[str, tuple[Index, ...]] = {
        "hidden": (choose("hidden", None, 1),),
        "groups": groups,
        "heads": heads,
        "ffn": tuple(choose("ffn", int(layer), blocks) for layer in layers),
    }
    pruned = [axis for axis in kept if sizes[axis] != config.sizes[axis] and criterion_name != "random"]
    scores = {axis: [criterion(axis, None if axis == "hidden" else int(i)) for i in layers] for axis in pruned}
    return Plan(
        layers=layers,
        hidden=kept["hidden"][0],
        **{axis: kept[axis] for axis in LAYER_AXES},
        parent_sizes=config.sizes,
        parent_fingerprint=fingerprint(parent),
        prune_type=prune_type,
        tensor_parallel=layout.tensor,
        criterion=criterion_name,
        layer_criterion=layer_criterion,
        seed=seed,
        scores_digest=scores_digest,
        importance_kept=_by_layer(scores, kept, _share),
        balance_tax=_by_layer(
            {axis: scores[axis] for axis in ("groups", "ffn") if axis in scores and blocks > 1},
            kept,
            lambda scores, index: 1 - _share(scores, index) / _share(scores, best(scores, len(index))),
        ),
        norm_gains=_norm_gains(calibration, layers, kept["hidden"][0]) if correct_norms and calibration else (),
    )


def _share(scores: Scores, index: Index) -> float:
    """Return the share of all scores that these indices hold; of no scores at all they hold everything."""
    return float(scores[index].sum() / total) if (total := scores.sum()) else 1.0


def _by_layer(
    scores: Mapping[str, list[Scores]],
    kept: Mapping[str, tuple[Index, ...]],
    measure: Callable[[Scores, Index], float],
) -> dict[str, tuple[float, ...]]:
    """Return what `measure` says of each axis, in every kept layer that has an index set of its own."""
    return {
        axis: tuple(round(float(measure(s, index)), 6) for s, index in zip(scores[axis], kept[axis], strict=False))
        for axis in scores
    }


def _norm_gains(calibration: Calibration, layers: Index, hidden: Index) -> tuple[float, ...]:
    """Return by what to multiply the gains of each kept layer's two norms and of the final one.

    The kept channels hold the fraction v of the sum of squares, so that the new root mean square is
    sqrt(v * parent's hidden / hidden) of the old one; a gain multiplied by that gives what the parent's norm gave.
    """
    squares = calibration.sums["norm_inputs"]
    rows = np.append(np.stack([2 * layers, 2 * layers + 1], axis=1).ravel(), len(squares) - 1)
    kept = squares[rows][:, hidden].mean(axis=1) / squares[rows].mean(axis=1)
    return tuple(np.sqrt(kept).tolist())
