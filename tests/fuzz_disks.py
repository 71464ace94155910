"""Sound files on a file system that fails, or that does less than it is asked for; and two processes that meet there.

In a fork of this process some calls of the system fail from a moment on, once or for ever, or come short. What a file
system need not have must not be missed; where it fails, what was there before stays, and nothing else.
"""

import errno
import fcntl
import io
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import convert as converter
import preprocess_data
import show_checkpoint
from fuzz_bytes import DATA, Breaker
from fuzz_checkpoints import BREAKERS, FIELD_BREAKERS, Fuzzer, make_bases
from fuzz_guards import Child
from fuzz_text import MODEL
from helpers import convert, digests
from torch.distributed import TCPStore

import prune_llama
from megatron.pruning.formats import FORMATS, open_checkpoint
from megatron.pruning.storage import output, processes

# Faults ---------------------------------------------------------------------------------------------------------------

ABSENT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE)
# Calls, how each may go wrong (a number of errno, or "short"), and whether a run must do without it.
CALLS: dict[tuple[Any, str], tuple[tuple[Any, ...], bool]] = {
    (os, "preadv"): (("short",), True),
    (os, "pwrite"): (("short",), True),
    (os, "posix_fallocate"): (ABSENT, True),
    (os, "posix_fadvise"): ((*ABSENT, errno.EIO), True),
    (fcntl, "fcntl"): (ABSENT, True),
    (fcntl, "flock"): ((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), True),
    (output, "_renameat2"): ((None,), True),  # says that there is no such call
    (io, "read"): (("short",), True),
    (io, "write"): (("short",), True),
}
FAILURES: dict[tuple[Any, str], tuple[int, ...]] = {
    (os, "preadv"): (errno.EIO, errno.ESTALE),
    (os, "pwrite"): FAILING,
    (os, "posix_fallocate"): (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    (os, "fsync"): FAILING,
    (os, "ftruncate"): FAILING,
    (os, "rename"): (errno.EIO, errno.EACCES, errno.EXDEV),
    (os, "mkdir"): (errno.ENOSPC, errno.EACCES, errno.EROFS),
    (os, "open"): (errno.EIO, errno.EACCES, errno.EMFILE),
    (io, "open"): (errno.EIO, errno.EACCES, errno.EMFILE),
    (io, "read"): (errno.EIO, errno.ESTALE),
    (io, "write"): FAILING,
}
# After these nothing may be called done: what was read or written is not what it should be.
FATAL = {(os, "preadv"), (os, "pwrite"), (os, "fsync"), (os, "ftruncate"), (io, "write"), (io, "read")}


class Fault:
    """One call that goes wrong: which, how, from which on and how often."""

    def __init__(self, random: Random, top: Path) -> None:
        self.optional = random.random() < 0.5
        table: dict[tuple[Any, str], Any] = CALLS if self.optional else FAILURES
        self.call = random.choice(sorted(table, key=str))
        self.how = random.choice(CALLS[self.call][0] if self.optional else FAILURES[self.call])
        self.first = random.choice((0, 0, 0, 1, 1, 2, 3, 5, 9, 20))
        # To open fails once: what is begun could not be cleared away without it.
        self.times = 1 if self.call[1] in ("open", "rename") else random.choice((1, 10**9))
        self.top, self.count, self.sign = top, itertools.count(), top / "fired"

    def __str__(self) -> str:
        how = errno.errorcode.get(self.how, str(self.how)) if isinstance(self.how, int) else str(self.how)
        return f"{self.call[1]} of {self.call[0].__name__} {how} from {self.first} on, {min(self.times, 2)}"

    def fires(self) -> bool:
        """Count a call, and return whether it is one that goes wrong."""
        hit = self.first <= next(self.count) < self.first + self.times
        if hit and not self.sign.exists():
            os.close(_open(self.sign, os.O_CREAT | os.O_WRONLY))
        return hit

    def put(self) -> None:
        """Let the call go wrong from now on in this process."""
        owner, name = self.call
        if owner is io:
            io.open = self._opened  # type: ignore[assignment]  # which pathlib looks up there
            return
        real = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            asked = name == "fcntl" and args[1] != fcntl.F_SETFL  # to ask for flags never fails
            return real(*args, **kwargs) if asked or not self.fires() else self._wrong(real, *args, **kwargs)

        setattr(owner, name, called)

    def _wrong(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.how is None:
            return False
        if self.how == "short":
            descriptor, data, offset = args
            whole = data[0] if isinstance(data, list) else data
            part = memoryview(whole)[: max(1, len(whole) // 2)]
            return real(descriptor, [part] if isinstance(data, list) else part, offset)
        raise self.error(args[0])

    def error(self, about: object) -> OSError:
        """Return what a call raises, about a path or a descriptor."""
        path = [str(about)] if isinstance(about, str | Path) else []
        return OSError(self.how, os.strerror(self.how), *path)

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **kwargs: Any) -> Any:
        if "b" not in mode or not str(file).startswith(str(self.top)):
            return _io_open(file, mode, buffering, *rest, **kwargs)
        if self.call[1] == "open" and self.fires():
            raise self.error(file)
        raw = _File(file, mode.replace("b", ""), self)
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        return kind(raw)


class _File(io.FileIO):
    """A file whose reads or writes go wrong."""

    def __init__(self, path: Any, mode: str, fault: Fault) -> None:
        super().__init__(path, mode)
        self.fault = fault

    def readinto(self, buffer: Any) -> int | None:
        part = memoryview(buffer).cast("B")
        return super().readinto(part[: self._less(len(part))] if self._is("read") else part)

    def readall(self) -> bytes:
        found, buffer = b"", bytearray(1 << 16)
        while count := self.readinto(buffer):
            found += buffer[:count]
        return found

    def write(self, data: Any) -> int:
        part = memoryview(data).cast("B")
        return super().write(part[: self._less(len(part))] if self._is("write") else part)

    def _is(self, name: str) -> bool:
        return self.fault.call[1] == name and self.fault.fires()

    def _less(self, size: int) -> int:
        if self.fault.how != "short":
            raise self.fault.error(0)
        return max(1, size // 2)


_open, _io_open = os.open, io.open

# One process ----------------------------------------------------------------------------------------------------------


class Disks:
    """Runs of the commands that read and write, and what each should come to."""

    def __init__(self, top: Path) -> None:
        self.top = top
        bases = make_bases(top / "bases")
        hf, torch, dist = (bases[f"untied {name}"] for name in ("hf", "torch 2 2", "torch_dist"))
        (top / "bases" / "text.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n' * 9)
        self.old = convert(bases["tied hf"], top / "old", format="hf")
        save = ["--save", str(top / "out")]
        small = ["--ffn-hidden-size-remain", "12", "--hidden-size-remain", "12"]
        text = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(MODEL / "tokenizer.model")]
        self.runs: dict[str, tuple[Callable[[Sequence[str]], object], list[str]]] = {
            "convert": (converter.main, ["--load", str(hf), *save, "--tensor-model-parallel-size", "2"]),
            "convert to torch_dist": (converter.main, ["--load", str(torch), *save, "--format", "torch_dist"]),
            "export": (converter.main, ["--load", str(dist), *save, "--format", "hf"]),
            "prune": (prune_llama.main, ["--load", str(dist), *save, *small, "--format", "torch"]),
            "prune in place": (prune_llama.main, ["--load", str(hf), *save, *small, "--overwrite"]),
            "prune by magnitude": (prune_llama.main, ["--load", str(torch), *save, *small, "--criterion", "magnitude"]),
            "show": (show_checkpoint.main, [str(torch), "--weights", "--digest"]),
            "verify": (show_checkpoint.main, [str(dist), "--verify"]),
            "preprocess": (
                preprocess_data.main,
                ["--input", str(top / "bases" / "text.jsonl"), "--output-prefix", str(top / "out" / "p"), *text],
            ),
        }
        self.sources = digests(top / "bases")
        self.wanted = {}
        for name in self.runs:
            ended = self._run(name, lambda: None)
            assert ended.require(name), ended.said
            self.wanted[name] = self._found(), ended.out

    def attempt(self, random: Random) -> tuple[str, str]:
        """Let a call go wrong in one run. Returns the case and how it ended; raises AssertionError if wrongly."""
        name = random.choice(sorted(self.runs))
        fault = Fault(random, self.top)
        case = f"{name}: {fault}"
        fault.sign.unlink(missing_ok=True)
        ended = self._run(name, fault.put)
        fired = fault.sign.exists()
        fault.sign.unlink(missing_ok=True)
        done = ended.require(case)
        left = {path.name for path in self.top.iterdir()} - {"bases", "old", "out"}
        assert not left, f"{case}: left {left}"
        assert digests(self.top / "bases") == self.sources, f"{case}: a source was changed"
        if done:
            assert (self._found(), ended.out) == self.wanted[name], f"{case}: done, but not the same"
            assert not (fired and not fault.optional and fault.call in FATAL), f"{case}: done all the same"
            return case, "done" if fired else "not met"
        assert fired and not fault.optional, f"{case}: {ended.last}"
        before = digests(self.old) if name == "prune in place" else {}
        assert self._found() == before, f"{case}: {ended.last}: left {sorted(self._found())}"
        return f"{case}: {ended.last}", "refused"

    def _run(self, name: str, before: Callable[[], None]) -> Any:
        shutil.rmtree(self.top / "out", ignore_errors=True)
        if name == "prune in place":
            shutil.copytree(self.old, self.top / "out")
        main, words = self.runs[name]
        return Child(self.top, "disks", main, words, before=before).wait()

    def _found(self) -> dict[str, str]:
        return digests(self.top / "out")


# Two processes --------------------------------------------------------------------------------------------------------


class Pairs:
    """Two processes of one run, one of which may have a failing file system, over a checkpoint that may be broken."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.fuzzer = Fuzzer(top)

    def attempt(self, random: Random) -> tuple[str, str]:
        """Let two processes convert or prune one checkpoint; both must come to the same end."""
        source, target = self.top / "source", self.top / "target"
        for leftover in (source, target):
            shutil.rmtree(leftover, ignore_errors=True)
        name = random.choice(sorted(self.fuzzer.bases))
        shutil.copytree(self.fuzzer.bases[name], source)
        breaker: Breaker = random.choice((*BREAKERS, *FIELD_BREAKERS))
        said, fault, failing = "", None, 0
        if random.random() < 0.6:
            said = f"{breaker.__name__}: {breaker(source, random, self.fuzzer.foreign)}"
        else:
            fault, failing = Fault(random, self.top), random.randrange(2)
            said = f"rank {failing}: {fault}"
        words = ["--load", str(source), "--save", str(target), "--format", random.choice(list(FORMATS))]
        main: Callable[[Sequence[str]], object] = converter.main
        if prunes := random.random() < 0.5:
            main, words = prune_llama.main, [*words, "--ffn-hidden-size-remain", "12"]
        case = f"{name}: {'prune' if prunes else 'convert'}: {said}"
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        both = [
            Child(
                self.top,
                f"rank{rank}",
                main,
                words,
                before=lambda rank=rank: _be_rank(rank, store.port, fault, failing),
            )
            for rank in (0, 1)
        ]
        ended = [child.wait() for child in both]
        (self.top / "fired").unlink(missing_ok=True)
        done = [one.require(f"{case}: rank {rank}") for rank, one in enumerate(ended)]
        assert done[0] == done[1], f"{case}: one of two is done: {ended[0].last} / {ended[1].last}"
        left = {path.name for path in self.top.iterdir()} - {"bases", "other", "source", "target"}
        assert not left, f"{case}: left {left}"
        assert target.exists() == done[0], f"{case}: {done}, and the target is {target.exists()}"
        if done[0]:
            found = open_checkpoint(target)
            if not prunes:
                self.fuzzer.check_read(case, name, found.config, target, DATA in said, True)
        else:
            assert fault is None or not fault.optional, f"{case}: {ended[failing].last}"
        return f"{case}: {ended[0].last} / {ended[1].last}", "done" if done[0] else "refused"


def _be_rank(rank: int, port: int, fault: Fault | None, failing: int) -> None:
    """Be one of two processes, as torchrun would start them on two machines, and wait for the other only seconds.

    The port is that of this case's store, which the parent has.
    """
    settings = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in settings.items()}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    processes.JOINING, processes.LOOK, processes.SILENCE = 8.0, 0.02, 8.0
    if fault is not None and rank == failing:
        fault.put()
