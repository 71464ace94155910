"""The wheel holds everything that the installed commands need."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, python_path

from tools.llama_pruning import TOOLS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but what the wheel of this project has."""
    top = tmp_path_factory.mktemp("wheel")
    source = top / "source"
    source.mkdir()
    for name in ("megatron", "tools", "prune_llama.py", "pyproject.toml", "setup.py", "README_EN.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(top), str(source)]
    subprocess.run(build, check=True, cwd=top)
    (wheel,) = top.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(top / "site"), str(wheel)], check=True, cwd=top)
    return top / "site"


@pytest.fixture(scope="module")
def required(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the packages that the wheel requires without extras, and no others."""
    folder = tmp_path_factory.mktemp("required")
    site = Path(np.__file__).parents[1]
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name = line.partition(">")[0]
        for path in site.glob(f"{name}*"):
            if path.name in (name, f"{name}.libs"):
                (folder / path.name).symlink_to(path)
    return folder


def run(installed: Path, *words: object, alone: Path | None = None, status: int = 0) -> str:
    """Run the installed command far from the repository, and return what it prints.

    With `alone` it sees no packages but those there, beside itself.
    """
    path = python_path(installed) if alone is None else f"{installed}:{alone}"
    python = [sys.executable] if alone is None else [sys.executable, "-S"]
    done = subprocess.run(
        [*python, str(installed / "bin/llama-pruning"), *map(str, words)], cwd=installed.parent, text=True,
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def test_an_installed_wheel_prunes_converts_and_shows(installed: Path, tmp_path: Path) -> None:
    where = "import megatron.pruning, prune_llama; print(megatron.pruning.__file__, prune_llama.__file__)"
    environment = {**os.environ, "PYTHONPATH": python_path(installed)}
    found = subprocess.check_output([sys.executable, "-c", where], cwd=tmp_path, env=environment, text=True).split()
    assert all(Path(file).is_relative_to(installed) for file in found), found
    parent = ROOT / "assets/tiny-llama"
    run(installed, "prune", "--load", parent, "--save", tmp_path / "p", "--ffn_hidden_size_remain=288", "--lr=1")
    run(installed, "convert", "--load", tmp_path / "p", "--save", tmp_path / "hf", "--format=hf")
    assert "ffn hidden size  288" in run(installed, "show", tmp_path / "hf", "--verify")


def test_pruning_and_converting_need_no_torch(installed: Path, required: Path, tmp_path: Path) -> None:
    parent, out, text = ROOT / "assets/tiny-llama", tmp_path / "out", tmp_path / "text.jsonl"
    sizes = "--ffn_hidden_size_remain=288", "--hidden_size_remain=128", "--criterion=magnitude"
    run(installed, "prune", "--load", parent, "--save", out, *sizes, "--format=torch", alone=required)
    for format in ("torch_dist", "hf"):
        words = ["--load", out, "--save", tmp_path / format, f"--format={format}"]
        run(installed, "convert", *words, alone=required)
    assert "verified" in run(installed, "show", tmp_path / "hf", "--verify", "--digest", alone=required)
    assert "\nlibrary_name: transformers\n" in (tmp_path / "hf/README.md").read_text()
    run(installed, "prune", "--load", parent, "--save", tmp_path / "p", *sizes, "--plan-only", alone=required)
    for command in ("score", "evaluate"):
        words = ["--load", parent, "--data", text, *(["--save", tmp_path / "s"] if command == "score" else [])]
        said = run(installed, command, *words, alone=required, status=1)
        assert said.startswith("error: this needs torch, which is not installed") and said.count("\n") == 1


def test_help_names_every_tool_in_its_own_sentence(installed: Path) -> None:
    said = " ".join(run(installed, "--help").split())
    for name, module in TOOLS.items():
        sentence, _, _ = (importlib.import_module(module).__doc__ or "").partition("\n")
        assert f" {name} {sentence}" in said


@pytest.mark.parametrize("command", ["", *TOOLS])
def test_every_command_helps_without_what_it_needs_and_as_it_is_typed(
    installed: Path, required: Path, command: str
) -> None:
    said = run(installed, *command.split(), "--help", alone=required)  # torch and its like, which take seconds
    assert f"usage: llama-pruning {command}" in said
    assert not re.search(r"python tools/|python prune_llama", said)


def test_a_mistake_of_the_command_is_told_with_what_there_is(installed: Path) -> None:
    assert "invalid choice: 'cut' (choose from 'prune', 'reconstruct'" in run(installed, "cut", status=2)
    assert "llama-pruning show: error: the following arguments are required: PATH" in run(installed, "show", status=2)


def test_bash_completes_commands_flags_values_and_files(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "script").write_text(run(installed, "completion", "bash"))
    ask = 'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_llama_pruning; echo "${COMPREPLY[@]}"'

    def completed(*typed: str) -> list[str]:
        words = ["bash", "-c", ask, "bash", "llama-pruning", *typed]
        return subprocess.check_output(words, cwd=tmp_path, text=True).split()

    assert completed("pr") == ["prune", "preprocess"]
    assert completed("prune", "--num-l") == ["--num-layers-remain"]
    assert completed("convert", "--format", "torch") == ["torch", "torch_dist"]
    assert completed("show", "check") == completed("prune", "--load", "check") == ["checkpoint"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_flag_that_help_lists(installed: Path, shell: str) -> None:
    script = run(installed, "completion", shell)
    flags = set(re.findall(r"--([a-z][a-z-]+)", run(installed, "evaluate", "--help").partition("options:")[2]))
    assert {flag for flag in flags if flag not in script} == set()


def test_completion_without_what_makes_it_says_what_to_install(installed: Path, required: Path) -> None:
    said = run(installed, "completion", "bash", alone=required, status=1)
    assert said == "error: what completes commands is made by shtab, which is not installed: pip install shtab\n"
