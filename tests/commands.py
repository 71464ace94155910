"""How tests start programs: with this Python and this project, and in a light module, for programs import it, too."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONVERT, PRUNE = str(ROOT / "tools/checkpoint_conversion/convert.py"), str(ROOT / "prune_llama.py")


def python_path(first: Path) -> str:
    """Return what PYTHONPATH is to be, so that packages are looked for in a folder first."""
    return os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])])


def replace(owner: Any, name: str, value: Any) -> None:
    """Give what a module or a class has under a name another value, for the rest of this process."""
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, value)


def environment(**settings: object) -> dict[str, str]:
    """Return the environment of a program: this Python and this project, and one thread, for processes share cores."""
    ours = {
        "PYTHON": sys.executable,
        "PYTHONPATH": python_path(ROOT),
        "OMP_NUM_THREADS": 1,
        "CUDA_DEVICE_MAX_CONNECTIONS": 1,
    }
    return os.environ | {name: str(value) for name, value in (ours | settings).items()}


def torchrun(ranks: int) -> list[str]:
    """Return the words that start a program's ranks on this machine, as a user does it."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def run(*command: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with environment settings, and return its status and what it said."""
    return subprocess.run(command, env=environment(**settings), text=True, capture_output=True)


def check_model(folder: Path, gpus: int = 0, *flags: str, **settings: object) -> tuple[list[str], list[str]]:
    """Run check_model.sh so; return what would start the training, and all its flags."""
    return started_by("check_model.sh", "pretrain_gpt.py", folder, gpus, *flags, **settings, VERBOSE=1)


def started_by(
    name: str, program: str, folder: Path, gpus: int, *flags: str, **settings: object
) -> tuple[list[str], list[str]]:
    """Run a script as on a machine with so many GPUs; return what would start the program, and all its flags.

    Raises ValueError with what the script says where it ends before that.
    """
    python, script = folder / "python", str(ROOT / program)
    start = f'*{program}*) printf "%s\\n" "$@" >"{folder}/launched";; *count_gpus*) echo {gpus};;'
    python.write_text(f'#!/bin/sh\ncase "$*" in {start} *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    path = os.environ["PATH"]
    if gpus:
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin/nvidia-smi").symlink_to("/bin/true")
        path = f"{folder / 'bin'}:{path}"
    done = run("bash", str(ROOT / "scripts" / name), *flags, **settings, PYTHON=python, PATH=path)
    if done.returncode:
        raise ValueError(done.stderr)
    words = (folder / "launched").read_text().splitlines()
    return words[: words.index(script)], words[words.index(script) + 1 :]
