"""Shape and constants of a model, and the families of models that the table of weights describes."""

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.pruning.model.axes import AXES
from megatron.pruning.model.weights import parameter_count


@dataclass(frozen=True)
class Family:
    """A kind of model that is a Llama but for its `features`, by its names and habits in Hugging Face's config.json.

    `features` name the rows of the table of weights that only such models have. `unsaid` is what transformers takes for
    granted when config.json does not say, where that differs from Llama's. `window_switch` names the setting without
    which a `sliding_window` is not used.
    """

    architecture: str
    features: frozenset[str] = frozenset()
    unsaid: Mapping[str, Any] = field(default_factory=dict)
    window_switch: str | None = None


# By config.json's `model_type`. A family whose rows the table has is one entry here.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", unsaid={"sliding_window": 4096, "max_position_embeddings": 131072}),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        frozenset({"qkv_bias"}),
        {"sliding_window": 4096, "max_position_embeddings": 32768},
        "use_sliding_window",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        frozenset({"qk_norm"}),
        {"sliding_window": 4096, "max_position_embeddings": 32768, "head_dim": 128},
        "use_sliding_window",
    ),
}


def family_with(features: frozenset[str]) -> str | None:
    """Return the first family that has just these features, None when no family has."""
    return next((name for name, family in FAMILIES.items() if family.features == features), None)


LARGEST_CONSTANT = 1e12  # of a rotary embedding


def _check_constant(name: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
        raise ValueError(f"{name} is {reprlib.repr(value)}: it must be a positive number below {most:g}")


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a dense Llama, or of a model of another family that is one but for its features.

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
    family: str = "llama"
    # Whatever else the parent's config.json says (token ids, ...): carried to the next config.json, never interpreted.
    other: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        limits = {axis.field: axis.limit for axis in AXES} | {"max_position_embeddings": 1 << 40}
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} is {reprlib.repr(value)}: it must be a whole number from 1 to {limit}")
        for name, most in {"norm_epsilon": 1.0, "rope_theta": LARGEST_CONSTANT}.items():
            _check_constant(name, getattr(self, name), most)
        for name, value in (self.rope_scaling or {}).items():
            if name == "factor" or not isinstance(value, str | None | list):  # some are words, or lists
                _check_constant(f"rope_scaling.{name}", value, LARGEST_CONSTANT)
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
    def features(self) -> frozenset[str]:
        """What the family has beyond a Llama, as the rows of the table of weights name it."""
        return FAMILIES[self.family].features

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size of every axis of the table."""
        return {axis.name: getattr(self, axis.field) for axis in AXES}

    @property
    def constants(self) -> dict[str, Any]:
        """What a forward pass takes beside the weights, in plain values, the same for every format."""
        scaling = {name: float(n) if type(n) is int else n for name, n in sorted((self.rope_scaling or {}).items())}
        return {"norm_epsilon": self.norm_epsilon, "rope_theta": self.rope_theta, "rope": scaling, "tied": self.tied}

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
        changes: dict[str, Any] = {axis.field: sizes[axis.name] for axis in AXES if axis.name in sizes}
        return dataclasses.replace(self, **changes)


def short(count: float) -> str:
    """Write a count, of parameters or tokens, to three digits: 3.37B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.3g}"


def said_bytes(count: float) -> str:
    """Write bytes to three digits: 13.5 GB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
