"""What check.py compares: figures and how far they may be from each other, losses of a log, and scores."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# By how much a loss in nats may differ from the CPU's in fp32. bf16 has 8 bits, and TransformerEngine multiplies fp32
# in TF32, which has 11.
NEAR = {"fp32": 0.002, "bf16": 0.02}
# The same for scores, as a share of the largest of their kind.
NEAR_SCORES = {"fp32": 0.005, "bf16": 0.05}


@dataclass(frozen=True)
class Figure:
    """A number that a check has found, and what it may be: from `least` to `most`."""

    name: str
    value: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def holds(self) -> bool:
        """Tell whether the number is what it may be; one that is none never is."""
        return self.least <= self.value <= self.most

    @property
    def facts(self) -> dict[str, Any]:
        """Return the figure for JSON, which has no infinity and no number that is none: they are null."""
        numbers = {"value": self.value, "least": self.least, "most": self.most}
        return {name: float(f"{number:.7g}") if math.isfinite(number) else None for name, number in numbers.items()}

    def __str__(self) -> str:
        where = "" if self.holds else f" is not within {self.least:.6g} and {self.most:.6g}"
        return f"{self.name} {self.value:.6g}{where}"


def near(name: str, value: float, expected: float, by: float) -> Figure:
    """Return a figure that may differ from what is expected by so much."""
    return Figure(name, value, expected - by, expected + by)


def loss(log: Path, name: str, step: int) -> float:
    """Return a loss (`lm loss`, `kd loss`) at a step, out of the log of the stock loop.

    Of the steps after a start the first two are to be read with care: Megatron counts the first again in the second.
    Raises ValueError where the log has none.
    """
    found = re.search(rf"iteration +{step}/.*? {name}: (\S+)", log.read_text(errors="replace"))
    if found is None:
        raise ValueError(f"{log} has no {name} of step {step}")
    return float(found[1])


def difference(found: Mapping[str, NDArray[np.float64]], expected: Mapping[str, NDArray[np.float64]]) -> float:
    """Return the largest difference of scores from those expected, as a share of the largest of their kind."""
    if found.keys() != expected.keys():
        raise ValueError(f"scores of {', '.join(found)} are beside scores of {', '.join(expected)}")
    shares = [np.abs(found[kind] - array).max() / (np.abs(array).max() or 1.0) for kind, array in expected.items()]
    return float(np.max(shares))
