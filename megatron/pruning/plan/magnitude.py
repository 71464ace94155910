"""Magnitude: scores from the weights alone, the L2 norm of everything in the parent that an index touches.

It is the data-free baseline of the pruning literature. It can be far worse than a random choice right after pruning
(LLM-Pruner, arXiv 2305.11627, reports WikiText2 perplexity 582 against 27.5 for Llama-7B at 20%), so it is an option
and not the default.
"""

import numpy as np

from megatron.pruning.model.axes import AXIS, CHOSEN, axes_of
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.plan.scores import Array, AxisScores, Scores
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.processes import is_first
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.views import View, blocks, cast


def magnitude(parent: Checkpoint, seed: int = 0, scores: Scores | None = None) -> AxisScores:
    """Read every weight once and return, for each index of an axis, the L2 norm over all elements it is coupled to.

    Which those are the table says: every dim of every weight that names the axis. A query group takes its heads along.
    Sums are in float64.
    """
    sizes = parent.config.sizes
    squares: dict[tuple[str, int | None], Array] = {}
    progress = Progress("reading magnitudes", parent.nbytes, is_first())
    for row, layer, view in parent.weights():
        for dim, totals in zip(row.dims, _squares(view, progress), strict=True):
            names = axes_of(dim)
            grid = totals.reshape([sizes[name] for name in names])
            for i, name in enumerate(names):
                if name in CHOSEN:
                    key = name, layer if AXIS[name].per_layer else None
                    along = grid.sum(axis=tuple(j for j in range(len(names)) if j != i))
                    squares[key] = squares.get(key, np.zeros(sizes[name])) + along
        if not np.isfinite(totals).all():
            raise ValueError(f"{parent.path}: {row.hf_key(layer)} holds NaN or infinities, which have no magnitude")
    progress.close()
    for layer in range(sizes["layers"]):
        squares["groups", layer] += squares["heads", layer].reshape(sizes["groups"], -1).sum(axis=1)
    return lambda axis, layer: np.sqrt(squares[axis, layer])


def _squares(view: View, progress: Progress) -> list[Array]:
    """Return the sums of squares of a weight along each of its dims: by row, and by column if it has columns."""
    rows, columns = [], np.zeros(view.shape[-1])
    for _, bits in blocks(cast(view, "fp32")):
        squared = np.square(bits.view(np.float32), dtype=np.float64)
        rows.append(squared.sum(axis=1) if squared.ndim == 2 else squared)
        columns += squared.sum(axis=0) if squared.ndim == 2 else 0
        progress.advance(bits.size * BYTES[view.dtype])
    return [np.concatenate(rows), columns][: len(view.shape)]
