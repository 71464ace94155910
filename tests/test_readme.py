"""The two READMEs say the same, and every command in them works, in their order, in a fresh directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Run by continuous integration itself: one calls this test, the other takes minutes.
RUN_ELSEWHERE = {"bash scripts/quickstart.sh", "bash scripts/test.sh"}


def commands(readme: str) -> list[str]:
    """Return the bash blocks of a README."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block.strip() for block in blocks]


def test_both_readmes_give_the_same_commands_flags_tables_and_figures() -> None:
    chinese, english = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_EN.md"))
    assert commands("README.md") == commands("README_EN.md")
    for pattern in (r"`[^`\n]+`", r"!\[.*\]\((.*)\)", r"^#+ ", r"\b\d+\.\d{2,}\b"):
        found = [sorted(re.findall(pattern, text, re.MULTILINE)) for text in (chinese, english)]
        assert found[0] == found[1], pattern


def test_figures_of_the_readme_exist() -> None:
    for figure in re.findall(r"!\[.*\]\((.*)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / figure).is_file()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a fresh clone, with the python that runs this test as its environment."""
    top = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "runs"):
            (top / path.name).symlink_to(path)
    (top / ".venv/bin").mkdir(parents=True)
    (top / ".venv/bin/activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    return top


def test_every_command_of_the_readme_runs(fresh: Path) -> None:
    script = "set -euo pipefail\n" + "\n".join(c for c in commands("README_EN.md") if c not in RUN_ELSEWHERE)
    small = {"TRAIN_ITERS": "15", "EVAL_ITERS": "1", "EVAL_INTERVAL": "15", "SAVE_INTERVAL": "15"}
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **small}
    done = subprocess.run(["bash", "-xc", script], cwd=fresh, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    runs = fresh / "runs"
    for made in ("parent", "pruned", "pruned-7", "narrow", "recovered", "recovered-tp1", "recovered-hf", "loss.png"):
        assert (runs / made).exists(), made
