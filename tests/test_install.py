"""The wheel holds everything that the installed commands need."""

import os
import subprocess
import sys
from pathlib import Path

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


def run(installed: Path, command: str, *words: object) -> str:
    """Run an installed command far from the repository, and return what it prints."""
    script = installed / "bin" / command
    environment = {**os.environ, "PYTHONPATH": python_path(installed)}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)], cwd=installed.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
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


@pytest.mark.parametrize("command", ["llama-score", "llama-evaluate", "llama-generate", "llama-preprocess"])
def test_every_installed_command_starts(installed: Path, command: str) -> None:
    assert "usage:" in run(installed, command, "--help")
