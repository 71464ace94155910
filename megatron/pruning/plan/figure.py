"""Pictures: what a plan keeps of every layer's heads and ffn and of the hidden size; what a reconstruction mended."""

from io import BytesIO
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron.pruning.plan.choose import CRITERIA
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.reconstructed import Report

_COLUMNS = 256  # at most: a wider axis is drawn as the share kept in each of so many bins


def plan_figure(plan: Plan) -> bytes:
    """Return a PNG: a row for each of the parent's layers (dropped ones stay empty), a panel for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes, layers = plan.parent_sizes, plan.parent_sizes["layers"]
    panels = [("heads", plan.heads), ("groups", plan.groups), ("ffn", plan.ffn)]
    if sizes["groups"] == sizes["heads"]:
        del panels[1]  # each head is its own group
    height = 1.6 + max(2.0, 0.12 * layers)
    figure, grid = plt.subplots(
        2, len(panels), figsize=(12, height), layout="constrained", height_ratios=[max(layers, 12), 1.5], squeeze=False,
        width_ratios=[3.0 if axis == "ffn" else 1.0 for axis, _ in panels],
    )  # fmt: skip
    for axes, (axis, kept) in zip(grid[0], panels, strict=True):
        rows = np.full((layers, min(sizes[axis], _COLUMNS)), np.nan)
        for layer, index in zip(plan.layers, kept, strict=True):
            rows[layer] = _share(index, sizes[axis])
        image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1,
                            extent=(0, sizes[axis], layers - 0.5, -0.5))  # fmt: skip
        axes.set(title=f"{axis}: {len(kept[0])} of {sizes[axis]}", ylabel="layer" if axis == "heads" else None)
        axes.set_facecolor("0.85")
        for block in range(1, plan.tensor_parallel):
            axes.axvline(sizes[axis] * block / plan.tensor_parallel, color="white", linewidth=1)
    _draw_hidden(figure, grid[1], plan)
    figure.colorbar(image, ax=grid[0, -1], label="share kept")
    criterion = plan.evidence.criterion
    seed = f"seed {plan.evidence.seed}, " if CRITERIA[criterion].seeded else ""
    figure.suptitle(
        f"kept, {criterion} ({seed}{plan.prune_type} over {plan.tensor_parallel} tensor-parallel "
        f"blocks); {len(plan.layers)} of {layers} layers"
    )
    out = BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    return out.getvalue()


def _draw_hidden(figure: Any, row: Any, plan: Plan) -> None:
    """Draw what is kept of the hidden size over the whole width of the figure's last row."""
    below = row[0].get_gridspec()
    for axes in row:
        axes.remove()
    size = plan.parent_sizes["hidden"]
    hidden = figure.add_subplot(below[1, :])
    share = _share(plan.hidden, size)[None]
    hidden.imshow(share, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1,
                  extent=(0, size, 0, 1))  # fmt: skip
    hidden.set(title=f"hidden, in every layer: {len(plan.hidden)} of {size}", yticks=[])


def _share(index: NDArray[np.intp], size: int) -> NDArray[np.float64]:
    """Return the share of each of at most `_COLUMNS` equal bins of an axis that is kept."""
    bins = min(size, _COLUMNS)
    edges = np.arange(bins + 1) * size // bins
    kept = np.diff(np.searchsorted(index, edges))
    share: NDArray[np.float64] = kept / np.diff(edges)
    return share


# What is read off a report together: the weights of these names, and what they are called.
_GROUPS = {
    "queries, keys and values": ("q", "k", "v"),
    "hidden states after attention": ("o",),
    "gate and up projections": ("gate", "up"),
    "hidden states after the layer": ("down",),
}


def report_figure(report: Report) -> bytes:
    """Return a PNG: what each layer's weights miss of what the parent gives on held-out text, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    layers = sorted({weight.layer for weight in report.weights if weight.layer is not None})
    figure, grid = plt.subplots(2, 2, figsize=(10, 6), layout="constrained", sharex=True)
    for axes, (title, names) in zip(grid.flat, _GROUPS.items(), strict=True):
        for after, color, label in ((False, "0.6", "cut"), (True, "tab:blue", "reconstructed")):
            missed = [report.share_missed(layer, names, after) for layer in layers]
            axes.plot(layers, missed, marker="o", markersize=4, color=color, label=label)
        axes.set_title(title, fontsize=11)
        axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-6))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("layer")
    grid[0, 0].legend()
    losses = msgspec.structs.asdict(report.losses) if report.losses else {}
    told = "".join(f"; {loss:.3f} ({name})" for name, loss in losses.items())
    figure.suptitle(f"missed of what the parent has, on held-out text{told}")
    out = BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    return out.getvalue()
