"""Shapes of about a wanted size, and that hardware likes: proposed, ranked, not measured.

The rank is a prior after Minitron's best practices (arXiv 2407.14679): take from hidden and ffn first and evenly, from
heads and layers reluctantly. It sums, over the axes, a weight times the squared logarithm of how much smaller the axis
becomes. What a shape is worth is for candidates.py to measure.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron.pruning.model.axes import PRUNABLE
from megatron.pruning.model.config import LlamaConfig, said_bytes, short
from megatron.pruning.model.hf_config import hf_export_problem
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.weights import parameter_count
from megatron.pruning.plan.report import table

RELUCTANCE = {"hidden": 1.0, "ffn": 1.0, "heads": 2.0, "layers": 4.0}
SMALLEST = {"hidden": 0.4, "ffn": 0.3, "heads": 0.5, "layers": 0.5}  # of the parent's size
TOLERANCE = 0.02  # of the wanted number of parameters
PROPOSALS = 10
_ALIKE = 3  # proposals with the same layers and heads, at most
_SIZES = 4  # of the hidden states, at least, to choose among

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Shape:
    """A proposal: the sizes of all axes, the parameters, and its distance from the parent in the prior's measure.

    `multiplied` are the parameters that a token is multiplied by on its way: all but those of an embedding that is not
    the output layer.
    """

    sizes: Mapping[str, int]
    parameters: int
    multiplied: int
    distance: float

    @property
    def operations(self) -> int:
        """FLOPs of one token's forward pass through the weights; attention over the context comes on top."""
        return 2 * self.multiplied

    def memory(self, bytes_each: int, cached_tokens: int = 0) -> int:
        """Return the bytes of the weights, and of the keys and values of so many tokens, at `bytes_each` a number."""
        return bytes_each * (self.parameters + cached_tokens * cached_numbers(self.sizes))


def cached_numbers(sizes: Mapping[str, int]) -> int:
    """Return how many numbers generation keeps of each token: a key and a value in every group of every layer."""
    return 2 * sizes["layers"] * sizes["groups"] * sizes["head_dim"]


@dataclass(frozen=True)
class Target:
    """What a shape is to be: of about so many `parameters`, at most so many bytes of `memory`, or both.

    The memory is that of the weights, and of the keys and values of `cached_tokens` (sequences times their tokens), at
    `bytes_each` a number.
    """

    parameters: float | None = None
    memory: float | None = None
    bytes_each: int = 2
    cached_tokens: int = 0

    def __str__(self) -> str:
        parameters, memory = self.parameters, self.memory
        cache = f" and the cache of {self.cached_tokens:,} tokens" if self.cached_tokens else ""
        said = [] if parameters is None else [f"about {parameters:,.0f} parameters"]
        said += [] if memory is None else [f"at most {memory:,.0f} bytes of weights{cache}"]
        return " in ".join(said)

    def room(self, sizes: Mapping[str, int]) -> float:
        """Return the parameters for which there is memory beside the cache of a shape of these layers and groups."""
        if self.memory is None:
            return math.inf
        return self.memory / self.bytes_each - self.cached_tokens * cached_numbers(sizes)

    def bounds(self, sizes: Mapping[str, int]) -> tuple[float, float]:
        """Return the fewest and the most parameters that a shape of these layers and groups may have."""
        room = self.room(sizes)
        about = room if self.parameters is None else self.parameters
        return about * (1 - TOLERANCE), min(about * (1 + TOLERANCE), room)

    def miss(self, shape: Shape) -> float:
        """Return by what factor a shape misses the target, as a logarithm: 0 where it does not."""
        fewest, most = self.bounds(shape.sizes)
        if most < fewest or most <= 0:  # no ffn would do with these layers and groups
            return math.inf
        return max(0.0, math.log(fewest / shape.parameters), math.log(shape.parameters / most))


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


def propose(config: LlamaConfig, target: Target, layout: Layout, count: float = PROPOSALS) -> list[Shape]:
    """Return at most `count` shapes as `target` wants them that can be cut to `layout`, the best first.

    Raises ValueError when there is none, naming the nearest.
    """
    layout.check_split(config.sizes, "the parent's")
    parent = Shape(config.sizes, config.parameters, _multiplied(config.parameters, config.sizes, config.tied), 0.0)
    needs = parent.memory(target.bytes_each, target.cached_tokens)
    if not 0 < (target.parameters or 1) < config.parameters or not 0 < (target.memory or 1) < math.inf:
        raise ValueError(f"{target}: that is not below the parent's {config.parameters:,} parameters: ask for fewer")
    if target.parameters is None and needs <= (target.memory or 0):
        raise ValueError(f"{target}: that is not below the parent's {needs:,} bytes: ask for fewer")
    found = list(_all(config, target, layout))
    if not found:
        raise ValueError(f"no smaller shape of {config.sizes} divides over {layout}: choose another layout")
    near = sorted(
        (shape for shape in found if not target.miss(shape)), key=lambda shape: (shape.distance, -shape.parameters)
    )
    if not near:
        nearest = min(found, key=target.miss)
        takes = nearest.memory(target.bytes_each, target.cached_tokens)
        raise ValueError(
            f"no shape has {target}; the nearest has {nearest.parameters:,} and takes {takes:,} bytes: ask for that, "
            "prune in two rounds if it is too large, or name the sizes with the _remain flags"
        )
    chosen: list[Shape] = []
    for shape in near:
        alike = [other for other in chosen if all(other.sizes[a] == shape.sizes[a] for a in ("layers", "heads"))]
        if len(alike) < _ALIKE and len(chosen) < count:
            chosen.append(shape)
    return chosen


def _all(config: LlamaConfig, target: Target, layout: Layout) -> Iterator[Shape]:
    """Yield every hidden size, heads and layers in reach, each with the ffn that comes nearest to the target."""
    parent = config.sizes
    ffn_step = min(step(parent["ffn"], 64) * layout.tensor, parent["ffn"])
    widest = parent["ffn"] // ffn_step
    narrowest = min(math.ceil(parent["ffn"] * SMALLEST["ffn"] / ffn_step), widest)
    strict = hf_export_problem(config) is None
    for groups, heads in _heads(parent, layout.tensor):
        for hidden in _hidden(parent["hidden"], heads if strict else 1, finer=heads == parent["heads"]):
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
                shape = {**sizes, "layers": layers}
                about, room = target.parameters or math.inf, target.room(shape)
                steps = (min(about, room) - outside - layers * (one - outside)) / (layers * (wider - one)) / ffn_step
                ffn = min(max(int(steps if room < about else steps + 0.5), narrowest), widest) * ffn_step
                if steps * ffn_step >= parent["ffn"]:
                    ffn = parent["ffn"]
                shape["ffn"] = ffn
                if shape != parent:
                    parameters = outside + layers * (one - outside + ffn * (wider - one))
                    multiplied = _multiplied(parameters, shape, config.tied)
                    yield Shape(shape, parameters, multiplied, _distance(shape, parent))


def _multiplied(parameters: int, sizes: Mapping[str, int], tied: bool) -> int:
    return parameters - (0 if tied else sizes["vocab"] * sizes["hidden"])


def step(size: int, usual: int) -> int:
    """Return the steps in which to change an axis: the usual one, or a power of two for a model too small for that."""
    return usual if size >= 8 * usual else max(1, 2 ** int(math.log2(size / 8)))


def _down(size: int, by: int, smallest: float) -> Iterator[int]:
    """Yield the parent's size and every multiple of `by` below it, down to a share of it."""
    yield size
    yield from range((size - 1) // by * by, max(by, math.ceil(size * smallest)) - 1, -by)


def _hidden(size: int, multiple: int, finer: bool) -> Iterator[int]:
    """Yield hidden sizes in the usual steps that are a `multiple`; where they are few, and `finer`, in steps of one."""
    usual = step(size, 128)
    found = [hidden for hidden in _down(size, usual, SMALLEST["hidden"]) if hidden % multiple == 0]
    while finer and len(found) < _SIZES and usual > 1:
        usual //= 2
        found = list(_down(size, math.lcm(usual, multiple), SMALLEST["hidden"]))
    yield from found


def _heads(parent: Mapping[str, int], tensor: int) -> Iterator[tuple[int, int]]:
    """Yield (groups, heads): fewer heads in every group, or, where each head is its own group, fewer heads."""
    heads, groups = parent["heads"], parent["groups"]
    if heads == groups:
        yield from ((count, count) for count in _down(heads, tensor, SMALLEST["heads"]))
    else:
        yield from ((groups, groups * each) for each in _down(heads // groups, 1, SMALLEST["heads"]))


def _distance(sizes: Mapping[str, int], parent: Mapping[str, int]) -> float:
    return sum(weight * math.log(parent[axis] / sizes[axis]) ** 2 for axis, weight in RELUCTANCE.items())


def describe_shapes(config: LlamaConfig, shapes: Sequence[Shape], bytes_each: int, cached_tokens: int = 0) -> str:
    """Return the proposals as a table; the memory of the cache stands in it where it is of some tokens."""
    cache = ["with cache"] if cached_tokens else []
    rows: list[Sequence[str]] = [
        ("shape", *PRUNABLE, "parameters", "of parent", "weights", *cache, "FLOPs/token", "KV bytes/token", "distance")
    ]
    for number, shape in enumerate(shapes, start=1):
        memory = [shape.memory(bytes_each, tokens) for tokens in (0, cached_tokens)][: 1 + len(cache)]
        rows.append(
            (
                f"{number}", *(f"{shape.sizes[axis]:,}" for axis in PRUNABLE),
                f"{shape.parameters:,}", f"{shape.parameters / config.parameters:.1%}",
                *map(said_bytes, memory), short(shape.operations),
                f"{bytes_each * cached_numbers(shape.sizes):,}", f"{shape.distance:.3f}",
            )
        )  # fmt: skip
    return table(rows)
