"""The plan: which layers, channels, heads and groups of which parent are kept, and what spoke for them.

A plan is decided once, for the whole model, before any weight is read; processes only apply it. It is a JSON file that
can be read, kept, and applied again. Index sets are written as ranges ("0-3,5"). decide.py makes it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np

from megatron.pruning import __version__
from megatron.pruning.model.axes import AXIS, BLOCKS, CHOSEN, PER_LAYER
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.choose import CRITERIA, CRITERION, LAYER_CRITERIA, SEED
from megatron.pruning.plan.scores import OTHER_MODEL
from megatron.pruning.storage.small_files import parse_as
from megatron.pruning.storage.views import Index

VERSION = 2  # 1 knew its parent by one row of each weight
MADE_BY = f"megatron-llama-pruning {__version__}"
LARGEST = max(axis.limit for axis in AXIS.values())
BALANCE = "balance"
UNBALANCE = "unbalance"
PRUNE_TYPES = (BALANCE, UNBALANCE)
PRUNE_TYPE = BALANCE  # unless asked for the other


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """How a plan was decided, and what its choice is worth by the scores that were seen.

    `layer_criterion` is None where the user named the layers, `scores` is the digest of a file that took part.
    `importance_kept` (share of the scores) and `balance_tax` (share lost to keeping the same number in every block) are
    by axis and kept layer, `block_influence` is by layer of the parent, and empty without a file of scores.
    """

    criterion: str = CRITERION
    layer_criterion: str | None = None
    seed: int = SEED
    scores: str | None = None
    importance_kept: dict[str, tuple[float, ...]] = {}
    balance_tax: dict[str, tuple[float, ...]] = {}
    block_influence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Kept indices, ascending. `groups`, `heads` and `ffn` have one entry for each kept layer, in order.

    `norm_gains`, if any, multiply the gains of each kept layer's two norms and of the final one.
    """

    layers: Index
    hidden: Index
    groups: tuple[Index, ...]
    heads: tuple[Index, ...]
    ffn: tuple[Index, ...]
    parent_sizes: Mapping[str, int]
    parent_fingerprint: str
    prune_type: str = PRUNE_TYPE
    tensor_parallel: int = 1
    norm_gains: tuple[float, ...] = ()
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes of the pruned model."""
        kept = {"layers": self.layers, "hidden": self.hidden, **self.keep(0)}
        return {**self.parent_sizes, **{axis: len(index) for axis, index in kept.items()}}

    @property
    def dropped_layers(self) -> list[int]:
        """Numbers of the parent's layers that are dropped."""
        return sorted(set(range(self.parent_sizes["layers"])) - set(self.layers.tolist()))

    def keep(self, layer: int | None) -> dict[str, Index]:
        """Return what is kept of each axis, for the weights of pruned layer `layer` or those outside the layers."""
        keep = {"hidden": self.hidden}
        return keep if layer is None else keep | {axis: getattr(self, axis)[layer] for axis in PER_LAYER}

    def to_json(self) -> str:
        """Return the plan file's content: the same bytes for the same plan."""
        content = _PlanFile(
            version=VERSION,
            **msgspec.structs.asdict(self.evidence),
            made_by=MADE_BY,
            prune_type=self.prune_type,
            tensor_parallel=self.tensor_parallel,
            parent={"fingerprint": self.parent_fingerprint, **self.parent_sizes},
            pruned=self.sizes,
            norm_gains=self.norm_gains,
            keep=_Keep(
                layers=to_ranges(self.layers),
                hidden=to_ranges(self.hidden),
                per_layer=[
                    _LayerKeep(int(layer), *(to_ranges(getattr(self, axis)[i]) for axis in PER_LAYER))
                    for i, layer in enumerate(self.layers)
                ],
            ),
        )
        return json.dumps(msgspec.to_builtins(content), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Plan":
        """Read a plan file. Raises ValueError, naming `where` and the place in it, for what is not a valid plan."""
        content = parse_as(_PlanFile, text.encode(errors="replace"), f"{where} is not a pruning plan")
        keep, parent = content.keep, dict(content.parent)
        try:
            if content.version != VERSION:
                raise ValueError(f"it has version {content.version}, this program reads {VERSION}")
            plan = cls(
                layers=from_ranges(keep.layers),
                hidden=from_ranges(keep.hidden),
                **{axis: tuple(from_ranges(getattr(entry, axis)) for entry in keep.per_layer) for axis in PER_LAYER},
                parent_fingerprint=str(parent.pop("fingerprint", "")),
                parent_sizes={axis: _size(axis, size) for axis, size in parent.items()},
                prune_type=content.prune_type,
                tensor_parallel=content.tensor_parallel,
                norm_gains=content.norm_gains,
                evidence=Evidence(**{name: getattr(content, name) for name in Evidence.__struct_fields__}),
            )
            if [entry.layer for entry in keep.per_layer] != plan.layers.tolist():
                raise ValueError(f"keep.per_layer is not of the layers {keep.layers[:60]}, in their order")
            _check_indices(plan)
            _check_ties(plan)
            _check_evidence(plan)
            if content.pruned not in ({}, plan.sizes):
                raise ValueError(f"it says that the pruned model is {content.pruned}, but keeps {plan.sizes}")
        except ValueError as error:
            raise ValueError(f"{where} is not a valid plan: {error}") from error
        return plan

    def check_parent(self, parent: Checkpoint) -> None:
        """Raise ValueError unless `parent` is the model this plan was made for."""
        if dict(self.parent_sizes) != parent.config.sizes:
            raise ValueError(
                f"the plan is for a parent of {dict(self.parent_sizes)}, {parent.path} is {parent.config.sizes}"
            )
        if self.parent_fingerprint != (found := fingerprint(parent)):
            raise ValueError(
                f"the plan is for a parent with fingerprint {self.parent_fingerprint}, but {parent.path} has {found}: "
                f"{OTHER_MODEL}"
            )


# The plan file, field by field in the order in which it is written. `parent` has a fingerprint beside the sizes.
_Shares = dict[str, tuple[float, ...]]


class _LayerKeep(msgspec.Struct, forbid_unknown_fields=True):
    layer: int
    groups: str
    heads: str
    ffn: str


class _Keep(msgspec.Struct, forbid_unknown_fields=True):
    layers: str
    hidden: str
    per_layer: list[_LayerKeep]


class _PlanFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    version: int
    made_by: str = ""
    criterion: str
    layer_criterion: str | None = None
    seed: int
    scores: str | None = None
    prune_type: str
    tensor_parallel: Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
    parent: dict[str, int | str]
    pruned: dict[str, int] = {}
    importance_kept: _Shares = {}
    balance_tax: _Shares = {}
    block_influence: tuple[float, ...] = ()
    norm_gains: tuple[float, ...] = ()
    keep: _Keep


def _size(axis: str, size: int | str) -> int:
    if axis not in AXIS or not isinstance(size, int) or not 1 <= size <= AXIS[axis].limit:
        raise ValueError(f"the parent's sizes must be of {', '.join(AXIS)}, from 1 to {LARGEST}")
    return size


def _check_indices(plan: Plan) -> None:
    """Raise ValueError unless the index sets ascend, within the parent's sizes, and are of one size in all layers."""
    sizes = plan.parent_sizes
    if set(sizes) != set(AXIS):
        raise ValueError(f"the parent's sizes must be of {', '.join(AXIS)}, from 1 to {LARGEST}")
    per_layer = {axis: getattr(plan, axis) for axis in PER_LAYER}
    for axis, kept in per_layer.items():
        if len(kept) != len(plan.layers):
            raise ValueError(f"{axis} are given for {len(kept)} layers, but {len(plan.layers)} are kept")
    for axis, kept in {"layers": (plan.layers,), "hidden": (plan.hidden,), **per_layer}.items():
        for index in kept:
            if not len(index) or index[0] < 0 or index[-1] >= sizes[axis] or (np.diff(index) < 1).any():
                raise ValueError(f"{axis} kept must ascend within 0-{sizes[axis] - 1}: {to_ranges(index)[:60]}")
            if len(index) != len(kept[0]):
                raise ValueError(f"{axis} has {len(index)} kept in one layer and {len(kept[0])} in another")


def _check_ties(plan: Plan) -> None:
    """Raise ValueError unless heads are tied to their groups, and a gain to each norm."""
    sizes, gains = plan.parent_sizes, plan.norm_gains
    if sizes["heads"] % sizes["groups"]:
        raise ValueError(f"the parent's {sizes['heads']} heads are no multiple of its {sizes['groups']} groups")
    if ranks := [axis for axis in BLOCKS if sizes[axis] % plan.tensor_parallel]:
        raise ValueError(f"tensor_parallel {plan.tensor_parallel} does not divide the parent's {' and '.join(ranks)}")
    per_group = sizes["heads"] // sizes["groups"]
    for groups, heads in zip(plan.groups, plan.heads, strict=True):
        counts = np.bincount(heads // per_group, minlength=sizes["groups"])
        if set(np.flatnonzero(counts)) != set(groups) or len(set(counts[groups])) != 1:
            raise ValueError("each kept query group must keep the same number of its own heads")
    if gains and (len(gains) != 2 * len(plan.layers) + 1 or not all(1e-6 < gain < 1e6 for gain in gains)):
        raise ValueError(f"norm_gains must be {2 * len(plan.layers) + 1} positive numbers, or none")


def _check_evidence(plan: Plan) -> None:
    evidence = plan.evidence
    if plan.prune_type not in PRUNE_TYPES:
        raise ValueError(f"prune_type {plan.prune_type!r} is none of {', '.join(PRUNE_TYPES)}")
    for what, known in ((evidence.criterion, CRITERIA), (evidence.layer_criterion, (None, *LAYER_CRITERIA))):
        if what not in known:
            raise ValueError(f"criterion {str(what)[:40]!r} is none of {', '.join(map(str, known))}")
    for shares in (evidence.importance_kept, evidence.balance_tax):
        for axis, values in shares.items():
            if axis not in CHOSEN or len(values) != (len(plan.layers) if AXIS[axis].per_layer else 1):
                raise ValueError(
                    "importance_kept and balance_tax must be numbers by axis, one for each kept layer or for hidden: "
                    f"{axis[:40]!r} has {len(values)}"
                )
    layers, influence = plan.parent_sizes["layers"], evidence.block_influence
    if influence and (len(influence) != layers or not all(abs(value) <= 2 for value in influence)):
        raise ValueError(f"block_influence must be {layers} numbers up to 2, one for each layer of the parent, or none")


def check_layout(
    sizes: Mapping[str, int], parent: Mapping[str, int], layout: Layout, prune_type: str = PRUNE_TYPE
) -> None:
    """Raise ValueError unless the parent and, when balanced, the pruned model divide over the ranks of `layout`."""
    layout.check_split(parent, "the parent's")
    if prune_type == BALANCE:
        layout.check_split(sizes, "the pruned model's")
    layout.check_stages(sizes, "the pruned model's")


def to_ranges(index: Iterable[int]) -> str:
    """Write ascending indices as "0-3,5"."""
    values = np.asarray(list(index), dtype=np.intp)
    if not len(values):
        return ""
    breaks = np.flatnonzero(np.diff(values) != 1)
    firsts, lasts = values[[0, *(breaks + 1)]], values[[*breaks, len(values) - 1]]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def from_ranges(text: str) -> Index:
    """Read what `to_ranges` wrote."""
    parts, before = [], -1
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]{1,8})(?:-([0-9]{1,8}))?", item)
        if match is None:
            raise ValueError(f"{item[:40]!r} is not a range of indices such as 0-3")
        start, stop = int(match[1]), int(match[2] or match[1])
        if not before < start <= stop < LARGEST:  # ascending, so that all of them together are not too many either
            raise ValueError(f"{item[:40]!r} is not a range of indices above {before}")
        parts.append(np.arange(start, stop + 1))
        before = stop
    return np.concatenate(parts)
