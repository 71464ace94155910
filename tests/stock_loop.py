"""The stock training loop for tests: runs of pretrain_gpt.py whose ranks one process forks (stock_worker.py)."""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from commands import ROOT, environment, python_path


@dataclass
class Run:
    """What a training run left: its exit status and its log."""

    code: int
    log: str

    def values(self, name: str) -> dict[int, float]:
        """Return a loss by step. The stock log's first line after a start is counted again in its second."""
        return {int(step): float(loss) for step, loss in re.findall(rf"iteration +(\d+)/.*{name}: (\S+)", self.log)}

    def ok(self) -> "Run":
        """Return the run itself; fail with the end of its log unless it succeeded."""
        assert self.code == 0, self.log[-3000:]
        return self

    @property
    def losses(self) -> dict[int, float]:
        """Return the language-model loss by step."""
        return self.values("lm loss")

    @property
    def error(self) -> str:
        """Return the sentence that ended the run."""
        lines = [line for line in self.log.splitlines() if re.match(r"(\[rank \d+\] )?error: ", line)]
        assert len(lines) == 1, self.log[-2000:]
        return lines[0]


@functools.cache
def worker(te: bool) -> TextIO:
    """Return a line to the process that has imported pretrain_gpt.py, one for all processes of a test run.

    Whoever needs it first starts it, and it ends with the last of them. With `te` it has imported the stand-in for
    TransformerEngine, too.
    """
    session = os.environ.setdefault("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()}")  # and processes that this one starts
    address = f"\0stock loop {session} {te}"  # no file, but a name that the system forgets with the socket
    with socket.socket(socket.AF_UNIX) as door:
        with contextlib.suppress(OSError):  # another process has the name, and starts it
            door.bind(address)
        if door.getsockname():
            door.listen()
            path = python_path(ROOT / "tests/te_stand_in") if te else python_path(ROOT)
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests/stock_worker.py"), f"{door.fileno()}"],
                env=environment(LOCAL_WORLD_SIZE=4, PYTHONPATH=path),  # how many devices the stand-in says there are
                pass_fds=[door.fileno()],
            )
    line = socket.socket(socket.AF_UNIX)
    line.connect(address)
    return line.makefile("rw")


@dataclass
class StockLoop:
    """Runs of the stock loop, or of another program, in one folder, each with a log in it; with a stand-in for TE?"""

    folder: Path
    te: bool = False

    def run(self, name: str, words: str, ranks: int = 1, **how: Any) -> Run:
        """Run pretrain_gpt.py with these flags; `how`, which may be none, is what else stock_worker.py takes."""
        return self.run_all([{"name": name, "words": words.split(), "ranks": ranks, **how}])[name]

    def run_all(self, cases: list[dict]) -> dict[str, Run]:
        """Run several cases, two at a time, and return what each left."""
        line = worker(self.te)
        line.writelines(json.dumps({**case, "folder": str(self.folder)}) + "\n" for case in cases)
        line.flush()
        answers = [line.readline().split() for _ in cases]
        assert all(answers), "the process that runs the cases has ended; what it said stands above"
        return {name: Run(int(status), (self.folder / f"{name}.log").read_text()) for name, status in answers}


def stands_in_for_python(folder: Path) -> Path:
    """Return what scripts may be given as Python: it lets the process above run the programs that import much."""
    worker(te=False)  # which lives as long as somebody has a line to it
    script = folder / "python"
    program = "*/pretrain_gpt.py | */prune_llama.py | */evaluate.py | */convert.py | */generate.py | */report.py"
    script.write_text(
        "#!/bin/sh\n"
        # It waits for processes of its own, longer than a case may take.
        f'case "$*" in *" --candidates "*) exec {sys.executable} "$@";; esac\n'
        f'case "$1" in {program}) exec {sys.executable} {__file__} "$@";; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return script


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        case = {"name": "run", "program": Path(sys.argv[1]).stem, "words": sys.argv[2:], "ranks": 1}
        done = StockLoop(Path(here)).run_all([case])["run"]
    sys.stdout.write(done.log)
    sys.exit(done.code)
