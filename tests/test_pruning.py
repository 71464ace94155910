"""A pruned model is exactly its masked parent, and every way to make it gives the same bytes."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import show_checkpoint
import torch
from helpers import (
    assert_same_tensors,
    convert,
    digests,
    hf_logits,
    load_whole,
    make_llama,
    plan_of,
    prune,
    rank_file,
    set_config,
    sliced,
    tensors,
)
from safetensors.torch import load_file, save_file
from stock_loop import StockLoop
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import fingerprint
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.weights import TABLE, split_dim
from megatron.pruning.plan.choose import CRITERIA, Criterion, best, random
from megatron.pruning.plan.decide import PruneRequest, decide
from megatron.pruning.plan.plan import Plan, from_ranges, to_ranges

WIDTHS = {  # what remains of each of SHAPES: every axis but the hidden size, which comes apart
    "mha": ["--num-attention-heads-remain=2", "--ffn-hidden-size-remain=40"],
    "gqa": ["--num-attention-heads-remain=4", "--ffn-hidden-size-remain=52"],
    "tied": ["--num_attention_heads_remain", "2", "--ffn_hidden_size_remain", "20"],
    "qwen2": ["--num-attention-heads-remain=4", "--ffn-hidden-size-remain=40"],
    "qwen3": ["--num-attention-heads-remain=4", "--num-query-groups-remain=2", "--ffn-hidden-size-remain=44"],
    "llama3": ["--num-attention-heads-remain=4", "--num-query-groups-remain=2", "--ffn-hidden-size-remain=60"],
}


# What plans of the first release lack.
ADDED_TO_PLANS = (
    "made_by", "layer_criterion", "scores", "importance_kept", "balance_tax", "block_influence", "norm_gains"
)  # fmt: skip


def test_every_weight_keeps_exactly_the_chosen_coordinates(llama: Path, tmp_path: Path) -> None:
    flags = [*WIDTHS[llama.name], "--hidden-size-remain=24", "--drop-layers=1", "--format=hf"]
    pruned = prune(llama, tmp_path / "pruned", *flags)
    plan = plan_of(pruned)
    assert len(plan.hidden) == 24 and plan.layers.tolist() == [0, 2, 3]
    head_dim = AutoConfig.from_pretrained(llama).head_dim
    assert_same_tensors(tensors(pruned), sliced(tensors(llama), plan, head_dim))


def test_pruned_model_equals_masked_parent(llama: Path, tmp_path: Path) -> None:
    pruned = prune(llama, tmp_path / "pruned", *WIDTHS[llama.name], "--drop-layers=0,2", "--format=hf")
    plan, tokens = plan_of(pruned), torch.randint(0, 101, (2, 30), generator=torch.Generator().manual_seed(1))
    parent = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64, attn_implementation="eager").eval()
    parent.config.use_cache = False
    kept = [parent.model.layers[layer] for layer in plan.layers]
    with torch.no_grad():
        for layer, heads, ffn in zip(kept, plan.heads, plan.ffn, strict=True):
            mask = torch.zeros(parent.config.num_attention_heads, parent.config.head_dim, dtype=torch.float64)
            mask[heads] = 1
            layer.self_attn.o_proj.weight.mul_(mask.flatten())
            mask = torch.zeros(parent.config.intermediate_size, dtype=torch.float64)
            mask[ffn] = 1
            layer.mlp.down_proj.weight.mul_(mask)
        parent.model.layers = torch.nn.ModuleList(kept)
        masked = parent(tokens).logits
    assert masked.std() > 0.1
    difference = (hf_logits(pruned, tokens, torch.float64) - masked).abs().max()
    assert difference < 1e-14 * masked.abs().max()  # the mathematics is equal; BLAS may sum zeros in another order


def test_pruning_and_resharding_commute(llama: Path, tmp_path: Path) -> None:
    flags = ["--hidden-size-remain=24", "--ffn-hidden-size-remain=20", "--drop-layers=1,3"]
    first = prune(convert(llama, tmp_path / "tp2", tensor=2), tmp_path / "pruned", *flags)
    a = convert(first, tmp_path / "a", tensor=4, pipeline=2)
    plan = ["--plan", str(first / "prune_plan.json")]
    b = prune(convert(llama, tmp_path / "tp4", tensor=4, pipeline=2), tmp_path / "b", *plan)
    assert digests(a) == digests(b)


@pytest.mark.slow
def test_any_number_of_processes_and_any_source_give_the_same_bytes(gqa: Path, tmp_path: Path) -> None:
    flags = ["--hidden_size_remain", "24", "--num_attention_heads_remain", "4", "--tensor-model-parallel-size", "2"]
    one = prune(gqa, tmp_path / "one", *flags)
    from_shards = prune(convert(gqa, tmp_path / "shards", tensor=4, pipeline=2), tmp_path / "from", *flags,
                        "--pipeline-model-parallel-size=1")  # fmt: skip
    assert digests(one) == digests(from_shards)
    # More than there are files: one of them writes nothing.
    words = ["--load", str(gqa), "--save", "three", *flags]
    done = StockLoop(tmp_path).run("processes", " ".join(words), ranks=3, program="prune_llama").ok()
    assert done.log.count("parameters") == 2  # the parent's line and the table's, from one process only
    assert digests(one) == digests(tmp_path / "three")


def test_same_seed_same_plan_and_another_seed_another(gqa: Path, tmp_path: Path) -> None:
    flags = ["--ffn-hidden-size-remain=40", "--format=hf"]
    plans = [plan_of(prune(gqa, tmp_path / name, *flags, "--seed", seed)) for name, seed in
             (("a", "7"), ("b", "7"), ("c", "8"))]  # fmt: skip
    assert plans[0].to_json() == plans[1].to_json() != plans[2].to_json()
    assert not np.array_equal(plans[0].ffn[0], plans[0].ffn[1])  # every layer chooses for itself


def test_random_choice_is_pinned() -> None:
    # A seed must give the same plan with every later numpy.
    scores = random(SimpleNamespace(config=SimpleNamespace(sizes={"ffn": 12})), 1234, None)("ffn", 3)
    assert best(scores, 6, blocks=2).tolist() == [2, 4, 5, 6, 8, 11]


def test_plan_file_round_trips_and_applies(gqa: Path, tmp_path: Path) -> None:
    flags = ["--num-attention-heads-remain=4", "--drop-layers=2", "--format=hf"]
    made = prune(gqa, tmp_path / "made", *flags)
    text = (made / "prune_plan.json").read_text()
    assert Plan.from_json(text, "x").to_json() == text
    prune(gqa, tmp_path / "only", *flags, "--plan-only")
    assert not (tmp_path / "only").exists()
    plan_file = tmp_path / "only.prune_plan.json"
    assert plan_file.read_text() == text
    assert (tmp_path / "only.prune_plan.png").read_bytes().startswith(b"\x89PNG")
    applied = prune(gqa, tmp_path / "applied", "--plan", str(plan_file), "--format=hf")
    assert digests(made) == digests(applied)


def test_plan_is_refused_on_another_parent_and_when_tampered_with(gqa: Path, tmp_path: Path) -> None:
    prune(gqa, tmp_path / "x", "--ffn-hidden-size-remain=40", "--plan-only")
    file = tmp_path / "x.prune_plan.json"
    twin = make_llama(tmp_path / "twin", "gqa", layers=4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="same shape, other weights"):
        prune(twin, tmp_path / "y", "--plan", str(file))
    other = make_llama(tmp_path / "other", "gqa", layers=3)
    with pytest.raises(ValueError, match="the plan is for a parent of"):
        prune(other, tmp_path / "y", "--plan", str(file))
    with pytest.raises(ValueError, match="keeps ffn 40, but the flags ask for 32"):
        prune(gqa, tmp_path / "y", "--plan", str(file), "--ffn-hidden-size-remain=32")
    prune(gqa, tmp_path / "z", "--drop-layers=1", "--plan-only")
    with pytest.raises(ValueError, match=r"drops layers \[1\], but the flags \(1, 2\)"):
        prune(gqa, tmp_path / "y", "--plan", str(tmp_path / "z.prune_plan.json"), "--drop-layers=1,2")
    with pytest.raises(ValueError, match="corrects no norms, but the flags say --correct-norms"):
        prune(gqa, tmp_path / "y", "--plan", str(file), "--correct-norms")
    with pytest.raises(ValueError, match="keeps layers 4, but the flags ask for 0"):
        prune(gqa, tmp_path / "y", "--plan", str(file), "--num-layers-remain=0")
    with pytest.raises(ValueError, match="/dev/zero is not a file"):
        prune(gqa, tmp_path / "y", "--plan", "/dev/zero")
    content = json.loads(file.read_text())
    old = {name: value for name, value in content.items() if name not in ADDED_TO_PLANS}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert plan_of(prune(gqa, tmp_path / "old", "--plan", str(tmp_path / "old.json"))).evidence.criterion == "random"
    for change, message in (
        (lambda c: c["keep"].update(hidden="0-99"), "must ascend within 0-39"),
        (lambda c: c["keep"]["per_layer"][0].update(heads="0-6"), "same number of its own heads|kept in one layer"),
        (lambda c: c["keep"]["per_layer"].pop(), "per_layer is not of the layers 0-3, in their order"),
        (lambda c: c["keep"]["per_layer"].reverse(), "per_layer is not of the layers 0-3, in their order"),
        (lambda c: c["keep"]["per_layer"][2].pop("ffn"), r"keep.per_layer\[2\].ffn is missing"),
        (lambda c: c["keep"].update(hidden="0-x"), "'0-x' is not a range of indices such as 0-3"),
        (lambda c: c["pruned"].update(hidden=7), "says that the pruned model is"),
        (lambda c: c.pop("version"), "version is missing"),
        (lambda c: c.update(tensor_parallel=3000), "tensor_parallel 3000 does not divide the parent's groups and ffn"),
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.pop("keep"), "not a pruning plan"),
        (lambda c: c["keep"].update(layers="0-99999999999"), "not a range"),
        (lambda c: c["keep"].update(hidden=",".join(["0-16777215"] * 40)), "not a range of indices above 16777215"),
        (lambda c: c["parent"].update(heads=10**12, groups=10**12), "must be of layers, hidden, .* from 1 to 16777216"),
        (lambda c: c["parent"].update(groups=16), "8 heads are no multiple of its 16 groups"),
        (lambda c: c.update(importance_kept={"hidden": []}), "must be numbers by axis"),
        (lambda c: c.update(balance_tax={"ffn": [0.1] * 3}), "one for each kept layer .* 'ffn' has 3"),
        (lambda c: c.update(block_influence=[0.1] * 3), "block_influence must be 4 numbers up to 2"),
        (lambda c: c.update(block_influence=[1e300] * 4), "block_influence must be 4 numbers up to 2"),
        (lambda c: c.update(layer_criterion="\x1b]0;"), "is none of None, spaced"),
        (lambda c: c.update(tensor_parallel=-1), "tensor_parallel: expected `int` >= 1"),
        (lambda c: c.update(norm_gains=[1e300] * 9), "norm_gains must be 9 positive numbers"),
    ):
        broken = json.loads(json.dumps(content))
        change(broken)
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            prune(gqa, tmp_path / "y", "--plan", str(file))
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_balance_keeps_the_same_number_in_every_block(gqa: Path, tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    table = {axis: rng.random((4, size)) for axis, size in (("groups", 4), ("heads", 8), ("ffn", 72))}
    criterion = Criterion("what the table says", lambda *_: lambda axis, layer: table[axis][layer])
    monkeypatch.setitem(CRITERIA, "table", criterion)
    request = PruneRequest(layout=Layout(tensor), remain={"heads": 4, "ffn": 40}, criterion="table")
    plan = decide(request, open_checkpoint(gqa))
    for layer in range(4):
        counts = np.bincount(plan.ffn[layer] * tensor // 72, minlength=tensor)
        assert counts.tolist() == [40 // tensor] * tensor
        for block in range(tensor):
            mine = range(72 * block // tensor, 72 * (block + 1) // tensor)
            best_here = sorted(sorted(mine, key=lambda i: -table["ffn"][layer][i])[: 40 // tensor])
            assert [i for i in plan.ffn[layer].tolist() if i in mine] == best_here
        for group in range(4):
            pair = [2 * group, 2 * group + 1]
            assert [h for h in plan.heads[layer].tolist() if h in pair] == [max(pair, key=table["heads"][layer].item)]


def test_unbalanced_shards_are_written_as_they_fall_and_merge(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "mha")
    flags = ["--num-attention-heads-remain=2", "--ffn-hidden-size-remain=39", "--prune-type=unbalance",
             "--tensor-model-parallel-size=2"]  # fmt: skip
    uneven = prune(source, tmp_path / "uneven", *flags, "--seed=3")
    plan = plan_of(uneven)
    assert all(len(ffn) == 39 for ffn in plan.ffn)
    wanted = sliced(tensors(source), plan, 16)
    widths = []
    for rank in (0, 1):
        model = load_whole(rank_file(uneven, f"mp_rank_{rank:02d}"))["model"]
        down = model["decoder.layers.1.mlp.linear_fc2.weight"]
        kept = [i for i, ffn in enumerate(plan.ffn[1].tolist()) if ffn * 2 // 88 == rank]
        assert torch.equal(down, wanted["model.layers.1.mlp.down_proj.weight"][:, kept])
        widths.append(down.shape[1])
    assert sum(widths) == 39 and widths[0] != widths[1]
    merged = tensors(convert(convert(uneven, tmp_path / "tp1"), tmp_path / "out", format="hf"))
    assert all(torch.equal(wanted[key], merged[key]) for key in wanted)
    with pytest.raises(ValueError, match=re.escape("does not divide the model's ffn hidden size 39")):
        convert(uneven, tmp_path / "tp2", tensor=2)
    with pytest.raises(ValueError, match=re.escape("does not divide the model's ffn hidden size 39")):
        prune(source, tmp_path / "dist", *flags, "--format=torch_dist")


def test_fingerprint_is_of_the_model_not_of_its_files(gqa: Path, tmp_path: Path) -> None:
    shards = convert(gqa, tmp_path / "m", tensor=4, pipeline=2)
    assert fingerprint(open_checkpoint(gqa)) == fingerprint(open_checkpoint(shards))


def test_fingerprint_changes_with_a_weight_and_with_a_constant(gqa: Path, tmp_path: Path) -> None:
    mine = fingerprint(open_checkpoint(gqa))
    for number, change in enumerate(
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rms_norm_eps": 1e-5}, {})
    ):
        other = Path(shutil.copytree(gqa, tmp_path / str(number)))
        set_config(**change)(other)
        if not change:  # all but the first row of one matrix, which may lie where no row is looked at
            weights = load_file(other / "model.safetensors")
            weights["model.layers.2.mlp.up_proj.weight"][1:] *= 1.01
            save_file(weights, other / "model.safetensors", {"format": "pt"})
        assert fingerprint(open_checkpoint(other)) != mine
        digest = [show_checkpoint.digest(open_checkpoint(path)) for path in (gqa, other)]
        assert digest[0] != digest[1]


def test_ranges_round_trip() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 50, 999):
        index = np.sort(rng.choice(2000, size, replace=False))
        assert np.array_equal(from_ranges(to_ranges(index)), index)
    assert to_ranges([0, 1, 2, 3, 5]) == "0-3,5"


def test_table_splits_each_weight_along_at_most_one_dim() -> None:
    assert {weight.name: split_dim(weight) for weight in TABLE} == {
        "embed": 0, "attn_norm": None, "q": 0, "k": 0, "v": 0, "q_bias": 0, "k_bias": 0, "v_bias": 0,
        "q_norm": None, "k_norm": None, "o": 1, "mlp_norm": None, "gate": 0, "up": 0, "down": 1,
        "final_norm": None, "lm_head": 0,
    }  # fmt: skip
