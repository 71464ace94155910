"""Processes that meet: nobody waits without end, a signal comes through, and each says why it ends."""

import functools
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from meeting import Meeting
from stock_loop import StockLoop

from megatron.pruning.storage import processes
from megatron.pruning.storage.processes import World


@pytest.fixture
def port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def start(port: int, tmp_path: Path) -> Callable[..., Meeting]:
    """What starts one of two processes that meet at the port."""
    return functools.partial(Meeting, tmp_path, port)


@pytest.mark.slow
def test_processes_meet_share_and_part(start: Callable[..., Meeting]) -> None:
    both = [start(rank, "meets") for rank in (0, 1)]
    assert [process.end() for process in both] == [(0, "joined\nfrom the first\n", "")] * 2


@pytest.mark.slow
def test_a_process_that_fails_before_it_joins_says_so_and_the_other_names_it(start: Callable[..., Meeting]) -> None:
    both = [start(0, "meets", joining=6), start(1, "absent")]
    assert both[1].end() == (1, "", "[rank 1] error: this node has no such file\n")
    status, out, err = both[0].end()
    assert (status, out) == (1, "")
    assert err.startswith("[rank 0] error: of the 2 processes of this run, 1 did not join within 6 seconds")


@pytest.mark.slow
def test_torch_waits_for_one_that_is_behind_and_the_others_live_on(start: Callable[..., Meeting]) -> None:
    both = [start(rank, "behind", silence=2) for rank in (0, 1)]
    assert [process.end() for process in both] == [(0, "joined\nof nccl\nfrom the first\n", "")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_later_ends_the_others_with_its_sentence(
    start: Callable[..., Meeting], failing: int
) -> None:
    both = [start(rank, "fails" if rank == failing else "meets") for rank in (0, 1)]
    found = [process.end() for process in both]
    assert [status for status, _, _ in found] == [1, 1]
    assert found[failing][2] == f"[rank {failing}] error: this disk is full\n"
    assert f"process {failing} of this run has ended: this disk is full" in found[1 - failing][2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait(start: Callable[..., Meeting], number: signal.Signals) -> None:
    both = [start(0, "meets"), start(1, "stops")]
    for process in both:
        process.wait_for("joined")
    begin = time.monotonic()
    both[0].send(number)
    assert both[0].end()[0] in (130, 143)
    assert time.monotonic() - begin < 10
    both[1].send(signal.SIGKILL)
    both[1].end()


@pytest.mark.slow
def test_a_process_that_falls_silent_ends_the_others(start: Callable[..., Meeting]) -> None:
    both = [start(0, "meets", silence=4), start(1, "stops")]
    for process in both:
        process.wait_for("joined")
    both[1].send(signal.SIGSTOP)
    assert "process 1 of this run has given no sign of life for" in both[0].end()[2]
    both[1].send(signal.SIGKILL)
    both[1].end()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_process_that_fails_ends_one_that_waits_where_no_signal_comes_through(tmp_path: Path) -> None:
    case = {"program": "waiting_worker", "ranks": 2}
    runs = StockLoop(tmp_path).run_all(
        [
            {**case, "name": "fails", "words": ["fails", "200"]},
            {**case, "name": "ends", "words": ["ends", "3"]},
        ]
    )
    # Each by itself: what would kill the one that waits gives it two seconds.
    assert runs["fails"].code
    assert "[rank 0] error: process 1 of this run has ended: CUDA out of memory\n" in runs["fails"].log
    ends = runs["ends"].ok()
    assert ends.log.endswith("waited to the end\n") and "error" not in ends.log, "who ends as it should ends no other"
