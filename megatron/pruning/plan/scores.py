"""Scores: what one pass of the parent over text leaves, a small file of sums from which every score is derived.

The file is safetensors, float64. Sums, not means: they add up over sequences, data-parallel copies and interrupted
runs, and are the same for every layout within rounding. With A[b, c] the mean over the sequence of |a[s, b, c]|:

    norm_outputs    [2 * layers, hidden]          sum over sequences b of A^2, after both norms of every layer
    norm_inputs     [2 * layers + 1, hidden]      sum over tokens of x^2, before those norms and the final one
    heads           [layers, heads]               sum over sequences and head_dim of A^2, of the input of o_proj
    ffn             [layers, ffn]                 sum over sequences of A^2, of the input of down_proj
    added_by_heads  [layers, heads]               sum over tokens of |what o_proj adds for this head|^2
    added_by_groups [layers, groups]              the same, for all heads of a query group together
    added_by_ffn    [layers, ffn]                 sum over tokens of |what down_proj adds for this channel|^2
    layer_cosines   [layers + 1, layers + 1]      sum over positions of cos(x_i, x_j); x_i enters layer i
    layer_losses    [layers + 1]                  sum over tokens of the loss without layer i; last: with all

The activation score of an index is sqrt(sum_b A^2), the aggregation "batch L2, sequence mean" that did best in Minitron
(arXiv 2407.14679, table 11), its contribution the root of what it adds; block influence is 1 - mean cos(x_i, x_i+1)
(ShortGPT, arXiv 2403.03853).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron.pruning.model.axes import AXIS, PER_LAYER, PRUNABLE
from megatron.pruning.storage.small_files import parse_as, write_durably

VERSION = 3  # 1 knew its model by one row of each weight, 2 had no contributions
OTHER_MODEL = "the same shape, other weights or another dtype"
_FACTS = "calibration"  # the key that the file's metadata has for them, a part of the format

Array = NDArray[np.float64]
# The scores of one axis in one layer (None: of an axis that all layers share); higher is better.
AxisScores = Callable[[str, int | None], Array]
Sums = Mapping[str, Array]


def shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array for a model whose axes have `sizes`."""
    layers = sizes["layers"]
    return {
        "norm_outputs": (2 * layers, sizes["hidden"]),
        "norm_inputs": (2 * layers + 1, sizes["hidden"]),
        "heads": (layers, sizes["heads"]),
        "ffn": (layers, sizes["ffn"]),
        **{f"added_by_{axis}": (layers, sizes[axis]) for axis in PER_LAYER},
        "layer_cosines": (layers + 1, layers + 1),
        "layer_losses": (layers + 1,),
    }


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the sums were summed over.

    `sequences` of `sequence_length` tokens are in, of the `sequences_wanted` that were asked for; the layers' losses
    are those of the first `loss_sequences`, the cosines those of `positions` in every sequence. `loss` is the parent's
    mean loss in nats on all of it, computed in `dtype`. `parent` and `text` are digests, `sizes` those of the axes
    that can be pruned.
    """

    sequences: int
    sequences_wanted: int
    sequence_length: int
    positions: int
    loss_sequences: int
    parent: str
    text: str
    dtype: str
    loss: float
    sizes: dict[str, int]

    def __post_init__(self) -> None:
        sizes = self.sizes
        if sorted(sizes) != sorted(PRUNABLE) or not all(1 <= size <= AXIS[axis].limit for axis, size in sizes.items()):
            raise ValueError(f"its sizes must be of {', '.join(PRUNABLE)}, from 1 to what a model may have")
        if not 0 <= self.sequences <= self.sequences_wanted or not 0 <= self.loss_sequences <= self.sequences_wanted:
            raise ValueError(
                f"it says that {self.sequences} and {self.loss_sequences} of {self.sequences_wanted} are in"
            )
        if not 1 <= self.positions <= self.sequence_length:
            raise ValueError(f"it compares {self.positions} positions of sequences of {self.sequence_length}")


@dataclass(frozen=True)
class Scores:
    """The sums, and what they were summed over; `digest` is the file's that they were read from."""

    facts: Facts
    sums: Sums
    digest: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return self.facts.sequences * self.facts.sequence_length

    @property
    def block_influence(self) -> Array:
        """Return 1 - mean cosine between what enters and what leaves each layer, `[layers]`."""
        return self.block_distance(1)

    def block_distance(self, length: int) -> Array:
        """Return 1 - mean cosine between what enters layer i and what leaves layer i + length - 1, for each i."""
        compared = self.facts.sequences * self.facts.positions
        distances: Array = 1 - np.diagonal(self.sums["layer_cosines"], length) / compared
        return distances

    @property
    def loss_rise(self) -> Array:
        """Return by how much the mean loss rises without each layer, in nats, `[layers]`. ValueError: not measured."""
        facts = self.facts
        if not facts.loss_sequences:
            raise ValueError("the scores hold no losses of single layers: score again with --layer-loss")
        losses = self.sums["layer_losses"] / (min(facts.sequences, facts.loss_sequences) * facts.sequence_length)
        rise: Array = losses[:-1] - losses[-1]
        return rise

    @property
    def activations(self) -> AxisScores:
        """Return the activation scores by axis and layer. A query group's is that of its heads together."""
        sizes = self.facts.sizes
        groups = self.sums["heads"].reshape(sizes["layers"], sizes["groups"], -1).sum(axis=2)
        per_layer = {"heads": self.sums["heads"], "ffn": self.sums["ffn"], "groups": groups}
        hidden = np.sqrt(self.sums["norm_outputs"]).sum(axis=0)
        return lambda axis, layer: hidden if axis == "hidden" else np.sqrt(per_layer[axis][layer])

    @property
    def contributions(self) -> AxisScores:
        """Return by axis and layer the root of what each index adds; of the hidden size, the activation scores."""
        return lambda axis, layer: (
            self.activations(axis, layer) if axis == "hidden" else np.sqrt(self.sums[f"added_by_{axis}"][layer])
        )

    def norm_gains(self, layers: NDArray[np.intp], hidden: NDArray[np.intp]) -> tuple[float, ...]:
        """Return by what to multiply the gains of each kept layer's two norms and of the final one.

        The kept channels hold the fraction v of the sum of squares, so that the new root mean square is
        sqrt(v * parent's hidden / hidden) of the old one; a gain multiplied by that gives what the parent's norm gave.
        """
        squares = self.sums["norm_inputs"]
        rows = np.append(np.stack([2 * layers, 2 * layers + 1], axis=1).ravel(), len(squares) - 1)
        kept = squares[rows][:, hidden].mean(axis=1) / squares[rows].mean(axis=1)
        return tuple(np.sqrt(kept).tolist())

    def plus(self, sums: Sums, sequences: int, loss: float) -> "Scores":
        """Return this with the sums over `sequences` more, whose mean loss was `loss`, added."""
        total = self.facts.sequences + sequences
        mean = (self.facts.loss * self.facts.sequences + loss * sequences) / max(total, 1)
        facts = msgspec.structs.replace(self.facts, sequences=total, loss=mean)
        return Scores(facts, {name: self.sums[name] + array for name, array in sums.items()})

    def same_job(self, other: "Scores") -> bool:
        """Return whether both are sums over the same text through the same model, maybe not equally far."""
        far = {"sequences": 0, "loss": 0.0, "positions": 1}
        return msgspec.structs.replace(self.facts, **far) == msgspec.structs.replace(other.facts, **far)


def write(path: Path, scores: Scores) -> None:
    """Write the file, whole or not at all."""
    from safetensors.numpy import save

    metadata = {"scores_version": str(VERSION), _FACTS: json.dumps(msgspec.to_builtins(scores.facts))}
    aside = path.with_name(f".{path.name}.new")
    try:
        write_durably(aside, save({name: np.ascontiguousarray(a) for name, a in scores.sums.items()}, metadata))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read(path: Path) -> Scores:
    """Read what `write` wrote. Raises ValueError for anything else, for shapes that disagree, and for NaN."""
    from safetensors import SafetensorError

    if not path.is_file():
        raise ValueError(f"{path} is not a file: tools/score_importance.py makes one of scores")
    try:
        scores = _read(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a file of scores: {error}") from error
    for name, array in scores.sums.items():
        if not np.isfinite(array).all() or ((array < 0).any() and name != "layer_cosines"):
            raise ValueError(f"{path}: {name} holds NaN, infinite or negative sums: scoring went wrong, score again")
    return dataclasses.replace(scores, digest=digest(path))


def digest(path: Path) -> str:
    """Return 16 hex digits that tell scores files apart."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _read(path: Path) -> Scores:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if (version := metadata.get("scores_version")) != str(VERSION):
            raise ValueError(f"it has version {version}, this program reads {VERSION}")
        facts = parse_as(Facts, metadata.get(_FACTS, "").encode(), "its metadata")
        arrays = {name: file.get_slice(name) for name in file.keys()}
        expected = shapes(facts.sizes)
        if (found := {name: tuple(array.get_shape()) for name, array in arrays.items()}) != expected:
            raise ValueError(f"its arrays are {found}, its model of {facts.sizes} has {expected}")
        if any(array.get_dtype() != "F64" for array in arrays.values()):
            raise ValueError("its arrays are not float64")
        return Scores(facts, {name: file.get_tensor(name) for name in expected})


def read_for(path: Path, parent: str, where: Path, sizes: Mapping[str, int], least_tokens: int) -> Scores:
    """Read a scores file that is to decide about the model at `where`, whose fingerprint is `parent`.

    Raises ValueError for scores of another model, unfinished ones, and ones of fewer than `least_tokens` tokens.
    """
    scores = read(path)
    found = scores.facts
    if found.sizes != {axis: sizes[axis] for axis in PRUNABLE}:
        raise ValueError(f"{path} scores a model of {found.sizes}, {where} is {dict(sizes)}: score this one")
    if found.parent != parent:
        raise ValueError(
            f"{path} scores a model with fingerprint {found.parent}, but {where} has {parent}: {OTHER_MODEL}"
        )
    if found.sequences < found.sequences_wanted:
        raise ValueError(
            f"{path} is of an interrupted run, {found.sequences} of {found.sequences_wanted} sequences: run it again"
        )
    if scores.tokens < least_tokens:
        raise ValueError(
            f"{path} comes from {scores.tokens:,} tokens, fewer than --min-scores-tokens {least_tokens:,}: score more "
            "text, or lower that"
        )
    return scores
