"""Writing: files laid out first and filled in place, in a directory that gets its name only when it is complete."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron.pruning.storage.direct_write import UNSUPPORTED, Segment, fill, finish
from megatron.pruning.storage.manifest import MANIFEST, Digest, manifest_bytes, read_manifest
from megatron.pruning.storage.processes import World
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.small_files import new_beside, write_durably
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
    overwrite: bool,
    is_checkpoint: Callable[[Path], bool],
    world: World,
) -> None:
    """Write a whole checkpoint directory: every process its share of `files`, the first one also `beside`.

    The directory appears under `path` complete or not at all. Raises ValueError before the first byte when `path` is
    taken or the disk has no room.
    """
    mine = files[world.rank :: world.size]
    need = sum(file.nbytes for file in files)
    with _building(path, need, lambda: check_target(path, overwrite, is_checkpoint), world) as partial:
        if not partial.is_dir():
            raise ValueError(f"process {world.rank} cannot see {partial}: all need one file system under --save")
        total = sum(file.nbytes for file in mine)
        with contextlib.closing(Progress(f"writing {path}", total, show=world.rank == 0)) as progress:
            digests = {file.name: file.write(partial, progress) for file in mine}
        for source in {source for file in files for view in file.views.values() for source in view.sources()}:
            source.check_unchanged(source.path.stat())
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


def own_place(path: Path) -> Path:
    """Return a path without "..", which leads out of where a link leads and not of where it lies; its last name stays.

    Where directories before a ".." are not there yet, the system would not find the path at all before they are made.
    """
    if ".." not in path.parts:
        return path
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def check_target(path: Path, overwrite: bool, is_checkpoint: Callable[[Path], bool]) -> None:
    """Raise ValueError if `path` must not be replaced: unless `overwrite`, and it is a checkpoint."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"--save {path} exists and is not a directory: name another")
    if path.is_mount():
        raise ValueError(f"--save {path} is a mount point, which cannot be replaced: name a directory inside it")
    if any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"--save {path} exists: name another directory, or add --overwrite to replace it")
        if not is_checkpoint(path):
            raise ValueError(f"--save {path} holds something else than a checkpoint: --overwrite does not replace it")


@contextmanager
def _building(path: Path, need: int, check: Callable[[], None], world: World) -> Iterator[Path]:
    """Give a directory beside `path`, and at the end put it in its place; when anything fails, leave nothing behind.

    Nothing is removed but what this run has made: its names are random and made afresh, and a directory that turns up
    under `path` meanwhile stays. Locks only make a second run end early; what is right does not hang on them, for on
    many cluster file systems they bind one machine.
    """
    path = path.absolute()
    made, parents, hold = None, list[Path](), -1
    try:
        if world.rank == 0:
            parents = _make_parents(path)
            check()
            _tell_of_others(path)
            require_room(path.parent, need, f"--save {path}")
            made = new_beside(path, "partial", Path.mkdir)
            hold = hold_directory(made, tell=True)
        partial = path.with_name(world.share(made.name if made else ""))
        yield partial
        if made is not None:
            _sync_directories(made)
            _put_in_place(made, path, check)
            made = None
        world.barrier()
    except BaseException:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        for parent in parents:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
    finally:
        if hold >= 0:
            os.close(hold)


def require_room(folder: Path, need: int, what: str) -> None:
    """Raise ValueError, naming `what`, where the disk of a folder has less than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{what} needs {need / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there")


def _make_parents(path: Path) -> list[Path]:
    """Make the directories above `path` that are not there, and return them, the deepest first."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def hold_directory(directory: Path, tell: bool = False) -> int:
    """Lock a directory until the descriptor that is returned is closed: a sign that it is in use.

    Where the file system cannot, nothing is locked, and that is told if it is asked for. Raises BlockingIOError where
    another process has it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise
        if tell:
            where = f"the file system of {directory.parent} has no locks ({error.strerror})"
            print(f"note: {where}: another run to the same target is noticed only at its end", file=sys.stderr)
    return descriptor


def _tell_of_others(path: Path) -> None:
    """Look at what other runs with this target left beside it, and touch nothing of it.

    Raises ValueError when one of them is still writing.
    """
    for other in sorted(path.parent.glob(f".{glob.escape(path.name)}.*-????????")):
        try:
            os.close(hold_directory(other))
        except BlockingIOError:
            raise ValueError(f"--save {path}: another run is writing it ({other.name})") from None
        except OSError:
            continue  # no directory, or gone by now
        print(f"note: {other} is of a run that was killed: remove it if none is going on", file=sys.stderr)


def _put_in_place(partial: Path, path: Path, check: Callable[[], None]) -> None:
    """Give `partial` the name `path`, and make sure that it has it, before what was there is removed."""
    mine, old, hold = (partial / MANIFEST).read_bytes(), None, -1
    try:
        if not _rename_to_new(partial, path):
            seen = path.lstat()
            check()  # again: it may have turned up since the run began
            hold = hold_directory(path)
            old = _replace(partial, path, seen)
        _sync_directory(path.parent)
        if not (path / MANIFEST).is_file() or (path / MANIFEST).read_bytes() != mine:
            raise ValueError(f"--save {path}: another run has put its own checkpoint in the place of this one's")
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BlockingIOError:
        raise ValueError(f"--save {path}: another run is writing it") from None
    finally:
        if hold >= 0:
            os.close(hold)


def _rename_to_new(partial: Path, path: Path) -> bool:
    """Rename unless `path` is there: then return False. An empty directory does not count."""
    try:
        if not _renameat2(partial, path, _NOREPLACE):
            partial.rename(path)  # which replaces an empty directory, and fails on any other
        return True
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False


def _replace(partial: Path, path: Path, seen: os.stat_result) -> Path:
    """Put `partial` in the place of the directory `seen` under `path`, and return where that is now.

    Where the file system cannot exchange names, none has `path` between two renames; what was there is then beside it.
    Raises ValueError when another directory has come there instead.
    """
    if _renameat2(partial, path, _EXCHANGE):
        if not os.path.samestat(partial.lstat(), seen):
            _renameat2(partial, path, _EXCHANGE)
            raise ValueError(f"--save {path}: another run has put its own checkpoint there meanwhile")
        return partial
    old = new_beside(path, "replaced", Path.mkdir)
    path.rename(old)
    try:
        if not os.path.samestat(old.lstat(), seen):
            raise ValueError(f"--save {path}: another run has put its own checkpoint there meanwhile")
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    return old


_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2, from linux/fs.h


def _renameat2(one: Path, other: Path, flag: int) -> bool:
    """Rename as `flag` says, in one step; False where the system or the file system cannot (NFS is one).

    Raises OSError as `rename` does.
    """
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD of linux/fcntl.h
    if renameat2 is None:
        return False
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync_directories(top: Path) -> None:
    for directory, _, _ in os.walk(top):
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # a file system that makes a rename durable by itself, or not at all
            raise
    finally:
        os.close(descriptor)
