"""Pictures: what a plan keeps, by axis and by layer; what a reconstruction mended."""

import functools
from collections.abc import Callable
from io import BytesIO
from typing import Any

import msgspec
import numpy as np

from megatron.pruning.model.axes import AXIS, PRUNABLE
from megatron.pruning.plan.choose import CRITERIA
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.reconstructed import Report

_KEPT, _LOST, _DROPPED = "#6baed6", "tab:orange", "0.85"


def plan_figure(plan: Plan) -> bytes:
    """Return a PNG: what remains of each axis that is cut, and below it, by layer, what scores say of the choice.

    These are block influence and, of every axis whose choice is each layer's own, the importance that is kept and that
    is lost to balance. Dropped layers are grey. Where nothing is known by layer, a row says which layers remain.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evidence, parent = plan.evidence, plan.parent_sizes
    cut = [axis for axis in PRUNABLE if plan.sizes[axis] != parent[axis]]
    if parent["groups"] == parent["heads"] and "groups" in cut:
        cut.remove("groups")  # each head is its own group
    scored = [axis for axis in cut if AXIS[axis].per_layer and axis in evidence.importance_kept]
    panels: list[tuple[float, Callable[[Any], None]]] = [  # height in inches, and what draws it
        (0.35 * len(cut) + 0.2, lambda axes: _draw_sizes(axes, plan, cut))
    ]
    if evidence.block_influence:
        panels.append((1.3, lambda axes: _draw_influence(axes, plan)))
    panels += [(1.3, functools.partial(_draw_importance, plan=plan, axis=axis)) for axis in scored]
    if len(panels) == 1 and "layers" in cut:
        panels.append((0.4, lambda axes: _draw_layers(axes, plan)))
    heights = [height for height, _ in panels]
    figure, rows = plt.subplots(len(panels), figsize=(9, sum(heights) + 0.4 * len(heights) + 0.5), squeeze=False,
                                layout="constrained", height_ratios=heights)  # fmt: skip
    for axes, (_, draw) in zip(rows[:, 0], panels, strict=True):
        draw(axes)
    for axes in rows[1:, 0]:
        _number_layers(axes, plan, last=axes is rows[-1, 0])
    if plan.dropped_layers and len(panels) > 1:
        rows[1, 0].set_title("grey: dropped", loc="right", fontsize=10, color="0.4")
    words = [evidence.criterion]
    if CRITERIA[evidence.criterion].seeded:
        words.append(f"seed {evidence.seed}")
    if evidence.layer_criterion:
        words.append(f"layers by {evidence.layer_criterion}")
    if plan.tensor_parallel > 1:
        words.append(f"{plan.prune_type} over {plan.tensor_parallel} tensor-parallel blocks")
    figure.suptitle(f"pruning plan: {', '.join(words)}", fontsize=12)
    return png_of(figure)


def _draw_sizes(axes: Any, plan: Plan, cut: list[str]) -> None:
    """Draw a bar for each axis that is cut, of the share that remains."""
    for row, axis in enumerate(cut):
        size, whole = plan.sizes[axis], plan.parent_sizes[axis]
        axes.barh(row, size / whole, color=_KEPT)
        axes.barh(row, 1 - size / whole, left=size / whole, color=_DROPPED)
        text = f"{size:,} of {whole:,}"
        if shares := plan.evidence.importance_kept.get(axis):
            text += f", {np.mean(shares):.1%} of importance"
        axes.text(0.01, row, text, va="center", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(max(len(cut), 1) - 0.5, -0.5), yticks=range(len(cut)), yticklabels=cut)
    _in_percent(axes.xaxis)
    axes.set_title("what remains", loc="left", fontsize=10)


def _number_layers(axes: Any, plan: Plan, last: bool) -> None:
    """Make the x axis one of the parent's layers, with the dropped ones in grey; the `last` panel has the numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.5, plan.parent_sizes["layers"] - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelbottom=last)
    if last:
        axes.set_xlabel("layer of the parent")
    for layer in plan.dropped_layers:
        axes.axvspan(layer - 0.5, layer + 0.5, color=_DROPPED, linewidth=0, zorder=0)


def _draw_layers(axes: Any, plan: Plan) -> None:
    """Draw which layers are kept."""
    axes.bar(plan.layers, 1.0, color=_KEPT)
    axes.set(ylim=(0, 1), yticks=[])
    axes.set_title("layers kept", loc="left", fontsize=10)


def _draw_influence(axes: Any, plan: Plan) -> None:
    """Draw the block influence of the parent's layers; that of the first is often a hundred times that of others."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    influence = plan.evidence.block_influence
    colors = np.where(np.isin(np.arange(len(influence)), plan.layers), _KEPT, "0.5")
    axes.bar(range(len(influence)), influence, color=colors)
    if min(influence) > 0:
        axes.set_yscale("log")
        axes.set_ylim(10 ** np.floor(np.log10(min(influence))), 10 ** np.ceil(np.log10(max(influence))))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("block influence: how much a layer changes what goes through it", loc="left", fontsize=10)


def _draw_importance(axes: Any, plan: Plan, axis: str) -> None:
    """Draw the share of an axis' importance that each layer keeps and, on top of it, what balance takes away."""
    kept = np.array(plan.evidence.importance_kept[axis])
    axes.bar(plan.layers, kept, color=_KEPT)
    if axis in plan.evidence.balance_tax:
        tax = np.array(plan.evidence.balance_tax[axis])
        axes.bar(plan.layers, kept * tax / np.maximum(1 - tax, 1e-6), bottom=kept, color=_LOST)
        axes.set_title(f"orange: balance tax, {tax.mean():.2%}", loc="right", fontsize=10, color=_LOST)
    share = plan.sizes[axis] / plan.parent_sizes[axis]
    axes.axhline(share, color="black", linestyle="--", linewidth=1)
    told = f"importance kept of {axis}: {kept.mean():.1%} (dashed: share kept, {share:.0%})"
    axes.set_title(told, loc="left", fontsize=10)
    axes.set_ylim(0, 1)
    _in_percent(axes.yaxis)


def _in_percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def png_of(figure: Any) -> bytes:
    """Return the figure as a PNG, sharp at twice a screen's usual density, with a margin; it is closed."""
    import matplotlib.pyplot as plt

    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    out = BytesIO()
    figure.savefig(out, format="png", dpi=200)
    plt.close(figure)
    return out.getvalue()


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
    figure, grid = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharex=True)
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
    figure.suptitle(f"missed of what the parent has, on held-out text{told}", fontsize=12)
    return png_of(figure)
