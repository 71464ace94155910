"""A model's shape and constants as Megatron spells them: the arguments in its checkpoints, and its command line."""

import reprlib
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron.pruning.model.config import LlamaConfig, family_with
from megatron.pruning.model.layout import Layout

# The llama3 rotary frequencies as Megatron-core fixes them; only the factor is configurable there.
MEGATRON_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEFAULT_ROPE_FACTOR = 8.0


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
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "use_mup": False,
    "softmax_type": "vanilla",
    "qk_l2_norm": False,
    "experimental_attention_variant": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
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

    family = _family_of(vars(args), where)
    heads, hidden = get("num_attention_heads"), get("hidden_size")
    try:
        factor = float(get("rope_scaling_factor", DEFAULT_ROPE_FACTOR))
        scaling = {"rope_type": "llama3", "factor": factor, **MEGATRON_ROPE_SCALING}
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
            rope_scaling=scaling if get("use_rope_scaling", False) else None,
            max_position_embeddings=get("max_position_embeddings", get("seq_length", 4096)),
            family=family,
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: its arguments are not a Llama's: {error}") from error


def _family_of(args: Mapping[str, Any], where: str) -> str:
    """Return the family of these arguments. Raises ValueError when they are not those of a dense Llama."""
    for name, wanted in LLAMA_ARGS.items():
        if (found := args.get(name)) not in (None, wanted):
            raise ValueError(f"{where}: its argument {name} is {reprlib.repr(found)}, but a Llama's is {wanted!r}")
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if args.get(name) is None]
    if missing:
        raise ValueError(f"{where}: its arguments lack {', '.join(missing)}")
    features = frozenset(name for name, arg in FEATURE_ARGS.items() if args.get(arg))
    if (family := family_with(features)) is None:
        raise ValueError(f"{where}: no model read here has all of {', '.join(FEATURE_ARGS[name] for name in features)}")
    return family


def model_args(config: LlamaConfig, layout: Layout) -> dict[str, Any]:
    """Return the Megatron arguments that describe the model, by the name that they have on the command line.

    Everything that tells Megatron of a model is made from them: the arguments in its checkpoints, the flags of a
    training, the models that are built here, and the check of the flags that a user gives.
    """
    scaling = config.rope_scaling
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
        "rotary_base": int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta,
        "rotary_percent": 1.0,
        "use_rope_scaling": scaling is not None,
        "rope_scaling_factor": DEFAULT_ROPE_FACTOR if scaling is None else scaling.get("factor"),
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


# Those of them that a training may have otherwise.
OF_THE_TRAINING = frozenset(
    "attention_dropout hidden_dropout make_vocab_size_divisible_by tensor_model_parallel_size "
    "pipeline_model_parallel_size".split()
)


def _computable_args(config: LlamaConfig, layout: Layout) -> dict[str, Any]:
    """Return `model_args`. Raises ValueError for a rotary embedding that Megatron cannot compute."""
    if config.rope_scaling is not None:
        scaling = dict(config.rope_scaling)
        factor = scaling.pop("factor", None)
        if scaling.pop("rope_type", None) != "llama3" or factor is None or scaling != MEGATRON_ROPE_SCALING:
            raise ValueError(
                f"rope scaling {dict(config.rope_scaling)} is not one that Megatron computes: only rope_type llama3 "
                f"with {MEGATRON_ROPE_SCALING} (and any factor)"
            )
    values = model_args(config, layout)
    if not isinstance(values["rotary_base"], int):
        raise ValueError(f"rope_theta {config.rope_theta}: Megatron's --rotary-base takes whole numbers only")
    return values | {"rope_scaling_factor": float(values["rope_scaling_factor"])}


def config_to_args(config: LlamaConfig, layout: Layout) -> Namespace:
    """Return the Namespace for a Megatron checkpoint: plain values only, so that every release may load it safely.

    Raises ValueError for a rotary embedding that Megatron cannot compute.
    """
    values = _computable_args(config, layout)
    values["add_bias_linear"] = not values.pop("disable_bias_linear")
    # The name was norm_epsilon up to 0.15 and is layernorm_epsilon since.
    values["layernorm_epsilon"] = values["norm_epsilon"]
    # `seq_length` is for loaders of a time when --use-checkpoint-args took it without a second look.
    extra = {"seq_length": config.max_position_embeddings, "ckpt_format": "torch", "add_position_embedding": False}
    return Namespace(**values, **extra, use_rotary_position_embeddings=True, rotary_interleaved=False)


def config_to_command_line(config: LlamaConfig, layout: Layout) -> list[str]:
    """Return the flags with which pretrain_gpt.py (or stock Megatron) builds this model, one `--flag value` each.

    `--use-checkpoint-args` restores only some of them: not the epsilon, the rope scaling or the vocabulary divisor.
    Raises ValueError for a rotary embedding that Megatron cannot compute.
    """
    values = _computable_args(config, layout)
    if not values["group_query_attention"]:
        del values["num_query_groups"]
    if not values["use_rope_scaling"]:
        del values["rope_scaling_factor"]
    flags = {flag_of(name): value for name, value in values.items() if value is not False}
    return [flag if value is True else f"{flag} {value}" for flag, value in flags.items()]


def flag_of(name: str) -> str:
    """Return the flag that sets an argument."""
    return "--" + name.replace("_", "-")
