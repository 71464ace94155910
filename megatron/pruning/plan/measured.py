"""What shapes are worth, measured: the losses of each by the tokens that it was trained on, and the best of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron.pruning.model.axes import PRUNABLE
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.config import said_bytes, short
from megatron.pruning.plan.figure import png_of
from megatron.pruning.plan.plan import MADE_BY
from megatron.pruning.plan.report import table
from megatron.pruning.plan.shapes import Shape
from megatron.pruning.storage.small_files import parse_as, read_small

MEASURED_FILE = "shapes.json"
VERSION = 1
ZERO = "zero"  # what --measure says for no training at all
EVALUATED = 200_000  # tokens that a loss is taken of, unless told otherwise
BEST = "best"  # what --shape says for the one that was measured best


class MeasuredShape(msgspec.Struct, kw_only=True):
    """A shape and what was measured of it.

    `memory` is the bytes of the weights, and of the cache where there is to be room for one, `operations` the FLOPs of
    a token. `losses` are in nats a token, by the tokens that were trained on: 0 is right after the reconstruction.
    """

    sizes: dict[str, int]
    parameters: int
    memory: int
    operations: int
    losses: dict[int, float] = {}

    @property
    def tokens(self) -> int:
        """The most tokens that it was trained on; -1 where nothing was measured yet."""
        return max(self.losses, default=-1)

    @property
    def loss(self) -> float:
        """The loss after these."""
        return self.losses[self.tokens]


class Measured(msgspec.Struct, kw_only=True):
    """Shapes of one parent, numbered from 1 as they were proposed; `job` says on what they were measured, and how."""

    job: dict[str, Any]
    parent: MeasuredShape
    shapes: list[MeasuredShape]
    made_by: str = MADE_BY
    version: int = VERSION

    @classmethod
    def from_json(cls, raw: bytes, where: str) -> "Measured":
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        return parse_as(cls, raw, f"{where} is no file of measured shapes")

    def to_json(self) -> bytes:
        """Return the file's content: the best first, each with its number."""
        content = msgspec.to_builtins(self, str_keys=True)
        content["best_first"] = self.ranked()
        return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"

    def ranked(self) -> list[int]:
        """Return the numbers of the shapes that were measured, the best first: who was trained longest, by its loss."""
        known = [number for number, shape in enumerate(self.shapes, start=1) if shape.losses]
        return sorted(known, key=lambda number: (-self.shapes[number - 1].tokens, self.shapes[number - 1].loss))

    def rows(self) -> list[Sequence[str]]:
        """Return the ranking, the best first and the parent last, below a heading."""
        trained = sorted({tokens for shape in self.shapes for tokens in shape.losses})
        rows: list[Sequence[str]] = [
            ("rank", "shape", *PRUNABLE, "parameters", "memory", "FLOPs/token", *map(_after, trained))
        ]
        ranked = [(f"{rank}", f"{number}") for rank, number in enumerate(self.ranked(), start=1)]
        for rank, number in [*ranked, ("", "parent")]:
            shape = self.parent if number == "parent" else self.shapes[int(number) - 1]
            losses = [f"{shape.losses[tokens]:.4f}" if tokens in shape.losses else "" for tokens in trained]
            sizes = [f"{shape.sizes[axis]:,}" for axis in PRUNABLE]
            memory, operations = said_bytes(shape.memory), short(shape.operations)
            rows.append((rank, number, *sizes, f"{shape.parameters:,}", memory, operations, *losses))
        return rows

    def describe(self) -> str:
        """Return the ranking as a table."""
        return table(self.rows())


def folder_of(save: Path) -> Path:
    """Return where the shapes for a target are measured: beside it."""
    return save.with_name(f"{save.name}.candidates")


def best_shape(save: Path, parent: Checkpoint, shapes: Sequence[Shape]) -> int:
    """Return the number of the shape that was measured best. Raises ValueError where these shapes were not measured."""
    file = folder_of(save) / MEASURED_FILE
    if not file.is_file():
        raise ValueError(f"--shape {BEST}: there is no {file}; measure shapes first, with --candidates")
    measured = Measured.from_json(read_small(file), str(file))
    same = [shape.sizes for shape in measured.shapes] == [dict(shape.sizes) for shape in shapes[: len(measured.shapes)]]
    if measured.job.get("parent") != fingerprint(parent) or not same:
        raise ValueError(f"--shape {BEST}: {file} is of another parent or another size: measure these shapes")
    if not (ranked := measured.ranked()):
        raise ValueError(f"--shape {BEST}: in {file} no shape is measured yet: let --candidates end")
    return ranked[0]


def _after(tokens: int) -> str:
    return f"loss after {short(tokens)}" if tokens else "loss at once"


def measured_figure(measured: Measured) -> bytes:
    """Return a PNG: the loss of each shape against its parameters, its memory and its operations.

    The line joins the shapes that none other beats in both; the number is the shape's, the best has a ring around it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    shapes = {number: measured.shapes[number - 1] for number in measured.ranked()}
    best = next(iter(shapes))
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.8), layout="constrained", sharey=True)
    costs = (("parameters", "", "parameters"), ("memory", "B", "memory"), ("operations", "", "FLOPs a token"))
    for axes, (cost, unit, label) in zip(panels, costs, strict=True):
        for trained in sorted({shape.tokens for shape in shapes.values()}):
            stage = {n: shape for n, shape in shapes.items() if shape.tokens == trained}
            x = [getattr(shape, cost) for shape in stage.values()]
            y = [shape.loss for shape in stage.values()]
            axes.scatter(x, y, s=36, label=_after(trained))
            front = _undominated(list(zip(x, y, strict=True)))
            axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=0)
            for number, at in zip(stage, zip(x, y, strict=True), strict=True):
                axes.annotate(f"{number}", at, xytext=(6, 4), textcoords="offset points", fontsize=9)
                if number == best:
                    axes.scatter(*at, s=160, facecolors="none", edgecolors="black")
        if measured.parent.losses:
            axes.axhline(measured.parent.loss, color="black", linestyle=":", linewidth=1)
        axes.margins(0.12)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.xaxis.set_major_formatter(EngFormatter(unit, sep=""))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss in nats a token")
    panels[-1].legend(fontsize=9)
    parent = f"; dotted: the parent, {measured.parent.loss:.3f}" if measured.parent.losses else ""
    figure.suptitle(f"{len(shapes)} shapes on held-out text; ring: the best{parent}", fontsize=12)
    return png_of(figure)


def _undominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one is below and to the left of, from the left."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
