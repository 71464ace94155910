"""Whatever ends a run, nothing is lost: the target is absent or complete, the source as it was, and a rerun succeeds.

    python tests/test_faults.py --count 200 --seed 0      # kill -9 at so many random moments; the suite tries a few

A kill leaves at most a directory `.TARGET.partial-*`, which the next run to that target tells of. Every other end, a
signal, a full or failing disk, cleans up after itself and says why in one line.
"""

import argparse
import collections
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from commands import CONVERT, PRUNE, environment, run, torchrun
from fuzz_guards import time_limit
from helpers import convert, digests, make_llama

from megatron.pruning.model.layout import Layout
from megatron.pruning.storage import output

PARTIAL = ".out.partial-*"  # what a run builds beside its target
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def make_big(path: Path, vocab: int = 1000, **save: Any) -> Path:
    """Save a Llama of 40 MB: enough that most of a run is spent reading and writing."""
    return make_llama(path, SIZES, vocab=vocab, **save)


def start(*command: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a command, its temporary files under `cwd`."""
    (cwd / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        command, env=environment(TMPDIR=cwd / "tmp"), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """Return the processes that `pid` started, and theirs."""
    found, waiting = [], [pid]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
            except OSError:  # it has just ended
                continue
            found += children
            waiting += children
    return found


def kill(pids: list[int]) -> None:
    """End processes that this test started, at once."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_end(pids: list[int]) -> None:
    """Wait until none of the processes runs; orphans end by themselves."""
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}/stat").is_file() and " Z " not in _stat(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process that lost its parent does not end"
        time.sleep(0.05)


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "


class Killing:
    """A source, the runs that are killed, and what each of them should come to."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.source = make_big(top / "hf", max_shard_size="25MB")
        self.shards = convert(self.source, top / "shards", layout=Layout(2, 1, 8))
        self.target = top / "out"
        where = ["--save", str(self.target)]
        small = "--ffn-hidden-size-remain 512 --drop-layers 1 --hidden-size-remain 384 --num-attention-heads-remain 4"
        two = ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "8"]
        hf, shards = ["--load", str(self.source), *where], ["--load", str(self.shards), *where]
        self.runs = {
            "convert": [CONVERT, *hf, *two],
            "convert to torch_dist": [CONVERT, *hf, "--format", "torch_dist"],
            "prune": [PRUNE, *hf, *two, *small.split()],
            "prune in place of another": [PRUNE, *shards, *small.split(), "--format", "hf", "--overwrite"],
            "transfer": [CONVERT, *shards, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"],
            "export": [CONVERT, *shards, "--format", "hf"],
            "torchrun prune": [PRUNE, *shards, *small.split()],
            "torchrun transfer": [CONVERT, *shards, "--tensor-model-parallel-size", "4"],
        }
        self.seconds: dict[str, tuple[float, float]] = {}
        self.wanted: dict[str, dict[str, str]] = {}
        self.before = digests(self.source) | digests(self.shards)
        self.names = {path.name for path in top.iterdir()} | {"tmp"}

    def start(self, name: str, alone: bool = False) -> subprocess.Popen[str]:
        """Start a run; `alone`: in one process, which writes the same bytes as many do."""
        launch = torchrun(2) if "torchrun" in name and not alone else [sys.executable]
        return start(*launch, *self.runs[name], cwd=self.top)

    def prepare(self, name: str) -> None:
        """Run once to the end, to know how long it takes, how long of that it writes, and what comes out."""
        if name not in self.wanted:
            begin = time.monotonic()
            process = self.start(name, alone=True)
            self._wait_for_writing(process)
            writes = time.monotonic()
            _, said = process.communicate()
            assert process.returncode == 0, f"{name}: {said[-2000:]}"
            self.seconds[name] = time.monotonic() - begin, time.monotonic() - writes
            self.wanted[name] = digests(self.target)
            shutil.rmtree(self.target)

    def _wait_for_writing(self, process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not any(self.top.glob(PARTIAL)):
            time.sleep(0.004)

    def finish(self, name: str) -> None:
        """Run to the end."""
        with self.start(name, alone=True) as process:
            _, said = process.communicate()
        assert process.returncode == 0, f"{name}: {said[-2000:]}"

    def attempt(self, random: Random, name: str) -> str:
        """Kill a run at a random moment and look at what is there. Returns the state it was found in."""
        self.prepare(name)
        old: dict[str, str] | None = None  # what is there before; with --overwrite there is always one or the other
        if "--overwrite" in self.runs[name]:
            shutil.copytree(self.source, self.target)
            old = digests(self.target)
        process = self.start(name)
        whole, writing = self.seconds[name]
        if random.random() < 0.75:  # most of a run is its start, where there is little to break
            self._wait_for_writing(process)
            whole = writing
        time.sleep(random.random() * 1.1 * whole)
        workers = descendants(process.pid)
        who = random.choice((workers, workers[-1:], [])) if workers else []
        kill([process.pid, *workers] if not who else who)
        process.communicate()
        wait_for_end(workers)
        state = self._state(name, old)
        begun = any(self.top.glob(f"{PARTIAL}/**/*"))
        left = {path.name for path in self.top.iterdir()} - self.names - {"out"}
        assert len(left) <= 1 and all(fnmatch(other, PARTIAL) for other in left), f"{name}: left {left}"
        stray = sum(path.stat().st_blocks * 512 for path in (self.top / "tmp").rglob("*"))
        assert stray < 1 << 20, f"{name}: left {stray} bytes of temporary files"
        if state != "complete" or left:  # it may have ended while it removed what it replaced
            self.finish(name)
        assert self._state(name, None) == "complete", f"{name}: the rerun is incomplete"
        assert {path.name for path in self.top.iterdir()} - self.names == {"out", *left}, f"{name}: after the rerun"
        for other in left:  # which the rerun tells of, and does not touch
            shutil.rmtree(self.top / other)
        assert digests(self.source) | digests(self.shards) == self.before, f"{name}: the source was changed"
        shutil.rmtree(self.target)
        shutil.rmtree(self.top / "tmp")
        return f"{state}, begun" if begun else state

    def _state(self, name: str, old: dict[str, str] | None) -> str:
        if not self.target.exists():
            assert old is None, f"{name}: neither the old checkpoint nor the new one is there"
            return "absent"
        found = digests(self.target)
        if found == self.wanted[name]:
            return "complete"
        assert found == old, f"{name}: the target is neither the old nor the new one: {sorted(found)}"
        return "old"


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Killing:
    """Make the source of the runs that are killed."""
    return Killing(tmp_path_factory.mktemp("kill"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "prune", "prune in place of another", "transfer", "torchrun transfer"])
def test_a_kill_leaves_the_target_absent_or_complete(killing: Killing, name: str) -> None:
    killing.attempt(Random(name), name)


@pytest.fixture(scope="module")
def bigger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a source that takes long enough for a signal to come while it is converted."""
    return make_big(tmp_path_factory.mktemp("bigger") / "hf", vocab=100_000)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_in_one_line_and_cleans_up(bigger: Path, tmp_path: Path, number: signal.Signals) -> None:
    old = convert(make_llama(tmp_path / "small"), tmp_path / "out", format="hf")
    before = digests(old)
    command = [sys.executable, CONVERT, "--load", str(bigger), "--save", str(old), "--format", "torch", "--overwrite"]
    with start(*command, cwd=tmp_path) as process:
        with time_limit(60):
            while not any(tmp_path.glob(f"{PARTIAL}/release/*/*")):
                time.sleep(0.004)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == {signal.SIGINT: 130}.get(number, 128 + number)
    assert said.startswith("error: ") and said.count("\n") == 1 and "nothing was left behind" in said
    assert digests(old) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small", "tmp"]
    assert not any((tmp_path / "tmp").iterdir())


@contextmanager
def small_disk(path: Path, megabytes: float, *options: str) -> Iterator[Path]:
    """Mount a file system of so many megabytes at `path`; skip the test where none may be mounted."""
    path.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join((size, *options)), "tmpfs", str(path)], check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "torch", "torch_dist"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    source = make_big(tmp_path / "hf")
    with small_disk(tmp_path / "disk", 30) as disk:
        old = convert(make_llama(tmp_path / "small"), disk / "out", format="hf")
        before = digests(old)
        with pytest.raises(ValueError, match=r"needs 0.04 GB, but only 0.03 GB are free there"):
            convert(source, old, format=format, overwrite=True)
        free = collections.namedtuple("Usage", "free")(1 << 40)  # as if somebody else had filled it meanwhile
        monkeypatch.setattr(output.shutil, "disk_usage", lambda _: free)
        with pytest.raises(OSError, match="No space left on device") as failure:
            convert(source, old, format=format, layout=Layout(4, 1, 8), overwrite=True)
        assert str(disk) in str(failure.value.filename)
        assert digests(old) == before
        assert [path.name for path in disk.iterdir()] == ["out"]


def test_a_read_only_target_is_an_error_in_one_line(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf")
    with small_disk(tmp_path / "disk", 1, "ro") as disk:
        done = run(sys.executable, CONVERT, "--load", str(source), "--save", str(disk / "out"))
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {disk}/.out.partial-\w{{8}}: Read-only file system\n", done.stderr)


@pytest.mark.slow
def test_a_read_error_names_the_source_and_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_big(tmp_path / "hf")
    old = convert(make_llama(tmp_path / "small"), tmp_path / "out", format="hf")
    before = digests(old)
    read, calls = os.preadv, iter(range(1000))

    def failing(*arguments: Any) -> int:
        if next(calls) > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match="Input/output error") as failure:
        convert(source, old, format="hf", overwrite=True)
    assert failure.value.filename == str(source / "model.safetensors")
    assert digests(old) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "small"]


def test_verify_names_every_file_that_is_not_as_it_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import show_checkpoint  # which the program below does not find

    for format, weights in (("hf", "model.safetensors"), ("torch", "release/mp_rank_01/model_optim_rng.pt"),
                            ("torch_dist", "release/__0_0.distcp")):  # fmt: skip
        path = convert(make_llama(tmp_path / "source" / format), tmp_path / format, format, layout=Layout(2, 1, 4))
        show_checkpoint.main([str(path), "--verify"])
        files = digests(path)
        assert f"verified: all {len(files) - 1} files" in capsys.readouterr().out
        raw = bytearray((path / weights).read_bytes())
        raw[len(raw) // 2] ^= 1  # one bit of a weight
        (path / weights).write_bytes(raw)
        (path / "notes.txt").write_text("mine")
        side = path / next(name for name in files if name.endswith("config.json"))
        side.unlink()
        with pytest.raises(
            ValueError, match=rf"2 of the {len(files) - 1} files of {path} are not as they were written"
        ):
            show_checkpoint.main([str(path), "--verify"])
        printed = capsys.readouterr().out.splitlines()
        assert sorted(line.split(" ", 1)[0] for line in printed) == sorted(
            map(str, (path / weights, path / "notes.txt", side))
        )
        assert any(line.startswith(f"{path / weights} has crc32") for line in printed)
        assert f"{side} is missing" in printed and f"{path / 'notes.txt'} is not in the manifest" in printed
        (path / "manifest.json").unlink()
        with pytest.raises(ValueError, match=r"has no manifest.json, so there is nothing to check it against"):
            show_checkpoint.main([str(path), "--verify"])


def main() -> None:
    """Kill runs, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, metavar="N", help="kills (default 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random moments (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = Random(args.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        killing = Killing(Path(directory))
        names = sorted(killing.runs)
        for i in range(args.count):
            name = names[i % len(names)]
            counts[f"{name}: {killing.attempt(random, name)}"] += 1
            print(f"{i + 1} kills", end="\r", flush=True)
    print(f"{args.count} kills, after each the target was absent, the old one, or complete; every rerun succeeded:")
    for what, count in sorted(counts.items()):
        print(f"{count:5} x {what}")


if __name__ == "__main__":
    main()
