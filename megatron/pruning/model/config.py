"""What a Llama checkpoint says of its model, and the two ways to write it down: config.json and Megatron arguments."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.pruning.model.weights import parameter_count


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a dense Llama, or of a model that is one but for `features` (see the table's rows).

    Sizes count elements; `vocab_size` is without padding.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 4096
    features: frozenset[str] = frozenset()
    # Whatever else the parent's config.json says (token ids, ...): carried to the next config.json, never interpreted.
    other: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in (*AXIS_OF_FIELD, "max_position_embeddings"):
            value = getattr(self, name)
            limit = _LIMITS.get(name, 1 << 24)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} is {reprlib.repr(value)}: it must be a whole number from 1 to {limit}")
        for name in ("norm_epsilon", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {reprlib.repr(value)}: it must be a positive number")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tie_word_embeddings is {reprlib.repr(self.tied)}: it must be true or false")
        if self.num_attention_heads * self.head_dim > 1 << 24:
            raise ValueError(f"{self.num_attention_heads} heads of {self.head_dim} are more than any model has")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size of every axis of the table."""
        return {axis: getattr(self, name) for name, axis in AXIS_OF_FIELD.items()}

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def parameters(self) -> int:
        """Number of parameters, vocabulary padding left out."""
        return parameter_count(self.sizes, self.tied, self.features)

    def with_sizes(self, sizes: Mapping[str, int]) -> "LlamaConfig":
        """Return this config with new axis sizes."""
        changes: dict[str, Any] = {name: sizes[axis] for name, axis in AXIS_OF_FIELD.items() if axis in sizes}
        return dataclasses.replace(self, **changes)


# What no model reaches (other sizes: 2**24): a wrong number shall end in a sentence, not in a loop over it.
_LIMITS = {"num_layers": 10_000, "max_position_embeddings": 1 << 40}

AXIS_OF_FIELD = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "groups",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
}
