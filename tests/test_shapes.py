"""Shapes for a size: of about as many parameters, divisible as hardware and layout want, ranked, taken and measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import PRUNE, run
from helpers import make_llama, plan_of, prune, write_documents
from stock_loop import stands_in_for_python

from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.shapes import parse_bytes, parse_count, propose

LLAMA_2_7B = LlamaConfig(32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_3_8B = LlamaConfig(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_2_70B = LlamaConfig(80, 8192, 28672, 64, 8, 128, 32000)


@pytest.mark.parametrize("config", [LLAMA_2_7B, LLAMA_3_8B, LLAMA_2_70B], ids=["7b", "8b", "70b"])
@pytest.mark.parametrize("ratio,tensor,pipeline", [(0.5, 1, 1), (0.7, 8, 2), (0.9, 4, 4), (0.6, 1, 3)])
def test_every_proposal_is_of_the_size_and_divides(
    config: LlamaConfig, ratio: float, tensor: int, pipeline: int
) -> None:
    shapes = propose(config, ratio * config.parameters, Layout(tensor, pipeline))
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
    best = propose(LLAMA_2_7B, 0.9 * LLAMA_2_7B.parameters, Layout())[0]
    assert best.sizes["heads"] == 32 and best.sizes["layers"] >= 30
    assert best.sizes["hidden"] < 4096 or best.sizes["ffn"] < 11008


@pytest.mark.parametrize(
    "text,value", [("3.4B", 3.4e9), ("700M", 7e8), ("1e9", 1e9), ("12 k", 12e3), ("7b", 7e9), ("1e3M", 1e9)]
)
def test_counts_are_read_as_people_write_them(text: str, value: float) -> None:
    assert parse_count(text) == value
    assert parse_bytes("8GB") == 8e9 and parse_bytes("7.5 GiB") == 7.5 * 2**30 and parse_bytes("12mib") == 12 * 2**20


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
        (["--target-ratio=0.6", "--candidates=2", "--data-path=x", "--shape=1"], "leave one of"),
        (["--target-ratio=0.6", "--candidates=2", "--data-path=x", "--train-iters=abc"], "--train-iters abc is not"),
        (["--target-ratio=0.5", "--target-params=3B"], "proposes all sizes: leave out --target-"),
        (["--target-ratio=0.5", "--drop-layers=1"], "proposes all sizes: leave out"),
        (["--target-ratio=0.5", "--shape=99"], "--shape 99: the shapes proposed are 1 to"),
        (["--shape=1"], "--shape 1 is of the shapes for a size: add --target-params"),
        (["--candidates=2", "--drop-layers=1"], "add --target-params"),
        (["--target-ratio=0.6", "--candidates=1"], "at least two shapes"),
        (["--target-ratio=0.6", "--candidates=2"], "--candidates needs text"),
        (["--target-ratio=0.6", "--candidates=2", "--data-path", "x"], "--load .*/hf has no tokenizer"),
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


@pytest.mark.slow
def test_candidates_are_trained_and_ranked(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa", vocab=128)
    write_documents(tmp_path / "data", np.tile(np.random.default_rng(0).integers(0, 128, 40), 100))
    command = f"--load {source} --save {tmp_path / 'out'} --target-ratio 0.6 --candidates 2 --train-iters 4 --lr 1e-2 "
    command += f"--train-data-path {tmp_path / 'data'} --valid-data-path {tmp_path / 'data'} --seq-length 32 "
    command += "--tokenizer-type NullTokenizer --tokenizer-model none --vocab-size 128 --micro-batch-size 2 "
    command += "--global-batch-size 2 --eval-iters 2 --lr-warmup-iters 2"
    done = run(sys.executable, PRUNE, *command.split(), PYTHON=stands_in_for_python(tmp_path))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    ranking = json.loads((tmp_path / "out.candidates/losses.json").read_text())
    best = min(ranking, key=lambda entry: entry["loss"])
    assert len(ranking) == 2 and all(3 < entry["loss"] < 6 for entry in ranking)
    assert f"take the first with --shape {best['shape']} instead of --candidates" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out.candidates").iterdir()) == [
        "losses.json", "shape1.log", "shape2.log",
    ]  # fmt: skip


def test_an_ffn_narrower_than_its_steps_over_the_ranks_stays_as_it_is() -> None:
    config = LlamaConfig(12, 1024, 512, 16, 16, 64, 32000)
    shapes = propose(config, config.parameters * 0.7, Layout(16))
    assert shapes and all(shape.sizes["ffn"] == 512 for shape in shapes)
