"""What guards a case of the fuzzers: limits of time and memory, a watch on what it does, and a process of its own."""

import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron.pruning.cli import entry

SECONDS = 20  # a case takes 0.05, one of the training's loader 1
MEGABYTES = 300  # that a case may add; its files have 100 kB


class HangError(BaseException):
    """A case took too long."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise HangError in what takes longer."""

    def ring(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def megabytes(field: str, process: int | str = "self") -> float:
    """Return a size from /proc/PROCESS/status; 0 for a process that has none any more."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


# What no case does, nor what it reads has it do -----------------------------------------------------------------------

_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "pickle.find_class")
_TEMPORARY = tempfile.gettempdir()
_watch: dict[str, Any] = {"inside": None, "seen": [], "hooked": False, "allowed": ()}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    inside = _watch["inside"]
    if inside is None or event.startswith(_watch["allowed"]):
        return
    if event.startswith(_FORBIDDEN):
        _watch["seen"].append(event)
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if isinstance(arguments[0], str) and not arguments[0].startswith((str(inside), _TEMPORARY, "/dev/null")):
            _watch["seen"].append(f"write to {arguments[0]}")


@contextmanager
def watched(inside: Path, allowed: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Give a list, in which every program that is started and every write outside of `inside` is noted.

    `allowed` are beginnings of the names of events that are not noted.
    """
    if not _watch["hooked"]:
        sys.addaudithook(_audit)
    _watch.update(inside=inside, seen=[], hooked=True, allowed=allowed or ("none",))
    try:
        yield _watch["seen"]
    finally:
        _watch["inside"] = None


# A process of its own -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (None: it was killed for what `wrong` says), its output and its complaint."""

    status: int | None
    out: str
    said: str
    wrong: str

    @property
    def last(self) -> str:
        """Return the last line of its complaint."""
        return (self.said.replace("\r", "\n").splitlines() or [""])[-1]

    def require(self, case: str) -> bool:
        """Return whether it did its work; raises AssertionError unless it did, or said in one sentence why not."""
        assert not self.wrong, f"{case}: {self.wrong}"
        lines = self.said.replace("\r", "\n").splitlines()
        assert "Traceback" not in self.said, f"{case}: {self.last[:300]}"
        assert self.status in (0, 1), f"{case}: status {self.status}: {self.last[:300]}"
        errors = [line for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
        assert len(errors) == self.status, f"{case}: status {self.status} and {len(errors)} errors: {self.last[:300]}"
        assert all(len(line.split("error: ", 1)[1].strip()) > 5 for line in errors), f"{case}: an empty sentence"
        # torch says so of a size that it believed.
        assert "allocate memory" not in self.said, f"{case}: {self.last[:300]}"
        return self.status == 0


class Child:
    """A command in a fork of this process, as a user starts it: with an exit status, output, and limits."""

    def __init__(
        self,
        top: Path,
        name: str,
        main: Callable[[Sequence[str]], object],
        argv: Sequence[str],
        allowed: tuple[str, ...] = (),
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.logs = [top / f"{name}.{what}" for what in ("out", "said", "seen")]
        self.deadline = time.monotonic() + SECONDS
        self.most = megabytes("RssAnon") + MEGABYTES
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            self._be_child(top, main, argv, allowed, before)

    def wait(self) -> Ended:
        """Wait for its end, and end it when it passes a limit."""
        wrong = ""
        while not (found := os.waitpid(self.process, os.WNOHANG))[0]:
            if time.monotonic() > self.deadline:
                wrong = f"hangs: no end within {SECONDS} seconds"
            elif megabytes("RssAnon", self.process) > self.most:
                wrong = f"takes more than {MEGABYTES} MB"
            if wrong:
                os.killpg(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                break
            time.sleep(0.004)
        out, said, seen = (log.read_text(errors="replace") if log.exists() else "" for log in self.logs)
        for log in self.logs:
            log.unlink(missing_ok=True)
        return Ended(None if wrong else os.waitstatus_to_exitcode(found[1]), out, said, wrong or seen)

    def _be_child(
        self,
        top: Path,
        main: Callable[[Sequence[str]], object],
        argv: Sequence[str],
        allowed: tuple[str, ...],
        before: Callable[[], None],
    ) -> NoReturn:
        status: Any = 99
        seen: list[str] = []
        try:
            os.setsid()
            os.chdir(top)
            for descriptor, log in zip((1, 2), self.logs, strict=False):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
            sys.stdout = open(1, "w", buffering=1)  # what a test may have put there ends here
            sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")
            sys.argv = ["command", *argv]
            before()
            with watched(top, allowed) as seen:
                entry.run(main)  # type: ignore[arg-type]  # what it returns is nobody's
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        except BaseException:
            traceback.print_exc()
        if seen:
            os.write(os.open(self.logs[2], os.O_WRONLY | os.O_CREAT), "; ".join(seen[:9]).encode())
        sys.stdout.flush()
        os._exit(status)
