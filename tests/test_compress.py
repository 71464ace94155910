"""From a size to a model in one command: what is done, in which order, once; and the page that tells of it."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, run
from helpers import digests, prune, write_documents
from stock_loop import stands_in_for_python

from megatron.pruning.storage.output import hold_directory
from tools import compress, report
from tools.report import Block

SCRIPT, TINY = str(ROOT / "scripts/compress.sh"), ROOT / "assets/tiny-llama"
FLAGS = ["--load", str(TINY), "--target=0.5", "--data-path=x", "--valid-data-path=y", "--tokens=1M"]


@pytest.fixture(autouse=True)
def a_place(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder with two texts, and an environment in which a step of the training has 2,000 tokens."""
    place = tmp_path_factory.mktemp("texts")
    for name in ("x.idx", "y.idx"):
        (place / name).touch()
    monkeypatch.chdir(place)
    monkeypatch.setenv("SEQ_LENGTH", "100")
    monkeypatch.setenv("GLOBAL_BATCH_SIZE", "20")


def performed(monkeypatch: pytest.MonkeyPatch, last: int = 1000) -> list[compress.Step]:
    """Have steps be noted instead of done, and the run end at one of them."""
    steps: list[compress.Step] = []

    def note(step: compress.Step, held: int) -> None:
        if len(steps) == last:
            raise KeyboardInterrupt
        steps.append(step)

    monkeypatch.setattr(compress, "perform", note)
    return steps


def test_rounds_go_down_by_equal_ratios_and_begin_where_the_one_before_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = performed(monkeypatch)
    save = tmp_path / "out"
    words = [
        *FLAGS,
        "--save",
        str(save),
        "--rounds=2",
        "--candidates=4",
        "--teacher=parent",
        "--rotate-hidden",
        "--seed=7",
    ]
    compress.main([*words, "--target=0.25"])
    assert [step.name for step in steps] == [
        "round 1: shapes", "round 1: prune", "round 1: recover", "round 2: shapes", "round 2: prune",
        "round 2: recover", "evaluate", "export", "generate", "report",
    ]  # fmt: skip
    of = {step.name: step for step in steps}
    for number, size, source in ((1, "1209680", str(TINY)), (2, "604840", str(save / "round1/recovered"))):
        shapes, prune = of[f"round {number}: shapes"].command, of[f"round {number}: prune"]
        assert "--candidates" in shapes and "--rotate-hidden" in shapes and source in shapes
        for command in (shapes, prune.command):
            # Of the first parent, whatever the round begins with.
            assert command[command.index("--target-params") + 1] == size
        assert "best" in prune.command and prune.settings["LOAD_PATH"] == source
        recover = of[f"round {number}: recover"]
        assert (recover.settings["TRAIN_ITERS"], recover.tokens) == ("500", 1_000_000)
        assert recover.settings["TEACHER_LOAD"] == str(TINY) and recover.command[-2:] == ["--seed", "7"]
    assert of["export"].settings["MEGATRON_FORMAT_DIR"] == str(save / "round2/recovered")
    said = " ".join(of["evaluate"].command)
    assert "--sequence-length 100 --batch-size 40" in said, "as the training reads"


@pytest.mark.parametrize(
    "words,found",
    [
        (["--target=1M,8MB", "--rounds=1"], ["--target-params", "1M", "--target-memory", "8MB"]),
        (["--target=800K", "--rounds=1"], ["--target-params", "800K"]),
    ],
)
def test_a_target_may_be_of_several_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], found: list[str]
) -> None:
    steps = performed(monkeypatch)
    compress.main([*FLAGS, "--save", str(tmp_path / "out"), *words, "--skip=evaluate,export"])
    command = list(steps[0].command)
    assert command[command.index("--target-params") :][: len(found)] == found
    assert [step.name for step in steps] == ["round 1: prune", "round 1: recover", "generate", "report"]


def test_ended_anywhere_it_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*FLAGS, "--save", str(tmp_path / "out")]
    whole = performed(monkeypatch)
    compress.main([*words[:-1], str(tmp_path / "whole")])
    done = 0
    while done < len(whole):
        part = performed(monkeypatch, last=1)
        try:
            compress.main(words)
        except KeyboardInterrupt:
            pass
        assert [step.name for step in part] == [whole[done].name]
        done += 1
    part = performed(monkeypatch)
    compress.main(words)
    assert not part, "all is done"
    with pytest.raises(ValueError, match=r"is of another job, whose flags are .*, not .*: name another --save"):
        compress.main([*words, "--teacher=parent"])


def test_what_was_skipped_is_done_later_with_all_that_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*FLAGS, "--save", str(tmp_path / "out"), "--rounds=2", "--candidates=3"]
    whole = performed(monkeypatch)
    compress.main([*words, "--skip=recover"])
    assert [step.name for step in whole][:4] == [
        "round 1: shapes",
        "round 1: prune",
        "round 2: shapes",
        "round 2: prune",
    ]
    again = performed(monkeypatch)
    compress.main(words)
    names = [step.name for step in again]
    assert names[:4] == ["round 1: recover", "round 2: shapes", "round 2: prune", "round 2: recover"]
    assert names[4:] == ["evaluate", "export", "generate", "report"]


def test_the_time_of_a_step_is_that_of_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, file = [*FLAGS, "--save", str(tmp_path / "out")], tmp_path / "out/compress.json"
    now = itertools.count(step=10.0)
    monkeypatch.setattr("time.time", lambda: next(now))
    for _ in range(2):
        performed(monkeypatch, last=0)
        with pytest.raises(KeyboardInterrupt):
            compress.main(words)
    before = json.loads(file.read_text())["spent"]
    assert list(before) == ["round 1: prune"]
    performed(monkeypatch)
    compress.main(words)
    state = json.loads(file.read_text())
    assert state["done"]["round 1: prune"]["seconds"] > before["round 1: prune"] > 10 and state["spent"] == {}


@pytest.mark.parametrize("words", [["report.py", "."], ["compress.py", "--load=absent", "--save=y", *FLAGS[2:]]])
def test_a_tool_that_is_called_directly_finds_the_others(tmp_path: Path, words: list[str]) -> None:
    name, *others = words
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, ROOT / "tools" / name, *others], cwd=tmp_path, env=alone, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 1 and re.fullmatch(r"error: .*(no compress.json|no such directory).*\n", done.stderr)


def test_a_step_that_outlives_the_run_keeps_others_out(tmp_path: Path) -> None:
    save = tmp_path / "out"
    save.mkdir()
    lock = hold_directory(save)
    left = compress.Step("left", ["bash", "-c", f"sleep 30 >/dev/null 2>&1 & echo $! >{tmp_path / 'pid'}"])
    compress.perform(left, lock)
    os.close(lock)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ValueError, match="another run is at work in"):
        compress.main([*FLAGS, "--save", str(save)])
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "words,complaint",
    [
        (["--target=lots"], "'lots' is not a number such as 3.4B"),
        (["--tokens=1M,2M", "--rounds=3"], "--tokens 1M,2M names 2 amounts, but there are --rounds 3"),
        (["--tokens=1999"], "--tokens 1999: a step of the training has 2,000, name as many at least"),
        (["--skip=cook"], "--skip cook: the steps are shapes, prune"),
        (["--valid-data-path=z"], "--valid-data-path z: there is neither z.bin and .idx nor a file"),
        (["--data-path", "0.5", "x", "0.5", "z"], "--data-path z: there is neither"),
        (["--load", "absent"], "--load absent: no such directory"),
        (["--valid-data-path", __file__], "is to be trained on, too: turn it into tokens with tools/preprocess"),
    ],
)
def test_mistakes_are_said_before_any_step(tmp_path: Path, words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compress.main([*FLAGS, "--save", str(tmp_path / "out"), *words])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name,value", [("SEQ_LENGTH", "many"), ("GLOBAL_BATCH_SIZE", "0"), ("SAVE_INTERVAL", "0")])
def test_settings_of_the_training_are_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is {value}: .* a whole number from 1 on"):
        compress.main([*FLAGS, "--save", str(tmp_path / "out")])


def test_several_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNODES", "4")
    with pytest.raises(ValueError, match="NNODES is 4: this goes on one machine"):
        compress.main([*FLAGS, "--save", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_flag_that_prune_llama_has_not_is_said_before_any_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compress.main([*FLAGS, "--save", str(tmp_path / "out"), "--ridge=lots"])
    assert "--ridge: 'lots' is neither a number" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a part of tiny-llama was compressed."""
    top = tmp_path_factory.mktemp("compress")
    draw = np.random.default_rng(0)
    for name in ("train", "valid"):
        write_documents(top / name, *draw.integers(0, 1000, size=(12, 200)))
    settings = {
        "LOAD_PATH": prune(TINY, top / "parent", "--num-layers-remain=3", "--format=hf"), "SAVE_PATH": top / "out",
        "TARGET": 0.6, "DATA_PATH": top / "train", "TOKENS": 512,
        "VALID_DATA_PATH": top / "valid", "SEQ_LENGTH": 64, "GLOBAL_BATCH_SIZE": 2, "MICRO_BATCH_SIZE": 2,
        "CANDIDATES": 2, "EVAL_ITERS": 1, "EVAL_INTERVAL": 2, "LR": 1e-3, "PYTHON": stands_in_for_python(top),
        "TMPDIR": top,
    }  # fmt: skip
    few = ["--sequences=4", "--sequence-length=64", "--min-scores-tokens=1"]
    done = run("bash", SCRIPT, *few, **settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return top


@pytest.mark.timeout(900)  # seconds: all steps, one after the other
@pytest.mark.slow(60)
def test_its_commands_give_the_same_bytes_alone(compressed: Path) -> None:
    top = compressed
    state = json.loads((top / "out/compress.json").read_text())
    (top / "alone").mkdir()
    (top / "alone/losses.json").write_bytes((top / "out/losses.json").read_bytes())
    # Of the shapes' own bytes, test_shapes.py.
    shutil.copytree(top / "out/round1/pruned.candidates", top / "alone/round1/pruned.candidates")
    for name in ("round 1: prune", "round 1: recover", "export"):
        command = state["done"][name]["command"].replace(str(top / "out"), str(top / "alone"))
        # Pruned once more, as where the run was ended before it wrote down that the step was done.
        for _ in range(2 if name == "round 1: prune" else 1):
            done = run("bash", "-c", command)  # whatever settings it needs stand in it
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for part in ("round1/pruned", "hf"):
        found, wanted = digests(top / "alone" / part), digests(top / "out" / part)
        assert found == wanted and len(found) > 2


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_page_has_everything_and_needs_nothing(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compressed)
    report.main(["out"])  # as its name is from here
    page, text = ((compressed / "out" / name).read_text() for name in ("report.html", "report.md"))
    for said in ("Models", "round1/recovered", "What was cut", "2 shapes were measured", "Recovery", "Samples",
                 "The most important", "scripts/prune_llama.sh", "megatron-core", "Seed of the choice"):  # fmt: skip
        assert said in page and (said in text or said.replace("_", r"\_") in text)
    assert page.count("data:image/png;base64,") == text.count("](report/") == 4
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\(', page)
    headings = re.findall(r"<h(\d)>(.*?)</h", page)
    levels = [int(level) for level, _ in headings]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    parts = [heading for level, heading in headings if level == "2"]
    assert parts == ["Models", "Samples", "Recovery", "What was cut", "How it was made"]
    assert page.index("held-out loss") < page.index("Models</h2>") and '<th scope="col">rank</th>' in page
    losses = json.loads((compressed / "out/losses.json").read_text())
    assert all(f"{one['loss']:.4f}" in page and f"{one['loss']:.4f}" in text for one in losses)
    pictures = re.findall(r"\]\((report/\d+\.png)\)", text)
    assert all((compressed / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


@pytest.mark.parametrize("seconds,said", [(0.4, "0 s"), (59.6, "1 min 0 s"), (952.8, "15 min 53 s"),
                                          (3_600_060, "1,000 h 1 min")])  # fmt: skip
def test_a_time_is_said_in_its_two_largest_units(seconds: float, said: str) -> None:
    assert report.said_time(seconds) == said


def test_what_may_be_wider_than_a_window_is_scrolled_by_keys_and_has_a_name() -> None:
    wide = [Block(heading="Shapes"), Block(rows=[["a"], ["1"]]), Block(picture=b"x", shows="a loss")]
    page = report.render("report.html", "title", wide)
    boxes = re.findall(r'<div class="scroll" tabindex="0" role="region" aria-label="(.*?)">\s*<(table|img)', page)
    assert boxes == [("Table: Shapes", "table"), ("Picture: Shapes", "img")] and 'alt="a loss"' in page
    assert page.count("<table") == page.count("<img") == 1


def test_what_a_model_writes_stays_text() -> None:
    hostile = "<script>alert(1)</script>\n```\n# not a heading\n|a|b| [x](http://y)"
    blocks: Sequence[Block] = [
        Block(text=hostile), Block(rows=[["", hostile], [hostile, "1"]]), Block(code=hostile),
        Block(columns=[(hostile, hostile)]), Block(heading=hostile), Block(figures=[(hostile, hostile, hostile)]),
    ]  # fmt: skip
    page = report.render("report.html", hostile, blocks)
    assert "<script>" not in page and page.count("&lt;script&gt;") == 13
    text = report.render("report.md", hostile, blocks)
    outside = re.sub(r"^(````+)text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    obeyed = re.sub(r"\\.", "", outside)
    assert text.count("````text") == 2 and "script>" not in obeyed
    assert "\n# not" not in obeyed and "](http" not in obeyed and "```" not in obeyed
