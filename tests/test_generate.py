"""Checkpoints write: the likeliest, drawn, as a chat, and beside each other."""

import shutil
from pathlib import Path

import generate
import pytest
from commands import ROOT
from helpers import convert
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = ROOT / "assets/tiny-llama"
TEMPLATE = (
    "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}def {% endif %}"
)


def written(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a run prints."""
    generate.main([*words, "--max-new-tokens=12", "--device=cpu"])
    return capsys.readouterr().out


@pytest.mark.slow
def test_models_are_compared_by_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = convert(TINY, tmp_path / "shards", tensor=2)
    (tmp_path / "prompts.txt").write_text("import \n\ndef main(\n")
    words = [
        "--load",
        str(TINY),
        "--load",
        str(shards),
        "--prompt",
        "class ",
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    found = written(capsys, *words)
    assert [line for line in found.splitlines() if line.startswith("---")] == [
        "--- 'class '", "--- 'import '", "--- 'def main('",
    ]  # fmt: skip
    for part in found.split("--- ")[1:]:
        _, one, other = part.split(f"[{TINY}]\n")[0], *part.split(f"[{TINY}]\n")[1].split(f"[{shards}]\n")
        assert one == other, "the same model in two formats"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    tokens = tokenizer("class ", return_tensors="pt").input_ids
    likeliest = model.generate(tokens, max_new_tokens=12, do_sample=False, repetition_penalty=generate.PENALTY)[0]
    assert found.startswith(f"--- 'class '\n[{TINY}]\n{tokenizer.decode(likeliest, skip_special_tokens=True)}\n")


@pytest.mark.slow
def test_draws_follow_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load", str(TINY), "--prompt", "import ", "--temperature", "1.5", "--seed"]
    one, again, other = (written(capsys, *words, seed) for seed in ("1", "1", "2"))
    assert one == again != other


@pytest.mark.slow
def test_a_chat_goes_through_the_models_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TINY, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    asked = written(capsys, "--load", str(tmp_path / "chat"), "--prompt", "sum two", "--chat")
    plain = written(capsys, "--load", str(TINY), "--prompt", "# user: sum two\ndef ")
    given = AutoTokenizer.from_pretrained(TINY)("# user: sum two\ndef ").input_ids
    text = AutoTokenizer.from_pretrained(TINY).decode(given, skip_special_tokens=True)
    assert asked.removeprefix("--- 'sum two'\n").strip() and plain.strip().endswith(asked.split("\n", 1)[1].strip())
    assert text not in asked, "an answer is printed without the question"


def test_mistakes_end_in_one_sentence(tmp_path: Path) -> None:
    for words, said in (
        ([], "nothing to continue: give --prompt TEXT, or --prompts FILE"),
        (["--prompts", str(tmp_path / "none")], "none: no such file"),
        (["--prompt", "x", "--chat"], "has no chat template: leave it out"),
    ):
        with pytest.raises(ValueError, match=said):
            generate.main(["--load", str(TINY), "--device=cpu", *words])
