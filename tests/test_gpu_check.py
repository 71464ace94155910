"""What benchmarks/gpu/check.sh makes of its checks, and says where there is no GPU; the checks themselves need one."""

import importlib
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from commands import ROOT, run
from helpers import make_llama, write_repeated
from stock_loop import stands_in_for_python

CHECK = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the checks."""
    monkeypatch.syspath_prepend(str(CHECK))
    monkeypatch.setenv("PYTHON", sys.executable)
    return importlib.import_module("check")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the comparisons."""
    monkeypatch.syspath_prepend(str(CHECK))
    return importlib.import_module("compare")


def test_without_a_gpu_one_sentence_ends_it(tmp_path: Path) -> None:
    done = run("bash", str(CHECK / "check.sh"), "--work-dir", str(tmp_path / "new"))
    assert done.returncode == 1 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ") and "torch can use no GPU here" in sentence
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "value,holds", [(4.0, True), (4.02, True), (3.98, True), (4.021, False), (3.9, False), (math.nan, False)]
)
def test_a_figure_holds_within_its_limits(value: float, holds: bool, compare: ModuleType) -> None:
    figure = compare.near("GPU", value, 4.0, 0.02 + 1e-12)
    assert figure.holds is holds
    assert ("is not within" in str(figure)) is not holds
    json.dumps(figure.facts, allow_nan=False)


def test_losses_are_read_by_name_and_step(tmp_path: Path, compare: ModuleType) -> None:
    log = tmp_path / "log"
    lines = (
        f" iteration {step:8d}/      12 | consumed samples: 16 | lm loss: {step}.5E+00 | kd loss: {step}.25 | x: 1 |\n"
        for step in (1, 2, 11)
    )
    log.write_text("".join(lines))
    assert [compare.loss(log, "lm loss", step) for step in (1, 2, 11)] == [1.5, 2.5, 11.5]
    assert compare.loss(log, "kd loss", 11) == 11.25
    with pytest.raises(ValueError, match="has no lm loss of step 12"):
        compare.loss(log, "lm loss", 12)


@pytest.mark.slow
def test_the_loss_of_each_step_is_in_the_log_of_a_training(
    tmp_path: Path, check: ModuleType, compare: ModuleType
) -> None:
    write_repeated(tmp_path / "text", np.arange(32), 50)
    settings = {
        "LOAD_PATH": make_llama(tmp_path / "hf", "gqa"), "DATA_PATH": tmp_path / "text", "VALID_DATA_PATH": "",
        "SPLIT": "100,0,0", "TOKENIZER_TYPE": "NullTokenizer", "TOKENIZER_MODEL": "none", "SEQ_LENGTH": 32,
        "MICRO_BATCH_SIZE": 2, "GLOBAL_BATCH_SIZE": 4, "LR": 1e-2, "LR_WARMUP_ITERS": 1,
        "PYTHON": stands_in_for_python(tmp_path),
    }  # fmt: skip
    log = check.Machine(tmp_path, 0, 100.0).train("first", gpu=False, **settings)
    first, *_, last = (compare.loss(log, "lm loss", step) for step in (1, 2, 3))
    assert first > last > 0


def test_scores_differ_by_a_share_of_the_largest_of_their_kind(compare: ModuleType) -> None:
    expected = {"heads": np.array([[10.0, -200.0]]), "ffn": np.array([0.5, 0.25]), "none": np.zeros(2)}
    found = {"heads": np.array([[10.0, -199.0]]), "ffn": np.array([0.5, 0.26]), "none": np.zeros(2)}
    assert compare.difference(found, expected) == pytest.approx(0.02)
    assert compare.difference(expected, expected) == 0.0
    assert math.isnan(compare.difference({**found, "ffn": np.array([math.nan, 0.25])}, expected))
    with pytest.raises(ValueError, match="beside"):
        compare.difference({"heads": found["heads"]}, expected)


def stands_in(check: ModuleType, monkeypatch: pytest.MonkeyPatch, **checks: object) -> None:
    """Let these be all checks, and the first ones do nothing."""
    nothing = {name: lambda at: check.Found() for name in check.FIRST}
    monkeypatch.setattr(check, "CHECKS", {**nothing, **checks})


def outcomes(folder: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {row["check"]: row for row in rows}


def test_whatever_stops_a_check_is_a_row_and_the_next_runs(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = check.Found([check.Figure("loss", 4.0, 3.9, 4.1)])
    wrong = check.Found([check.Figure("loss", 4.0, 3.9, 4.1), check.Figure("other", 5.0, most=4.5)])
    stands_in(
        check, monkeypatch, right=lambda at: right, wrong=lambda at: wrong, alone=check.two_ranks,
        breaks=lambda at: at.run("breaks", "tools/show_checkpoint.py", tmp_path / "nothing"),
        early=check.first_losses, crash=lambda at: 1 / 0, last=lambda at: right,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        check.main(["--gpus", "1", "--work-dir", str(tmp_path / "new")])
    assert ended.value.code == 1
    rows = outcomes(tmp_path / "new")
    assert [row["outcome"] for row in rows.values()] == (
        ["passed", "passed", "passed", "failed", "left out", "failed", "left out", "failed", "passed"]
    )
    assert rows["wrong"]["reason"] == "other 5 is not within -inf and 4.5"
    assert rows["alone"]["reason"] == "it needs two GPUs, and this machine has 1"
    assert rows["breaks"]["reason"].startswith("breaks ended with status 1: error: ")
    assert rows["early"]["reason"] == "it needs pruned, which the check text-and-checkpoints makes"
    assert rows["crash"]["reason"] == "ZeroDivisionError: division by zero"
    assert rows["right"]["figures"] == {"loss": {"value": 4.0, "least": 3.9, "most": 4.1}}
    assert "4 passed, 3 failed, 2 left out" in capsys.readouterr().out


def test_what_is_left_out_fails_nothing(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stands_in(check, monkeypatch, alone=check.two_ranks)
    check.main(["--gpus", "1", "--work-dir", str(tmp_path / "new"), "--only", "alone"])
    assert "2 passed, 0 failed, 1 left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is there already: name a new folder"):
        check.main(["--gpus", "1", "--work-dir", str(tmp_path / "new")])


def test_a_program_that_takes_too_long_ends_with_all_that_it_started(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "hangs.sh").write_text('sleep 60 & echo $! >"$RUNS/child"; wait\n')
    at = check.Machine(tmp_path, 1, 1.0)
    with pytest.raises(ValueError, match="hangs took longer than 1 seconds: see"):
        at.run("hangs", str(tmp_path / "hangs.sh"))
    child = int((tmp_path / "child").read_text())
    for _ in range(500):  # it is told to end, and on a busy machine may take its time
        if has_ended(child):
            return
        time.sleep(0.01)
    pytest.fail("what the program started goes on")


def has_ended(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True
