"""What a Llama checkpoint says of its model, and the two ways to write it down: config.json and Megatron arguments."""

import dataclasses
import math
import reprlib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.pruning.layout import Layout
from megatron.pruning.table import parameter_count
from megatron.pruning.views import TORCH_NAMES

# The llama3 rotary frequencies as Megatron-core fixes them; only the factor is configurable there.
MEGATRON_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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


def megatron_rope_factor(config: LlamaConfig) -> float | None:
    """Return the factor for --rope-scaling-factor, None without scaling. ValueError for what Megatron cannot do."""
    if config.rope_scaling is None:
        return None
    scaling = dict(config.rope_scaling)
    factor = scaling.pop("factor", None)
    if scaling.pop("rope_type", None) != "llama3" or factor is None or scaling != MEGATRON_ROPE_SCALING:
        raise ValueError(
            f"rope scaling {dict(config.rope_scaling)} is not one that Megatron computes: only rope_type llama3 with "
            f"{MEGATRON_ROPE_SCALING} (and any factor)"
        )
    return float(factor)


# The Megatron argument that turns a feature on.
FEATURE_ARGS = {"qkv_bias": "add_qkv_bias", "qk_norm": "qk_layernorm"}
# Megatron arguments that would make a model something else than the table's Llama, and what they are for one. Old
# checkpoints lack some; absent and None say nothing.
LLAMA_ARGS: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "rotary_percent": 1.0,
    "add_bias_linear": False,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "squared_relu": False,
    "quick_geglu": False,
    "multi_latent_attention": False,
    "rotary_seq_len_interpolation_factor": None,
    "window_size": None,
    "num_experts": None,
    "mtp_num_layers": None,
}


def config_from_args(args: Namespace, where: str) -> LlamaConfig:
    """Read the arguments that a Megatron checkpoint carries. Raises ValueError if they are not a dense Llama's."""

    def get(name: str, default: Any = None) -> Any:
        value = getattr(args, name, None)
        return default if value is None else value

    for name, wanted in LLAMA_ARGS.items():
        if get(name) not in (None, wanted):
            raise ValueError(f"{where}: its argument {name} is {reprlib.repr(get(name))}, but a Llama's is {wanted!r}")
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if get(name) is None]
    if missing:
        raise ValueError(f"{where}: its arguments lack {', '.join(missing)}")
    features = frozenset(name for name, arg in FEATURE_ARGS.items() if get(arg))
    if features not in [known for _, known in FAMILIES.values()]:
        raise ValueError(f"{where}: no model read here has all of {', '.join(FEATURE_ARGS[name] for name in features)}")
    heads, hidden = get("num_attention_heads"), get("hidden_size")
    try:
        scaling = None
        if get("use_rope_scaling", False):
            scaling = {"rope_type": "llama3", "factor": float(get("rope_scaling_factor", 8.0)), **MEGATRON_ROPE_SCALING}
        return LlamaConfig(
            num_layers=get("num_layers"),
            hidden_size=hidden,
            ffn_hidden_size=get("ffn_hidden_size", 4 * hidden),
            num_attention_heads=heads,
            # Before Megatron-core 0.16 plain multi-head attention was saved with num_query_groups 1.
            num_query_groups=get("num_query_groups", heads) if get("group_query_attention", False) else heads,
            head_dim=get("kv_channels", hidden // heads),
            vocab_size=get("vocab_size", get("padded_vocab_size", 1)),
            tied=not get("untie_embeddings_and_output_weights", False),
            norm_epsilon=float(get("layernorm_epsilon", get("norm_epsilon", 1e-5))),
            rope_theta=float(get("rotary_base", 10000)),
            rope_scaling=scaling,
            max_position_embeddings=get("max_position_embeddings", get("seq_length", 4096)),
            features=features,
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: its arguments are not a Llama's: {error}") from error


def _megatron_values(config: LlamaConfig, layout: Layout) -> dict[str, Any]:
    """Return the Megatron arguments that describe the model, by the name they have on the command line."""
    factor = megatron_rope_factor(config)
    if config.rope_theta != int(config.rope_theta):
        raise ValueError(f"rope_theta {config.rope_theta}: Megatron's --rotary-base takes whole numbers only")
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rope_theta),
        "rotary_percent": 1.0,
        "use_rope_scaling": factor is not None,
        "rope_scaling_factor": 8.0 if factor is None else factor,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_epsilon,
        "swiglu": True,
        "disable_bias_linear": True,
        **{arg: feature in config.features for feature, arg in FEATURE_ARGS.items()},
        "untie_embeddings_and_output_weights": not config.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": layout.padded_vocab(config.vocab_size),
        "make_vocab_size_divisible_by": layout.vocab_divisor,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
    }


def config_to_args(config: LlamaConfig, layout: Layout) -> Namespace:
    """Return the Namespace for a Megatron checkpoint: plain values only, so that every release may load it safely."""
    values = _megatron_values(config, layout)
    values["add_bias_linear"] = not values.pop("disable_bias_linear")
    # The name was norm_epsilon up to 0.15 and is layernorm_epsilon since.
    values["layernorm_epsilon"] = values["norm_epsilon"]
    # `seq_length` is for loaders of a time when --use-checkpoint-args took it without a second look.
    extra = {"seq_length": config.max_position_embeddings, "ckpt_format": "torch", "add_position_embedding": False}
    return Namespace(**values, **extra, use_rotary_position_embeddings=True, rotary_interleaved=False)


def config_to_command_line(config: LlamaConfig, layout: Layout) -> list[str]:
    """Return the flags with which pretrain_gpt.py (or stock Megatron) builds this model, one `--flag value` each.

    `--use-checkpoint-args` restores only some of them: not the epsilon, the rope scaling or the vocabulary divisor.
    """
    values = _megatron_values(config, layout)
    if not values["group_query_attention"]:
        del values["num_query_groups"]
    if not values["use_rope_scaling"]:
        del values["rope_scaling_factor"]
    lines = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is not False:
            lines.append(flag if value is True else f"{flag} {value}")
    return lines
