"""Tensors of low precision, of which there are none."""

import torch


class QuantizedTensor(torch.Tensor):
    """What Megatron asks whether a weight is."""
