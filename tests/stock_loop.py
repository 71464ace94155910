"""The stock training loop for tests: runs of pretrain_gpt.py whose ranks one process forks (stock_worker.py)."""

import atexit
import functools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import ROOT, environment, python_path


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
def worker(te: bool) -> subprocess.Popen[str]:
    """Return the process that has imported pretrain_gpt.py, one for all of the tests; it ends when they do.

    With `te` it has imported the stand-in for TransformerEngine, too.
    """
    path = python_path(ROOT / "tests/te_stand_in") if te else python_path(ROOT)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/stock_worker.py")],
        env=environment(LOCAL_WORLD_SIZE=4, PYTHONPATH=path),  # how many devices the stand-in says there are
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(process.communicate)
    return process


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
        process = worker(self.te)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([{**case, "folder": str(self.folder)} for case in cases]) + "\n")
        process.stdin.flush()
        answers = [process.stdout.readline().split() for _ in cases]
        assert all(answers), "the process that runs the cases has ended; what it said stands above"
        return {name: Run(int(status), (self.folder / f"{name}.log").read_text()) for name, status in answers}
