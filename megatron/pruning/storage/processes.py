"""The processes of one run: alone, or the N that torchrun started, on one machine or on many.

They share a file system and meet through the store that torchrun has for them, where each process posts what it is at
and reads what the others are at. Nothing waits without end: a process that never comes, ends with an error or falls
silent ends the others with a sentence, and every wait is short enough for a signal to come through.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

# Seconds: until all processes must have joined, between two looks at the others, and without a sign of life from one.
JOINING, LOOK, SILENCE = 120.0, 0.2, 120.0
BEHIND = 1800.0  # seconds that one may be behind the others where torch waits for it


def rank() -> int:
    """Return this process's number among those that torchrun started; 0 when it is alone."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdecimal() else 0


def count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() else 1


def be_alone_without_torchrun() -> None:
    """Let a process that torchrun did not start be one that meets nobody, by what torch and Megatron look at."""
    if "WORLD_SIZE" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}


def is_first() -> bool:
    """Return whether this is the process that speaks: alone, or rank 0 of a torchrun."""
    return rank() == 0


def is_first_here() -> bool:
    """Return whether this is the process that speaks for those of its machine, before all have met."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@dataclass(frozen=True)
class World:
    """This process's rank among `size`. They share a file system and meet only at barriers."""

    rank: int = 0
    size: int = 1
    board: "_Board | None" = field(default=None, compare=False)
    # Whether this process has met the others: until then all of them do, and fail in, the same.
    joined: ClassVar[bool] = False
    current: ClassVar["World | None"] = None  # which they are to be told in when this process ends

    @classmethod
    def from_environment(cls) -> "World":
        """Join the processes that torchrun started, or stay alone.

        Raises ValueError where the environment does not say how, and when not all of them have come in time.
        """
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(f"RANK {rank} and WORLD_SIZE {size} of the environment do not fit each other")
        if int(size) == 1:
            return cls()
        World.current = cls(int(rank), int(size), _Board(int(rank), int(size)))
        World.joined = True
        return World.current

    def meeting_place(self) -> dict[str, Any]:
        """Return what torch needs for these processes to meet in groups of its own; nothing for one that is alone.

        It is another way to the store that they have met at: nccl waits there for one that is behind, which would hold
        up the sign of life, and for longer than that may take.
        """
        if self.board is None:
            return {}
        from torch._C._distributed_c10d import PrefixStore

        store = PrefixStore("torch", _connect(self.size, hosts=False))
        store.set_timeout(timedelta(seconds=BEHIND))
        return {"store": store, "rank": self.rank, "world_size": self.size}

    def barrier(self) -> None:
        """Wait for every process. Raises ValueError when one of them will not come."""
        self.share("")

    def share(self, text: str) -> str:
        """Return the text that the first process gives, at a barrier of all."""
        return text if self.board is None else self.board.meet(text)

    def leave(self) -> None:
        """Part from the others, after the last barrier."""
        if self.board is not None:
            self.board.leave(left=True)

    def fail(self, sentence: str) -> None:
        """Tell the others why this process ends."""
        if self.board is not None:
            self.board.leave(ended=sentence)


class _Board:
    """The store, in which each process has one entry: its barriers so far, a sign of life, and what it said at which.

    A thread keeps this process's entry alive and looks at the others', so that a store that does not answer holds up
    nobody but the thread.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.entry: dict[str, Any] = {"at": 0, "beat": 0, "said": {}, "ended": "", "left": False}
        self.others: list[dict[str, Any] | None] = [None] * size
        self.heard = [time.monotonic()] * size  # when each entry was last another
        self._ends = False
        self.lost = ""  # why the store cannot be had any more
        self._changed = threading.Event()
        self._version = self._sent = 0  # of the entry, here and in the store
        self.hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent has one
        self._store = _connect(size, self.hosts)
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._wait_for_all()

    def close(self) -> None:
        """Stop looking: a thread that is inside of torch when the process ends would abort it."""
        self._ends = True
        self._changed.set()
        self._thread.join(5.0)

    def post(self, **values: Any) -> None:
        """Change this process's entry, and wait a moment until the others can see it."""
        self.entry |= values
        self._version += 1
        self._changed.set()
        deadline = time.monotonic() + 2.0
        while self._sent < self._version and not self.lost and time.monotonic() < deadline:
            time.sleep(0.005)

    def meet(self, text: str = "") -> str:
        """Wait at the next barrier, and return what the first process says there."""
        number = self.entry["at"] + 1
        # What it said before stays: one that is slow to look may still want it.
        self.post(at=number, said={**self.entry["said"], str(number): text} if text else self.entry["said"])
        while not all(other is not None and other["at"] >= number for other in self.others):
            self._check()
            time.sleep(LOOK)
        return str((self.others[0] or {})["said"].get(str(number), ""))

    def leave(self, **last: Any) -> None:
        """Post a last word; the process whose store it is stays for a few seconds, until all others have, too."""
        self.post(**last)
        deadline = time.monotonic() + 5.0
        while self.hosts and not self.lost and time.monotonic() < deadline:
            if all(other is not None and (other["left"] or other["ended"]) for other in self.others):
                return
            time.sleep(LOOK)

    def _check(self) -> None:
        for number, other in enumerate(self.others):
            if other is not None and other["ended"]:
                raise ValueError(f"process {number} of this run has ended: {other['ended']}")
        if self.lost:
            raise ValueError(f"another process of this run has ended: see its message ({self.lost})")
        for number, heard in enumerate(self.heard):
            if self.others[number] is not None and (silent := time.monotonic() - heard) > SILENCE:
                raise ValueError(f"process {number} of this run has given no sign of life for {silent:.0f} seconds")

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + JOINING
        while missing := [number for number, other in enumerate(self.others) if other is None]:
            self._check()
            if time.monotonic() > deadline:
                absent = ", ".join(map(str, missing[:20]))
                raise ValueError(
                    f"of the {self.size} processes of this run, {absent} did not join within {JOINING:.0f} seconds: "
                    "see their messages, or unset RANK and WORLD_SIZE to run alone"
                )
            time.sleep(LOOK)

    def _talk(self) -> None:
        """Post this process's entry and read the others', for as long as the process lives."""
        keys = [str(number) for number in range(self.size)]
        try:
            while not self._ends:
                self._changed.clear()
                self.entry["beat"] += 1
                version = self._version
                self._store.set(keys[self.rank], json.dumps(self.entry))
                self._sent = version
                for number, key in enumerate(keys):
                    if self._store.check([key]) and (found := json.loads(self._store.get(key))) != self.others[number]:
                        self.others[number], self.heard[number] = found, time.monotonic()
                self._changed.wait(LOOK)
        except RuntimeError as error:
            self.lost = str(error).splitlines()[0][:200]


class EndedTogether:
    """End this process when another of its torchrun fails in the same context, and tell the others when it fails here.

    The main thread may wait inside of nccl, where no signal of torchrun comes through: by itself it would wait until
    nccl gives up, on other machines for ten minutes. So a thread looks, gives the main thread `GRACE` seconds to end as
    it likes, and ends the process with a sentence. Alone, or without torchrun's store, this does nothing.
    """

    EVERY, GRACE = 1.0, 3.0  # seconds between two looks, and until the process ends

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if count() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            self._store = _connect(count(), hosts=False)
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._thread is None:
            return
        if error is not None and not isinstance(error, SystemExit):  # with which Megatron ends as it should
            why = str(error) if isinstance(error, Exception) else "it was told to"
            with contextlib.suppress(RuntimeError):  # a store that is gone tells nobody
                self._store.set("ended", f"process {rank()} of this run has ended: {why or type(error).__name__}")
        self._ended.set()
        self._thread.join(5.0)

    def _look(self) -> None:
        found = ""
        while not found:
            if self._ended.wait(self.EVERY):
                return
            try:
                found = self._store.get("ended").decode() if self._store.check(["ended"]) else ""
            except RuntimeError as error:
                found = (
                    f"the machine on which the processes of this run meet is gone ({str(error).splitlines()[0][:200]})"
                )
        if not self._ended.wait(self.GRACE):
            print(f"[rank {rank()}] error: {' '.join(found[:300].split())}", file=sys.stderr, flush=True)
            os._exit(1)


def _connect(size: int, hosts: bool) -> Any:
    """Return the store that torchrun, or the process that `hosts` it, has for this run.

    Raises ValueError where the environment does not say where it is, and when it does not answer in time.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"WORLD_SIZE is {size}, but MASTER_ADDR {host or '(not set)'} and MASTER_PORT {port or '(not set)'} do not "
            "say where to meet: start all processes with torchrun, or unset RANK and WORLD_SIZE to run alone"
        )
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    deadline = time.monotonic() + JOINING
    while True:  # by short tries, between which a signal comes through
        try:
            store = TCPStore(host, int(port), None, hosts, timedelta(seconds=2), wait_for_workers=False)
        except RuntimeError as error:
            if hosts or time.monotonic() > deadline:
                reason = str(error).splitlines()[0][:200]
                raise ValueError(
                    f"nobody answers at {host}:{port}, where process 0 of {size} should be: {reason}"
                ) from error
        else:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return PrefixStore(f"megatron-llama-pruning/{attempt}", store)
