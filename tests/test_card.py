"""A pruned model's export has a model card, which the hub reads, and which nothing that came from outside can bend."""

import json
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import CONVERT, run
from helpers import convert, digests, prune, write_repeated
from huggingface_hub import ModelCard
from stock_loop import StockLoop

from megatron.pruning.cli.flags import facts
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.formats.card import model_card, read_evaluation
from megatron.pruning.model.lineage import LINEAGE_FILE, Cut, Lineage, Shape, read_lineage
from tools import show_checkpoint

COMMIT = "c0ffee" + "0" * 34
CARD = """---
license: llama2
license_name: "a-licence" # as they say
license_link: LICENSE
extra: &x
  license: no
---
# Parent
license: mit
"""
FIRST = ["--ffn-hidden-size-remain=40", "--drop-layers=1"]
SECOND = ["--hidden-size-remain=24", "--num-layers-remain=2", "--criterion=magnitude", "--seed=7"]


@pytest.fixture
def parent(gqa: Path, tmp_path: Path) -> Path:
    """A model as the hub's cache has it, with a card and a licence."""
    path = tmp_path / "models--an-owner--A_model" / "snapshots" / COMMIT
    shutil.copytree(gqa, path)
    (path / "README.md").write_text(CARD)
    (path / "LICENSE").write_text("what may be done")
    return path


def card_of(path: Path) -> ModelCard:
    return ModelCard((path / "README.md").read_text(encoding="utf-8"))


def rows(card: ModelCard) -> dict[str, list[str]]:
    """The cells of all tables of a card by the first cell of each row."""
    found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*", card.text, re.MULTILINE)]
    return {first: cells for first, *cells in found}


def test_the_parents_name_and_licence_reach_the_export_of_what_was_pruned(parent: Path, tmp_path: Path) -> None:
    shards = convert(parent, tmp_path / "shards", tensor=2)
    assert not (convert(shards, tmp_path / "back", "hf") / "README.md").exists(), "it was not pruned"
    once = prune(shards, tmp_path / "once", *FIRST, "--format=torch_dist")
    card = card_of(convert(convert(once, tmp_path / "tp2", tensor=2), tmp_path / "hf", format="hf"))
    said = card.data.to_dict()
    assert said == {
        "base_model": "an-owner/A_model",
        "base_model_relation": "finetune",
        "license": "llama2",
        "license_name": "a-licence",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "pruned", "megatron-llama-pruning"],
    }
    assert (tmp_path / "hf/LICENSE").read_text() == "what may be done"
    assert f"[an-owner/A_model](https://huggingface.co/an-owner/A_model) at commit `{COMMIT}`" in card.text
    assert rows(card)["ffn hidden size"] == ["72", "40", "55.6%"] and rows(card)["layers"] == ["4", "3", "75.0%"]
    assert (
        "counted from 0: 1.\n" in card.text
        and "- channels and heads kept by `random`; layers named one by one (seed 1234).\n" in card.text
    )
    assert "It was not trained after it was cut." in card.text


def test_pruned_again_a_model_has_its_first_parent(parent: Path, tmp_path: Path) -> None:
    once = prune(parent, tmp_path / "once", *FIRST, "--format=hf")
    twice = prune(once, tmp_path / "twice", *SECOND, "--format=hf")
    card = card_of(twice)
    assert card.data.base_model == "an-owner/A_model" and card.data.license == "llama2"
    assert rows(card)["layers"] == ["4", "2", "50.0%"] and rows(card)["hidden size"] == ["40", "24", "60.0%"]
    assert card.text.count(" kept by `") == 2 and "by `magnitude`; layers dropped by `spaced` (seed 7).\n" in card.text
    kept = {0, 2, 3} - {[0, 2, 3][layer] for layer in plan_layers_dropped(twice)}
    gone = ", ".join(map(str, sorted(set(range(4)) - kept)))
    assert f"counted from 0: {gone}.\n" in card.text
    assert rows(card)["parameters"][0] == f"{open_checkpoint(parent).config.parameters:,}"


def plan_layers_dropped(path: Path) -> list[int]:
    plan = json.loads((path / "prune_plan.json").read_text())
    kept = {entry["layer"] for entry in plan["keep"]["per_layer"]}
    return sorted(set(range(plan["parent"]["layers"])) - kept)


def test_the_same_model_has_the_same_card_and_lineage(parent: Path, tmp_path: Path) -> None:
    found = [prune(parent, tmp_path / name, *FIRST, "--format=hf") for name in "ab"]
    assert digests(found[0]) == digests(found[1])
    again = convert(convert(found[0], tmp_path / "m", pipeline=3), tmp_path / "again", format="hf")
    for name in ("README.md", LINEAGE_FILE):
        assert (again / name).read_bytes() == (found[0] / name).read_bytes()


def test_what_is_not_known_is_not_invented(gqa: Path, tmp_path: Path) -> None:
    assert not (convert(gqa, tmp_path / "same", format="hf") / LINEAGE_FILE).exists()
    card = card_of(prune(gqa, tmp_path / "pruned", *FIRST, "--format=hf"))
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "cut out of a model whose name is not known with" in card.text
    assert "The licence of the parent is not known here" in card.text


@pytest.mark.slow
def test_the_card_tells_of_the_trainings_after_each_cut(parent: Path, tmp_path: Path) -> None:
    write_repeated(tmp_path / "data", np.arange(32), 200)
    once = prune(parent, tmp_path / "once", *FIRST, "--make-vocab-size-divisible-by=1")
    flags = f"--use-checkpoint-args --norm-epsilon 1e-4 --data-path {tmp_path}/data --split 100,0,0 --eval-iters 0"
    flags += " --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer --vocab-size 101 --seq-length 32"
    flags += " --micro-batch-size 2 --global-batch-size 4 --train-iters 3 --ckpt-format torch"
    loop = StockLoop(tmp_path)
    trained = tmp_path / "trained"
    loop.run("one", f"{flags} --pretrained-checkpoint {once} --save {trained} --lr 2e-3 --teacher-load {parent}").ok()
    again = tmp_path / "again"
    loop.run("two", f"{flags} --pretrained-checkpoint {trained} --save {again} --lr 1e-3").ok()
    twice = prune(convert(again, tmp_path / "tp2", tensor=2), tmp_path / "twice", *SECOND, "--format=hf")
    first = (
        "- 3 iterations of 4 sequences of 32 tokens, 384 tokens in all, learning rate 0.002, distilled, with 100% of"
    )
    card = card_of(twice)
    assert first in card.text and "tokens in all, learning rate 0.001, in Megatron." in card.text
    assert card.text.count("iterations of") == 2 and card.data.base_model == "an-owner/A_model"


@pytest.mark.slow
def test_a_training_that_starts_from_hugging_faces_format_carries_the_lineage(parent: Path, tmp_path: Path) -> None:
    from megatron.pruning.training.direct_start import start_files  # takes seconds

    pruned = prune(parent, tmp_path / "pruned", *FIRST, "--format=hf")
    assert start_files(open_checkpoint(pruned))["huggingface/lineage.json"] == (pruned / LINEAGE_FILE).read_bytes()


def test_a_parents_own_training_is_no_recovery() -> None:
    args = Namespace(consumed_train_samples=8, seq_length=4, global_batch_size=2, lr=1.0)
    assert Lineage().trained(args, 4) == Lineage()


def test_arguments_that_no_training_has_are_left_out() -> None:
    before = Shape({**dict.fromkeys(("layers", "hidden", "ffn", "heads", "groups", "head_dim", "vocab"), 1)}, 9)
    cut = Cut(dropped_layers=[], criterion="random", layer_criterion=None, seed=1)
    lineage = Lineage().cut(cut, before)
    strange = Namespace(consumed_train_samples=-1, seq_length="<b>", global_batch_size=[], lr=float("nan"), kd_load=1)
    (_, found) = lineage.trained(strange, 5).steps
    assert [getattr(found, name) for name in found.__struct_fields__] == [5, None, None, None, None, None]


# Evaluation ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(parent: Path, tmp_path: Path) -> Path:
    return prune(parent, tmp_path / "pruned", *FIRST)


def evaluation(tmp_path: Path, *runs: Any) -> Path:
    file = tmp_path / "losses.json"
    file.write_text(json.dumps(runs))
    return file


def test_an_evaluation_stands_in_the_card(pruned: Path, parent: Path, tmp_path: Path) -> None:
    parameters = open_checkpoint(pruned).config.parameters
    file = evaluation(
        tmp_path,
        {"path": str(parent), "parameters": 1000, "loss": 2.5, "perplexity": 12.18},
        {"path": "/home/me/pruned", "parameters": parameters, "loss": 3.25, "arc_easy acc": 0.25},
        *({"path": f"/home/me/small/round{i}/recovered", "parameters": 1000, "loss": i + 0.5} for i in (1, 2)),
    )
    words = ["--load", str(pruned), "--save", str(tmp_path / "hf"), "--format=hf", "--evaluation", str(file)]
    done = run(sys.executable, CONVERT, *words)
    assert done.returncode == 0, done.stderr
    found = rows(card_of(tmp_path / "hf"))
    assert found["`an-owner/A_model`"] == ["1,000", "2.5", "12.18", ""]
    assert found["`pruned`"] == [f"{parameters:,}", "3.25", "", "0.25"]
    assert [found[f"`round{i}/recovered`"][1] for i in (1, 2)] == ["1.5", "2.5"]
    assert "/home/me" not in (tmp_path / "hf/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags,content,told",
    [
        (["--format=torch"], "[]", "--format torch has no model card; leave it out"),
        (["--format=hf"], None, "no such file; tools/evaluate.py --json .* writes it"),
        (["--format=hf"], "[]", "is of no model of 40,040 parameters, which this one has"),
        (["--format=hf"], "{}", "is not what tools/evaluate.py --json writes: Expected `array`"),
    ],
)
def test_a_mistake_with_an_evaluation_is_a_sentence(
    pruned: Path, tmp_path: Path, flags: list[str], content: str | None, told: str
) -> None:
    file = tmp_path / "losses.json"
    if content is not None:
        file.write_text(content)
    done = run(
        sys.executable,
        CONVERT,
        "--load",
        str(pruned),
        "--save",
        str(tmp_path / "out"),
        "--evaluation",
        str(file),
        *flags,
    )
    assert done.returncode == 1 and re.fullmatch(rf"error: --evaluation .*(?:{told}).*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_for_what_was_pruned(gqa: Path, tmp_path: Path) -> None:
    file = evaluation(tmp_path, {"path": "a", "parameters": open_checkpoint(gqa).config.parameters})
    done = run(sys.executable, CONVERT, "--load", str(gqa), "--save", str(tmp_path / "out"), "--format=hf",
               "--evaluation", str(file))  # fmt: skip
    assert done.returncode == 1 and "was not pruned here and gets no model card" in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[1]",
        b'[{"parameters": 5}]',
        b'[{"path": "a", "parameters": "5 | evil", "loss": 1}]',
        b'[{"path": "a", "parameters": 5, "loss": "<script>"}]',
        b'[{"path": "a", "parameters": 5, "loss": true}]',
        b'[{"path": "a", "parameters": 5, "loss": NaN}]',
        b'[{"path": "a", "parameters": ' + b"9" * 6000 + b"}]",
        b"[" * 5000,
    ],
)
def test_another_file_is_no_evaluation(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^--evaluation .* is not what tools/evaluate.py --json writes|of no model"):
        read_evaluation(file, 5)


# Nothing from outside bends it ---------------------------------------------------------------------------------------

EVIL = "x`|\n---\nlicense: mit\n# <script>alert(1)</script> [a](http://evil) ![b](http://evil/c.png)\u202e\x1b[31m"


def test_names_in_an_evaluation_stay_in_their_cells(pruned: Path, tmp_path: Path) -> None:
    parameters = open_checkpoint(pruned).config.parameters
    found = read_evaluation(evaluation(tmp_path, {"path": EVIL, "parameters": parameters, EVIL: 1.0}), parameters)
    plain, bent = (model_card(open_checkpoint(pruned), found).decode() for found in (None, found))
    assert ModelCard(bent).data.to_dict() == ModelCard(plain).data.to_dict()
    assert len(bent.splitlines()) == len(plain.splitlines()) + 8, "a heading, a sentence, a table of three lines"
    new = set(bent.splitlines()) - set(plain.splitlines())
    assert not [line for line in new if re.search(r"[<>\[\]()!\x1b\u202e]", line)]
    assert all(line.count("`") in (0, 2) for line in new), new


@pytest.mark.parametrize(
    "card",
    [
        "license: [mit]",
        "license: mit\nlicense: llama2",
        "license: 'mit\n  evil: x'",
        'license: "mit\\nevil: x"',
        "license: !!python/object/apply:os.system [touch x]",
        "license: *alias",
        "license: " + "a" * 100,
        "license: a\x00b",
        "license_link: javascript:alert(1)",
        "license_link: https://evil/)<b>",
        "license_link: ../../etc/passwd",
        "license_name: <b>",
        "  license: mit",
    ],
)
def test_a_licence_that_is_no_word_or_link_is_left_out(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    assert read_lineage(tmp_path) == Lineage()


def test_a_card_without_an_end_of_its_front_matter_says_nothing(tmp_path: Path) -> None:
    for text in ("---\nlicense: mit\n", "license: mit\n---\n", "\n---\nlicense: mit\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert read_lineage(tmp_path) == Lineage()


GOOD = {
    "version": 1,
    "origin": {"name": "a/b", "license": "mit"},
    "parent": {"sizes": {"layers": 4, "hidden": 40, "ffn": 72, "heads": 8, "groups": 4, "head_dim": 6, "vocab": 101},
               "parameters": 50000},
    "steps": [{"step": "cut", "dropped_layers": [1], "criterion": "random", "layer_criterion": None, "seed": 1}],
}  # fmt: skip


@pytest.mark.parametrize(
    "place,value",
    [
        (("version",), 2),
        (("origin", "name"), 'a/b"\nevil: x'),
        (("origin", "name"), "a/b\n"),
        (("origin", "name"), "../../x/y"),
        (("origin", "license"), EVIL),
        (("origin", "commit"), "main"),
        (("origin", "evil"), "x"),
        (("parent", "sizes"), {"layers": 4}),
        (("parent", "sizes", "layers"), 10**9),
        (("parent", "parameters"), -1),
        (("parent",), None),
        (("steps", 0, "criterion"), EVIL),
        (("steps", 0, "layer_criterion"), "`"),
        (("steps", 0, "seed"), "1"),
        (("steps", 0, "step"), "training"),
        (("steps", 0, "dropped_layers"), [1] * 20_000),
    ],
)
def test_a_lineage_that_is_none_is_refused_with_its_place(gqa: Path, tmp_path: Path, place: Any, value: Any) -> None:
    source, content = tmp_path / "hf", json.loads(json.dumps(GOOD))
    shutil.copytree(gqa, source)
    (source / LINEAGE_FILE).write_text(json.dumps(content))
    assert "README.md" in digests(convert(source, tmp_path / "good", format="hf"))
    *path, last = place
    inner = content
    for name in path:
        inner = inner[name]
    inner[last] = value
    (source / LINEAGE_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lineage.json is no lineage of a model; remove it to go on without: "):
        convert(source, tmp_path / "bad", format="hf")


def test_a_link_out_of_the_checkpoint_is_not_followed(gqa: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(gqa, source)
    (tmp_path / "elsewhere").write_text(json.dumps(GOOD))
    (source / LINEAGE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside of its checkpoint"):
        convert(source, tmp_path / "out")


def test_show_says_where_a_model_comes_from(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (parent, prune(convert(parent, tmp_path / "m"), tmp_path / "p", *FIRST)):
        show_checkpoint.main([str(path)])
        line = f"first parent     an-owner/A_model, commit {COMMIT[:12]}, a-licence"
        assert line in capsys.readouterr().out.splitlines()
        assert facts(open_checkpoint(path))["origin"]["commit"] == COMMIT
