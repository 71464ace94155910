"""Writing: files laid out first and filled in place, in a directory that gets its name only when it is complete."""

import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron.pruning.processes import World
from megatron.pruning.views import View, blocks


class Progress:
    """One bar with rate and ETA on a terminal, a plain line every ten seconds in a log; quiet unless `show`."""

    def __init__(self, what: str, total_bytes: int, show: bool) -> None:
        self.what, self.total, self.done, self.show = what, total_bytes, 0, show
        self.start = self.last_line = time.monotonic()
        self.bar = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, leave=False)

    def advance(self, count: int) -> None:
        """Count `count` more bytes as written."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.show and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            rate = self.done / (self.last_line - self.start)
            left = (self.total - self.done) / rate
            print(f"{self.what}: {self.done / self.total:.0%}, {rate / 1e6:.0f} MB/s, {left:.0f} s left", flush=True)

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
            for key, view in self.views.items():
                for start, bits in blocks(view):
                    _write_all(file, memoryview(bits.reshape(-1).view(np.uint8)), offsets[key] + start)
                    progress.advance(bits.nbytes)
            os.fsync(file.fileno())


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
    check_target(path, overwrite)
    mine = files[world.rank :: world.size]
    need = sum(file.nbytes for file in files)
    with _building(path, need, overwrite, world) as partial:
        progress = Progress(what, sum(file.nbytes for file in mine), show=world.rank == 0)
        try:
            for file in mine:
                file.write(partial, progress)
        finally:
            progress.close()
        if world.rank == 0:
            for name, content in texts.items():
                write_durably(partial / name, content)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise ValueError if `path` holds something that must not be replaced."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        raise ValueError(f"--save {path} exists: name another directory, or add --overwrite to replace it")


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
    path = path.absolute()
    partial = path.with_name(f".{path.name}.partial")
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():  # left by a run that was killed
            shutil.rmtree(partial)
        free = shutil.disk_usage(path.parent).free
        if need > free:
            raise ValueError(f"--save {path} needs {need / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")
        partial.mkdir()
    world.barrier()
    try:
        yield partial
        world.barrier()
        if world.rank == 0:
            _sync_directories(partial)
            _put_in_place(partial, path, overwrite)
        world.barrier()
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _put_in_place(partial: Path, path: Path, overwrite: bool) -> None:
    old = path.with_name(f".{path.name}.replaced")
    if overwrite and path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
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
