"""The plan: which layers, channels, heads and groups of which parent are kept, and how that was decided.

A plan is decided once, for the whole model, before any weight is read; processes only apply it. It is a JSON file that
can be read, kept, and applied again. Index sets are written as ranges ("0-3,5"). decide.py makes it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron.pruning import __version__
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.layout import Layout
from megatron.pruning.storage.views import Index

VERSION = 1
MADE_BY = f"megatron-llama-pruning {__version__}"
LARGEST = 1 << 24  # that an axis may be
LAYER_AXES = ("groups", "heads", "ffn")
AXES = ("layers", "hidden", "ffn", "heads", "groups", "head_dim", "vocab")
PRUNE_TYPES = ("balance", "unbalance")
CRITERIA = ("random", "magnitude", "activation")
LAYER_CRITERIA = ("spaced", "block_influence", "contiguous", "loss")


@dataclass(frozen=True)
class Plan:
    """Kept indices, ascending. `groups`, `heads` and `ffn` have one entry for each kept layer, in order.

    `importance_kept` (share of the scores) and `balance_tax` (share lost to keeping the same number in every block)
    are by axis and kept layer. `norm_gains`, if any, multiply the gains of each kept layer's two norms and the final
    one.
    """

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
    layer_criterion: str | None = None
    seed: int = 1234
    scores_digest: str | None = None
    importance_kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    balance_tax: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    norm_gains: tuple[float, ...] = ()

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
            "made_by": MADE_BY,
            "criterion": self.criterion,
            "layer_criterion": self.layer_criterion,
            "seed": self.seed,
            "scores": self.scores_digest,
            "prune_type": self.prune_type,
            "tensor_parallel": self.tensor_parallel,
            "parent": {"fingerprint": self.parent_fingerprint, **self.parent_sizes},
            "pruned": self.sizes,
            "importance_kept": self.importance_kept,
            "balance_tax": self.balance_tax,
            "norm_gains": self.norm_gains,
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
                layer_criterion=content.get("layer_criterion"),
                seed=int(content["seed"]),
                scores_digest=content.get("scores"),
                importance_kept=_floats(content.get("importance_kept", {})),
                balance_tax=_floats(content.get("balance_tax", {})),
                norm_gains=tuple(float(gain) for gain in content.get("norm_gains", ())),
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
        if set(sizes) != set(AXES) or not all(1 <= size <= LARGEST for size in sizes.values()):
            raise ValueError(f"the parent's sizes must be of {', '.join(AXES)}, from 1 to {LARGEST}")
        if sizes["heads"] % sizes["groups"]:
            raise ValueError(f"the parent's {sizes['heads']} heads are no multiple of its {sizes['groups']} groups")
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
        gains = self.norm_gains
        if gains and (len(gains) != 2 * len(self.layers) + 1 or not all(1e-6 < gain < 1e6 for gain in gains)):
            raise ValueError(f"norm_gains must be {2 * len(self.layers) + 1} positive numbers, or none")
        for what, known in ((self.criterion, CRITERIA), (self.layer_criterion, (None, *LAYER_CRITERIA))):
            if what not in known:
                raise ValueError(f"criterion {str(what)[:40]!r} is none of {', '.join(map(str, known))}")
        for evidence in (self.importance_kept, self.balance_tax):
            for axis, shares in evidence.items():
                if axis not in AXES or not shares or not all(math.isfinite(share) for share in shares):
                    raise ValueError(f"importance_kept and balance_tax must be numbers by axis, not {axis[:40]!r}")
        if not 1 <= self.tensor_parallel <= LARGEST:
            raise ValueError(f"tensor_parallel is {self.tensor_parallel}")
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


def _floats(content: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {str(axis): tuple(float(value) for value in values) for axis, values in content.items()}


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
        first, _, last = item.partition("-")
        start, stop = int(first), int(last or first)
        if not before < start <= stop < LARGEST:  # ascending, so that all of them together are not too many either
            raise ValueError(f"{item[:40]!r} is not a range of indices above {before}")
        parts.append(np.arange(start, stop + 1))
        before = stop
    return np.concatenate(parts)


def check_layout(
    sizes: Mapping[str, int], parent: Mapping[str, int], layout: Layout, prune_type: str = "balance"
) -> None:
    """Raise ValueError unless the parent and, when balanced, the pruned model divide over the ranks of `layout`."""
    layout.check_split(parent, "the parent's")
    if prune_type == "balance":
        layout.check_split(sizes, "the pruned model's")
    layout.check_stages(sizes, "the pruned model's")
