"""What a plan does, as a table that a person reads before it is done."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron.pruning.model.axes import AXIS, CHOSEN, PRUNABLE
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.plan.choose import CRITERIA
from megatron.pruning.plan.plan import Plan


def describe(plan: Plan, before: LlamaConfig, after: LlamaConfig, bytes_before: int, bytes_after: int) -> str:
    """Return the before/after table: axis, parent, pruned, and what remains."""
    rows: list[Sequence[Any]] = [("", "parent", "pruned", "remains")]
    rows += [_row(AXIS[axis].words, before.sizes[axis], plan.sizes[axis]) for axis in PRUNABLE]
    rows.append(_row("parameters", before.parameters, after.parameters))
    rows.append(_row("bytes", bytes_before, bytes_after))
    return "\n".join([table(rows), *_evidence(plan)])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as aligned columns, the first one to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in rows
    )


def by_layer(what: str, values: Sequence[float]) -> str:
    """Return a number of each layer, ten on a line, which begins with the number of its first layer."""
    lines = [f"{what}, by layer"]
    for first in range(0, len(values), 10):
        lines.append(f"{first:>4}" + "".join(f"{value:8.3f}" for value in values[first : first + 10]))
    return "\n".join(lines)


def cost_of_choice(plan: Plan) -> str:
    """Return what it costs that something was chosen as it was; empty where little, or where nothing was chosen."""
    chosen = any(plan.sizes[axis] != plan.parent_sizes[axis] for axis in CHOSEN)
    return CRITERIA[plan.evidence.criterion].cost if chosen else ""


def _evidence(plan: Plan) -> list[str]:
    """Return a line for each axis of which scores say what was kept, and what balance costs."""
    lines, evidence = [], plan.evidence
    if evidence.layer_criterion:
        dropped = ", ".join(map(str, plan.dropped_layers)) or "none"
        lines.append(f"layers dropped by {evidence.layer_criterion}: {dropped}")
    for axis, shares in evidence.importance_kept.items():
        line = f"importance kept of {axis}: {_spread(shares)}"
        if axis in evidence.balance_tax:
            line += f"; balance tax {_spread(evidence.balance_tax[axis])}"
        lines.append(line)
    if plan.norm_gains:
        lines.append(f"norm gains multiplied by {min(plan.norm_gains):.3f} to {max(plan.norm_gains):.3f}")
    return lines


def _spread(values: Sequence[float]) -> str:
    """Return the mean, and the lowest and highest where there are several."""
    mean = f"{np.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%} by layer)"


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"
