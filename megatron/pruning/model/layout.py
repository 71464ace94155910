"""How logical weights lie on tensor- and pipeline-parallel ranks: split, fused, padded, and back.

Tensor parallelism cuts the axes `vocab, heads, groups, ffn` into one block a rank. Megatron fuses q, k, v group by
group (`[q_1 .. q_m, k, v]` for each query group) and gate and up as two halves *of each rank*; the full fc1 is
therefore not the ranks' concatenation. Both are one interleaving: every part cut into `units` equal chunks, and laid
down chunk by chunk.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.pruning.model.axes import AXIS, PER_LAYER, axes_of
from megatron.pruning.model.weights import WeightRow, weight_shape
from megatron.pruning.storage.views import Index, View, concat, take

MOST = 1_000_000  # ranks, or rows of padding: no layout has more


@dataclass(frozen=True)
class Layout:
    """Tensor x pipeline parallel sizes (ranks), and what the padded vocabulary is divisible by on each tensor rank."""

    tensor: int = 1
    pipeline: int = 1
    vocab_divisor: int = 128

    def __post_init__(self) -> None:
        for flag, value in (
            ("--tensor-model-parallel-size", self.tensor),
            ("--pipeline-model-parallel-size", self.pipeline),
            ("--make-vocab-size-divisible-by", self.vocab_divisor),
        ):
            if not 1 <= value <= MOST:
                raise ValueError(f"{flag} {value}: it must lie between 1 and {MOST:,}")

    def __str__(self) -> str:
        return f"tp{self.tensor} pp{self.pipeline}"

    def padded_vocab(self, vocab: int) -> int:
        """Return the vocabulary rounded up to a multiple of `vocab_divisor * tensor`, as Megatron does."""
        multiple = self.vocab_divisor * self.tensor
        return -(-vocab // multiple) * multiple

    def layers_of_stage(self, layers: int, stage: int) -> range:
        """Return the global layer numbers of a pipeline stage."""
        each = layers // self.pipeline
        return range(stage * each, (stage + 1) * each)

    def check_split(self, sizes: Mapping[str, int], whose: str) -> None:
        """Raise ValueError unless the axes of `whose` model divide over the tensor ranks."""
        for axis in PER_LAYER:
            if sizes[axis] % self.tensor:
                what = f"{whose} {AXIS[axis].words} {sizes[axis]}"
                raise ValueError(
                    f"--tensor-model-parallel-size {self.tensor} does not divide {what}: choose a size that does"
                )

    def check_stages(self, sizes: Mapping[str, int], whose: str) -> None:
        """Raise ValueError unless the layers of `whose` model divide over the pipeline stages."""
        if sizes["layers"] % self.pipeline:
            raise ValueError(
                f"--pipeline-model-parallel-size {self.pipeline} does not divide {whose} {sizes['layers']} layers: "
                "choose a size that does"
            )


def interleaving(part_rows: Sequence[int], units: int) -> Index:
    """Return, for each row of the fused tensor, its row in the concatenation of the parts.

    Part i has `part_rows[i]` rows, cut into `units` equal chunks; fused, chunk 0 of every part comes first, then 1, ...
    """
    if units == 0:  # an uneven pruning may leave a rank without a query group
        return np.zeros(0, dtype=np.intp)
    starts = np.concatenate([[0], np.cumsum(part_rows)[:-1]])
    chunks = [start + np.arange(rows).reshape(units, -1) for start, rows in zip(starts, part_rows, strict=True)]
    return np.concatenate(chunks, axis=1).ravel()


def fused_order(weights: Sequence[WeightRow], part_rows: Sequence[int], sizes: Mapping[str, int]) -> Index:
    """Return the order of the rows of a fused weight: its parts are cut into a chunk a query group, or one in all."""
    grouped = any(axes_of(weight.dims[0])[0] == "groups" for weight in weights)
    return interleaving(part_rows, sizes["groups"] if grouped else 1)


def fused_shape(weights: Sequence[WeightRow], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of the tensor that holds `weights` (one, or several that are fused) on a rank of these sizes."""
    shapes = [weight_shape(weight, sizes) for weight in weights]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def fuse(weights: Sequence[WeightRow], parts: Sequence[View], sizes: Mapping[str, int]) -> View:
    """Return one rank's tensor from its parts. `sizes` are the axis sizes on that rank."""
    if len(parts) == 1:
        return parts[0]
    return take(concat(parts, 0), 0, fused_order(weights, [part.shape[0] for part in parts], sizes))


def unfuse(weights: Sequence[WeightRow], fused: View, sizes: Mapping[str, int]) -> list[View]:
    """Return the parts of one rank's tensor; the inverse of `fuse`."""
    rows = [weight_shape(weight, sizes)[0] for weight in weights]
    position = np.argsort(fused_order(weights, rows, sizes)) if len(rows) > 1 else np.arange(rows[0])
    bounds = np.concatenate([[0], np.cumsum(rows)])
    return [take(fused, 0, position[a:b]) for a, b in itertools.pairwise(bounds)]


def pad_rows(view: View, rows: int) -> View:
    """Return `view` with `rows` rows: the last one is repeated, as Megatron's own converter pads a vocabulary."""
    return take(view, 0, np.minimum(np.arange(rows), view.shape[0] - 1))
