"""Importance from the weights alone: the L2 norm of everything in the parent that an index touches.

`magnitude` is the data-free baseline of the pruning literature. It can be far worse than a random choice right after
pruning (LLM-Pruner, arXiv 2305.11627, reports WikiText2 perplexity 582 against 27.5 for Llama-7B at 20%), so it is an
option and not the default.
"""

import numpy as np

from megatron.pruning.model.axes import CHOSEN_PER_LAYER, axes
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.plan.choose import Criterion, Scores
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.views import BYTES, View, blocks, cast

_AXES = ("hidden", "groups", "heads", "ffn")


def magnitude(checkpoint: Checkpoint, show: bool = True) -> Criterion:
    """Read every weight once and return, for each index of an axis, the L2 norm over all elements it is coupled to.

    Which those are the table says: every dim of every weight that names the axis. A query group takes its heads along.
    Sums are in float64.
    """
    sizes = checkpoint.config.sizes
    squares: dict[tuple[str, int | None], Scores] = {}
    progress = Progress("reading magnitudes", checkpoint.nbytes, show)
    for weight, layer, view in checkpoint.weights():
        for dim, totals in zip(weight.dims, _squares(view, progress), strict=True):
            names = axes(dim)
            grid = totals.reshape([sizes[name] for name in names])
            for i, name in enumerate(names):
                if name in _AXES:
                    key = name, layer if name in CHOSEN_PER_LAYER else None
                    along = grid.sum(axis=tuple(j for j in range(len(names)) if j != i))
                    squares[key] = squares.get(key, np.zeros(sizes[name])) + along
    progress.close()
    for layer in range(sizes["layers"]):
        squares["groups", layer] += squares["heads", layer].reshape(sizes["groups"], -1).sum(axis=1)
    return lambda axis, layer: np.sqrt(squares[axis, layer])


def _squares(view: View, progress: Progress) -> list[Scores]:
    """Return the sums of squares of a weight along each of its dims: by row, and by column if it has columns."""
    rows, columns = [], np.zeros(view.shape[-1])
    for _, bits in blocks(cast(view, "fp32")):
        squared = np.square(bits.view(np.float32), dtype=np.float64)
        rows.append(squared.sum(axis=1) if squared.ndim == 2 else squared)
        columns += squared.sum(axis=0) if squared.ndim == 2 else 0
        progress.advance(bits.size * BYTES[view.dtype])
    return [np.concatenate(rows), columns][: len(view.shape)]
