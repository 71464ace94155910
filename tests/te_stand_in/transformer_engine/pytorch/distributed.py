"""Random states."""

import contextlib
from collections.abc import Iterator

import torch


class CudaRNGStatesTracker:
    """States of random numbers, by name: of dropout in tensor-parallel regions, which the models of the tests lack."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self._states: dict[str, torch.Tensor] = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        """Return all."""
        return dict(self._states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Take these."""
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Begin another one."""
        self._states[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from one of them."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(before)


def activation_recompute_forward(*args: object, **kwargs: object) -> None:
    """Of fp8 with recomputation."""
