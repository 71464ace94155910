"""A model's shape and constants as Hugging Face spells them: config.json."""

import reprlib
from collections.abc import Mapping
from typing import Any

from megatron.pruning.model.config import FAMILIES, Family, LlamaConfig
from megatron.pruning.storage.dtypes import TORCH_NAMES

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
_MUST_BE_SAID = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
# Transformers takes these for granted when config.json does not say them; LlamaConfig has other defaults.
_UNSAID = {"norm_epsilon": 1e-6, "max_position_embeddings": 2048}
# Settings that would make a model something else than the table's Llama, and the only values they may have.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
}
# Names that are not carried on: they are written anew, or are of the parent's layers, as layer_types and
# max_window_layers are.
_OWNED = {*_HF_NAMES.values(), "model_type", "rope_parameters", "rope_scaling", "rope_theta", "torch_dtype", "dtype"}
_OWNED |= {"layer_types", "max_window_layers"}
_OWNED |= {"_name_or_path", "transformers_version"}  # of the model that it was, and of what wrote that
# Settings that have a reader run code, or fetch it: a plain Llama needs none, and so none goes on.
RUNS_CODE = (
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "custom_pipelines",
    "trust_remote_code", "use_kernels", "experts_implementation", "_experts_implementation",
)  # fmt: skip


def config_from_hf(hf: Mapping[str, Any], where: str) -> LlamaConfig:
    """Read a config.json, in the spelling of transformers 4 or 5. `where` names it in errors.

    Raises ValueError for a missing or wrong field and for a model that is not a dense Llama.
    """
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise _not_a_llama(where, "model_type", name, tuple(FAMILIES))
    family = FAMILIES[name]
    _check_settings(hf, family, where)
    theta, scaling = _rope(hf, where)
    # What config.json leaves out has transformers' defaults, not ours.
    fields: dict[str, Any] = _UNSAID | {key: value for key, value in family.unsaid.items() if key not in _REQUIRED}
    fields |= {ours: hf[theirs] for ours, theirs in _HF_NAMES.items() if hf.get(theirs) is not None}
    for ours in _MUST_BE_SAID:
        if ours not in fields:
            raise ValueError(f"{where}: {_HF_NAMES[ours]} is missing")
    fields.setdefault("num_query_groups", fields["num_attention_heads"])
    try:
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        for said, constant in {"rms_norm_eps": fields["norm_epsilon"], "rope_theta": theta}.items():
            if isinstance(constant, bool):
                raise ValueError(f"{said} is {constant}: it must be a number")
        fields["norm_epsilon"] = float(fields["norm_epsilon"])
        other = {key: value for key, value in hf.items() if key not in {*_OWNED, *RUNS_CODE}}
        return LlamaConfig(**fields, rope_theta=float(theta), rope_scaling=scaling, family=name, other=other)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_settings(hf: Mapping[str, Any], family: Family, where: str) -> None:
    for name, allowed in _REQUIRED.items():
        value = hf.get(name, family.unsaid.get(name, allowed[0]))
        if name == "sliding_window" and family.window_switch and not hf.get(family.window_switch):
            continue  # a width that is not used
        if value not in allowed:
            raise _not_a_llama(where, name, value, allowed)
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{where}: layer_types has others than full_attention, which is all that is pruned here")


def _not_a_llama(where: str, name: str, value: Any, allowed: tuple[Any, ...]) -> ValueError:
    known, found = " or ".join(map(repr, allowed)), reprlib.repr(value)
    return ValueError(f"{where}: {name} is {found}, but a dense Llama, which this program is for, has {known}")


def _rope(hf: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any] | None]:
    """Return the rotary base and the scaling (None: there is none), which transformers 5 keeps in one object."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: the rope parameters are {reprlib.repr(rope)}, not an object")
    rope = dict(rope)
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.get("partial_rotary_factor") in (1.0, None):
        rope.pop("partial_rotary_factor", None)
    return theta, {"rope_type": kind, **rope} if rope or kind != "default" else None


def config_to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json, in the names that transformers 4 and 5 (and vLLM) both read."""
    return {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        **config.other,
        **{theirs: getattr(config, ours) for ours, theirs in _HF_NAMES.items()},
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(sorted(config.rope_scaling.items())) if config.rope_scaling else None,
        "torch_dtype": TORCH_NAMES[dtype],
    }


def hf_export_problem(config: LlamaConfig) -> str | None:
    """Return why transformers would refuse this shape, None if it takes it. Only its Llama is so strict."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.family == "llama" and hidden % heads:
        below = hidden - hidden % heads
        nearest = f"{below} or {below + heads}" if below else f"{heads}"
        return (
            f"hidden size {hidden} is not a multiple of {heads} attention heads: transformers refuses such a Llama, so "
            f"it could be trained but not exported; it takes {nearest}"
        )
    return None
