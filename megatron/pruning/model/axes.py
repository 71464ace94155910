"""The axes of a Llama, and the rules that hold for an axis whatever weight has it."""

# Rules about axes, not about weights.
SPLIT_BY_TENSOR_PARALLEL = frozenset({"vocab", "heads", "groups", "ffn"})
CHOSEN_PER_LAYER = frozenset({"heads", "groups", "ffn"})


def axes(dim: str) -> tuple[str, ...]:
    """Return the model axes that one dim holds, outermost first."""
    return tuple(dim.split("*"))
