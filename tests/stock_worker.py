"""Run many cases of pretrain_gpt.py, or of another program: Megatron is imported once, and every rank is a fork.

    python tests/stock_worker.py LISTENING_SOCKET

Each line that a client sends is a case {"folder": DIR, "name": NAME, "words": [FLAG, ...], "ranks": COUNT}, run in its
folder, two of all clients' at a time; NAME.log there takes what all ranks print. As each ends, "NAME STATUS" is the
answer: 0, or that of the first rank that failed. A case that takes too long is killed, as is what is left of one in
which a rank failed; with {"kill_after": STEP} a rank kills itself as it logs that step. {"program": NAME} runs another
module's main, {"gpu": true} does as on a machine with GPUs (gpu_stand_in.py), and {"settings": {NAME: VALUE}} sets
variables of the environment. The last client's leaving ends it.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import io
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

import gpu_stand_in
from commands import replace
from torch.distributed import TCPStore

from megatron.pruning.cli import entry

AT_ONCE, TIMEOUT, GRACE = 2, 90.0, 2.0  # cases; seconds for one, and for the others of a rank that failed
PORT = 8  # bytes in which a port is told


class Case:
    """The ranks of one run of the stock loop, as children of this process."""

    def __init__(
        self,
        folder: str,
        name: str,
        words: list[str],
        ranks: int,
        kill_after: int | None = None,
        program: str = "pretrain_gpt",
        gpu: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.status = name, 0
        self.log = Path(folder, f"{name}.log")
        self.deadline = time.monotonic() + TIMEOUT
        world = {
            "WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", **(settings or {}),
        }  # fmt: skip
        self.log.touch()
        self.children: dict[int, int] = {}  # a descriptor, which can be read once the process has ended, by its number
        port, tell = os.pipe()
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                world |= {
                    "RANK": f"{rank}",
                    "LOCAL_RANK": f"{rank}",
                    "MASTER_PORT": os.read(port, PORT).decode().strip(),
                }
                if gpu:
                    gpu_stand_in.install()
                be_rank(self.log, program, words, world, kill_after)
            self.children[child] = os.pidfd_open(child)
        self.keeper = os.fork()
        if self.keeper == 0:
            keep_store(tell, ranks)
        os.close(port), os.close(tell)

    def ended(self) -> bool:
        """Reap the ranks that have ended, and kill those that never will."""
        for child in sorted(self.children):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                continue
            os.close(self.children.pop(child))
            if status and not self.status:
                self.status = os.waitstatus_to_exitcode(status)
                self.deadline = min(self.deadline, time.monotonic() + GRACE)
        if time.monotonic() > self.deadline and self.children:
            if not self.status:
                with self.log.open("a") as log:
                    log.write(f"\nkilled by the test: it had {TIMEOUT:.0f} seconds, or nobody waits for it\n")
            for child in self.children:
                os.kill(child, signal.SIGKILL)
        if not self.children:
            os.kill(self.keeper, signal.SIGKILL), os.waitpid(self.keeper, 0)
        return not self.children


def keep_store(tell: int, ranks: int) -> NoReturn:
    """Be where the ranks meet, and tell each the port.

    As under torchrun it is nobody's of them, on a port that the system gave: one that is found free and given back may
    be another case's before it is used. The store has a thread, which may hold a lock of the C library at any time: a
    process that forks ranks has none.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(tell, f"{store.port:{PORT}}".encode() * ranks)
    while True:
        signal.pause()


class UntilLine(io.TextIOBase):
    """Standard output of a process that dies, as by kill -9, with a line that has this in it."""

    def __init__(self, out: TextIO, last: str) -> None:
        self.out, self.last = out, last

    def write(self, text: str) -> int:
        """Write, and die."""
        self.out.write(text)
        if self.last in text:
            self.out.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(text)

    def flush(self) -> None:
        """Write what waits."""
        self.out.flush()


def be_rank(log: Path, program: str, words: list[str], settings: dict[str, str], kill_after: int | None) -> NoReturn:
    """Be one rank of a case: what torchrun would start."""
    os.environ.update(settings)
    sys.argv = [f"{program}.py", *words]
    os.chdir(log.parent)
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # not that of wandb, which looks at every line
    if kill_after:
        sys.stdout = UntilLine(sys.stdout, f"iteration {kill_after:8d}/")
    status: Any = 99
    try:
        entry.run(importlib.import_module(program).main)
        status = 0
    except SystemExit as leave:
        status = leave.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def hear(client: socket.socket) -> bytes:
    """Return what a client says, nothing once it has left, be it killed before it read an answer."""
    try:
        return client.recv(1 << 16)
    except ConnectionResetError:
        return b""


def serve(door: socket.socket) -> None:
    """Run the cases of all clients in the order in which they came, `AT_ONCE` of them together."""
    clients, waiting, running = {door.accept()[0]: b""}, list[tuple[socket.socket, dict[str, Any]]](), {}
    # A client is to see that this process has ended, even where a child of it has not.
    os.register_at_fork(after_in_child=lambda: [line.close() for line in (door, *clients)])
    while clients or running:
        ends = [end for case in running for end in case.children.values()]
        for ready in select.select([door, *clients, *ends], [], [], 0.5 if running else None)[0]:
            if ready in ends:  # that a rank has ended is seen below
                continue
            if ready is door:
                clients[door.accept()[0]] = b""
            elif said := hear(ready):
                *lines, clients[ready] = (clients[ready] + said).split(b"\n")
                waiting += [(ready, json.loads(line)) for line in lines]
            else:  # who left wants no more of its cases
                del clients[ready]
                waiting = [(client, case) for client, case in waiting if client is not ready]
                for case in [case for case, client in running.items() if client is ready]:
                    case.deadline = 0.0
        for case in [case for case in running if case.ended()]:
            client = running.pop(case)
            if client in clients:
                with contextlib.suppress(OSError):  # who has left since is seen above
                    client.sendall(f"{case.name} {case.status}\n".encode())
        # After the ended have gone: there is no waiting above for cases of which none runs.
        while waiting and len(running) < AT_ONCE:
            client, case = waiting.pop(0)
            running[Case(**case)] = client


def read_sources_once() -> None:
    """Let the text of Megatron's flags, which it finds in its own sources, be read here and not by every rank."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    read, known = ArgumentGroupFactory._get_field_docstrings, dict[type, dict[str, str]]()

    def read_once(self: ArgumentGroupFactory, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = read(self, config)
        return known[config]

    ArgumentGroupFactory._get_field_docstrings = read_once
    add_megatron_arguments(argparse.ArgumentParser())


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path += [str(root / folder) for folder in (".", "tools", "tools/checkpoint_conversion")]
    gpu_stand_in.keep_transformer_engine()
    # Before the forks, which then have them: the loop, and what each rank would import for a second.
    ours = "megatron.pruning.training"
    for module in ("pretrain_gpt", "score_importance", f"{ours}.record_scores", f"{ours}.reconstruct_checkpoint"):
        importlib.import_module(module)
    for module in ("tokenizers.text", "models.mimo", "datasets.helpers"):
        importlib.import_module(f"megatron.core.{module}")
    for module in ("torch.utils.serialization.config", "matplotlib.pyplot"):
        importlib.import_module(module)
    if importlib.util.find_spec("transformer_engine") is None:  # with it only the loop is run
        for module in ("llama", "qwen2", "qwen3"):
            importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        importlib.import_module(f"{ours}.evaluation")
    read_sources_once()
    # The tokens of a test, too, are to be more than are taken at once.
    replace(importlib.import_module(f"{ours}.divergence"), "_FP32_VALUES", 1000)
    replace(importlib.import_module(f"{ours}.teacher_cache"), "FILE_BYTES", 4_000)
    replace(importlib.import_module(f"{ours}.record_layerwise"), "AT_ONCE", 2)
    # Nobody reads the arguments in TensorBoard's files, which takes longer than the training of three steps.
    replace(importlib.import_module("torch.utils.tensorboard").SummaryWriter, "add_text", lambda *_, **__: None)
    # A picture takes as long as the rest of such a model's pruning; test_figures.py has some drawn.
    replace(importlib.import_module("prune_llama"), "plan_figure", lambda plan: b"")
    replace(importlib.import_module("megatron.pruning.cli.reconstruction"), "report_figure", lambda report: b"")

    # What is here for good is not looked at again by each rank, which would copy all of it.
    gc.collect(), gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
