"""A model's shape and constants as Hugging Face spells them: config.json."""

import reprlib
from collections.abc import Mapping
from typing import Any

from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.storage.views import TORCH_NAMES

# config.json's name of each field that both sides write as one plain value.
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
# The models that the table describes: config.json's model_type, its class, and its features.
FAMILIES: Mapping[str, tuple[str, frozenset[str]]] = {
    "llama": ("LlamaForCausalLM", frozenset()),
    "mistral": ("MistralForCausalLM", frozenset()),
    "qwen2": ("Qwen2ForCausalLM", frozenset({"qkv_bias"})),
    "qwen3": ("Qwen3ForCausalLM", frozenset({"qk_norm"})),
}
# What transformers takes for granted when config.json does not say, where that differs from Llama's.
_HF_UNSAID: Mapping[Any, Mapping[str, Any]] = {
    "mistral": {"sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
}
# Settings that would make a model something else than the table's Llama, and the only values it takes.
_HF_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
}


def config_from_hf(hf: Mapping[str, Any], where: str) -> LlamaConfig:
    """Read a config.json, in the spelling of transformers 4 or 5. `where` names it in errors.

    Raises ValueError for a missing or wrong field and for a model that is not a dense Llama.
    """
    for name, allowed in _HF_REQUIRED.items():
        unsaid = _HF_UNSAID.get(str(hf.get("model_type")), {})
        value = hf.get(name, unsaid.get(name, allowed[0] if name != "model_type" else None))
        if name == "sliding_window" and hf.get("model_type") in ("qwen2", "qwen3") and not hf.get("use_sliding_window"):
            continue  # a width that is not used
        if value not in allowed:
            known, found = " or ".join(map(repr, allowed)), reprlib.repr(value)
            raise ValueError(f"{where}: {name} is {found}, but a dense Llama, which this program is for, has {known}")
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{where}: layer_types has others than full_attention, which is all that is pruned here")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: the rope parameters are {reprlib.repr(rope)}, not an object")
    rope = dict(rope)
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.get("partial_rotary_factor") in (1.0, None):
        rope.pop("partial_rotary_factor", None)
    # What config.json leaves out has transformers' defaults, not ours.
    unsaid = _HF_UNSAID.get(hf["model_type"], {})
    fields: dict[str, Any] = {"norm_epsilon": 1e-6, "max_position_embeddings": 2048}
    fields |= {name: value for name, value in unsaid.items() if name != "sliding_window"}
    fields |= {ours: hf[theirs] for ours, theirs in _HF_NAMES.items() if hf.get(theirs) is not None}
    for ours in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
        if ours not in fields:
            raise ValueError(f"{where}: {_HF_NAMES[ours]} is missing")
    fields.setdefault("num_query_groups", fields["num_attention_heads"])
    try:
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        fields["norm_epsilon"], _ = float(fields["norm_epsilon"]), float(rope.get("factor", 1))
        return LlamaConfig(
            **fields,
            rope_theta=float(theta),
            rope_scaling={"rope_type": kind, **rope} if rope or kind != "default" else None,
            features=FAMILIES[hf["model_type"]][1],
            other={name: value for name, value in hf.items() if name not in _HF_OWNED},
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error


# Written anew, or by transformers itself: layer_types and max_window_layers are of the parent's number of layers.
_HF_OWNED = {*_HF_NAMES.values(), "rope_parameters", "rope_scaling", "rope_theta", "torch_dtype", "dtype"}
_HF_OWNED |= {"layer_types", "max_window_layers"}


def config_to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json, in the names that transformers 4 and 5 (and vLLM) both read."""
    family = next(name for name, (_, features) in FAMILIES.items() if features == config.features)
    defaults = {"architectures": [FAMILIES[family][0]], "model_type": family, "hidden_act": "silu"}
    return {
        **defaults,
        **config.other,
        **{theirs: getattr(config, ours) for ours, theirs in _HF_NAMES.items()},
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(sorted(config.rope_scaling.items())) if config.rope_scaling else None,
        "torch_dtype": TORCH_NAMES[dtype],
    }


def hf_export_problem(config: LlamaConfig) -> str | None:
    """Return why transformers would refuse this shape, None if it takes it. Only its Llama is so strict."""
    if config.other.get("model_type", "llama") != "llama" or config.features:
        return None
    if config.hidden_size % config.num_attention_heads:
        return (
            f"hidden size {config.hidden_size} is not a multiple of {config.num_attention_heads} attention heads: "
            "transformers refuses such a Llama, so it could be trained but not exported"
        )
    return None
