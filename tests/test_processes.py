"""Processes that meet: nobody waits without end, a signal comes through, and each says why it ends."""

import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import environment

from megatron.pruning.storage import processes
from megatron.pruning.storage.processes import World

PROGRAM = """
import os, sys, time
from megatron.pruning.cli.entry import run
from megatron.pruning.storage import processes
from megatron.pruning.storage.processes import World

def main(argv):
    processes.JOINING, processes.SILENCE = float(argv[0]), float(argv[1])
    if argv[2] == "absent":
        raise ValueError("this node has no such file")
    world = World.from_environment()
    print("joined", flush=True)
    if argv[2] == "fails":
        raise ValueError("this disk is full")
    if argv[2] == "stops":
        time.sleep(600)
    if world.rank == 1:
        processes.LOOK = 1.0  # slow to look
    print(world.share("from the first" if world.rank == 0 else ""), flush=True)
    for _ in range(4):
        world.barrier()
    world.leave()

run(main)
"""


@pytest.fixture
def port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def start(port: int, rank: int, does: str, joining: float = 60, silence: float = 60) -> subprocess.Popen[str]:
    """Start one of two processes, as on a machine of its own."""
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(joining), str(silence), does], env=environment(**settings), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end of a process: its status, and what it said."""
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


@pytest.mark.slow
def test_processes_meet_share_and_part(port: int) -> None:
    both = [start(port, rank, "meets") for rank in (0, 1)]
    assert [end(process) for process in both] == [(0, "joined\nfrom the first\n", "")] * 2


@pytest.mark.slow
def test_a_process_that_fails_before_it_joins_says_so_and_the_other_names_it(port: int) -> None:
    both = [start(port, 0, "meets", joining=6), start(port, 1, "absent")]
    assert end(both[1]) == (1, "", "[rank 1] error: this node has no such file\n")
    status, out, err = end(both[0])
    assert (status, out) == (1, "")
    assert err.startswith("[rank 0] error: of the 2 processes of this run, 1 did not join within 6 seconds")


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_later_ends_the_others_with_its_sentence(port: int, failing: int) -> None:
    both = [start(port, rank, "fails" if rank == failing else "meets") for rank in (0, 1)]
    found = [end(process) for process in both]
    assert [status for status, _, _ in found] == [1, 1]
    assert found[failing][2] == f"[rank {failing}] error: this disk is full\n"
    assert f"process {failing} of this run has ended: this disk is full" in found[1 - failing][2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait(port: int, number: signal.Signals) -> None:
    both = [start(port, 0, "meets"), start(port, 1, "stops")]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "joined\n"
    begin = time.monotonic()
    both[0].send_signal(number)
    assert end(both[0])[0] in (130, 143)
    assert time.monotonic() - begin < 10
    both[1].kill()
    end(both[1])


@pytest.mark.slow
def test_a_process_that_falls_silent_ends_the_others(port: int) -> None:
    both = [start(port, 0, "meets", silence=4), start(port, 1, "stops")]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "joined\n"
    both[1].send_signal(signal.SIGSTOP)
    assert "process 1 of this run has given no sign of life for" in end(both[0])[2]
    both[1].kill()
    end(both[1])


@pytest.mark.parametrize(
    "settings,complaint",
    [
        ({"RANK": "0"}, "MASTER_ADDR .not set. and MASTER_PORT .not set. do not say where to meet"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}, "MASTER_PORT abc do not say where to meet"),
        ({"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "nobody answers at 127.0.0.1:1"),
        ({"RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK 2 and WORLD_SIZE 2 .* do not fit"),
    ],
)
def test_a_left_over_environment_is_told_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], complaint: str
) -> None:
    monkeypatch.setattr(processes, "JOINING", 0.5)
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**settings, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=complaint):
        World.from_environment()
    assert time.monotonic() - begin < 20
