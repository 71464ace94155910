"""A tensor of low precision."""

from transformer_engine.pytorch.tensor import QuantizedTensor


class Float8Tensor(QuantizedTensor):
    """What Megatron asks whether a weight is."""
