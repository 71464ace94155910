"""Ways to break what describes a model, by what its values mean: configurations, arguments, plans and scores.

Each is as those of fuzz_bytes.py: it changes the copy at `path`, and returns what it did.
"""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_bytes import header_end
from fuzz_fields import ODD_NUMBERS, chosen
from helpers import load_whole

# Configurations and arguments -----------------------------------------------------------------------------------------

CONFIG_FIELDS = (
    "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim num_hidden_layers vocab_size "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings torch_dtype "
    "dtype hidden_act attention_bias mlp_bias model_type architectures quantization_config partial_rotary_factor "
    "pretraining_tp sliding_window auto_map"
).split()
OF_CONFIGS: list[Any] = [
    "gelu", "silu", "llama", "mistral", "qwen2", ["LlamaForCausalLM"], ["../x"], "float32", "float8", "true", "yes",
    1e-5, 1e4, {"rope_type": "llama3"}, {"rope_type": "linear", "factor": 0}, {"type": "yarn", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, {"rope_theta": "x"},
    {"factor": "8"},
    {"quant_method": "gptq", "bits": 4},
]  # fmt: skip
ARGUMENTS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention kv_channels "
    "padded_vocab_size max_position_embeddings norm_epsilon rotary_base rotary_percent use_rope_scaling "
    "rope_scaling_factor swiglu normalization add_bias_linear add_qkv_bias qk_layernorm position_embedding_type "
    "untie_embeddings_and_output_weights tensor_model_parallel_size pipeline_model_parallel_size vocab_size "
    "make_vocab_size_divisible_by params_dtype transformer_impl ckpt_format num_experts spec tokenizer_type "
    "virtual_pipeline_model_parallel_size decoder_first_pipeline_num_layers seq_length bf16 fp16"
).split()
OF_ARGUMENTS: list[Any] = [
    "LayerNorm", "RMSNorm", "rope", "learned_absolute", "none", "local", "../x", torch.float16, torch.int8,
    ["os", "system"], ["antigravity", "fly"], 1e-5, float("nan"), float("inf"), 10**400, torch.ones(3), {"a": 1},
]  # fmt: skip


def break_config(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Say something else in a field of a config.json."""
    if (file := chosen(path, random, "config.json")) is None:
        return "nothing"
    config = json.loads(file.read_bytes())
    field = random.choice(CONFIG_FIELDS)
    old = config.get(field)
    near = [old + step for step in (-1, 1, 4, old)] if type(old) is int else [old]
    value = random.choice(random.choice((ODD_NUMBERS, OF_CONFIGS, near)))
    if random.random() < 0.1:
        config.pop(field, None)
    else:
        config[field] = value
    file.write_text(json.dumps(config))
    return f"{field} of config.json is {str(value)[:20]}"


def break_argument(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Say something else in an argument that Megatron saved with the weights."""
    if (file := chosen(path, random, ".pt")) is None:
        return "nothing"
    content = load_whole(file)
    field = random.choice(ARGUMENTS)
    old = getattr(content["args"], field, None)
    near = [old + step for step in (-1, 1, old)] if type(old) is int else [not old if type(old) is bool else old]
    value = random.choice(random.choice((ODD_NUMBERS, OF_ARGUMENTS, near)))
    if random.random() < 0.1:
        vars(content["args"]).pop(field, None)
    else:
        setattr(content["args"], field, value)
    torch.save(content, file)
    return f"argument {field} of {file.name} is {str(value)[:20]}"


# Plans and scores -----------------------------------------------------------------------------------------------------


ODD_RANGES = (
    "", "0", "0,0", "1,0", "3-1", "0-99999", "0-999999999999", "-1", "0--1", "0-", ",", "0,", "0;1", " 0 , 1 ", "+1",
    "1_0", "0x1", "\u0661", "1e1", "0-3,2-5", "9" * 5000, "0-3", "0-1,3",
)  # fmt: skip


def break_plan(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change kept indices, which are text such as "0,2-7", or a field of a plan."""
    file = path / "plan.json"
    plan = json.loads(file.read_bytes())
    layer = random.choice(plan["keep"]["per_layer"])
    kind = random.choice(("indices", "indices", "layer", "top", "sizes", "no field", "more", "more layers", "no layer"))
    holders = {"indices": random.choice((layer, plan["keep"])), "layer": layer, "top": plan}
    holders["sizes"] = random.choice((plan["parent"], plan["pruned"]))
    if kind == "no field":
        holder = random.choice((layer, plan, plan["keep"], plan["parent"], plan["pruned"]))
        del holder[random.choice(sorted(holder))]
    elif kind == "more":
        random.choice((layer, plan, plan["keep"]))["more"] = 1
    elif kind == "more layers":
        plan["keep"]["per_layer"].append(layer)
    elif kind == "no layer":
        plan["keep"]["per_layer"].remove(layer)
    else:
        holder = holders[kind]
        field = random.choice(sorted(holder))
        old = holder[field]
        near = (old - 1, old + 1, 2 * old) if type(old) is int else (f"{old},{old}", f"{old}x", f"{old},0", f"0,{old}")
        holder[field] = random.choice(random.choice((ODD_RANGES if kind == "indices" else ODD_NUMBERS, near)))
        kind = f"{kind} {field}"
    file.write_text(json.dumps(plan))
    return f"{kind} of the plan"


def break_scores(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change a field of the facts in the header of a file of scores, or one of its numbers."""
    file = path / "scores.safetensors"
    end, raw = header_end(file), bytearray(file.read_bytes())
    if random.random() < 0.3:
        at = end + 8 * random.randrange((len(raw) - end) // 8)
        number = random.choice((float("nan"), float("inf"), float("-inf"), -0.0, -1.0, 5e-324, 1.7e308, 0.0))
        raw[at : at + 8] = struct.pack("<d", number)
        file.write_bytes(raw)
        return "a number of the scores"
    header = json.loads(raw[8:end])
    notes = header["__metadata__"]
    key = random.choice(sorted(notes))
    try:
        facts = json.loads(notes[key])
    except ValueError:
        facts = None
    if isinstance(facts, dict) and facts:
        field = random.choice(sorted(facts))
        facts[field] = random.choice(ODD_NUMBERS)
        notes[key] = json.dumps(facts)
    else:
        notes[key] = random.choice(("", "x", "0", "-1", "nan", "1e999", "9" * 5000, "\ud83d", "{}", "[]"))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return f"{key} of the scores"
