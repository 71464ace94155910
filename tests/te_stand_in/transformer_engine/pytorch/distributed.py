"""Random states."""


class CudaRNGStatesTracker:
    """Of dropout in tensor-parallel regions; the models of the tests have none."""


def activation_recompute_forward(*args: object, **kwargs: object) -> None:
    """Of fp8 with recomputation."""
