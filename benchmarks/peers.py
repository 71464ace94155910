"""The obvious ways that benchmarks/streaming.py compares with: load all, rearrange or index_select, save all.

    python benchmarks/peers.py WHAT SOURCE LIKE TARGET

LIKE is this project's output for the same task: its config and arguments and, for a pruning, its plan. Files are mapped
where the library offers it, which is the fastest it has. For one tensor-parallel rank and untied bf16 models.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from megatron.pruning.model.checkpoint import PLAN_FILE
from megatron.pruning.plan.plan import Plan

RANK_FILE = "release/mp_rank_00/model_optim_rng.pt"
PLAIN = ("model.embed_tokens", "model.norm", "lm_head")
TOP = dict(zip(PLAIN, ("embedding.word_embeddings", "decoder.final_layernorm", "output_layer"), strict=True))
LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
}
QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"


def select(tensor: torch.Tensor, *indices: torch.Tensor | None) -> torch.Tensor:
    """Return `tensor` at `indices` along each of its dims."""
    for dim, index in enumerate(indices):
        if index is not None:
            tensor = tensor.index_select(dim, index)
    return tensor


def elements(heads: Any, head_dim: int) -> torch.Tensor:
    """Return the elements of these heads."""
    return (torch.as_tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def load_hf(path: Path) -> Any:
    """Return the whole model."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def prune_hf(source: Path, like: Path, target: Path) -> None:
    """Prune with transformers."""
    from transformers import AutoConfig

    model = load_hf(source)
    plan = Plan.from_json((like / PLAN_FILE).read_text(), "plan")
    parent, hidden, head_dim = model.state_dict(), torch.as_tensor(plan.hidden), model.config.head_dim
    state = {f"{key}.weight": select(parent[f"{key}.weight"], *[None] * (key != "model.norm"), hidden) for key in PLAIN}
    for layer, old in enumerate(plan.layers):
        q, kv = (elements(kept[layer], head_dim) for kept in (plan.heads, plan.groups))
        ffn = torch.as_tensor(plan.ffn[layer])
        indices = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        for name, index in indices.items():
            state[f"model.layers.{layer}.{name}.weight"] = select(parent[f"model.layers.{old}.{name}.weight"], *index)
    model.config = AutoConfig.from_pretrained(like)
    model.save_pretrained(target, state_dict=state)


def prune_torch(source: Path, like: Path, target: Path) -> None:
    """Prune a rank file with torch."""
    content = load_rank(source)
    plan, args = Plan.from_json((like / PLAN_FILE).read_text(), "plan"), content["args"]
    parent, hidden, head_dim = content["model"], torch.as_tensor(plan.hidden), args.kv_channels
    each = args.num_attention_heads // args.num_query_groups
    state = {f"{key}.weight": select(parent[f"{key}.weight"], *[None] * ("norm" not in key), hidden)
             for key in TOP.values()}  # fmt: skip
    for layer, old in enumerate(plan.layers):
        blocks = []
        for group in plan.groups[layer].tolist():
            first = group * (each + 2)
            blocks += [first + head % each for head in plan.heads[layer].tolist() if head // each == group]
            blocks += [first + each, first + each + 1]
        ffn = torch.as_tensor(plan.ffn[layer])
        indices = {
            QKV: (elements(blocks, head_dim), hidden), FC1: (torch.cat([ffn, ffn + args.ffn_hidden_size]), hidden),
            "self_attention.linear_proj": (hidden, elements(plan.heads[layer], head_dim)),
            "mlp.linear_fc2": (hidden, ffn), "input_layernorm": (hidden,), "pre_mlp_layernorm": (hidden,),
        }  # fmt: skip
        for name, index in indices.items():
            state[f"decoder.layers.{layer}.{name}.weight"] = select(
                parent[f"decoder.layers.{old}.{name}.weight"], *index
            )
    save_rank(state, like, target)


def load_rank(path: Path) -> dict[str, Any]:
    """Return a rank file, its tensors mapped."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content: dict[str, Any] = torch.load(path / RANK_FILE, mmap=True, weights_only=True)
    return content


def save_rank(state: dict[str, torch.Tensor], like: Path, target: Path) -> None:
    """Write a rank file with the arguments of another."""
    (target / RANK_FILE).parent.mkdir(parents=True)
    torch.save({**load_rank(like), "model": state}, target / RANK_FILE)


def import_torch(source: Path, like: Path, target: Path) -> None:
    """Convert from Hugging Face to a rank file."""
    model = load_hf(source)
    parent, config = model.state_dict(), model.config
    state = {f"{TOP[key]}.weight": parent[f"{key}.weight"] for key in PLAIN}
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        state |= {f"{new}{name}.weight": parent[f"{old}{key}.weight"] for key, name in LAYER.items()}
        qkv = [parent[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        grouped = [part.view(config.num_key_value_heads, -1, config.hidden_size) for part in qkv]
        state[f"{new}{QKV}.weight"] = torch.cat(grouped, 1).view(-1, config.hidden_size)
        state[f"{new}{FC1}.weight"] = torch.cat([parent[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up")])
    save_rank(state, like, target)


def export_hf(source: Path, like: Path, target: Path) -> None:
    """Convert a rank file to Hugging Face's format."""
    from safetensors.torch import save_file

    content = load_rank(source)
    parent, args = content["model"], content["args"]
    state = {f"{key}.weight": parent[f"{name}.weight"] for key, name in TOP.items()}
    for layer in range(args.num_layers):
        new, old = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        state |= {f"{new}{key}.weight": parent[f"{old}{name}.weight"] for key, name in LAYER.items()}
        grouped = parent[f"{old}{QKV}.weight"].view(args.num_query_groups, -1, args.kv_channels, args.hidden_size)
        parts = grouped.split([grouped.shape[1] - 2, 1, 1], 1)
        names = [f"{new}self_attn.{name}_proj.weight" for name in "qkv"]
        state |= {
            name: part.reshape(-1, args.hidden_size).contiguous() for name, part in zip(names, parts, strict=True)
        }
        halves = parent[f"{old}{FC1}.weight"].chunk(2)
        state |= {f"{new}mlp.{name}_proj.weight": half for name, half in zip(("gate", "up"), halves, strict=True)}
    target.mkdir()
    (target / "config.json").write_bytes((like / "config.json").read_bytes())
    save_file(state, target / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    ways = {way.__name__: way for way in (prune_hf, prune_torch, import_torch, export_hf)}
    ways[sys.argv[1]](*map(Path, sys.argv[2:]))
