"""Magnitude scores against a few independent lines on a Hugging Face state dict, and the layers that are dropped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import convert, make_llama, plan_of, prune, tensors
from safetensors.torch import save_file

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.plan.choose import spaced
from megatron.pruning.plan.magnitude import magnitude


@pytest.mark.parametrize("shape,groups,heads,head_dim", [("gqa", 4, 8, 6), ("mha", 4, 4, 16), ("qwen2", 4, 8, 6)])
def test_magnitude_is_the_norm_of_all_that_an_index_touches(
    tmp_path: Path, shape: str, groups: int, heads: int, head_dim: int
) -> None:
    source = make_llama(tmp_path / "hf", shape)
    scores = magnitude(open_checkpoint(convert(source, tmp_path / "m", tensor=2, pipeline=2)))
    state = {key: value.double() for key, value in tensors(source).items()}
    hidden = torch.zeros(40 if shape != "mha" else 48, dtype=torch.float64)
    for key, value in state.items():
        if not key.endswith("bias"):
            row = any(name in key for name in ("o_proj", "down_proj", "norm"))
            hidden += value.pow(2) if value.ndim == 1 else value.pow(2).sum(1 if row else 0)
    assert np.allclose(scores("hidden", None), hidden.sqrt(), rtol=1e-12)
    for layer in range(4):
        w = {k.split(".", 3)[3]: v.pow(2) for k, v in state.items() if k.startswith(f"model.layers.{layer}.")}
        ffn = w["mlp.gate_proj.weight"].sum(1) + w["mlp.up_proj.weight"].sum(1) + w["mlp.down_proj.weight"].sum(0)
        assert np.allclose(scores("ffn", layer), ffn.sqrt(), rtol=1e-12)
        q = w["self_attn.q_proj.weight"].sum(1) + w["self_attn.o_proj.weight"].sum(0)
        kv = w["self_attn.k_proj.weight"].sum(1) + w["self_attn.v_proj.weight"].sum(1)
        if shape == "qwen2":
            q, kv = q + w["self_attn.q_proj.bias"], kv + w["self_attn.k_proj.bias"] + w["self_attn.v_proj.bias"]
        q, kv = q.view(heads, head_dim).sum(1), kv.view(groups, head_dim).sum(1)
        assert np.allclose(scores("heads", layer), q.sqrt(), rtol=1e-12)
        assert np.allclose(scores("groups", layer), (kv + q.view(groups, -1).sum(1)).sqrt(), rtol=1e-12)


def test_magnitude_keeps_the_largest_and_says_so_in_the_plan(gqa: Path, tmp_path: Path) -> None:
    flags = ["--criterion=magnitude", "--ffn-hidden-size-remain=40", "--hidden-size-remain=24", "--format=hf"]
    plan = plan_of(prune(gqa, tmp_path / "p", *flags))
    scores = magnitude(open_checkpoint(gqa))
    assert plan.evidence.criterion == "magnitude"
    for layer in range(4):
        assert plan.ffn[layer].tolist() == sorted(np.argsort(-scores("ffn", layer))[:40].tolist())
    assert plan.hidden.tolist() == sorted(np.argsort(-scores("hidden", None))[:24].tolist())
    again = prune(gqa, tmp_path / "q", *flags, "--plan", str(tmp_path / "p/prune_plan.json"))
    assert plan_of(again).to_json() == plan.to_json()
    with pytest.raises(ValueError, match="has criterion magnitude, but the flags say random"):
        prune(gqa, tmp_path / "r", "--plan", str(tmp_path / "p/prune_plan.json"), "--criterion=random")


def test_layers_that_need_not_be_named_are_dropped_evenly(gqa: Path, tmp_path: Path) -> None:
    assert spaced(32, 4) == (6, 12, 19, 25)
    assert spaced(40, 0) == () and spaced(4, 3) == (1, 2, 3) and spaced(3, 1) == (1,)
    for layers in range(1, 90):
        for keep in range(1, layers + 1):
            dropped = spaced(layers, layers - keep)
            assert len(set(dropped)) == layers - keep and (not dropped or 0 < min(dropped) <= max(dropped) < layers)
    assert plan_of(prune(gqa, tmp_path / "p", "--num-layers-remain=2", "--format=hf")).layers.tolist() == [0, 3]
    with pytest.raises(ValueError, match="--num-layers-remain 5 must lie between 1 and the parent's 4"):
        prune(gqa, tmp_path / "q", "--num-layers-remain=5")
    with pytest.raises(ValueError, match="both say which layers remain"):
        prune(gqa, tmp_path / "q", "--num-layers-remain=2", "--drop-layers=1")


def test_weights_that_are_no_numbers_have_no_magnitude(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa")
    state = tensors(source)
    state["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(state, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight holds NaN or infinities"):
        prune(source, tmp_path / "p", "--criterion=magnitude", "--ffn-hidden-size-remain=40", "--plan-only")
    assert not (tmp_path / "p.prune_plan.json").exists()
