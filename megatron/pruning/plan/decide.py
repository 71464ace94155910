"""Deciding: from what the user asked for, the parent and its scores, to a plan. What cannot be is refused here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron.pruning.model.axes import AXIS, BLOCKS, CHOSEN, PER_LAYER, PRUNABLE
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.choose import (
    CRITERIA,
    CRITERION,
    CRITERION_BY_SCORES,
    LAYER_CRITERIA,
    LAYER_CRITERION,
    LAYER_CRITERION_BY_SCORES,
    SEED,
    best,
    best_in_groups,
)
from megatron.pruning.plan.plan import BALANCE, PRUNE_TYPE, Evidence, Plan, check_layout
from megatron.pruning.plan.scores import Array, AxisScores, Scores
from megatron.pruning.storage.views import Index

DROP_LAYERS = "--drop-layers"
REMAIN_FLAGS = (*(AXIS[axis].flag or "" for axis in PRUNABLE), DROP_LAYERS)


@dataclass(frozen=True)
class PruneRequest:
    """What the user asked for; None and what is left out mean the default, which heeds scores where there are some.

    `remain` has the sizes that remain by axis (an axis that is not named stays as it is), `drop_layers` the layers that
    go, numbered as in the parent. With `prune_type` balance each tensor-parallel block of `layout` keeps the same
    number. `correct_norms` scales the norms' gains for the mean square that hidden pruning takes away.
    """

    layout: Layout = field(default_factory=Layout)
    remain: Mapping[str, int] = field(default_factory=dict)
    drop_layers: tuple[int, ...] = ()
    prune_type: str | None = None
    criterion: str | None = None
    layer_criterion: str | None = None
    seed: int | None = None
    correct_norms: bool | None = None

    @property
    def needs_scores(self) -> list[str]:
        """Flags that cannot do without scores."""
        criterion, layer_criterion = self.criterion, self.layer_criterion
        needing = {
            f"--criterion {criterion}": criterion and CRITERIA[criterion].needs_scores,
            f"--layer-criterion {layer_criterion}": layer_criterion and LAYER_CRITERIA[layer_criterion].needs_scores,
            "--correct-norms": self.correct_norms,
        }
        return [flag for flag, needs in needing.items() if needs]

    @property
    def heeds_scores(self) -> bool:
        """Whether anything is decided by scores if there are some."""
        criterion = CRITERIA[self.criterion or CRITERION_BY_SCORES]
        layer_criterion = LAYER_CRITERIA[self.layer_criterion or LAYER_CRITERION_BY_SCORES]
        return (
            criterion.needs_scores
            or ("layers" in self.remain and layer_criterion.needs_scores)
            or ("hidden" in self.remain and self.correct_norms is not False)
        )


def decide(request: PruneRequest, parent: Checkpoint, scores: Scores | None = None) -> Plan:
    """Decide what is kept. Raises ValueError for every request that `parent`, its layout or its scores cannot give."""
    config = parent.config
    if scores is None and (flags := request.needs_scores):
        raise ValueError(f"{flags[0]} needs --scores FILE, which tools/score_importance.py makes from text")
    layer_criterion = request.layer_criterion or (LAYER_CRITERION if scores is None else LAYER_CRITERION_BY_SCORES)
    dropped = _layers_to_drop(request, layer_criterion, config.num_layers, scores)
    sizes = pruned_sizes(request, config, dropped)
    # Everything is refused before the weights are read for a criterion's sake.
    prune_type, seed = request.prune_type or PRUNE_TYPE, SEED if request.seed is None else request.seed
    check_layout(sizes, config.sizes, request.layout, prune_type)
    name = request.criterion or (CRITERION if scores is None else CRITERION_BY_SCORES)
    axis_scores = CRITERIA[name].of(parent, seed, scores)
    layers = np.array([layer for layer in range(config.num_layers) if layer not in dropped], dtype=np.intp)
    blocks = request.layout.tensor if prune_type == BALANCE else 1
    kept = _choose(config, sizes, layers, axis_scores, blocks)
    shares = {} if CRITERIA[name].seeded else _scores_of_pruned(config, sizes, layers, axis_scores)
    corrected = scores is not None and request.correct_norms is not False and sizes["hidden"] < config.hidden_size
    gains = scores.norm_gains(layers, kept["hidden"][0]) if scores is not None and corrected else ()
    return Plan(
        layers=layers,
        hidden=kept["hidden"][0],
        **{axis: kept[axis] for axis in PER_LAYER},
        parent_sizes=config.sizes,
        parent_fingerprint=fingerprint(parent),
        prune_type=prune_type,
        tensor_parallel=request.layout.tensor,
        norm_gains=gains,
        evidence=Evidence(
            criterion=name,
            layer_criterion=layer_criterion if "layers" in request.remain else None,
            seed=seed,
            scores=scores.digest if scores else None,
            importance_kept=_by_layer(shares, kept, _share),
            balance_tax=_balance_tax(shares, kept) if blocks > 1 else {},
            block_influence=tuple(np.round(scores.block_influence, 6).tolist()) if scores else (),
        ),
    )


def _layers_to_drop(request: PruneRequest, criterion: str, layers: int, scores: Scores | None) -> tuple[int, ...]:
    """Return which layers go: those that were named, or by a criterion so that as many remain as were asked for."""
    keep = request.remain.get("layers")
    if keep is None:
        if request.layer_criterion:
            raise ValueError(
                f"--layer-criterion {request.layer_criterion} says which layers: add {AXIS['layers'].flag} N"
            )
        return request.drop_layers
    if request.drop_layers:
        raise ValueError(f"{DROP_LAYERS} and {AXIS['layers'].flag} both say which layers remain: give one of them")
    if not 1 <= keep <= layers:
        raise ValueError(f"{AXIS['layers'].flag} {keep} must lie between 1 and the parent's {layers}")
    if keep == layers:
        return ()
    return LAYER_CRITERIA[criterion].drop(layers, layers - keep, scores)


def pruned_sizes(request: PruneRequest, config: LlamaConfig, dropped: tuple[int, ...]) -> dict[str, int]:
    """Return the pruned model's axis sizes. Raises ValueError, naming the flag and both values, for what cannot be."""
    parent = config.sizes
    sizes = dict(parent)
    for axis in CHOSEN:
        wanted = request.remain.get(axis)
        if wanted is None:
            continue
        if not 1 <= wanted <= parent[axis]:
            raise ValueError(f"{AXIS[axis].flag} {wanted} must lie between 1 and the parent's {parent[axis]}")
        sizes[axis] = wanted
    if parent["groups"] == parent["heads"] and "groups" not in request.remain:
        sizes["groups"] = sizes["heads"]  # multi-head attention stays multi-head: each head takes its group along
    _check_heads(sizes, parent)
    for layer in dropped:
        if not 0 <= layer < parent["layers"]:
            raise ValueError(f"{DROP_LAYERS} {layer}: the parent's layers are numbered 0 to {parent['layers'] - 1}")
        if dropped.count(layer) > 1:
            raise ValueError(f"{DROP_LAYERS} names layer {layer} twice")
    sizes["layers"] -= len(dropped)
    if not sizes["layers"]:
        raise ValueError(f"{DROP_LAYERS} drops all {parent['layers']} layers: keep at least one")
    if sizes == parent:
        raise ValueError(f"nothing to prune: give at least one of {', '.join(REMAIN_FLAGS)} another value")
    if request.correct_norms and sizes["hidden"] == parent["hidden"]:
        raise ValueError(f"--correct-norms is for a smaller hidden size: add {AXIS['hidden'].flag}, or leave it out")
    return sizes


def _check_heads(sizes: Mapping[str, int], parent: Mapping[str, int]) -> None:
    heads, groups = sizes["heads"], sizes["groups"]
    heads_flag, groups_flag = AXIS["heads"].flag, AXIS["groups"].flag
    if heads % groups:
        raise ValueError(
            f"{heads_flag} {heads} is not a multiple of the {groups} query groups that remain: "
            f"every group must keep the same number of heads; choose a multiple, or give {groups_flag}"
        )
    has = parent["heads"] // parent["groups"]
    if heads // groups > has:
        raise ValueError(
            f"{heads} heads in {groups} query groups need {heads // groups} heads a group, but the parent has {has}: "
            f"give {heads_flag} at most {groups * has}, or a larger {groups_flag}"
        )


def _choose(
    config: LlamaConfig, sizes: Mapping[str, int], layers: Index, scores: AxisScores, blocks: int
) -> dict[str, tuple[Index, ...]]:
    """Return the kept indices of each axis, one set for all layers or one for each kept layer."""

    def choose(axis: str, layer: int | None, blocks: int) -> Index:
        if sizes[axis] == config.sizes[axis]:
            return np.arange(sizes[axis])
        return best(scores(axis, layer), sizes[axis], blocks)

    groups = tuple(choose("groups", int(layer), blocks) for layer in layers)
    per_group = sizes["heads"] // sizes["groups"]
    return {
        "hidden": (choose("hidden", None, 1),),
        "groups": groups,
        "heads": tuple(
            best_in_groups(scores("heads", int(layer)), kept, config.heads_per_group, per_group)
            for layer, kept in zip(layers, groups, strict=True)
        ),
        "ffn": tuple(choose("ffn", int(layer), blocks) for layer in layers),
    }


def _scores_of_pruned(
    config: LlamaConfig, sizes: Mapping[str, int], layers: Index, scores: AxisScores
) -> dict[str, list[Array]]:
    """Return the scores of the axes that get smaller, as many as there are index sets of each."""
    pruned = [axis for axis in CHOSEN if sizes[axis] != config.sizes[axis]]
    return {
        axis: [scores(axis, int(layer)) for layer in layers] if AXIS[axis].per_layer else [scores(axis, None)]
        for axis in pruned
    }


def _share(scores: Array, index: Index) -> float:
    """Return the share of all scores that these indices hold; of no scores at all they hold everything."""
    return float(scores[index].sum() / total) if (total := scores.sum()) else 1.0


def _balance_tax(
    scores: Mapping[str, list[Array]], kept: Mapping[str, tuple[Index, ...]]
) -> dict[str, tuple[float, ...]]:
    """Return the share of the best scores that is lost because every block keeps the same number."""
    balanced = {axis: scores[axis] for axis in BLOCKS if axis in scores}
    return _by_layer(
        balanced, kept, lambda scores, index: 1 - _share(scores, index) / _share(scores, best(scores, len(index)))
    )


def _by_layer(
    scores: Mapping[str, list[Array]],
    kept: Mapping[str, tuple[Index, ...]],
    measure: Callable[[Array, Index], float],
) -> dict[str, tuple[float, ...]]:
    """Return what `measure` says of each axis, in every kept layer that has an index set of its own."""
    return {
        axis: tuple(round(float(measure(s, index)), 6) for s, index in zip(scores[axis], kept[axis], strict=True))
        for axis in scores
    }
