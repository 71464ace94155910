"""Writing: files laid out first and filled in place, in a directory that gets its name only when it is complete."""

import fcntl
import os
import shutil
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron.pruning.processes import World
from megatron.pruning.views import View, blocks

# Threads that fill one file: reading, gathering and writing all release Python's lock.
_WRITERS = min(4, os.cpu_count() or 1)


class Progress:
    """One bar with rate and ETA on a terminal, a plain line every ten seconds in a log; quiet unless `show`."""

    def __init__(self, what: str, total_bytes: int, show: bool) -> None:
        self.what, self.total, self.done, self.show = what, total_bytes, 0, show
        self.start = self.last_line = time.monotonic()
        self.bar = None
        self.lock = threading.Lock()
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, leave=False)

    def advance(self, count: int) -> None:
        """Count `count` more bytes as written."""
        with self.lock:
            self.done += count
            self._show(count)

    def _show(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)
        elif self.show and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            rate = self.done / (self.last_line - self.start)
            left = (self.total - self.done) / rate
            print(f"{self.what}: {self.done / self.total:.0%}, {rate / 1e6:.1f} MB/s, {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


class OutputFile(ABC):
    """A file of tensors: `lay_out` writes everything but their bytes, `write` pulls those through the views."""

    def __init__(self, name: str, views: Mapping[str, View]) -> None:
        self.name, self.views = name, views

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(view.nbytes for view in self.views.values())

    @abstractmethod
    def lay_out(self, path: Path) -> dict[str, int]:
        """Create the file with room for every tensor and return each tensor's byte offset."""

    def write(self, directory: Path, progress: Progress) -> None:
        """Write the file under `directory` and make it durable."""
        path = directory / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        offsets = self.lay_out(path)
        with path.open("r+b", buffering=0) as file:
            with ThreadPoolExecutor(_WRITERS) as pool:
                tasks = [pool.submit(_fill, file, offsets[key], view, progress) for key, view in self.views.items()]
                try:
                    for task in as_completed(tasks):
                        task.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            os.fsync(file.fileno())


def _fill(file: FileIO, offset: int, view: View, progress: Progress) -> None:
    """Write one tensor, block by block."""
    for start, bits in blocks(view):
        _write_all(file, memoryview(bits.reshape(-1).view(np.uint8)), offset + start)
        progress.advance(bits.nbytes)


def _write_all(file: FileIO, data: memoryview, offset: int) -> None:
    while data:
        try:
            count = os.pwrite(file.fileno(), data, offset)
        except OSError as error:  # says the path, which pwrite does not know
            raise OSError(error.errno, error.strerror, file.name) from error
        data, offset = data[count:], offset + count


def write_files(
    files: Sequence[OutputFile], texts: Mapping[str, bytes], path: Path, what: str, overwrite: bool, world: World
) -> None:
    """Write a whole checkpoint directory: every process its share of `files`, the first one also `texts`.

    The directory appears under `path` complete or not at all. Raises ValueError before the first byte when `path` is
    taken or the disk has no room.
    """
    mine = files[world.rank :: world.size]
    need = sum(file.nbytes for file in files)
    with _building(path, need, overwrite, world) as partial:
        if not partial.is_dir():
            raise ValueError(f"process {world.rank} cannot see {partial}: all need one file system under --save")
        progress = Progress(what, sum(file.nbytes for file in mine), show=world.rank == 0)
        try:
            for file in mine:
                file.write(partial, progress)
        finally:
            progress.close()
        world.barrier()
        if world.rank == 0:
            for file in files:
                if not (partial / file.name).is_file():
                    raise ValueError(f"{partial / file.name} was not written: all processes need one file system")
            for name, content in texts.items():
                write_durably(partial / name, content)


# One of these marks a directory as a checkpoint, which --overwrite may replace.
_MARKS = ("config.json", "latest_checkpointed_iteration.txt")


def check_target(path: Path, overwrite: bool) -> None:
    """Raise ValueError if `path` is something that must not be replaced: anything but a checkpoint and --overwrite."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"--save {path} exists and is not a directory: name another")
    if path.is_mount():
        raise ValueError(f"--save {path} is a mount point, which cannot be replaced: name a directory inside it")
    if any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"--save {path} exists: name another directory, or add --overwrite to replace it")
        if not any((path / mark).is_file() for mark in _MARKS):
            raise ValueError(f"--save {path} holds something else than a checkpoint: --overwrite does not replace it")


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file and fsync it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _building(path: Path, need: int, overwrite: bool, world: World) -> Iterator[Path]:
    """Give a directory beside `path`, and at the end put it in its place; when anything fails, leave nothing behind."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolves "..", but no links
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "replaced"))
    lock = None
    try:
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(partial, path)
            # What a run that was killed left behind; it may have been between the two renames of `_put_in_place`.
            if old.exists() and not path.exists():
                old.rename(path)
            for leftover in (old, *partial.iterdir()):
                _remove(leftover)
            check_target(path, overwrite)
            free = shutil.disk_usage(path.parent).free
            if need > free:
                raise ValueError(
                    f"--save {path} needs {need / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there"
                )
        world.barrier()
        yield partial
        if world.rank == 0:
            _sync_directories(partial)
            _put_in_place(partial, path, old)
        world.barrier()
    except BaseException:
        if lock is not None:  # only who holds the lock may remove it
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(partial: Path, path: Path) -> int:
    """Make `partial` and keep other runs from it; the lock goes with the process that holds it, however it ends."""
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino != partial.stat().st_ino:
            raise BlockingIOError  # that run has just put it in place
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        raise ValueError(f"--save {path}: another run is writing it") from None
    return lock


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(partial: Path, path: Path, old: Path) -> None:
    try:
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_directories(top: Path) -> None:
    for directory, _, _ in os.walk(top):
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
