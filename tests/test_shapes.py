"""Shapes for a size: of about as many parameters, divisible as hardware and layout want, ranked, taken and measured."""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import PRUNE, ROOT, run
from helpers import make_llama, plan_of, prune, write_documents
from stock_loop import stands_in_for_python
from transformers import LlamaForCausalLM

import prune_llama
from megatron.pruning.cli.pruning_flags import shapes_from_flags
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.formats.megatron import TRACKER
from megatron.pruning.model.config import LlamaConfig, short
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.measured import Measured
from megatron.pruning.plan.shapes import Target, parse_bytes, parse_count, propose
from megatron.pruning.storage.output import hold_directory
from tools import candidates

LLAMA_2_7B = LlamaConfig(32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_3_8B = LlamaConfig(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_2_70B = LlamaConfig(80, 8192, 28672, 64, 8, 128, 32000)


@pytest.mark.parametrize("config", [LLAMA_2_7B, LLAMA_3_8B, LLAMA_2_70B], ids=["7b", "8b", "70b"])
@pytest.mark.parametrize("ratio,tensor,pipeline", [(0.5, 1, 1), (0.7, 8, 2), (0.9, 4, 4), (0.6, 1, 3)])
def test_every_proposal_is_of_the_size_and_divides(
    config: LlamaConfig, ratio: float, tensor: int, pipeline: int
) -> None:
    shapes = propose(config, Target(ratio * config.parameters), Layout(tensor, pipeline))
    assert 3 <= len(shapes) <= 10 and len({tuple(sorted(shape.sizes.items())) for shape in shapes}) == len(shapes)
    assert [shape.distance for shape in shapes] == sorted(shape.distance for shape in shapes)
    for shape in shapes:
        sizes = shape.sizes
        assert shape.parameters == config.with_sizes(sizes).parameters
        assert abs(shape.parameters / (ratio * config.parameters) - 1) <= 0.02
        assert sizes["hidden"] % 128 == 0 and sizes["ffn"] % (64 * tensor) == 0 and sizes["layers"] % pipeline == 0
        assert sizes["heads"] % sizes["groups"] == 0 and sizes["groups"] % tensor == 0
        assert sizes["hidden"] % sizes["heads"] == 0  # transformers wants it
        assert all(sizes[axis] <= size for axis, size in config.sizes.items())


def test_a_tenth_is_taken_from_width_and_not_from_heads_or_layers() -> None:
    best = propose(LLAMA_2_7B, Target(0.9 * LLAMA_2_7B.parameters), Layout())[0]
    assert best.sizes["heads"] == 32 and best.sizes["layers"] >= 30
    assert best.sizes["hidden"] < 4096 or best.sizes["ffn"] < 11008


@pytest.mark.parametrize(
    "text,value", [("3.4B", 3.4e9), ("700M", 7e8), ("1e9", 1e9), ("12 k", 12e3), ("7b", 7e9), ("1e3M", 1e9)]
)
def test_counts_are_read_as_people_write_them(text: str, value: float) -> None:
    assert parse_count(text) == value and parse_count(short(value)) == value
    assert parse_bytes("8GB") == 8e9 and parse_bytes("7.5 GiB") == 7.5 * 2**30 and parse_bytes("12mib") == 12 * 2**20


LEARN, BATCH = ["--data-path=text", "--valid-data-path=text"], ["--seq-length=16", "--global-batch-size=2"]


@pytest.fixture(autouse=True)
def a_place(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder with a text of tokens and one of records."""
    place = tmp_path_factory.mktemp("texts")
    for name in ("text.idx", "records.jsonl"):
        (place / name).touch()
    monkeypatch.chdir(place)


@pytest.mark.parametrize(
    "flags,complaint",
    [
        (["--target-params=lots"], "'lots' is not a number such as 3.4B"),
        (["--target-params=1.2.3B"], "is not a number"),
        (["--target-params=-3B"], "is not a number"),
        (["--target-memory=8"], "'8' is not a size such as 8GB"),
        (["--target-ratio=1.5"], "--target-ratio 1.5 must lie between 0 and 1"),
        (["--target-params=1B"], "is not below the parent's 66,040"),
        (["--target-ratio=0.01"], "the nearest has .*: ask for that, prune in two rounds"),
        (["--target-ratio=0.9", "--tensor-model-parallel-size=3"], "3 does not divide the parent's query groups"),
        (["--target-ratio=0.5", "--target-params=3B"], "both say how many parameters"),
        (["--target-ratio=0.5", "--drop-layers=1"], "proposes all sizes: leave out"),
        (["--target-ratio=0.5", "--shape=99"], "--shape 99: the shapes proposed are 1 to"),
        (["--shape=1"], "--shape 1 is of the shapes for a size: add --target-params"),
        (["--candidates=2", "--drop-layers=1"], "add --target-params"),
        (["--target-ratio=0.5", "--shape=best"], "measure shapes first, with --candidates"),
        (["--target-ratio=0.6", "--shape=1", LEARN[0]], "would not look at the text: add --reconstruct"),
        (["--target-ratio=0.5", "--kv-batch=4"], "--kv-batch 4 is of the cache .*: add that"),
        (["--target-memory=1GB", "--kv-sequence=64"], "is not below the parent's 313,312 bytes"),
        (["--target-memory=170kB", "--kv-sequence=64", "--kv-batch=100"], "the nearest has .* bytes: ask for that"),
        (["--target-ratio=0.6", "--candidates=1", *LEARN], "at least two shapes"),
        (["--target-ratio=0.6", "--candidates=2"], "--candidates reconstructs each shape by a text: add --data-path"),
        (["--target-ratio=0.6", "--candidates=2", "--data-path=x", "--valid-data-path=y"], "--data-path x: there is n"),
        (["--target-ratio=0.6", "--candidates=2", "--data-path=x"], "not learned from: add --valid-data-path"),
        (["--target-ratio=0.6", "--candidates=2", *LEARN, "--shape=1"], "leave one of"),
        (
            [
                "--target-ratio=0.6",
                "--candidates=2",
                LEARN[0],
                "--valid-data-path=records.jsonl",
                "--measure=1k",
                *BATCH,
            ],
            "records.jsonl is to be trained on, too: turn it into tokens",
        ),
        (["--target-ratio=0.6", "--candidates=2", *LEARN, "--measure=1k"], "counts tokens: add --seq-length N"),
        (["--target-ratio=0.6", "--candidates=2", *LEARN, "--measure=lots", *BATCH], "'lots' is not a number"),
        (["--target-ratio=0.6", "--candidates=2", *LEARN, "--measure=60", *BATCH], "at least four steps, of 32 tokens"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(gqa: Path, tmp_path: Path, flags: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prune(gqa, tmp_path / "p", *flags)
    assert not list(tmp_path.iterdir())


def test_proposals_are_shown_and_one_is_taken(gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(gqa, tmp_path / "p", "--target-ratio=0.6")
    shown = capsys.readouterr().out
    assert "nothing was written: take one with --shape" in shown and not list(tmp_path.iterdir())
    second = shown.splitlines()[2].split()
    plan = plan_of(prune(gqa, tmp_path / "p", "--target-ratio=0.6", "--shape=2", "--format=torch_dist"))
    sizes = [f"{plan.sizes[axis]:,}" for axis in ("layers", "hidden", "ffn", "heads", "groups")]
    assert second[:6] == ["2", *sizes]
    assert plan.evidence.layer_criterion == "spaced"
    # By bytes of the weights, 4 each here: a ceiling.
    capsys.readouterr()
    prune(gqa, tmp_path / "q", "--target-memory=160kB")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert rows and all(0.98 * 40_000 <= int(row[6].replace(",", "")) <= 40_000 for row in rows)


def test_memory_is_that_of_the_weights_file_and_of_the_cache_and_both_targets_hold(gqa: Path, tmp_path: Path) -> None:
    config = open_checkpoint(gqa).config
    target = Target(0.7 * config.parameters, 262_000, bytes_each=4, cached_tokens=2 * 64)
    shapes = propose(config, target, Layout())
    assert len(shapes) > 1 and min(shape.sizes["layers"] for shape in shapes) < config.num_layers
    flags = ["--target-ratio=0.7", "--target-memory=262kB", "--kv-batch=2", "--kv-sequence=64", "--format=hf"]
    for number, shape in enumerate(shapes, start=1):
        saved = prune(gqa, tmp_path / f"{number}", *flags, f"--shape={number}")
        file = saved / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        model = LlamaForCausalLM.from_pretrained(saved)
        cache = model(torch.zeros(2, 64, dtype=torch.long)).past_key_values
        cached = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert shape.memory(4, 2 * 64) == file.stat().st_size - header + cached <= 262_000
        assert abs(shape.parameters / (0.7 * config.parameters) - 1) <= 0.02


@pytest.mark.slow(60)
def test_candidates_are_reconstructed_and_the_best_trained_on(tmp_path: Path) -> None:
    source, text, save = make_llama(tmp_path / "hf", "gqa", vocab=128), tmp_path / "data", tmp_path / "out"
    write_documents(text, np.tile(np.random.default_rng(0).integers(0, 128, 40), 100))
    settings: dict[str, object] = {"PYTHON": stands_in_for_python(tmp_path)}
    command = f"--load {source} --save {save} --target-ratio 0.6 --data-path {text} --sequences 8 --sequence-length 32 "
    command += "--min-scores-tokens 1 "
    measure = f"--candidates 2 --measure 512 --valid-data-path {text} --seq-length 32 --micro-batch-size 2 "
    measure += "--global-batch-size 2 --lr 1e-2 --lr-warmup-iters 2 --tokenizer-type NullTokenizer "
    measure += "--tokenizer-model none --vocab-size 128"
    done = run(sys.executable, PRUNE, *command.split(), *measure.split(), **settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    folder = tmp_path / "out.candidates"
    measured = Measured.from_json((folder / "shapes.json").read_bytes(), "file")
    by_tokens = {t: [n for n, s in enumerate(measured.shapes, 1) if t in s.losses] for t in (0, 128, 256, 512)}
    assert by_tokens[0] == [1, 2]
    for before, after, count in ((0, 128, 2), (128, 256, 2), (256, 512, 1)):
        ranked = sorted(by_tokens[before], key=lambda number: measured.shapes[number - 1].losses[before])
        assert sorted(ranked[:count]) == by_tokens[after]
    best = measured.ranked()[0]
    assert [best] == by_tokens[512] and done.stdout.splitlines()[-4].split()[:2] == ["1", f"{best}"]
    logs = [f"shape{number}.log" for number in by_tokens[0]]
    assert sorted(p.name for p in folder.iterdir()) == ["parent.log", *logs, "shapes.json", "shapes.png"]
    # The best is what a user's own command makes of that shape.
    taken = run(
        "bash", str(ROOT / "scripts/prune_llama.sh"), *command.split(), "--reconstruct", "--shape=best", **settings
    )
    assert taken.returncode == 0, taken.stderr[-2000:]
    loss = run(f"{settings['PYTHON']}", str(ROOT / "tools/evaluate.py"), "--load", str(save), "--data", str(text),
               "--sequence-length=32", "--json", str(tmp_path / "loss.json"))  # fmt: skip
    assert loss.returncode == 0, loss.stderr[-2000:]
    assert json.loads((tmp_path / "loss.json").read_text())[0]["loss"] == measured.shapes[best - 1].losses[0]


class Interrupted:
    """Stands in for the steps of a measurement, which it notes, and ends the run at one of them."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.last = -1

    def __call__(self, command: Sequence[str], settings: Mapping[str, str], log: Path, held: int) -> None:
        what = Path(command[1]).name
        save = settings.get("SAVE_PATH", "")
        if len(self.steps) == self.last:
            self.last = -1
            raise KeyboardInterrupt
        if what == "evaluate.py":
            model = Path(command[command.index("--load") + 1])
            trained = model / TRACKER
            seed = f"{model.parent.name} {trained.read_text() if trained.exists() else 0}"
            loss = Random(seed).random()
            Path(command[command.index("--json") + 1]).write_text(json.dumps([{"loss": loss}]))
            what += f" {seed}"
        elif what == "check_model.sh":
            assert (Path(settings["LOAD_PATH"]) / "model").exists()
            Path(save).mkdir(exist_ok=True)
            (Path(save) / TRACKER).write_text(command[command.index("--exit-interval") + 1])
        else:
            Path(save).mkdir()
            (Path(save) / "model").touch()
        self.steps.append(f"{what} {Path(save).parent.name}")


def test_a_measurement_goes_on_wherever_it_was_ended(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "measured_figure", lambda measured: b"")  # it takes longer than all else
    words = ["--target-ratio=0.6", "--candidates=4", "--measure=2k", "--seq-length=32", "--global-batch-size=2", *LEARN]
    found = {}
    for last in range(-1, 100):
        save = tmp_path / f"{last}"
        monkeypatch.setattr(candidates, "_run", steps := Interrupted())
        steps.last = last
        if last >= 0:
            with pytest.raises(KeyboardInterrupt):
                prune(gqa, save, *words)
        prune(gqa, save, *words)
        found[last] = (save.with_name(f"{last}.candidates") / "shapes.json").read_bytes()
        if last < 0:
            steps_of_all = steps.steps
        # A step that was ended is the only one that is done again; what it had made is taken away.
        assert sorted(steps.steps) == sorted(steps_of_all)
        if last == len(steps_of_all) - 1:
            break
    assert len(set(found.values())) == 1 and len(steps_of_all) == 1 + 2 * (4 + 3 + 2 + 1)
    with pytest.raises(
        ValueError, match=r"is of other shapes, flags or settings: remove .*candidates, or name another"
    ):
        prune(gqa, tmp_path / "-1", *words, "--ridge=1")
    monkeypatch.setenv("LR", "1e-3")
    with pytest.raises(ValueError, match="is of other shapes, flags or settings"):
        prune(gqa, tmp_path / "-1", *words)


def test_a_step_that_outlives_the_measuring_keeps_others_out(tmp_path: Path) -> None:
    held = hold_directory(tmp_path)
    left = ["bash", "-c", f"sleep 30 >/dev/null 2>&1 & echo $! >{tmp_path / 'pid'}"]
    candidates._run(left, {}, tmp_path / "log", held)
    os.close(held)
    with pytest.raises(BlockingIOError):
        hold_directory(tmp_path)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_number_of_heads_that_divides_no_usual_hidden_size_has_sizes_of_its_own() -> None:
    smollm2 = LlamaConfig(30, 576, 1536, 9, 3, 64, 49152, tied=True)
    shapes = propose(smollm2, Target(1e8), Layout())
    assert {504, 576} <= {shape.sizes["hidden"] for shape in shapes}
    assert all(shape.sizes["hidden"] % shape.sizes["heads"] == 0 for shape in shapes)


def test_as_many_are_proposed_as_are_to_be_measured_or_the_one_that_is_taken_asks_for() -> None:
    smollm2 = LlamaConfig(30, 576, 1536, 9, 3, 64, 49152, tied=True)
    target, words = Target(1e8), ["--load=x", "--save=y", "--target-params=100M"]
    found = {}
    for flag in ("--dtype=fp32", "--candidates=16", "--shape=14", "--shape=best"):
        args = prune_llama.parser().parse_args([*words, flag])
        found[flag] = shapes_from_flags(args, SimpleNamespace(config=smollm2), Layout(), target)  # type: ignore[arg-type]
    usual, measured, taken, every = found.values()
    assert [len(shapes) for shapes in (usual, measured, taken)] == [10, 16, 14] and len(every) > 16
    assert every[:16] == measured and every[:14] == taken and every[:10] == usual
    # The ffn alone gives, which the prior holds for one of the worst.
    assert {**smollm2.sizes, "ffn": 896} in [shape.sizes for shape in measured]


def test_an_ffn_narrower_than_its_steps_over_the_ranks_stays_as_it_is() -> None:
    config = LlamaConfig(12, 1024, 512, 16, 16, 64, 32000)
    shapes = propose(config, Target(config.parameters * 0.7), Layout(16))
    assert shapes and all(shape.sizes["ffn"] == 512 for shape in shapes)
