"""What one calibration pass of the parent over text leaves: a small file of sums, from which every score is derived.

The file is safetensors, float64. Sums, not means: they add up over sequences, data-parallel copies and interrupted
runs, and are the same for every layout within rounding. With A[b, c] the mean over the sequence of |a[s, b, c]|:

    norm_outputs    [2 * layers, hidden]          sum over sequences b of A^2, after both norms of every layer
    norm_inputs     [2 * layers + 1, hidden]      sum over tokens of x^2, before those norms and the final one
    heads           [layers, heads]               sum over sequences and head_dim of A^2, of the input of o_proj
    ffn             [layers, ffn]                 sum over sequences of A^2, of the input of down_proj
    layer_cosines   [layers + 1, layers + 1]      sum over positions of cos(x_i, x_j); x_i enters layer i
    layer_losses    [layers + 1]                  sum over tokens of the loss without layer i; last: with all

Scores are sqrt(sum_b A^2), the aggregation "batch L2, sequence mean" that did best in Minitron (arXiv 2407.14679, table
11); block influence is 1 - mean cos(x_i, x_i+1) (ShortGPT, arXiv 2403.03853).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.plan.choose import Criterion, Scores
from megatron.pruning.storage.small_files import write_durably

VERSION = 1
OTHER_MODEL = "the same shape, other weights or another dtype"
AXES = ("layers", "hidden", "heads", "groups", "ffn")  # whose sizes must be the parent's
_COUNTS = ("sequences", "sequences_wanted", "sequence_length", "positions", "loss_sequences")

Sums = Mapping[str, NDArray[np.float64]]


def shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array for a model whose axes have `sizes`."""
    layers = sizes["layers"]
    return {
        "norm_outputs": (2 * layers, sizes["hidden"]),
        "norm_inputs": (2 * layers + 1, sizes["hidden"]),
        "heads": (layers, sizes["heads"]),
        "ffn": (layers, sizes["ffn"]),
        "layer_cosines": (layers + 1, layers + 1),
        "layer_losses": (layers + 1,),
    }


@dataclass(frozen=True)
class Calibration:
    """The sums, and what they were summed over.

    `sequences` of `sequence_length` tokens are in, of the `sequences_wanted` that were asked for; the layers' losses
    are those of the first `loss_sequences`, the cosines those of `positions` in every sequence. `loss` is the parent's
    mean loss in nats on all of it, computed in `dtype`. `parent` and `text` are digests.
    """

    parent: str
    text: str
    dtype: str
    sizes: Mapping[str, int]
    sequences: int
    sequences_wanted: int
    sequence_length: int
    loss_sequences: int
    positions: int
    loss: float
    sums: Sums

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return self.sequences * self.sequence_length

    @property
    def block_influence(self) -> Scores:
        """Return 1 - mean cosine between what enters and what leaves each layer, `[layers]`."""
        return self.block_distance(1)

    def block_distance(self, length: int) -> Scores:
        """Return 1 - mean cosine between what enters layer i and what leaves layer i + length - 1, for each i."""
        distances: Scores = 1 - np.diagonal(self.sums["layer_cosines"], length) / (self.sequences * self.positions)
        return distances

    @property
    def loss_rise(self) -> Scores:
        """Return by how much the mean loss rises without each layer, in nats, `[layers]`. ValueError: not measured."""
        if not self.loss_sequences:
            raise ValueError("the scores hold no losses of single layers: score again with --layer-loss")
        losses = self.sums["layer_losses"] / (min(self.sequences, self.loss_sequences) * self.sequence_length)
        rise: Scores = losses[:-1] - losses[-1]
        return rise

    def criterion(self) -> Criterion:
        """Return the activation scores by axis and layer. A query group's is that of its heads together."""
        groups = self.sums["heads"].reshape(self.sizes["layers"], self.sizes["groups"], -1).sum(axis=2)
        per_layer = {"heads": self.sums["heads"], "ffn": self.sums["ffn"], "groups": groups}
        hidden = np.sqrt(self.sums["norm_outputs"]).sum(axis=0)
        return lambda axis, layer: hidden if axis == "hidden" else np.sqrt(per_layer[axis][layer])

    def plus(self, sums: Sums, sequences: int, loss: float) -> "Calibration":
        """Return this with the sums over `sequences` more, whose mean loss was `loss`, added."""
        total = self.sequences + sequences
        return replace(
            self,
            sequences=total,
            loss=(self.loss * self.sequences + loss * sequences) / max(total, 1),
            sums={name: self.sums[name] + array for name, array in sums.items()},
        )

    def same_job(self, other: "Calibration") -> bool:
        """Whether both are sums over the same text through the same model, maybe not equally far."""
        names = ("parent", "text", "dtype", "sizes", "sequences_wanted", "sequence_length", "loss_sequences")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def write(path: Path, calibration: Calibration) -> None:
    """Write the file, whole or not at all."""
    from safetensors.numpy import save

    facts = {name: getattr(calibration, name) for name in (*_COUNTS, "parent", "text", "dtype", "loss")}
    metadata = {"scores_version": str(VERSION), "calibration": json.dumps({**facts, "sizes": dict(calibration.sizes)})}
    aside = path.with_name(f".{path.name}.new")
    try:
        write_durably(aside, save({name: np.ascontiguousarray(a) for name, a in calibration.sums.items()}, metadata))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read(path: Path) -> Calibration:
    """Read what `write` wrote. Raises ValueError for anything else, for shapes that disagree, and for NaN."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is not a file: tools/score_importance.py makes one of scores")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("scores_version") != str(VERSION):
                raise ValueError(f"it has version {metadata.get('scores_version')}, this program reads {VERSION}")
            facts: dict[str, Any] = json.loads(metadata["calibration"])
            sizes = {axis: int(facts["sizes"][axis]) for axis in AXES}
            expected = shapes(sizes)
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if found != expected:
                raise ValueError(f"its arrays are {found}, its model of {sizes} has {expected}")
            sums = {name: file.get_tensor(name) for name in expected}
            if any(array.dtype != np.float64 for array in sums.values()):
                raise ValueError("its arrays are not float64")
        calibration = Calibration(
            parent=str(facts["parent"]),
            text=str(facts["text"]),
            dtype=str(facts["dtype"]),
            sizes=sizes,
            loss=float(facts["loss"]),
            sums=sums,
            **{name: int(facts[name]) for name in _COUNTS},
        )
        _check_counts(calibration)
    except (SafetensorError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not a file of scores: {error}") from error
    for name, array in sums.items():
        if not np.isfinite(array).all() or ((array < 0).any() and name != "layer_cosines"):
            raise ValueError(
                f"{path}: {name} holds NaN, infinite or negative sums: the calibration pass went wrong, score again"
            )
    return calibration


def _check_counts(found: Calibration) -> None:
    """Raise ValueError for numbers of sequences, tokens and positions that cannot be."""
    if not 0 <= found.sequences <= found.sequences_wanted or not 0 <= found.loss_sequences <= found.sequences_wanted:
        raise ValueError(
            f"it says that {found.sequences} and {found.loss_sequences} of {found.sequences_wanted} are in"
        )
    if not 1 <= found.positions <= found.sequence_length:
        raise ValueError(f"it compares {found.positions} positions of sequences of {found.sequence_length}")


def read_for(path: Path, parent: str, where: Path, sizes: Mapping[str, int], least_tokens: int) -> Calibration:
    """Read a scores file that is to decide about the model at `where`, whose digest is `parent`.

    Raises ValueError for scores of another model, unfinished ones, and ones of fewer than `least_tokens` tokens.
    """
    found = read(path)
    if found.sizes != {axis: sizes[axis] for axis in AXES}:
        raise ValueError(f"{path} scores a model of {dict(found.sizes)}, {where} is {dict(sizes)}: score this one")
    if found.parent != parent:
        raise ValueError(
            f"{path} scores a model with fingerprint {found.parent}, but {where} has {parent}: {OTHER_MODEL}"
        )
    if found.sequences < found.sequences_wanted:
        raise ValueError(
            f"{path} is of an interrupted run, {found.sequences} of {found.sequences_wanted} sequences: run it again"
        )
    if found.tokens < least_tokens:
        raise ValueError(
            f"{path} comes from {found.tokens:,} tokens, fewer than --min-scores-tokens {least_tokens:,}: score more "
            "text, or lower that"
        )
    return found


def digest(path: Path) -> str:
    """Return 16 hex digits that tell scores files apart."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
