"""An export has the names, shapes and settings that vLLM's Llama loads, as its published source states them.

vllm/model_executor/models/llama.py at commit e06c9ba2: which parameters a model has for a config.json, and which names
of Hugging Face fill which part of them. vLLM itself wants a GPU; this needs none.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama, tensors
from test_pruning import prune
from transformers import AutoConfig

# A parameter of vLLM that is fused -> the names whose rows it holds, in order.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
KEEP = {
    "mha": "--hidden-size-remain 32 --ffn-hidden-size-remain 40 --num-attention-heads-remain 2",
    "llama3": "--hidden-size-remain 32 --ffn-hidden-size-remain 60 --num-attention-heads-remain 4",
    "tied": "--hidden-size-remain 24 --ffn-hidden-size-remain 24 --num-attention-heads-remain 2",
}


@pytest.fixture(scope="module", params=sorted(KEEP))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("vllm")
    flags = f"{KEEP[request.param]} --drop-layers 1 --format hf".split()
    return prune(make_llama(folder / "parent", request.param), folder / "pruned", *flags)


def parameters_of_vllm(config: Any) -> dict[str, list[int]]:
    """The shape of every parameter that vLLM builds for a config, on one rank."""
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layer = {
        "self_attn.qkv_proj": [(heads + 2 * groups) * head_dim, hidden],
        "self_attn.o_proj": [hidden, heads * head_dim],
        "mlp.gate_up_proj": [2 * ffn, hidden],
        "mlp.down_proj": [hidden, ffn],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    model = {"model.embed_tokens": [config.vocab_size, hidden], "model.norm": [hidden]}
    if not config.tie_word_embeddings:
        model["lm_head"] = [config.vocab_size, hidden]
    for number in range(config.num_hidden_layers):
        model |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in model.items()}


def test_every_weight_fills_its_part_of_a_parameter(exported: Path) -> None:
    weights = tensors(exported)
    for name, shape in parameters_of_vllm(AutoConfig.from_pretrained(exported)).items():
        fused = next((part for part in STACKED if f".{part}." in name), None)
        parts = [name.replace(fused, part) for part in STACKED[fused]] if fused else [name]
        pieces = [weights.pop(part) for part in parts]
        assert [sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:]] == shape, name
    assert not weights, "vLLM has no place for these"


def test_config_says_what_vllm_reads(exported: Path) -> None:
    written = json.loads((exported / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["model_type"] == "llama"
    assert written["hidden_act"] == "silu"
    for name in ("attention_bias", "mlp_bias", "bias"):
        assert not written.get(name)
    for name in ("sliding_window", "quantization_config", "qkv_bias", "is_causal", "layer_types"):
        assert written.get(name) is None
    needed = {"rms_norm_eps", "max_position_embeddings", "head_dim", "num_key_value_heads", "tie_word_embeddings"}
    assert needed <= written.keys()
    # Older releases read the rotary settings under their old names, newer ones where transformers 5 puts them.
    rope = AutoConfig.from_pretrained(exported).rope_parameters
    assert rope["rope_theta"] == written["rope_theta"]
    scaling = written["rope_scaling"] or {"rope_type": "default"}
    assert {name: rope[name] for name in scaling} == scaling
