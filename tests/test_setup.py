"""scripts/setup.sh beside a Python with torch and TransformerEngine, which stands in for that of a container."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, run

# As in a container: a torch that no registry has, and packages older than ours are, newer, or not there.
SITE = {
    "torch": "2.12.0a0+145a3a7bda.nv26.06", "transformer_engine": "2.17.0", "numpy": "1.26.4",
    "pytorch_triton": "3.6.0", "nvidia-cudnn-frontend": "1.12.0", "transformers": "4.51.0", "psutil": "7.0.0",
    "pytest": "8.1.1",
}  # fmt: skip
RECORDER = """import json, os, sys
json.dump({"words": sys.argv[1:], "python": sys.executable, "constraint": os.environ["PIP_CONSTRAINT"]}, open(LOG, "w"))
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Make a clone with nothing installed, and beside it `site`, a Python that has SITE and a pip that only records."""
    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    shutil.copy(ROOT / "requirements.txt", clone)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "site")], check=True)
    (packages,) = (tmp_path / "site/lib").glob("python*/site-packages")
    for name in ("torch", "transformer_engine", "pip"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").touch()
    (packages / "pip/__main__.py").write_text(f"LOG = {str(tmp_path / 'pip.json')!r}\n{RECORDER}")
    for name, version in SITE.items():
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return clone


def setup(clone: Path, *flags: str) -> str:
    """Run setup.sh in the clone with the Python of `site`, and return what it says."""
    python, script = clone.parent / "site/bin/python", str(clone / "scripts/setup.sh")
    done = run("bash", script, *flags, PYTHON_BIN=python, PIP_CONSTRAINT="/etc/pip/constraint.txt")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_what_a_container_lacks_is_installed(clone: Path) -> None:
    assert "beside the torch and TransformerEngine" in setup(clone)
    called = json.loads((clone.parent / "pip.json").read_text())
    venv = clone / ".venv"
    assert called["python"] == str(venv / "bin/python")
    assert called["constraint"] == ""
    missing, kept = (f"{venv}/{name}.txt" for name in ("missing", "kept"))
    assert called["words"] == (
        ["install", "--quiet", "--constraint", kept, "--requirement", missing, "--editable", f"{clone}[train]"]
    )
    wanted = Path(missing).read_text().splitlines()
    ours = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    has = ("torch==", "numpy==", "psutil==", "pytest==")
    assert wanted == [line for line in ours if not line.startswith(has)]
    assert any(line.startswith("transformers==") for line in wanted), "the container's is another than was tested"
    assert Path(kept).read_text().splitlines() == [
        "numpy==1.26.4", "nvidia-cudnn-frontend==1.12.0", "pytorch-triton==3.6.0",
        "torch==2.12.0a0+145a3a7bda.nv26.06", "transformer-engine==2.17.0",
    ]  # fmt: skip


def test_the_environment_sees_the_packages_of_the_container_and_stays(clone: Path) -> None:
    setup(clone)
    program = "import torch, transformer_engine as te; print(torch.__file__, te.__file__)"
    found = subprocess.check_output([str(clone / ".venv/bin/python"), "-c", program], text=True)
    assert all(Path(file).is_relative_to(clone.parent / "site") for file in found.split())
    assert setup(clone) == "", "the second time there is nothing to do"


def test_what_is_enough_to_prune_is_kept_until_more_is_needed(clone: Path) -> None:
    setup(clone)
    stamp = clone / ".venv/.installed"
    full = stamp.read_text()
    assert setup(clone, "--light") == setup(clone, "--or-light") == "", "all of it is enough, too"
    stamp.write_text(f"light {full}")
    assert setup(clone, "--light") == setup(clone, "--or-light") == ""
    assert "setting up" in setup(clone) and stamp.read_text() == full
    done = run("bash", str(clone / "scripts/setup.sh"), "--lite")
    assert done.returncode == 2 and done.stderr == "error: --lite: the only flag is --light\n"
