"""Where a model has no room, one layer is held at a time, and what comes out is the same."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from helpers import make_llama, plan_of, tensors, write_documents
from stock_loop import StockLoop

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.training import room


@pytest.mark.slow
def test_what_has_no_room_is_evaluated_scored_and_reconstructed_to_the_same(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "hf", "gqa")
    write_documents(tmp_path / "text", np.random.default_rng(0).integers(0, 101, 300))
    text = ["--sequence-length=16"]
    words = {
        "evaluate": ["--dtype=fp32", f"--data={tmp_path / 'text'}", "--json={save}.json"],
        "prune_llama": ["--save={save}", "--format=hf", "--reconstruct", f"--data-path={tmp_path / 'text'}",
                        "--sequences=5", "--min-scores-tokens=1", "--ffn-hidden-size-remain=40",
                        "--num-attention-heads-remain=4"],
    }  # fmt: skip
    cases = []
    for program, flags in words.items():
        for name in ("enough", "short"):
            given = [f"--load={model}", *text, *(flag.format(save=tmp_path / f"{name}-{program}") for flag in flags)]
            short = {"program": "short_of_memory", "words": [program, *given]}
            run = {"program": program, "words": given} if name == "enough" else short
            cases.append({"name": f"{name}-{program}.run", "ranks": 2, **run})
    runs = {name: run.ok() for name, run in StockLoop(tmp_path).run_all(cases).items()}
    for name, run in runs.items():
        assert run.log.count("one layer is held at a time") == name.startswith("short"), name
    losses = [json.loads((tmp_path / f"{name}-evaluate.json").read_text())[0]["loss"] for name in ("enough", "short")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    enough, short = (tmp_path / f"{name}-prune_llama" for name in ("enough", "short"))
    for axis in ("ffn", "heads"):
        assert np.array_equal(getattr(plan_of(enough), axis), getattr(plan_of(short), axis))
    found = tensors(short)
    assert all(np.array_equal(found[name], tensor) for name, tensor in tensors(enough).items())


@pytest.mark.parametrize(
    "groups,folder,names,cache",
    [
        ("0::/a/job\n", "a", ("max", "current"), "file"),
        (
            "5:cpuset:/x\n4:hugetlb,memory:/a/job\n0::/none\n",
            "memory/a",
            ("limit_in_bytes", "usage_in_bytes"),
            "total_cache",
        ),
    ],
)
def test_a_limit_of_the_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, folder: str, names: tuple[str, str], cache: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for name, path in (("_GROUPS", tmp_path / "groups"), ("_CGROUP", tmp_path)):
        monkeypatch.setattr(room, name, path)
    assert room.free_memory() == 1000
    (tmp_path / "groups").write_text(groups)
    limit, used, stat = (tmp_path / folder / f"memory.{name}" for name in (*names, "stat"))
    limit.parent.mkdir(parents=True)
    limit.write_text("max\n"), used.write_text("500\n"), stat.write_text(f"anon 100\n{cache} 300\nfile_mapped 7\n")
    assert room.free_memory() == 1000
    limit.write_text("900\n")
    assert room.free_memory() == 700


@pytest.mark.parametrize("free,fits", [(10.3, True), (9.9, False), (70.0, True), (67.0, False)])
def test_a_fifth_or_some_gigabytes_are_for_what_is_computed(
    gqa: Path, monkeypatch: pytest.MonkeyPatch, free: float, fits: bool
) -> None:
    checkpoint = open_checkpoint(gqa)
    weights = 8.0 if free < 20 else 60.0  # GB
    monkeypatch.setitem(room.BYTES, "fp32", weights * 1e9 / checkpoint.config.parameters)
    monkeypatch.setattr(room, "free_memory", lambda: free * 1e9)
    assert (room.too_large(checkpoint, "fp32", "cpu") is None) is fits
