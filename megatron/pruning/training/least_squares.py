"""Least squares: the weight of a linear map that comes nearest to what it should give, pulled towards the one it had.

A map W [out, in] sees inputs u and should give y = P t, where t is what the parent had at this place and P [out,
targets] is the parent's own weight, or the identity. Whatever the text, the solution and its error need no more than
the sums of u u^T, u t^T and t t^T over tokens: text streams through, and ranks add up.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.pruning.plan.reconstructed import AUTO, Ridge

GROWTH, LARGEST = 10.0, 1e4  # of a ridge under which the held-out error rises; beyond, the weight is let be
# The ridges among which the held-out text chooses. What is best for one weight alone is not for those after it: errors
# that are let be add up through the layers, so the ladder ends where a weight still mends most of what it can.
LADDER = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_FIRST = LADDER.index(0.01)  # that is tried
_ROWS = 8192  # of a weight that are solved for at once: an output layer has a hundred thousand
_ROUNDING = 1e-14  # of the largest square of an input: the least that is added, for what the text never showed


@contextlib.contextmanager
def tensor_cores(device: torch.device, dtype: str) -> Iterator[None]:
    """Let a GPU round what it multiplies in fp32 to TF32, and add up in fp32: a layer takes half the time.

    Only where the weights to come, in `dtype`, have no more bits than TF32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" and dtype != "fp32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Moments:
    """Sums over tokens, in float64: `inputs` u u^T [in, in], `cross` u t^T [in, targets], `targets` t t^T."""

    def __init__(self, inputs: int, targets: int, device: torch.device | str) -> None:
        self.inputs = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, targets, dtype=torch.float64, device=device)
        self.targets = torch.zeros(targets, targets, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add tokens, `[..., in]` and `[..., targets]`; products are taken in their own dtype."""
        u, t = inputs.flatten(0, -2), targets.flatten(0, -2)
        self.inputs += u.T @ u
        self.cross += u.T @ t
        self.targets += t.T @ t

    def scale_inputs(self, factor: float) -> None:
        """Let all inputs have been `factor` times what they were."""
        self.inputs *= factor**2
        self.cross *= factor

    def wanted(self, parent: Tensor | None) -> tuple[Tensor, float]:
        """Return the sums of y u^T, `[out, in]`, and of |y|^2, for the targets y = P t."""
        if parent is None:
            return self.cross.T, float(self.targets.trace())
        return parent @ self.cross.T, float(((parent @ self.targets) * parent).sum())


@dataclass
class Fit:
    """A weight [out, in], and sums of squares in float64: of what it should give, and of what it misses of it.

    `ridge` is infinite where a part of the weight was let be: every change made the held-out error worse. Squares are
    on the calibration text and on the held-out text.
    """

    weight: Tensor
    ridge: float
    wanted: tuple[float, float]
    before: tuple[float, float]
    after: tuple[float, float]


class LeastSquares:
    """Solves for every weight that reads the same inputs.

    `ridge` is in units of an input's mean square; with `AUTO` each weight gets that of the `LADDER` with which its
    error on the held-out text is least.
    """

    def __init__(self, calibration: Moments, held_out: Moments, ridge: Ridge) -> None:
        self.calibration, self.held_out, self.ridge = calibration, held_out, ridge
        self._factors: dict[float, Tensor | None] = {}

    def fit(self, cut: Tensor, parent: Tensor | None = None) -> Fit:
        """Return the weight W that minimises the sum of |W u - y|^2 plus ridge * |W - cut|^2.

        `cut` is [out, in], `parent` P. While the held-out error is above that of the cut weight, the ridge grows, from
        the one that was given or from the end of the ladder.
        """
        parts = [
            self._fit(cut[start : start + _ROWS].double(), None if parent is None else parent[start : start + _ROWS])
            for start in range(0, len(cut), _ROWS if parent is not None else len(cut))
        ]
        return Fit(
            weight=torch.cat([part.weight.to(cut.dtype) for part in parts]),
            ridge=max(part.ridge for part in parts),
            wanted=_added_up(part.wanted for part in parts),
            before=_added_up(part.before for part in parts),
            after=_added_up(part.after for part in parts),
        )

    def _fit(self, cut: Tensor, parent: Tensor | None) -> Fit:
        parent = None if parent is None else parent.double()
        ours, theirs = (_Error(moments, cut, parent) for moments in (self.calibration, self.held_out))
        wanted, before = (ours.wanted, theirs.wanted), (ours.before, theirs.before)

        def at(ridge: float) -> Fit:
            """Return the weight with this ridge; the cut one where rounding forbids it, or it does not help."""
            # A weight that writes is the only one with its inputs, and a factor may take gigabytes.
            factor = self._factor(ridge, keep=parent is not None)
            if factor is not None:
                change = torch.cholesky_solve(ours.missing.T, factor).T
                after = ours.after(change), theirs.after(change)
                if after[1] <= before[1] and after[0] <= before[0]:
                    return Fit(cut + change, ridge, wanted, before, after)
            return Fit(cut, math.inf, wanted, before, before)

        if self.ridge == AUTO:
            best = lowest(at)
            return _first_that_helps(at, LADDER[-1] * GROWTH) if math.isinf(best.ridge) else best
        return _first_that_helps(at, self.ridge)

    def _factor(self, ridge: float, keep: bool = False) -> Tensor | None:
        """Return the Cholesky factor of the inputs' moments plus the ridge, None where rounding makes it fail."""
        if ridge in self._factors:
            return self._factors[ridge]
        inputs = self.calibration.inputs
        squares = inputs.diagonal()
        pull = max(ridge * float(squares.mean()), _ROUNDING * float(squares.max()), 1e-300)
        pulled = inputs.clone()
        pulled.diagonal().add_(pull)
        factor, failed = torch.linalg.cholesky_ex(pulled)
        found = None if failed else factor
        if keep:
            self._factors[ridge] = found
        return found


def lowest(at: Callable[[float], Fit]) -> Fit:
    """Return the fit with the least held-out error: from the first rung up the ladder, or else down, while it falls.

    Where the first rungs do not help at all, it goes on to those that might.
    """
    best = at(LADDER[_FIRST])
    for rungs in (LADDER[_FIRST + 1 :], LADDER[:_FIRST][::-1]):
        start = best
        for ridge in rungs:
            if (fit := at(ridge)).after[1] < best.after[1]:
                best = fit
            elif math.isfinite(best.ridge):
                break
        if best is not start:
            break
    return best


def _first_that_helps(at: Callable[[float], Fit], ridge: float) -> Fit:
    """Return the fit with the first ridge, up to the largest, that does not raise the held-out error."""
    while True:
        fit = at(ridge)
        ridge = max(ridge, 1e-6) * GROWTH
        if math.isfinite(fit.ridge) or ridge > LARGEST:
            return fit


def _added_up(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return sum(first), sum(second)


class _Error:
    """The squared error of a cut weight on one text, and of changes to it."""

    def __init__(self, moments: Moments, cut: Tensor, parent: Tensor | None) -> None:
        self.inputs = moments.inputs
        asked, self.wanted = moments.wanted(parent)
        self.missing = asked - cut @ self.inputs  # the sum of (y - W u) u^T, [out, in]
        # Where nothing is left, what is left is rounding.
        self.before = max(self.wanted - float((cut * (asked + self.missing)).sum()), 0.0)

    def after(self, change: Tensor) -> float:
        fallen = float((change * (2 * self.missing - change @ self.inputs)).sum())
        return max(self.before - fallen, 0.0)
