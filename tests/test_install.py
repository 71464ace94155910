"""The wheel holds everything that the installed commands need."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, python_path

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


def run(installed: Path, command: str, *words: object, alone: Path | None = None, status: int = 0) -> str:
    """Run an installed command far from the repository, and return what it prints.

    With `alone` it sees no packages but those there, beside itself.
    """
    path = python_path(installed) if alone is None else f"{installed}:{alone}"
    python = [sys.executable] if alone is None else [sys.executable, "-S"]
    done = subprocess.run(
        [*python, str(installed / "bin" / command), *map(str, words)], cwd=installed.parent, text=True,
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
    run(installed, "llama-prune", "--load", parent, "--save", tmp_path / "p", "--ffn_hidden_size_remain=288", "--lr=1")
    run(installed, "llama-convert", "--load", tmp_path / "p", "--save", tmp_path / "hf", "--format=hf")
    assert "ffn hidden size  288" in run(installed, "llama-show", tmp_path / "hf", "--verify")


def test_pruning_and_converting_need_no_torch(installed: Path, required: Path, tmp_path: Path) -> None:
    parent, out, text = ROOT / "assets/tiny-llama", tmp_path / "out", tmp_path / "text.jsonl"
    sizes = "--ffn_hidden_size_remain=288", "--hidden_size_remain=128", "--criterion=magnitude"
    run(installed, "llama-prune", "--load", parent, "--save", out, *sizes, "--format=torch", alone=required)
    for format in ("torch_dist", "hf"):
        words = ["--load", out, "--save", tmp_path / format, f"--format={format}"]
        run(installed, "llama-convert", *words, alone=required)
    assert "verified" in run(installed, "llama-show", tmp_path / "hf", "--verify", "--digest", alone=required)
    run(installed, "llama-prune", "--load", parent, "--save", tmp_path / "p", *sizes, "--plan-only", alone=required)
    for command in ("llama-score", "llama-evaluate"):
        words = ["--load", parent, "--data", text, *(["--save", tmp_path / "s"] if command == "llama-score" else [])]
        said = run(installed, command, *words, alone=required, status=1)
        assert said.startswith("error: this needs torch, which is not installed") and said.count("\n") == 1


@pytest.mark.parametrize("command", ["llama-score", "llama-evaluate", "llama-generate", "llama-preprocess"])
def test_every_installed_command_starts(installed: Path, command: str) -> None:
    assert "usage:" in run(installed, command, "--help")
