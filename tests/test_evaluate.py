"""tools/evaluate.py: several checkpoints in one table, on text and on tasks of lm-evaluation-harness."""

import importlib.util
import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from commands import ROOT
from helpers import convert, hf_loss, make_llama, write_documents
from safetensors.torch import load_file, save_file
from stock_loop import StockLoop

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.layout import Layout

TINY = ROOT / "assets/tiny-llama"
TASK = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_table_compares_checkpoints_on_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.random.default_rng(0).integers(0, 101, 65)
    write_documents(tmp_path / "data", tokens)
    paths = [make_llama(tmp_path / shape, shape, layers=2) for shape in ("mha", "gqa")]
    words = ["--data", str(tmp_path / "data"), "--sequence-length", "64", "--device", "cpu", "--dtype", "fp32"]
    words += ["--json", str(tmp_path / "out.json"), *(word for path in paths for word in ("--load", str(path)))]
    evaluate.main(words)
    head, *lines = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["checkpoint", "parameters", "loss", "perplexity"]
    for path, line, result in zip(paths, lines, json.loads((tmp_path / "out.json").read_text()), strict=True):
        loss = hf_loss(path, tokens)
        assert result["loss"] == pytest.approx(loss, abs=1e-5)
        parameters = f"{open_checkpoint(path).config.parameters:,}"
        assert line.split() == [str(path), parameters, f"{loss:.4f}", f"{math.exp(loss):.2f}"]


@pytest.mark.slow
@pytest.mark.parametrize("value,said", [(float("nan"), "nan"), (1e5, "[0-9.e+]+")])
def test_a_loss_that_is_no_use_ends_in_a_sentence(tmp_path: Path, value: float, said: str) -> None:
    model = make_llama(tmp_path / "model", "gqa", layers=1)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= value
    save_file(weights, model / "model.safetensors")
    write_documents(tmp_path / "data", np.random.default_rng(0).integers(0, 101, 65))
    words = (
        f"--load {model} --data {tmp_path / 'data'} --sequence-length 64 --device cpu --json {tmp_path / 'out.json'}"
    )
    with pytest.raises(ValueError, match=f"model has a loss of {said}: was it trained"):
        evaluate.main(words.split())
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_layer_by_layer_and_in_several_processes_the_losses_are_the_same(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 101, 81)
    windows = [tokens[at : at + 17] for at in range(0, 80, 16)]  # of which two processes get no equal shares
    write_documents(tmp_path / "data", tokens)
    models = [make_llama(tmp_path / shape, shape, layers=3) for shape in ("mha", "tied", "qwen2", "qwen3", "llama3")]
    words = [f"--data={tmp_path / 'data'}", "--sequence-length=16", "--batch-size=2", "--dtype=fp32"]
    words += [f"--load={model}" for model in models]
    layered = [*words, "--layer-by-layer"]
    cases = {"whole": (words, 1), "shared": (words, 2), "layered": (layered, 1), "layered-shared": (layered, 2)}
    runs = [
        {"name": name, "program": "evaluate", "words": [*these, f"--json={tmp_path / name}.json"], "ranks": ranks}
        for name, (these, ranks) in cases.items()
    ]
    logs = {name: run.ok().log for name, run in StockLoop(tmp_path).run_all(runs).items()}
    losses = {name: [one["loss"] for one in json.loads((tmp_path / f"{name}.json").read_text())] for name in cases}
    wanted = [np.mean([hf_loss(model, window) for window in windows]) for model in models]
    assert losses["whole"] == pytest.approx(wanted, abs=1e-5)
    for name in ("shared", "layered", "layered-shared"):
        assert losses[name] == pytest.approx(losses["whole"], abs=2e-6)
    for log in logs.values():  # one process speaks
        assert log.count("perplexity") == 1 and log.count("tokens of") == 1


def test_mistakes_end_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give --data, --tasks or both"):
        evaluate.main(["--load", str(TINY)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tasks needs lm-evaluation-harness, which is not installed"):
        evaluate.main(["--load", str(TINY), "--tasks", "arc_easy"])
    with pytest.raises(ValueError, match=r"--layer-by-layer is for the loss on --data, .*: leave --device out"):
        evaluate.main(["--load", str(TINY), "--data", "x", "--layer-by-layer", "--device", "cpu"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:1 is one device for 2 processes"):
        evaluate.main(["--load", str(TINY), "--data", "x", "--device", "cuda:1"])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_table_compares_checkpoints_on_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    documents = [
        {"text": "import", "choices": [" os", " zqj"], "label": 0},
        {"text": "def", "choices": [" )", " __init__(self"], "label": 1},
    ]
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "counting.yaml").write_text(TASK.format(file=tmp_path / "test.json"))
    megatron = convert(TINY, tmp_path / "megatron", layout=Layout(2, 1, 32))
    words = ["--tasks", "counting", "--task-folder", str(tmp_path / "tasks"), "--dtype", "fp32", "--device", "cpu"]
    evaluate.main([*words, "--load", str(TINY), "--load", str(megatron)])
    head, *lines = capsys.readouterr().out.splitlines()[-3:]
    assert head.split() == ["checkpoint", "parameters", "counting", "acc"]
    for path, line in zip((TINY, megatron), lines, strict=True):
        assert line.split() == [str(path), f"{open_checkpoint(TINY).config.parameters:,}", "1.0000"]
    with pytest.raises(ValueError, match="--tasks nonsense: lm-evaluation-harness has no such task"):
        evaluate.main([*words[2:], "--tasks", "nonsense", "--load", str(TINY)])
