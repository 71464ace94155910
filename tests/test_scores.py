"""Scores against a few independent lines on a Hugging Face model with hooks, in float64; the same in every layout."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import score_importance
import torch
from helpers import convert, make_llama, plan_of, prune, write_documents
from stock_loop import StockLoop
from transformers import AutoModelForCausalLM

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import fingerprint
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.report import by_layer
from megatron.pruning.plan.scores import Facts, Scores, read, shapes, write
from megatron.pruning.training import cpu_device, scoring
from megatron.pruning.training.tokens import windows

LENGTH, SEQUENCES, LAYERS, LOSSES = 24, 5, 4, 3
VOCABULARY = 128  # a multiple of the divisor: no padding, which would take part in Megatron's softmax

# name: shape, format and layout on disk, layout of the run, processes
CASES = {
    "gqa-tp1": ("gqa", {}, (1, 1), 1),
    "gqa-tp2": ("gqa", {"format": "torch", "tensor": 2}, (2, 1), 2),
    "gqa-tp2pp2": ("gqa", {"format": "torch_dist"}, (2, 2), 4),
    "gqa-dp2": ("gqa", {}, (1, 1), 2),
    "tied-pp2dp2": ("tied", {}, (1, 2), 4),
    "qwen2-tp4": ("qwen2", {}, (4, 1), 4),
    "qwen3-pp2": ("qwen3", {}, (1, 2), 2),
    "mha-tp2": ("mha", {}, (2, 1), 2),
    "tied-layered": ("tied", {}, (1, 1), 1),
    "qwen3-layered-dp2": ("qwen3", {"format": "torch", "tensor": 2}, (1, 1), 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with text, the models, and the scores of all cases."""
    top = tmp_path_factory.mktemp("scores")
    texts = (np.random.default_rng(size).integers(0, VOCABULARY, size) for size in (100, 31, 200))
    write_documents(top / "text", *texts)
    cases = []
    for name, (shape, on_disk, (tensor, pipeline), ranks) in CASES.items():
        if not (top / shape).exists():
            make_llama(top / shape, shape, layers=LAYERS, vocab=VOCABULARY)
        source = convert(top / shape, top / f"{name}-source", **on_disk) if on_disk else top / shape
        words = f"--load {source} --data {top / 'text'} --save {top / name}.scores --sequence-length {LENGTH} "
        words += f"--sequences {SEQUENCES} "
        words += f"--layer-loss {LOSSES} {'--layer-by-layer ' if 'layered' in name else ''}"
        words += f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}"
        cases.append({"name": name, "words": words.split(), "ranks": ranks, "program": "score_importance"})
    half = f"--load {top / 'gqa'} --data {top / 'text'} --save {top / 'bf16'}.scores --dtype bf16 "
    half += f"--sequence-length {LENGTH} --sequences {SEQUENCES} --pipeline-model-parallel-size 2"
    cases.append({"name": "bf16", "words": half.split(), "ranks": 2, "program": "score_importance", "gpu": True})
    for way in ("", "--layer-by-layer"):
        words = f"--load {top / 'qwen3'} --data {top / 'text'} --save {top / f'qwen3-bf16{way}'}.scores --dtype bf16 "
        words += f"--sequence-length {LENGTH} --sequences {SEQUENCES} {way}"
        cases.append(
            {"name": f"qwen3-bf16{way}", "words": words.split(), "ranks": 1, "program": "score_importance", "gpu": True}
        )
    for run in StockLoop(top).run_all(cases).values():
        run.ok()
    return top


def added(linear: torch.nn.Linear, inputs: torch.Tensor, units: int) -> torch.Tensor:
    """Return the sum over tokens of the squares of what a linear adds for each of some equal blocks of its inputs."""
    blocks = torch.arange(units).repeat_interleave(inputs.shape[1] // units)
    parts = [inputs[:, blocks == unit] @ linear.weight[:, blocks == unit].T for unit in range(units)]
    return torch.stack([part.square().sum() for part in parts]).detach()


def add_contributions(sums: dict, i: int, config: Any, layer: torch.nn.Module, seen: dict) -> None:
    """Add what each ffn channel, head and query group of layer `i` has added."""
    o, heads = layer.self_attn.o_proj, seen[f"heads{i}"]
    sums["added_by_ffn"][i] += added(layer.mlp.down_proj, seen[f"ffn{i}"], config.intermediate_size)
    sums["added_by_heads"][i] += added(o, heads, config.num_attention_heads)
    sums["added_by_groups"][i] += added(o, heads, config.num_key_value_heads)


REFERENCES: dict[tuple[Path, bytes], dict[str, torch.Tensor]] = {}


def reference(model: Path, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the sums of a model and a text, computed once."""
    key = model, tokens.tobytes()
    if key not in REFERENCES:
        REFERENCES[key] = by_definition(model, tokens)
    return dict(REFERENCES[key])


def by_definition(model: Path, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the sums of plan/scores.py, from the definitions in its docstring, one sequence at a time."""
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    config, seen = llama.config, {}

    def watch(name: str, of_input: bool):
        return lambda module, args, out: seen.__setitem__(name, (args[0] if of_input else out)[0].detach())

    for i, layer in enumerate(llama.model.layers):
        for j, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
            norm.register_forward_hook(watch(f"out{2 * i + j}", False))
            norm.register_forward_hook(watch(f"in{2 * i + j}", True))
        layer.self_attn.o_proj.register_forward_hook(watch(f"heads{i}", True))
        layer.mlp.down_proj.register_forward_hook(watch(f"ffn{i}", True))
    llama.model.norm.register_forward_hook(watch(f"in{2 * LAYERS}", True))
    expected = {**shapes(open_checkpoint(model).config.sizes), "loss": ()}
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in expected.items()}
    for b, window in enumerate(torch.from_numpy(tokens)):
        with torch.no_grad():
            loss = llama(window[None, :-1]).logits[0]
            total = torch.nn.functional.cross_entropy(loss, window[1:], reduction="sum")
        sums["loss"] += total
        for i in range(2 * LAYERS + 1):
            sums["norm_inputs"][i] += (seen[f"in{i}"] ** 2).sum(0)
            if i < 2 * LAYERS:
                sums["norm_outputs"][i] += seen[f"out{i}"].abs().mean(0) ** 2
        for i in range(LAYERS):
            sums["ffn"][i] += seen[f"ffn{i}"].abs().mean(0) ** 2
            add_contributions(sums, i, config, llama.model.layers[i], seen)
            channels = seen[f"heads{i}"].abs().mean(0) ** 2
            sums["heads"][i] += channels.view(config.num_attention_heads, -1).sum(1)
        states = [seen[f"in{2 * i}"] for i in range(LAYERS + 1)]
        for i, first in enumerate(states):
            for j, second in enumerate(states):
                sums["layer_cosines"][i, j] += torch.cosine_similarity(first, second, dim=-1).sum()
        if b < LOSSES:
            sums["layer_losses"][-1] += total
            whole = llama.model.layers
            for i in range(LAYERS):
                llama.model.layers = torch.nn.ModuleList([layer for j, layer in enumerate(whole) if j != i])
                llama.config.num_hidden_layers = LAYERS - 1
                with torch.no_grad():
                    logits = llama(window[None, :-1], use_cache=False).logits[0]
                sums["layer_losses"][i] += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
            llama.model.layers, llama.config.num_hidden_layers = whole, LAYERS
    return sums


@pytest.mark.slow
def test_stages_hand_on_what_they_compute_in_bf16(folder: Path) -> None:
    """As on GPUs, whose default it is: 8 bits of each number."""
    half, whole = (read(folder / f"{name}.scores") for name in ("bf16", "gqa-tp1"))
    assert half.facts.dtype == "bf16" and half.facts.loss == pytest.approx(whole.facts.loss, rel=0.005)
    for name, sums in whole.sums.items():
        if name != "layer_losses":
            assert np.allclose(half.sums[name], sums, rtol=0.05, atol=0.02 * float(np.abs(sums).max())), name


@pytest.mark.slow
def test_every_weight_has_the_dtype_that_was_asked_for(folder: Path) -> None:
    """The gains of the norms of q and k, too, which Megatron's own layers build in fp32."""
    whole, layered = (read(folder / f"qwen3-bf16{way}.scores") for way in ("", "--layer-by-layer"))
    assert whole.facts.dtype == layered.facts.dtype == "bf16"
    for name, sums in whole.sums.items():
        assert np.allclose(layered.sums[name], sums, rtol=1e-3, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_definitions_in_every_layout(folder: Path, name: str) -> None:
    found = read(folder / f"{name}.scores")
    model = folder / CASES[name][0]
    tokens = windows(folder / "text", LENGTH, SEQUENCES, open_checkpoint(model), spread=True)
    sums = reference(model, tokens)
    assert found.facts.loss == pytest.approx(float(sums.pop("loss")) / tokens[:, 1:].size, rel=1e-6)
    for what, expected in sums.items():
        assert np.allclose(found.sums[what], expected, rtol=2e-5, atol=1e-9), what
    assert found.facts.parent == fingerprint(open_checkpoint(model))
    assert found.tokens == LENGTH * SEQUENCES and found.facts.loss_sequences == LOSSES


@pytest.mark.slow
def test_what_is_known_of_each_layer_is_said(folder: Path) -> None:
    said, found = (folder / "gqa-tp1.log").read_text(), read(folder / "gqa-tp1.scores")
    for what, values in (
        ("block influence", found.block_influence), ("rise of the loss without the layer", found.loss_rise),
    ):  # fmt: skip
        (line,) = re.findall(rf"{what}, by layer\n   0 (.*)", said)
        assert [float(value) for value in line.split()] == pytest.approx(values, abs=0.0005)
    facts = score_importance.scores_facts(folder / "gqa-tp1.scores")
    assert facts["loss_rise"] == found.loss_rise.tolist()
    assert [line.split()[0] for line in by_layer("x", [0.0] * 12).splitlines()[1:]] == ["0", "10"]


@pytest.mark.slow
def test_text_is_taken_evenly_from_all_of_it(folder: Path) -> None:
    model = open_checkpoint(folder / "gqa")
    tokens = np.fromfile(folder / "text.bin", dtype=np.uint16)
    assert windows(folder / "text", 24, 5, model, spread=True)[:, 0].tolist() == tokens[[0, 48, 120, 168, 240]].tolist()
    assert windows(folder / "text", 24, 99, model).shape == (13, 25)  # 331 tokens hold no more
    with pytest.raises(ValueError, match="has 331 tokens: fewer than one window of 401"):
        windows(folder / "text", 400, 1, model)


@pytest.mark.slow
def test_activation_keeps_what_scores_highest_and_says_what_that_is_worth(folder: Path, tmp_path: Path) -> None:
    scores = folder / "gqa-tp2.scores"
    flags = ["--criterion=activation", "--scores", str(scores), "--min-scores-tokens=1", "--ffn-hidden-size-remain=40"]
    flags += ["--hidden-size-remain=24", "--num-attention-heads-remain=4", "--tensor-model-parallel-size=2"]
    plan = plan_of(prune(folder / "gqa", tmp_path / "p", *flags))
    sums = read(scores).sums
    hidden = np.sqrt(sums["norm_outputs"]).sum(0)
    assert plan.hidden.tolist() == sorted(np.argsort(-hidden)[:24].tolist())
    assert plan.evidence.importance_kept["hidden"] == (
        pytest.approx(np.sort(hidden)[-24:].sum() / hidden.sum(), abs=1e-6),
    )
    for layer in range(LAYERS):
        ffn, heads = np.sqrt(sums["ffn"][layer]), sums["heads"][layer].reshape(4, 2)
        left, right = np.argsort(-ffn[:36])[:20], 36 + np.argsort(-ffn[36:])[:20]
        assert plan.ffn[layer].tolist() == sorted([*left.tolist(), *right.tolist()])
        assert plan.heads[layer].tolist() == [2 * group + int(heads[group].argmax()) for group in range(4)]
        kept, anywhere = ffn[plan.ffn[layer]].sum(), np.sort(ffn)[-40:].sum()
        assert plan.evidence.balance_tax["ffn"][layer] == pytest.approx(1 - kept / anywhere, abs=1e-6)
        assert plan.evidence.importance_kept["ffn"][layer] == pytest.approx(kept / ffn.sum(), abs=1e-6)
    assert max(plan.evidence.balance_tax["ffn"]) > 0
    assert plan.evidence.block_influence == pytest.approx(read(scores).block_influence, abs=1e-6)
    again = prune(
        folder / "gqa", tmp_path / "q", "--plan", str(tmp_path / "p/prune_plan.json"), "--scores", str(scores)
    )
    assert plan_of(again).to_json() == plan.to_json()
    with pytest.raises(ValueError, match=r"has scores .*, but the flags say"):
        prune(folder / "gqa", tmp_path / "r", "--plan", str(tmp_path / "p/prune_plan.json"), "--scores",
              str(folder / "gqa-tp1.scores"))  # fmt: skip


@pytest.mark.slow
def test_query_groups_score_as_their_heads_together(folder: Path, tmp_path: Path) -> None:
    flags = ["--criterion=activation", "--scores", str(folder / "gqa-tp1.scores"), "--min-scores-tokens=1"]
    plan = plan_of(prune(folder / "gqa", tmp_path / "p", *flags, "--num-query-groups-remain=2",
                         "--num-attention-heads-remain=4"))  # fmt: skip
    groups = read(folder / "gqa-tp1.scores").sums["heads"].reshape(LAYERS, 4, 2).sum(2)
    assert [kept.tolist() for kept in plan.groups] == [sorted(np.argsort(-row)[:2].tolist()) for row in groups]


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["block_influence", "contiguous", "loss"])
def test_layers_are_dropped_by_evidence(folder: Path, tmp_path: Path, criterion: str) -> None:
    flags = ["--num-layers-remain=2", f"--layer-criterion={criterion}", "--min-scores-tokens=1", "--scores"]
    plan = plan_of(prune(folder / "gqa", tmp_path / "p", *flags, str(folder / "gqa-dp2.scores")))
    sums = reference(
        folder / "gqa", windows(folder / "text", LENGTH, SEQUENCES, open_checkpoint(folder / "gqa"), spread=True)
    )
    cosines = sums["layer_cosines"].numpy()
    if criterion == "contiguous":
        first = max(range(3), key=lambda i: cosines[i, i + 2])
        dropped = [first, first + 1]
    else:
        harm = [-cosines[i, i + 1] if criterion == "block_influence" else sums["layer_losses"][i] for i in range(4)]
        dropped = sorted(sorted(range(4), key=lambda i: harm[i])[:2])
    assert plan.layers.tolist() == [layer for layer in range(4) if layer not in dropped]
    assert plan.evidence.layer_criterion == criterion


def synthetic(model: Path, **changes: object) -> Scores:
    """Return scores that fit a model, of no text at all."""
    checkpoint = open_checkpoint(model)
    sizes = {axis: checkpoint.config.sizes[axis] for axis in ("layers", "hidden", "heads", "groups", "ffn")}
    rng = np.random.default_rng(0)
    sums = changes.pop("sums", {n: rng.random(s) for n, s in shapes(sizes).items()})
    facts = Facts(
        parent=fingerprint(checkpoint), text="", dtype="fp32", sizes=sizes, sequences=3, sequences_wanted=3,
        sequence_length=10, loss_sequences=0, positions=10, loss=1.0,
    )  # fmt: skip
    for name, value in changes.items():
        msgspec.structs.force_setattr(facts, name, value)  # past the checks that a reader makes
    return Scores(facts, sums)  # type: ignore[arg-type]


def test_a_corrected_norm_gives_what_the_parents_norm_gave(gqa: Path, tmp_path: Path) -> None:
    # For text of a single token the correction is exact: what the kept channels lose in mean square is known.
    token = np.random.default_rng(1).normal(size=(9, 40))
    scores = synthetic(gqa)
    scores = dataclasses.replace(scores, sums={**scores.sums, "norm_inputs": token**2})
    kept = np.array([0, 3, 4, 17, 39])
    gains = scores.norm_gains(np.array([1, 3]), kept)
    for gain, row in zip(gains, (2, 3, 6, 7, 8), strict=True):
        wide, narrow = token[row], token[row, kept]
        normed = narrow / np.sqrt((narrow**2).mean()) * gain
        assert np.allclose(normed, (wide / np.sqrt((wide**2).mean()))[kept])

    write(tmp_path / "s", scores)
    flags = ["--hidden-size-remain=24", "--num-layers-remain=2", "--format=hf", "--min-scores-tokens=1", "--scores"]
    flags += [str(tmp_path / "s"), "--criterion=activation"]
    plain = prune(gqa, tmp_path / "plain", *flags, "--no-correct-norms")
    corrected = prune(gqa, tmp_path / "corrected", *flags)
    assert not plan_of(plain).norm_gains
    plan, names = plan_of(corrected), ("input_layernorm", "post_attention_layernorm")
    before, after = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).state_dict() for p in (plain, corrected)
    )
    expected = {f"model.layers.{i}.{n}.weight": 2 * i + j for i in range(2) for j, n in enumerate(names)}
    expected["model.norm.weight"] = 4
    for key, value in before.items():
        gain = np.float32(plan.norm_gains[expected[key]]) if key in expected else np.float32(1)
        assert torch.equal(after[key], value * torch.tensor(gain)), key


def test_where_there_are_scores_they_decide(gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s", synthetic(gqa))
    scores = [f"--scores={tmp_path / 's'}", "--min-scores-tokens=1"]
    sizes = ["--hidden-size-remain=24", "--ffn-hidden-size-remain=40", "--num-layers-remain=2", "--plan-only"]
    found = []
    for number, flags in enumerate(([], scores, [*scores, "--criterion=random", "--layer-criterion=spaced"])):
        prune(gqa, tmp_path / f"p{number}", *sizes, *flags)
        plan = Plan.from_json((tmp_path / f"p{number}.prune_plan.json").read_text(), "")
        advised = "--scores" in capsys.readouterr().err
        found.append((plan.evidence.criterion, plan.evidence.layer_criterion, bool(plan.norm_gains), advised))
    assert found == [
        ("random", "spaced", False, True),
        ("contribution", "block_influence", True, False),
        ("random", "spaced", True, True),
    ]
    prune(gqa, tmp_path / "applied", "--plan", str(tmp_path / "p0.prune_plan.json"), "--format=hf")
    prune(gqa, tmp_path / "by-hand", "--drop-layers=1", "--format=hf")
    assert not capsys.readouterr().err  # nothing was chosen here


def test_scores_that_cannot_be_trusted_are_refused(gqa: Path, tmp_path: Path) -> None:
    mha = make_llama(tmp_path / "mha", "mha")

    def refusal(scores: Scores | bytes | None, *flags: str, named: bool = True) -> str:
        file = tmp_path / "scores"
        file.unlink(missing_ok=True)
        if isinstance(scores, bytes):
            file.write_bytes(scores)
        elif scores is not None:
            write(file, scores)
        words = [f"--scores={file}"] * named + ["--ffn-hidden-size-remain=40", "--plan-only", *flags]
        with pytest.raises(ValueError) as problem:
            prune(gqa, tmp_path / "p", *words)
        assert "\n" not in str(problem.value)
        return str(problem.value)

    good, use = synthetic(gqa), "--criterion=activation"
    assert "comes from 30 tokens, fewer than --min-scores-tokens 32,768" in refusal(good, use)
    assert "scores a model of" in refusal(synthetic(mha), use)
    assert "the same shape, other weights" in refusal(synthetic(gqa, parent="0" * 16), use)
    assert "interrupted run, 3 of 4 sequences: run it again" in refusal(synthetic(gqa, sequences_wanted=4), use)
    nan = {**good.sums, "ffn": np.full_like(good.sums["ffn"], np.nan)}
    assert "ffn holds NaN, infinite or negative sums" in refusal(synthetic(gqa, sums=nan), use)
    short = {**good.sums, "heads": good.sums["heads"][:2]}
    assert "is not a file of scores: its arrays are" in refusal(synthetic(gqa, sums=short), use)
    assert "is not a file of scores" in refusal(b"\xff" * 100, use)
    assert "is not a file: tools/score_importance.py makes one" in refusal(None, use)
    assert "would not be used" in refusal(good, "--criterion=random")
    assert "--criterion activation needs --scores" in refusal(None, use, named=False)
    assert "--correct-norms needs --scores" in refusal(None, "--correct-norms", named=False)
    counts = {"sequences": -1}, {"positions": 0}, {"loss_sequences": -3}, {"sequence_length": -10}
    for wrong in counts:
        assert "is not a file of scores" in refusal(synthetic(gqa, **wrong), use)
    enough = ["--criterion=activation", "--min-scores-tokens=1"]
    assert "--correct-norms is for a smaller hidden size" in refusal(good, *enough, "--correct-norms")
    loss = ["--num-layers-remain=3", "--layer-criterion=loss", "--min-scores-tokens=1"]
    assert "hold no losses of single layers: score again with --layer-loss" in refusal(good, *loss)
    assert "needs --scores FILE" in refusal(None, *loss, named=False)
    assert "add --num-layers-remain" in refusal(good, "--layer-criterion=contiguous", "--min-scores-tokens=1")


class FakeRecorder:
    """Sums that tell which sequences went in, and an interruption on the way."""

    at_once = 1

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at, self.seen = stop_at, 0.0

    def sequence(self, window: np.ndarray, layer_losses: bool) -> None:
        if int(window[0]) == self.stop_at:
            raise KeyboardInterrupt
        self.seen += 10.0 ** int(window[0])

    def collect(self) -> dict[str, np.ndarray]:
        seen, self.seen = self.seen, 0.0
        return {"loss": np.array([0.0]), **{n: np.full(s, seen) for n, s in shapes(self.sizes).items()}}

    sizes: dict[str, int]


def test_an_interrupted_run_goes_on_where_it_was(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "from_first", lambda value: value)
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)  # after every sequence
    text = np.tile(np.arange(6)[:, None], 5)
    sizes = synthetic(gqa).facts.sizes
    empty = synthetic(
        gqa, sequences=0, sequences_wanted=6, loss=0.0, sums={n: np.zeros(s) for n, s in shapes(sizes).items()}
    )
    FakeRecorder.sizes = dict(sizes)
    save = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        scoring.score(save, empty, FakeRecorder(stop_at=4), text, 1, 0)
    assert not save.exists() and read(tmp_path / ".s.partial").facts.sequences == 4
    scoring.score(save, empty, FakeRecorder(stop_at=3), text, 1, 0)  # would stop, did it begin again
    assert "going on after 4 of 6 sequences" in capsys.readouterr().out
    assert read(save).facts.sequences == 6 and not (tmp_path / ".s.partial").exists()
    assert all((array == 111111).all() for array in read(save).sums.values())

    (tmp_path / ".s.partial").write_bytes(save.read_bytes())
    other = dataclasses.replace(empty, facts=msgspec.structs.replace(empty.facts, text="another"))
    scoring.score(save, other, FakeRecorder(stop_at=None), text, 1, 0)
    assert "starting over" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "words,complaint",
    [
        ("--save {here}/s --data {here}/none", "there is no .*none.bin"),
        ("--save {here}/none/s --data {here}/text", "there is no directory"),
        ("--save {here}/gqa-tp1.scores --data {here}/text", "exists: add --overwrite"),
        ("--save {here}/s --data {here}/text --tensor-model-parallel-size 3", "does not divide"),
        ("--save {here}/s --data {here}/other.jsonl", "is not a file"),
        ("--save {here}/s --data {here}/text --layer-by-layer --tensor-model-parallel-size 2", "that is not cut"),
    ],
)
def test_mistakes_of_a_user_are_said_before_anything_is_built(
    folder: Path, words: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_device, "install", lambda: False)  # this process keeps its device
    with pytest.raises(ValueError, match=complaint):
        score_importance.main(["--load", str(folder / "gqa"), *words.format(here=folder).split()])


@pytest.mark.slow
def test_text_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "small", "gqa", vocab=64)
    with pytest.raises(ValueError, match=re.escape("has a vocabulary of 64: it was made with another tokenizer")):
        windows(folder / "text", LENGTH, SEQUENCES, open_checkpoint(tmp_path / "small"))
