"""The table of weights: the one place that says what a Llama is made of.

A row names a weight, the model axes of its dims, and its key in Hugging Face and in Megatron-core. `heads*head_dim` is
one dim that holds two axes. Rows that share a Megatron key are fused there, in this order. Shapes, parameter counts,
what to slice for a set of kept indices, where tensor parallelism splits, and the key mapping in both directions are all
derived from it, here and in the modules that import it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron.pruning.model.axes import AXIS, axes_of
from megatron.pruning.storage.views import Index


@dataclass(frozen=True)
class WeightRow:
    """One row: a weight's name, the axes of its dims, and its keys (without the layer's prefix and `.weight`).

    A row with a `feature` is there only in models that have that feature.
    """

    name: str
    dims: tuple[str, ...]
    hf: str
    megatron: str
    feature: str | None = None
    per_layer: bool = True

    def hf_key(self, layer: int | None) -> str:
        """Return the key in a Hugging Face LlamaForCausalLM."""
        return f"model.layers.{layer}.{_full(self.hf)}" if self.per_layer else _full(self.hf)

    def megatron_key(self, layer: int | None) -> str:
        """Return the key in a Megatron GPTModel with the local layer spec; `layer` counts from 0 on its stage."""
        return f"decoder.layers.{layer}.{_full(self.megatron)}" if self.per_layer else _full(self.megatron)


def _full(name: str) -> str:
    return name if name.endswith(".bias") else f"{name}.weight"


TABLE = (
    WeightRow("embed", ("vocab", "hidden"), "model.embed_tokens", "embedding.word_embeddings", per_layer=False),
    WeightRow("attn_norm", ("hidden",), "input_layernorm", "input_layernorm"),
    WeightRow("q", ("heads*head_dim", "hidden"), "self_attn.q_proj", "self_attention.linear_qkv"),
    WeightRow("k", ("groups*head_dim", "hidden"), "self_attn.k_proj", "self_attention.linear_qkv"),
    WeightRow("v", ("groups*head_dim", "hidden"), "self_attn.v_proj", "self_attention.linear_qkv"),
    WeightRow("q_bias", ("heads*head_dim",), "self_attn.q_proj.bias", "self_attention.linear_qkv.bias", "qkv_bias"),
    WeightRow("k_bias", ("groups*head_dim",), "self_attn.k_proj.bias", "self_attention.linear_qkv.bias", "qkv_bias"),
    WeightRow("v_bias", ("groups*head_dim",), "self_attn.v_proj.bias", "self_attention.linear_qkv.bias", "qkv_bias"),
    WeightRow("q_norm", ("head_dim",), "self_attn.q_norm", "self_attention.q_layernorm", "qk_norm"),
    WeightRow("k_norm", ("head_dim",), "self_attn.k_norm", "self_attention.k_layernorm", "qk_norm"),
    WeightRow("o", ("hidden", "heads*head_dim"), "self_attn.o_proj", "self_attention.linear_proj"),
    WeightRow("mlp_norm", ("hidden",), "post_attention_layernorm", "pre_mlp_layernorm"),
    WeightRow("gate", ("ffn", "hidden"), "mlp.gate_proj", "mlp.linear_fc1"),
    WeightRow("up", ("ffn", "hidden"), "mlp.up_proj", "mlp.linear_fc1"),
    WeightRow("down", ("hidden", "ffn"), "mlp.down_proj", "mlp.linear_fc2"),
    WeightRow("final_norm", ("hidden",), "model.norm", "decoder.final_layernorm", per_layer=False),
    WeightRow("lm_head", ("vocab", "hidden"), "lm_head", "output_layer", per_layer=False),
)

# The rows before, in and after the layers.
LAYER = tuple(weight for weight in TABLE if weight.per_layer)
FIRST = TABLE[: TABLE.index(LAYER[0])]
LAST = TABLE[TABLE.index(LAYER[-1]) + 1 :]

# The norms, each with the weights that read what it gives; and the weights that add to the hidden states.
READERS = {"attn_norm": ("q", "k", "v"), "mlp_norm": ("gate", "up"), "final_norm": ("lm_head",)}
WRITERS = ("o", "down")


def split_dim(weight: WeightRow) -> int | None:
    """Return the dim along which tensor parallelism splits `weight`, None if every rank holds all of it."""
    return next((i for i, dim in enumerate(weight.dims) if AXIS[axes_of(dim)[0]].split), None)


def weight_shape(weight: WeightRow, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of `weight` in a model whose axes have `sizes`."""
    return tuple(math.prod(sizes[axis] for axis in axes_of(dim)) for dim in weight.dims)


def all_weights(layers: int, tied: bool, features: frozenset[str] = frozenset()) -> list[tuple[WeightRow, int | None]]:
    """Return every (weight, layer) of a model in the order of the forward pass; a tied output layer is left out."""
    rows = [weight for weight in LAYER if weight.feature is None or weight.feature in features]
    return [
        *((weight, None) for weight in FIRST),
        *((weight, layer) for layer in range(layers) for weight in rows),
        *((weight, None) for weight in LAST if not (tied and weight.name == "lm_head")),
    ]


def parameter_count(sizes: Mapping[str, int], tied: bool, features: frozenset[str] = frozenset()) -> int:
    """Return the number of parameters of a model whose axes have `sizes`."""
    return sum(math.prod(weight_shape(weight, sizes)) for weight, _ in all_weights(sizes["layers"], tied, features))


def kept_elements(dim: str, keep: Mapping[str, Index], sizes: Mapping[str, int]) -> Index:
    """Return the element indices that remain of `dim` when `keep` indices remain of its axes.

    `sizes` are the parent's; an axis that `keep` does not name is kept whole, e.g. the `head_dim` of `heads*head_dim`.
    """
    index = np.zeros(1, dtype=np.intp)
    for axis in axes_of(dim):
        chosen = keep[axis] if axis in keep else np.arange(sizes[axis])
        index = (index[:, None] * sizes[axis] + chosen[None, :]).ravel()
    return index
