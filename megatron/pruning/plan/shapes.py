"""Shapes that have about a wanted number of parameters, and that hardware likes: proposed, ranked, not measured.

The rank is a prior after Minitron's best practices (arXiv 2407.14679): take from hidden and ffn first and evenly, from
heads and layers reluctantly. It sums, over the axes, a weight times the squared logarithm of how much smaller the axis
becomes. What a shape is worth is for candidates.py to measure.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron.pruning.model.axes import PRUNABLE
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.hf_config import hf_export_problem
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.weights import parameter_count
from megatron.pruning.plan.report import table
from megatron.pruning.storage.dtypes import BYTES

RELUCTANCE = {"hidden": 1.0, "ffn": 1.0, "heads": 2.0, "layers": 4.0}
SMALLEST = {"hidden": 0.4, "ffn": 0.3, "heads": 0.5, "layers": 0.5}  # of the parent's size
TOLERANCE = 0.02  # of the wanted number of parameters
PROPOSALS = 10
_ALIKE = 3  # proposals with the same layers and heads, at most

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Shape:
    """A proposal: the sizes of all axes, the parameters, and its distance from the parent in the prior's measure."""

    sizes: Mapping[str, int]
    parameters: int
    distance: float


def parse_count(text: str) -> float:
    """Read "3.4B", "700M" or "1e9". Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)\s*([KMGBT]?)", text.strip(), re.IGNORECASE)
    try:
        value = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r} is not a number such as 3.4B or 700M")
    return value


def parse_bytes(text: str) -> float:
    """Read "8GB" (10^9 bytes) or "8GiB" (2^30). Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not 0 < value < math.inf:
        raise ValueError(f"{text!r} is not a size such as 8GB or 7.5GiB")
    power = "KMGT".index(match[2].upper()) + 1
    return value * float(1024**power if match[3] else 1000**power)


def propose(config: LlamaConfig, wanted: float, layout: Layout, ceiling: bool = False) -> list[Shape]:
    """Return at most `PROPOSALS` shapes of about `wanted` parameters that can be cut to `layout`, the best first.

    With `ceiling` none has more. Raises ValueError when there is none, naming the nearest.
    """
    layout.check_split(config.sizes, "the parent's")
    if not 0 < wanted < config.parameters:
        raise ValueError(
            f"the target of {wanted:,.0f} parameters is not below the parent's {config.parameters:,}: ask for fewer"
        )
    found = sorted(_all(config, wanted, layout, ceiling), key=lambda shape: (shape.distance, -shape.parameters))
    near = [shape for shape in found if abs(shape.parameters / wanted - 1) <= TOLERANCE]
    near = [shape for shape in near if not ceiling or shape.parameters <= wanted]
    if not near:
        if not found:
            raise ValueError(f"no smaller shape of {config.sizes} divides over {layout}: choose another layout")
        nearest = min(found, key=lambda shape: abs(math.log(shape.parameters / wanted)))
        raise ValueError(
            f"no shape is within {TOLERANCE:.0%} of {wanted:,.0f} parameters, the nearest has {nearest.parameters:,}: "
            "ask for that, prune in two rounds if it is too large, or name the sizes with the _remain flags"
        )
    chosen: list[Shape] = []
    for shape in near:
        alike = [other for other in chosen if all(other.sizes[a] == shape.sizes[a] for a in ("layers", "heads"))]
        if len(alike) < _ALIKE and len(chosen) < PROPOSALS:
            chosen.append(shape)
    return chosen


def _all(config: LlamaConfig, wanted: float, layout: Layout, ceiling: bool) -> Iterator[Shape]:
    """Yield every hidden size, heads and layers in reach, each with the ffn that comes nearest to `wanted`."""
    parent = config.sizes
    ffn_step = min(step(parent["ffn"], 64) * layout.tensor, parent["ffn"])
    widest = parent["ffn"] // ffn_step
    narrowest = min(math.ceil(parent["ffn"] * SMALLEST["ffn"] / ffn_step), widest)
    strict = hf_export_problem(config) is None
    for groups, heads in _heads(parent, layout.tensor):
        for hidden in _down(parent["hidden"], step(parent["hidden"], 128), SMALLEST["hidden"]):
            sizes = {**parent, "hidden": hidden, "heads": heads, "groups": groups}
            if strict and hf_export_problem(config.with_sizes(sizes)):
                continue
            outside, one, wider = (
                parameter_count({**sizes, "layers": layers, "ffn": ffn}, config.tied, config.features)
                for layers, ffn in ((0, 0), (1, 0), (1, 1))
            )
            for layers in _down(parent["layers"], layout.pipeline, SMALLEST["layers"]):
                if layers % layout.pipeline:
                    continue
                steps = (wanted - outside - layers * (one - outside)) / (layers * (wider - one)) / ffn_step
                ffn = min(max(int(steps if ceiling else steps + 0.5), narrowest), widest) * ffn_step
                if steps * ffn_step >= parent["ffn"]:
                    ffn = parent["ffn"]
                shape = {**sizes, "layers": layers, "ffn": ffn}
                if shape != parent:
                    parameters = outside + layers * (one - outside + ffn * (wider - one))
                    yield Shape(shape, parameters, _distance(shape, parent))


def step(size: int, usual: int) -> int:
    """Return the steps in which to change an axis: the usual one, or a power of two for a model too small for that."""
    return usual if size >= 8 * usual else max(1, 2 ** int(math.log2(size / 8)))


def _down(size: int, by: int, smallest: float) -> Iterator[int]:
    """Yield the parent's size and every multiple of `by` below it, down to a share of it."""
    yield size
    yield from range((size - 1) // by * by, max(by, math.ceil(size * smallest)) - 1, -by)


def _heads(parent: Mapping[str, int], tensor: int) -> Iterator[tuple[int, int]]:
    """Yield (groups, heads): fewer heads in every group, or, where each head is its own group, fewer heads."""
    heads, groups = parent["heads"], parent["groups"]
    if heads == groups:
        yield from ((count, count) for count in _down(heads, tensor, SMALLEST["heads"]))
    else:
        yield from ((groups, groups * each) for each in _down(heads // groups, 1, SMALLEST["heads"]))


def _distance(sizes: Mapping[str, int], parent: Mapping[str, int]) -> float:
    return sum(weight * math.log(parent[axis] / sizes[axis]) ** 2 for axis, weight in RELUCTANCE.items())


def describe_shapes(config: LlamaConfig, shapes: Sequence[Shape], dtype: str) -> str:
    """Return the proposals as a table.

    FLOPs are those of one token's forward pass through the weights; attention over the context comes on top.
    """
    rows: list[Sequence[str]] = [
        ("shape", *PRUNABLE, "parameters", "of parent", "weights", "GFLOP/token",
         "KV bytes/token", "distance")
    ]  # fmt: skip
    for number, shape in enumerate(shapes, start=1):
        sizes, bytes_each = shape.sizes, BYTES[dtype]
        multiplied = shape.parameters - (0 if config.tied else sizes["vocab"] * sizes["hidden"])
        cached = 2 * sizes["layers"] * sizes["groups"] * sizes["head_dim"] * bytes_each
        rows.append(
            (
                f"{number}", *(f"{sizes[axis]:,}" for axis in PRUNABLE),
                f"{shape.parameters:,}", f"{shape.parameters / config.parameters:.1%}",
                f"{shape.parameters * bytes_each / 1e9:.3g} GB", f"{2 * multiplied / 1e9:.3g}", f"{cached:,}",
                f"{shape.distance:.3f}",
            )
        )  # fmt: skip
    return table(rows)
