"""The hidden space that remains: some channels of the parent's, or a rotation of it that keeps what matters most.

RMSNorm commutes with a rotation once its gain is folded into the weights that read it. One basis serves the whole
model, so that the result is a plain Llama: SliceGPT (arXiv 2401.15024) rotates each block by itself and pays with a
matrix in every skip connection.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.pruning.model.weights import READERS, WRITERS

NORM_OF = {reader: norm for norm, readers in READERS.items() for reader in readers}


@dataclass(frozen=True)
class Basis:
    """Channels of the parent's hidden states that are kept, or, where there is a `matrix` [hidden, kept], its columns.

    The columns are orthonormal. They are of the hidden states, of which the norms give multiples.
    """

    channels: Tensor
    matrix: Tensor | None = None

    def project(self, states: Tensor) -> Tensor:
        """Return hidden states `[..., hidden]` in this basis, `[..., kept]`."""
        return states[..., self.channels] if self.matrix is None else states @ self.matrix.to(states.dtype)

    def cut(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of a layer (or those after the layers), by row, whose dims of the hidden size are cut.

        With a matrix each reader takes the gain of its norm in, and the norms' gains become ones.
        """
        return {name: self._cut(name, weight, weights) for name, weight in weights.items()}

    def _cut(self, name: str, weight: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        if name in WRITERS:
            return self.project(weight.T).T
        if name in READERS:
            return weight[self.channels] if self.matrix is None else weight.new_ones(self.matrix.shape[1])
        if name in NORM_OF:
            return self.project(weight if self.matrix is None else weight * weights[NORM_OF[name]])
        return self.project(weight) if name == "embed" else weight


def rotation(inputs: Tensor, readers: Tensor, kept: int) -> Tensor:
    """Return the basis [hidden, kept] in which what the readers give is kept best, in float64.

    `inputs` is C, the sum of n n^T over all that the norms give before their gains, `readers` is M, the sum of W^T W
    over all weights that read it, gains folded in; both [hidden, hidden]. Keeping the top eigenvectors of
    C^1/2 M C^1/2 loses least of |W n|^2.
    """
    values, vectors = torch.linalg.eigh(inputs.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    _, best = torch.linalg.eigh(root @ readers.double() @ root)
    basis: Tensor = torch.linalg.qr(root @ best[:, -kept:].flip(1))[0]
    return basis
