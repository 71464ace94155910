"""Reconstruction: exact where a smaller model can be the parent, never worse than the cut, the same everywhere."""

import json
import math
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers import (
    assert_same_tensors,
    convert,
    digests,
    hf_logits,
    make_llama,
    plan_of,
    prune,
    tensors,
    write_documents,
)
from safetensors.torch import load_file, save_file
from stock_loop import StockLoop
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.pruning.cli.reconstruction import claim
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.axes import PER_LAYER
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.reconstructed import AUTO, REPORT_FILE, Report, Ridge
from megatron.pruning.storage.output import hold_directory
from megatron.pruning.training.calibration import calibration
from megatron.pruning.training.least_squares import (
    LADDER,
    LARGEST,
    Fit,
    LeastSquares,
    Moments,
    lowest,
    tensor_cores,
)

VOCABULARY, LENGTH, SEQUENCES = 101, 16, 60
EXACT = {"ridge": 0.0, "rotate": False, "untie": False}


# The arithmetic -------------------------------------------------------------------------------------------------------


def moments(inputs: torch.Tensor, targets: torch.Tensor) -> Moments:
    """Return the sums over some tokens."""
    found = Moments(inputs.shape[1], targets.shape[1], "cpu")
    found.add(inputs, targets)
    return found


def random_problem(seed: int = 0, tokens: int = 200) -> tuple[torch.Tensor, ...]:
    """Return inputs, what the parent had there, the parent's weight and the cut one."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(tokens, 9, generator=generator, dtype=torch.float64)
    u = t[:, :6] + 0.3 * torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    parent = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    return u, t, parent, parent[:, :6]


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_the_normal_equations_hold(ridge: float) -> None:
    u, t, parent, cut = random_problem()
    fit = LeastSquares(moments(u, t), moments(u, t), ridge).fit(cut, parent)
    pull = ridge * float((u.T @ u).diagonal().mean())
    gradient = (u @ fit.weight.T - t @ parent.T).T @ u + pull * (fit.weight - cut)
    assert gradient.abs().max() < 1e-9 * float((t.T @ u).abs().max())
    for sums, weight in ((fit.before, cut), (fit.after, fit.weight)):
        assert sums[0] == pytest.approx(float((u @ weight.T - t @ parent.T).square().sum()), rel=1e-9)
    assert fit.wanted[0] == pytest.approx(float((t @ parent.T).square().sum()), rel=1e-12)


def test_a_writer_is_fitted_to_the_targets_themselves() -> None:
    u, t, _, _ = random_problem()
    fit = LeastSquares(moments(u, t), moments(u, t), 0.0).fit(torch.zeros(9, 6, dtype=torch.float64))
    assert torch.allclose(fit.weight.T, torch.linalg.lstsq(u, t).solution, atol=1e-9)


def test_without_text_nothing_changes() -> None:
    _, _, parent, cut = random_problem()
    nothing = Moments(6, 9, "cpu")
    assert torch.equal(LeastSquares(nothing, nothing, 0.01).fit(cut, parent).weight, cut)


def test_the_ridge_grows_until_the_held_out_error_falls() -> None:
    u, t, parent, cut = random_problem(tokens=7)  # hardly more tokens than inputs: it learns them by heart
    v, s, *_ = random_problem(seed=1)
    calibration, held_out = moments(u, t), moments(v, s)
    fit = LeastSquares(calibration, held_out, 1e-6).fit(cut, parent)
    assert fit.ridge > 1e-6 and fit.after[1] <= fit.before[1] and fit.after[0] <= fit.before[0]
    contrary = moments(v, 2 * (v @ cut.T) @ torch.linalg.pinv(parent).T - s)  # harm what helps on one
    fit = LeastSquares(calibration, contrary, 1e-6).fit(cut, parent)
    assert fit.after[1] <= fit.before[1]


@pytest.mark.parametrize(("tokens", "larger"), [(1000, True), (4000, False)])
def test_the_held_out_text_chooses_the_ridge(tokens: int, larger: bool) -> None:
    u, t, parent, cut = random_problem(tokens=tokens)
    v, s, *_ = random_problem(seed=1)
    calibration, held_out = moments(u, t), moments(v, s)
    chosen = LeastSquares(calibration, held_out, AUTO).fit(cut, parent)
    fits = {ridge: LeastSquares(calibration, held_out, ridge).fit(cut, parent) for ridge in LADDER}
    best = min(LADDER, key=lambda ridge: fits[ridge].after[1])
    assert chosen.ridge == best and torch.equal(chosen.weight, fits[best].weight)
    assert (best > 0.01) is larger, best


def test_where_no_ridge_of_the_ladder_helps_it_grows_beyond() -> None:
    u, t, parent, cut = random_problem(tokens=7)
    v, s, *_ = random_problem(seed=1)
    contrary = moments(v, 2 * (v @ cut.T) @ torch.linalg.pinv(parent).T - s)  # harm what helps on one
    fit = LeastSquares(moments(u, t), contrary, AUTO).fit(cut, parent)
    assert fit.ridge > LADDER[-1] and fit.after[1] <= fit.before[1]


def test_a_rung_that_helps_is_found_beyond_rungs_that_do_not() -> None:
    cut, errors = torch.zeros(1, 1), {0.1: 3.0, 0.3: 4.0}

    def at(ridge: float) -> Fit:
        after = errors.get(ridge, 5.0)
        return Fit(cut, ridge if ridge in errors else math.inf, (9.0, 9.0), (5.0, 5.0), (after, after))

    assert lowest(at).ridge == 0.1


@pytest.mark.parametrize("ridge", [0.01, LARGEST, AUTO])
def test_beyond_the_largest_ridge_a_weight_is_let_be(ridge: Ridge, monkeypatch: pytest.MonkeyPatch) -> None:
    u, t, parent, cut = random_problem()
    tried: list[float] = []
    monkeypatch.setattr(LeastSquares, "_factor", lambda self, ridge, keep: tried.append(ridge))
    fit = LeastSquares(moments(u, t), moments(u, t), ridge).fit(cut, parent)
    assert fit.ridge == math.inf and torch.equal(fit.weight, cut) and LARGEST / 10 < max(tried) <= LARGEST


@pytest.mark.parametrize(
    "device,dtype,inside",
    [("cuda", "bf16", "high"), ("cuda", "fp16", "high"), ("cuda", "fp32", "highest"), ("cpu", "bf16", "highest")],
)
def test_products_are_rounded_only_on_a_gpu_and_only_for_weights_that_are(device: str, dtype: str, inside: str) -> None:
    with pytest.raises(KeyError), tensor_cores(torch.device(device), dtype):
        assert torch.get_float32_matmul_precision() == inside
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_blocks_of_rows_are_solved_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    u, t, parent, cut = random_problem()
    whole = LeastSquares(moments(u, t), moments(u, t), 0.1).fit(cut, parent)
    monkeypatch.setattr("megatron.pruning.training.least_squares._ROWS", 2)
    parts = LeastSquares(moments(u, t), moments(u, t), 0.1).fit(cut, parent)
    assert torch.allclose(parts.weight, whole.weight, atol=1e-12)
    assert np.allclose([parts.wanted, parts.before, parts.after], [whole.wanted, whole.before, whole.after])


# Models that a smaller one can be -------------------------------------------------------------------------------------


def edit(path: Path, change: Any) -> None:
    """Change the tensors of a Hugging Face directory; `change` gets the state dict and the numbers of the layers."""
    state = load_file(path / "model.safetensors")
    layers = sorted({int(key.split(".")[2]) for key in state if key.startswith("model.layers.")})
    change(state, [f"model.layers.{layer}." for layer in layers])
    save_file(state, path / "model.safetensors", {"format": "pt"})


def doubled_channels(state: dict[str, torch.Tensor], layers: list[str]) -> None:
    """Let the second half of the ffn channels be the first half's doubles."""
    for layer in layers:
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            half = len(state[layer + name]) // 2
            state[layer + name][half:] = state[layer + name][:half]


def doubled_heads(state: dict[str, torch.Tensor], layers: list[str]) -> None:
    """Let the second head of every query group be the first's double."""
    for layer in layers:
        q = state[layer + "self_attn.q_proj.weight"].view(4, 2, 6, -1)
        q[:, 1] = q[:, 0]


def hidden_written(state: dict[str, torch.Tensor], layers: list[str]) -> list[torch.Tensor]:
    """Return all that writes hidden states, with the hidden size first."""
    names = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    return [state["model.embed_tokens.weight"].T, *(state[layer + name] for layer in layers for name in names)]


def empty_hidden(state: dict[str, torch.Tensor], layers: list[str]) -> None:
    """Let nothing ever be in the first three hidden channels and in the last nine."""
    for weight in hidden_written(state, layers):
        weight[:3] = weight[31:] = 0


def doubled_hidden(state: dict[str, torch.Tensor], layers: list[str]) -> None:
    """Let each of the last twelve hidden channels hold what the one before it holds: 28 dims, none of them an axis."""
    for weight in hidden_written(state, layers):
        weight[17::2] = weight[16::2]


def plan_keeping(parent: Path, file: Path, **kept: list[int]) -> Path:
    """Write a plan that keeps these of an axis, in every layer, and all of the others."""
    checkpoint = open_checkpoint(parent)
    sizes = checkpoint.config.sizes
    index = {axis: np.array(kept.get(axis, range(sizes[axis]))) for axis in ("layers", "hidden", *PER_LAYER)}
    layers = len(index["layers"])
    from megatron.pruning.model.checkpoint import fingerprint

    plan = Plan(
        layers=index["layers"], hidden=index["hidden"], **{axis: (index[axis],) * layers for axis in PER_LAYER},
        parent_sizes=sizes, parent_fingerprint=fingerprint(checkpoint),
    )  # fmt: skip
    file.write_text(plan.to_json())
    return file


# name: shape of the parent, change of it, what the plan keeps, options
EQUAL: dict[str, tuple[str, Any, dict[str, list[int]], dict[str, Any]]] = {
    "channels": ("gqa", doubled_channels, {"ffn": list(range(36))}, {}),
    "heads": ("gqa", doubled_heads, {"heads": [0, 2, 4, 6]}, {}),
    "hidden": ("gqa", empty_hidden, {"hidden": list(range(3, 31))}, {}),
    "rotated": ("gqa", doubled_hidden, {"hidden": list(range(28))}, {"rotate": True}),
    "whole-rotated": ("qwen3", lambda state, layers: None, {}, {"rotate": True}),
    "whole-rotated-tied": ("tied", lambda state, layers: None, {}, {"rotate": True, "untie": True}),
    "biases": ("qwen2", doubled_channels, {"ffn": list(range(28))}, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the text, and with what the jobs in float64 gave."""
    top = tmp_path_factory.mktemp("reconstruction")
    generator = np.random.default_rng(0)
    write_documents(top / "text", *(generator.integers(0, VOCABULARY, 600) for _ in range(2)))
    cases = []
    for name, (shape, change, kept, options) in EQUAL.items():
        parent = make_llama(top / name, shape, layers=2, vocab=VOCABULARY)
        config = json.loads((parent / "config.json").read_text())
        # RMSNorm adds epsilon to the mean square, which is over fewer channels then: without one it scales exactly.
        (parent / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-30}))
        edit(parent, change)
        plan = plan_keeping(parent, top / f"{name}.plan", **kept)
        job = {"load": str(parent), "plan": str(plan), "text": str(top / "text"), "length": LENGTH,
               "sequences": SEQUENCES, "save": str(top / f"{name}.pt"), **EXACT, **options}  # fmt: skip
        (top / f"{name}.json").write_text(json.dumps(job))
        cases.append({"name": name, "words": [f"{name}.json"], "ranks": 1, "program": "reconstruction_worker"})
    for run in StockLoop(top).run_all(cases).values():
        run.ok()
    return top


def double_logits(config: Any, state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers' model of this config and state, in float64 (its own norms go through fp32)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    with torch.no_grad():
        return model.double().eval()(tokens).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_a_weight_is_multiplied_once_for_all_positions(folder: Path, name: str) -> None:
    """Of inputs that do not lie in a row torch makes a product for each position: four fifths of an H100's time."""
    in_a_row = torch.load(folder / f"{name}.pt", weights_only=True)["in a row"]
    assert len(in_a_row) > 20 and all(in_a_row)


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_what_a_smaller_model_can_be_it_becomes(folder: Path, name: str) -> None:
    plan = Plan.from_json((folder / f"{name}.plan").read_text(), name)
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    tokens = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(5))  # unseen
    config = AutoConfig.from_pretrained(folder / name)
    state = {key: value.double() for key, value in load_file(folder / name / "model.safetensors").items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    wanted = double_logits(config, state, tokens)
    sizes = plan.sizes
    config.hidden_size, config.intermediate_size = sizes["hidden"], sizes["ffn"]
    config.num_attention_heads, config.num_key_value_heads = sizes["heads"], sizes["groups"]
    config.tie_word_embeddings = False
    weights = found["weights"]
    if "model.embed_tokens.weight" not in weights:
        weights["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:, torch.tensor(plan.hidden)]
    logits = double_logits(config, weights, tokens)
    assert (logits - wanted).abs().max() < 1e-9 * wanted.abs().max()
    for key, (wanted_squares, before, after) in found["fits"].items():
        assert after[0] <= before[0] + 1e-12 * wanted_squares[0], key


# Whole runs -----------------------------------------------------------------------------------------------------------

TEXT = f"--sequences {SEQUENCES} --sequence-length {LENGTH} --format hf"
# name: shape, flags of prune_llama.py
PRUNED = {
    "width": ("gqa", "--hidden-size-remain 32 --ffn-hidden-size-remain 50"),
    "heads": ("mha", "--num-attention-heads-remain 3"),
    "groups": ("gqa", "--num-query-groups-remain 2 --num-attention-heads-remain 4 --prune-type unbalance"),
    "depth": ("llama3", "--num-layers-remain 2"),
    "tied": ("tied", "--hidden-size-remain 24 --num-layers-remain 3"),
    "untied": ("tied", "--hidden-size-remain 24 --untie"),
    "rotated": ("tied", "--hidden-size-remain 24 --untie --rotate-hidden --ffn-hidden-size-remain 40"),
    "biases": ("qwen2", "--hidden-size-remain 32 --ffn-hidden-size-remain 40 --drop-layers 0,2"),
    "norms": ("qwen3", "--hidden-size-remain 36 --num-attention-heads-remain 4 --rotate-hidden"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the models, the text, and what prune_llama.py --reconstruct and tools/reconstruct.py gave."""
    top = tmp_path_factory.mktemp("reconstructed")
    generator = np.random.default_rng(1)
    write_documents(top / "text", *(generator.integers(0, VOCABULARY, 700) for _ in range(2)))
    cases: list[dict[str, Any]] = []

    def case(name: str, words: str, program: str = "prune_llama", ranks: int = 1) -> None:
        words = f"--save {name} {TEXT} {words}"
        cases.append({"name": name, "words": words.split(), "ranks": ranks, "program": program})

    for name, (shape, flags) in PRUNED.items():
        if not (top / f"{shape}-parent").exists():
            make_llama(top / f"{shape}-parent", shape, vocab=VOCABULARY)
        case(name, f"--load {shape}-parent --reconstruct --data-path text {flags}")
    convert(top / "gqa-parent", top / "gqa-torch", "torch", tensor=2)
    convert(top / "gqa-parent", top / "gqa-dist", "torch_dist")
    for source in ("torch", "dist"):
        case(source, f"--load gqa-{source} --reconstruct --data-path text {PRUNED['width'][1]}")
    case("two-ranks", f"--load gqa-parent --reconstruct --data-path text {PRUNED['width'][1]}", ranks=2)
    whole = plan_keeping(top / "gqa-parent", top / "whole.plan")
    case("whole", f"--load gqa-parent --plan {whole} --data text", "reconstruct")
    for run in StockLoop(top).run_all(cases).values():
        run.ok()
    return top


def report_of(path: Path) -> Report:
    """Return the report that lies beside a reconstructed checkpoint."""
    return Report.from_json((path / REPORT_FILE).read_bytes(), str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNED)
def test_every_family_and_axis_comes_nearer_to_its_parent(runs: Path, tmp_path: Path, name: str) -> None:
    parent = runs / f"{PRUNED[name][0]}-parent"
    report = report_of(runs / name)
    prune(parent, tmp_path / "cut", "--plan", str(runs / name / "prune_plan.json"), "--format", "hf")
    text = calibration([str(runs / "text")], LENGTH, SEQUENCES, open_checkpoint(parent))
    tokens = torch.from_numpy(text.tokens[text.held_out])
    wanted, cut, found = (hf_logits(path, tokens[:, :-1]) for path in (parent, tmp_path / "cut", runs / name))
    assert (found - wanted).square().mean() < 0.9 * (cut - wanted).square().mean()
    for weight in report.weights:
        assert weight.after[0] <= weight.before[0] and weight.after[1] <= weight.before[1], weight
    # The losses that it reports, measured by transformers, and which the model card has.
    assert report.losses is not None
    said = " | ".join(f"{loss:.3f}" for loss in msgspec.structs.astuple(report.losses))
    assert f"| {said} |" in (runs / name / "README.md").read_text()
    for logits, loss in zip((wanted, cut, found), msgspec.structs.astuple(report.losses), strict=True):
        lost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert loss == pytest.approx(float(lost), abs=2e-5)
    fitted = {(weight.name, weight.layer) for weight in report.weights}
    names = ("q", "k", "v", "o", "gate", "up", "down")
    assert {(n, layer) for layer in range(len(plan_of(runs / name).layers)) for n in names} <= fitted
    assert (("lm_head", None) in fitted) == (name != "tied")


@pytest.mark.slow
def test_the_source_may_be_of_any_format(runs: Path) -> None:
    wanted = tensors(runs / "width")
    for source in ("torch", "dist"):
        assert_same_tensors(tensors(runs / source), wanted)


@pytest.mark.slow
def test_ranks_share_the_text(runs: Path) -> None:
    one, two = report_of(runs / "width"), report_of(runs / "two-ranks")
    assert one.losses is not None and two.losses is not None
    for name in ("parent", "cut", "reconstructed"):
        assert getattr(two.losses, name) == pytest.approx(getattr(one.losses, name), abs=1e-6)
    first, second = tensors(runs / "width"), tensors(runs / "two-ranks")
    for name, value in first.items():
        assert torch.allclose(second[name], value, atol=1e-5 * float(value.abs().max())), name


@pytest.mark.slow
def test_where_nothing_is_cut_nothing_changes(runs: Path) -> None:
    assert_same_tensors(tensors(runs / "whole"), tensors(runs / "gqa-parent"))


@pytest.mark.slow
def test_nothing_is_left_behind(runs: Path) -> None:
    assert not list(runs.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("death,kept", [("--die-after 1", 1), ("--die-after 5", 5), ("--hold 3", 1)])
def test_a_killed_run_goes_on_and_ends_the_same(runs: Path, tmp_path: Path, death: str, kept: int) -> None:
    plan = runs / "rotated/prune_plan.json"
    words = f"--load {runs / 'tied-parent'} --plan {plan} --data {runs / 'text'} {TEXT} --untie --rotate-hidden --save"
    loop = StockLoop(tmp_path)
    case = {"ranks": 1, "program": "reconstruction_worker"}
    killed = {**case, "name": "killed", "words": f"{death} {words} again".split()}
    assert loop.run_all([killed])["killed"].code == 9
    assert not (tmp_path / "again").exists() and (tmp_path / ".again.reconstruction").is_dir()
    done = loop.run_all([{**case, "name": "done", "words": f"{words} again".split(), "program": "reconstruct"}])["done"]
    assert f"going on after layer {kept} of 4" in done.ok().log
    found, wanted = digests(tmp_path / "again"), digests(runs / "rotated")
    assert found["model.safetensors"] == wanted["model.safetensors"]
    assert report_of(tmp_path / "again").weights == report_of(runs / "rotated").weights
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_processes_that_see_different_states_of_a_run_end(runs: Path, tmp_path: Path) -> None:
    plan = runs / "rotated/prune_plan.json"
    words = f"--load {runs / 'tied-parent'} --plan {plan} --data {runs / 'text'} {TEXT} --untie --rotate-hidden --save"
    loop, case = StockLoop(tmp_path), {"program": "reconstruction_worker"}
    killed = {**case, "ranks": 1, "name": "dies", "words": f"--die-after 1 {words} again".split()}
    assert loop.run_all([killed])["dies"].code == 9
    behind = {**case, "ranks": 2, "name": "behind", "words": f"--behind {words} again".split()}
    run = loop.run_all([behind])["behind"]
    assert run.code and "is not the same file for all processes" in run.log
    assert (tmp_path / ".again.reconstruction").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape,words,complaint",
    [
        ("tied", "--data-path text --rotate-hidden", "add --untie, which costs 2,424 parameters"),
        ("gqa", "--data-path text --untie", "has weights of its own already"),
        ("gqa", "--data-path none", "--data-path none: there is no none.bin"),
        ("gqa", "--data-path 0.5 text 0.5", "name texts, or weights and texts in turns"),
        ("gqa", "--data-path 0.5 text -1 text", "each text once, with a weight above 0"),
        ("gqa", "--data-path text --sequence-length 65", "more than the 64 positions"),
        ("gqa", "", "--reconstruct learns from text: add --data-path"),
        ("gqa", "--data-path text --hidden-size-remain 5000", "--hidden-size-remain 5000 must lie between 1 and"),
        ("gqa", "--data-path text --format torch --tensor-model-parallel-size 3", "3 does not divide the parent's"),
        ("gqa", "--data-path text --criterion contribution --num-layers-remain 9", "between 1 and the parent's 4"),
        ("gqa", "--data-path text --candidates 2", "--candidates 2 is of the shapes for a size"),
    ],
)
def test_mistakes_are_said_before_any_work(
    runs: Path, shape: str, words: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setattr("megatron.pruning.training.cpu_device.install", lambda: False)  # this process keeps its device
    flags = f"--reconstruct --hidden-size-remain 24 --format hf {words}".split()
    with pytest.raises(ValueError, match=complaint):
        prune(runs / f"{shape}-parent", runs / "never", *flags)
    assert not list(runs.glob("*never*"))


@pytest.mark.slow
def test_nothing_is_left_in_a_parent_that_the_target_is_in(runs: Path) -> None:
    parent = runs / "gqa-parent"
    with pytest.raises(ValueError, match="overlap: name a directory of its own"):
        prune(parent, parent / "never", "--reconstruct", f"--data-path={runs / 'text'}", "--hidden-size-remain=24")
    assert not list(parent.glob(".*"))


def test_folders_above_the_target_are_made(tmp_path: Path) -> None:
    work = tmp_path / "of" / "tomorrow" / ".out.reconstruction"
    os.close(claim(work))
    assert work.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("others", ["thesis.txt was made by no reconstruction", "another reconstruction is at work in"])
def test_what_is_unfinished_shares_its_directory_with_nobody(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    monkeypatch.setattr("megatron.pruning.training.cpu_device.install", lambda: False)  # this process keeps its device
    folder = tmp_path / ".out.reconstruction"
    folder.mkdir()
    (folder / ("thesis.txt" if "thesis" in others else "states")).write_text("mine")
    lock = hold_directory(folder)
    if "thesis" in others:
        os.close(lock)
    flags = f"--hidden-size-remain 24 --format hf --data-path {runs / 'text'} --sequence-length 16".split()
    with pytest.raises(ValueError, match=others):
        prune(runs / "gqa-parent", tmp_path / "out", "--reconstruct", *flags)
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    if "another" in others:
        os.close(lock)


@pytest.mark.parametrize("flag", ["--sequences 7", "--ridge 0.1", "--rotate-hidden", "--untie", "--sequence-length 9"])
def test_flags_of_a_reconstruction_are_refused_without_one(gqa: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag.split()[0]} is for a reconstruction: add --reconstruct"):
        prune(gqa, tmp_path / "never", "--hidden-size-remain", "24", *flag.split())


@pytest.mark.slow
def test_numbers_that_are_none_end_it(runs: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "parent", "gqa", vocab=VOCABULARY)
    edit(tmp_path / "parent", lambda state, layers: state[layers[2] + "mlp.up_proj.weight"].fill_(float("nan")))
    words = f"--load parent --save never --plan {plan_keeping(tmp_path / 'parent', tmp_path / 'p', ffn=[0, 1, 2])}"
    words += f" --data {runs / 'text'} {TEXT}"
    case = {"name": "nan", "words": words.split(), "ranks": 1, "program": "reconstruct"}
    run = StockLoop(tmp_path).run_all([case])["nan"]
    assert run.code == 1 and "the reconstructed up of layer 2 has NaN or infinities, as has parent" in run.error
    assert not (tmp_path / "never").exists()


def test_what_cannot_be_factored_gets_a_larger_ridge() -> None:
    u, t, *_ = random_problem()
    sums = moments(u, t)
    least, mean = float(torch.linalg.eigvalsh(sums.inputs)[0]), float(sums.inputs.diagonal().mean())
    sums.inputs -= (least + 0.01 * mean) * torch.eye(6, dtype=torch.float64)
    solver = LeastSquares(sums, sums, 1e-4)
    assert solver._factor(1e-4) is None and solver._factor(1.0) is not None
