"""Two processes that meet, forked from one that has torch, which takes seconds to import: they need it to meet."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

from commands import replace

from megatron.pruning.cli.entry import run
from megatron.pruning.storage import processes
from megatron.pruning.storage.processes import World

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed"])


class Meeting:
    """One of the two, as on a machine of its own; `does` is what it comes to do, and the rest are its limits."""

    def __init__(self, folder: Path, port: int, rank: int, does: str, joining: float = 60, silence: float = 60) -> None:
        self.said = [folder / f"{rank}.{name}" for name in ("out", "err")]
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0}
        words = [str(joining), str(silence), does]
        self.process = FORKS.Process(target=be, args=(self.said, settings, words), daemon=True)
        self.process.start()

    def wait_for(self, text: str) -> None:
        """Wait until it has said so."""
        while not self.said[0].exists() or text not in self.said[0].read_text():
            assert self.process.is_alive(), self.said[1].read_text()
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int | None, str, str]:
        """Wait for its end: its status, and what it said."""
        self.process.join(90)
        out, err = (path.read_text() for path in self.said)
        return self.process.exitcode, out, err


def be(said: list[Path], settings: dict[str, object], words: list[str]) -> None:
    """Be one of them."""
    os.environ.update({name: str(value) for name, value in settings.items()})
    sys.argv = ["meeting", *words]
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    run(main)


def main(argv: list[str]) -> None:
    """Meet, and do what the command line says."""
    replace(processes, "JOINING", float(argv[0])), replace(processes, "SILENCE", float(argv[1]))
    if argv[2] == "absent":
        raise ValueError("this node has no such file")
    world = World.from_environment()
    print("joined", flush=True)
    if argv[2] == "fails":
        raise ValueError("this disk is full")
    if argv[2] == "stops":
        time.sleep(600)
    if argv[2] == "behind":
        store = world.meeting_place()["store"]
        if world.rank == 0:
            time.sleep(4.0)
            store.set("0", "of nccl")
        print(store.get("0").decode(), flush=True)
    if world.rank == 1:
        replace(processes, "LOOK", 1.0)  # slow to look
    print(world.share("from the first" if world.rank == 0 else ""), flush=True)
    for _ in range(4):
        world.barrier()
    world.leave()
