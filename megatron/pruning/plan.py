"""The plan: which layers, channels, heads and groups of which parent are kept, and how that was decided.

A plan is decided once, for the whole model, before any weight is read; processes only apply it. It is a JSON file that
can be read, kept, and applied again. Index sets are written as ranges ("0-3,5"). What cannot be is refused here.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.pruning.checkpoint import Checkpoint
from megatron.pruning.choose import Criterion, best, best_in_groups
from megatron.pruning.config import LlamaConfig
from megatron.pruning.layout import Layout
from megatron.pruning.views import Index

VERSION = 1
LAYER_AXES = ("groups", "heads", "ffn")
PRUNE_TYPES = ("balance", "unbalance")

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


@dataclass(frozen=True)
class Plan:
    """Kept indices, ascending. `groups`, `heads` and `ffn` have one entry for each kept layer, in order."""

    layers: Index
    hidden: Index
    groups: tuple[Index, ...]
    heads: tuple[Index, ...]
    ffn: tuple[Index, ...]
    parent_sizes: Mapping[str, int]
    parent_fingerprint: str
    prune_type: str = "balance"
    tensor_parallel: int = 1
    criterion: str = "random"
    seed: int = 1234

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes of the pruned model."""
        kept = {"layers": self.layers, "hidden": self.hidden}
        kept |= {axis: getattr(self, axis)[0] for axis in LAYER_AXES}
        return {**self.parent_sizes, **{axis: len(index) for axis, index in kept.items()}}

    def keep(self, layer: int | None) -> dict[str, Index]:
        """Return what is kept of each axis, for the weights of pruned layer `layer` or those outside the layers."""
        keep = {"hidden": self.hidden}
        return keep if layer is None else keep | {axis: getattr(self, axis)[layer] for axis in LAYER_AXES}

    def to_json(self) -> str:
        """Return the plan file's content: the same bytes for the same plan."""
        per_layer = [
            {"layer": int(layer), **{axis: to_ranges(getattr(self, axis)[i]) for axis in LAYER_AXES}}
            for i, layer in enumerate(self.layers)
        ]
        content = {
            "version": VERSION,
            "criterion": self.criterion,
            "seed": self.seed,
            "prune_type": self.prune_type,
            "tensor_parallel": self.tensor_parallel,
            "parent": {"fingerprint": self.parent_fingerprint, **self.parent_sizes},
            "pruned": self.sizes,
            "keep": {"layers": to_ranges(self.layers), "hidden": to_ranges(self.hidden), "per_layer": per_layer},
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Plan":
        """Read a plan file. Raises ValueError, naming `where`, for what is not a valid plan."""
        try:
            content = json.loads(text)
            if content["version"] != VERSION:
                raise ValueError(f"it has version {content['version']}, this program reads {VERSION}")
            keep, parent = content["keep"], dict(content["parent"])
            plan = cls(
                layers=from_ranges(keep["layers"]),
                hidden=from_ranges(keep["hidden"]),
                **{axis: tuple(from_ranges(entry[axis]) for entry in keep["per_layer"]) for axis in LAYER_AXES},
                parent_fingerprint=str(parent.pop("fingerprint")),
                parent_sizes={axis: int(size) for axis, size in parent.items()},
                prune_type=str(content["prune_type"]),
                tensor_parallel=int(content["tensor_parallel"]),
                criterion=str(content["criterion"]),
                seed=int(content["seed"]),
            )
            plan._check()
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"{where} is not a pruning plan: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{where} is not a valid plan: {error}") from error
        return plan

    def _check(self) -> None:
        """Raise ValueError unless the index sets ascend, in range, of one size in all layers and tied by groups."""
        sizes = self.parent_sizes
        for axis, kept in (
            ("layers", [self.layers]),
            ("hidden", [self.hidden]),
            *((a, getattr(self, a)) for a in LAYER_AXES),
        ):
            if axis in LAYER_AXES and len(kept) != len(self.layers):
                raise ValueError(f"{axis} are given for {len(kept)} layers, but {len(self.layers)} are kept")
            for index in kept:
                if not len(index) or index[0] < 0 or index[-1] >= sizes[axis] or (np.diff(index) < 1).any():
                    raise ValueError(f"{axis} kept must ascend within 0-{sizes[axis] - 1}: {to_ranges(index)[:60]}")
                if len(index) != len(kept[0]):
                    raise ValueError(f"{axis} has {len(index)} kept in one layer and {len(kept[0])} in another")
        if self.prune_type not in PRUNE_TYPES:
            raise ValueError(f"prune_type {self.prune_type!r} is none of {', '.join(PRUNE_TYPES)}")
        per_group = sizes["heads"] // sizes["groups"]
        for groups, heads in zip(self.groups, self.heads, strict=True):
            counts = np.bincount(heads // per_group, minlength=sizes["groups"])
            if set(np.flatnonzero(counts)) != set(groups) or len(set(counts[groups])) != 1:
                raise ValueError("each kept query group must keep the same number of its own heads")

    def check_parent(self, parent: Checkpoint) -> None:
        """Raise ValueError unless `parent` is the model this plan was made for."""
        if dict(self.parent_sizes) != parent.config.sizes:
            raise ValueError(
                f"the plan is for a parent of {dict(self.parent_sizes)}, {parent.path} is {parent.config.sizes}"
            )
        if self.parent_fingerprint != (found := fingerprint(parent)):
            raise ValueError(
                f"the plan is for a parent with fingerprint {self.parent_fingerprint}, but {parent.path} has {found}: "
                "the same shape, other weights or another dtype"
            )


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
    parts = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        start, stop = int(first), int(last or first)
        if not 0 <= start <= stop < 1 << 24:
            raise ValueError(f"{item!r} is not a range of indices")
        parts.append(np.arange(start, stop + 1))
    return np.concatenate(parts)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits that tell models of one shape apart, the same in every format and layout.

    Digests the first row of every weight: a few MB even of the largest model.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config.sizes, sort_keys=True).encode())
    for _, _, view in checkpoint.weights():
        digest.update(view.dtype.encode() + view.read(np.zeros(1, dtype=np.intp)).tobytes())
    return digest.hexdigest()[:16]


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
        raise ValueError(f"nothing to prune: give at least one of {', '.join(FLAG_OF_AXIS.values())} another value")
    return sizes


def spaced_layers(layers: int, keep: int) -> tuple[int, ...]:
    """Return which of `layers` to drop so that `keep` remain: evenly spaced, never the first, nor the last unless only
    the first remains.

    Raises ValueError unless 1 <= keep <= layers.
    """
    if not 1 <= keep <= layers:
        raise ValueError(f"--num-layers-remain {keep} must lie between 1 and the parent's {layers}")
    dropped = layers - keep
    return tuple((i + 1) * layers // (dropped + 1) for i in range(dropped))


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


def check_layout(
    sizes: Mapping[str, int], parent: Mapping[str, int], layout: Layout, prune_type: str = "balance"
) -> None:
    """Raise ValueError unless the parent and, when balanced, the pruned model divide over the ranks of `layout`."""
    layout.check_split(parent, "the parent's")
    if prune_type == "balance":
        layout.check_split(sizes, "the pruned model's")
    layout.check_stages(sizes, "the pruned model's")


def make_plan(
    parent: Checkpoint,
    target: Target,
    criterion: Criterion,
    *,
    layout: Layout,
    prune_type: str = "balance",
    criterion_name: str = "random",
    seed: int = 1234,
) -> Plan:
    """Decide what is kept. Raises ValueError for every target that `parent` or `layout` cannot give."""
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
    return Plan(
        layers=layers,
        hidden=choose("hidden", None, 1),
        groups=groups,
        heads=heads,
        ffn=tuple(choose("ffn", int(layer), blocks) for layer in layers),
        parent_sizes=config.sizes,
        parent_fingerprint=fingerprint(parent),
        prune_type=prune_type,
        tensor_parallel=layout.tensor,
        criterion=criterion_name,
        seed=seed,
    )


def describe(plan: Plan, before: LlamaConfig, after: LlamaConfig, bytes_before: int, bytes_after: int) -> str:
    """Return the before/after table: axis, parent, pruned, and what remains."""
    rows: list[Sequence[Any]] = [("", "parent", "pruned", "remains")]
    names = {"hidden": "hidden size", "heads": "attention heads", "groups": "query groups", "ffn": "ffn hidden size"}
    for axis, name in {"layers": "layers", **names}.items():
        rows.append(_row(name, before.sizes[axis], plan.sizes[axis]))
    rows.append(_row("parameters", before.parameters, after.parameters))
    rows.append(_row("bytes", bytes_before, bytes_after))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row))
        for row in rows
    ]
    return "\n".join(lines)


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"
