"""Writing: files laid out first and filled in place, in a directory that gets its name only when it is complete."""

import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron.pruning.storage.direct_write import Segment, fill, finish
from megatron.pruning.storage.manifest import MANIFEST, Digest, manifest_bytes, read_manifest
from megatron.pruning.storage.processes import World
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.small_files import write_durably
from megatron.pruning.storage.views import View


class OutputFile(ABC):
    """A file of tensors and of what lies between them."""

    def __init__(self, name: str, views: Mapping[str, View]) -> None:
        self.name, self.views = name, views

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(view.nbytes for view in self.views.values())

    @abstractmethod
    def parts(self, checksums: Mapping[str, int]) -> Iterator[bytes | str]:
        """Yield the file from first to last: bytes as they are, and a key of `views` where that tensor's bytes lie.

        `checksums` has the crc32 of the tensors that were written; nothing but the values of some bytes hangs on it.
        """

    def segments(self, checksums: Mapping[str, int]) -> list[Segment]:
        """Return `parts` with the place of each."""
        at = 0
        segments: list[Segment] = []
        for part in self.parts(checksums):
            if isinstance(part, bytes):
                segments.append(Segment(at, at + len(part), None, part))
            else:
                segments.append(Segment(at, at + self.views[part].nbytes, part, self.views[part]))
            at = segments[-1].stop
        return segments

    def write(self, directory: Path, progress: Progress) -> Digest:
        """Write the file under `directory`, make it durable, and return its digest."""
        path = directory / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        segments = self.segments({})
        digests = fill(path, segments, progress.advance)
        pairs = list(zip(segments, digests, strict=True))
        checksums = {segment.name: digest.crc32 for segment, digest in pairs if segment.name is not None}
        changes, whole = [], Digest()
        for (segment, digest), last in zip(pairs, self.segments(checksums), strict=True):
            if isinstance(last.content, bytes) and last.content != segment.content:
                changes.append((last.start, last.content))
                digest = Digest.of(last.content)
            whole += digest
        finish(path, changes)
        return whole


def write_files(
    files: Sequence[OutputFile],
    beside: Mapping[str, bytes],
    path: Path,
    what: str,
    overwrite: bool,
    marks: Sequence[str],
    world: World,
) -> None:
    """Write a whole checkpoint directory: every process its share of `files`, the first one also `beside`.

    The directory appears under `path` complete or not at all. Raises ValueError before the first byte when `path` is
    taken or the disk has no room.
    """
    mine = files[world.rank :: world.size]
    need = sum(file.nbytes for file in files)
    with _building(path, need, lambda: check_target(path, overwrite, marks), world) as partial:
        if not partial.is_dir():
            raise ValueError(f"process {world.rank} cannot see {partial}: all need one file system under --save")
        progress = Progress(what, sum(file.nbytes for file in mine), show=world.rank == 0)
        try:
            digests = {file.name: file.write(partial, progress) for file in mine}
        finally:
            progress.close()
        # The others' digests reach the first process as the files do, through the directory.
        (partial / f".digests.{world.rank}").write_bytes(manifest_bytes(digests))
        world.barrier()
        if world.rank == 0:
            for file in files:
                if not (partial / file.name).is_file():
                    raise ValueError(f"{partial / file.name} was not written: all processes need one file system")
            for rank in range(world.size):
                part = partial / f".digests.{rank}"
                digests |= read_manifest(part)
                part.unlink()
            for name, content in beside.items():
                write_durably(partial / name, content)
                digests[name] = Digest.of(content)
            write_durably(partial / MANIFEST, manifest_bytes(digests))


def check_target(path: Path, overwrite: bool, marks: Sequence[str]) -> None:
    """Raise ValueError if `path` must not be replaced: unless `overwrite`, and it has a file that is one of `marks`."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"--save {path} exists and is not a directory: name another")
    if path.is_mount():
        raise ValueError(f"--save {path} is a mount point, which cannot be replaced: name a directory inside it")
    if any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"--save {path} exists: name another directory, or add --overwrite to replace it")
        if not any((path / mark).is_file() for mark in marks):
            raise ValueError(f"--save {path} holds something else than a checkpoint: --overwrite does not replace it")


@contextmanager
def _building(path: Path, need: int, check: Callable[[], None], world: World) -> Iterator[Path]:
    """Give a directory beside `path`, and at the end put it in its place; when anything fails, leave nothing behind."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolves "..", but no links
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "replaced"))
    lock, placed = None, False
    try:
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(partial, path)
            # A run that was killed may have left these, even between the two renames of `_rename_twice`.
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(old, ignore_errors=True)  # another run may be removing it
            for leftover in partial.iterdir():
                _remove(leftover)
            check()
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
            placed = True
        world.barrier()
    except BaseException:
        if lock is not None and not placed:  # only who holds the lock may remove it; afterwards it is another run's
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
    if not path.exists():
        partial.rename(path)
        _sync_directory(path.parent)
        return
    # The replaced directory will have the name of `partial`: a lock keeps other runs from it until it is gone.
    replaced = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(replaced, fcntl.LOCK_EX)
        if not _exchange(partial, path):
            _rename_twice(partial, path, old)
        _sync_directory(path.parent)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
    finally:
        os.close(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change names in one step; False where the file system cannot (NFS is one)."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _rename_twice(partial: Path, path: Path, old: Path) -> None:
    """Put `partial` under the name of `path`, which for a moment nothing has: the next run mends what is cut there."""
    try:
        path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise


def _sync_directories(top: Path) -> None:
    for directory, _, _ in os.walk(top):
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
