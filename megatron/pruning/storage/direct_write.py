"""The streaming core: a file whose every byte is known before it is written, filled by a few threads.

A file is a row of segments: bytes as they are, and tensors that are pulled through their views. Threads take extents of
a few MiB in turn, gather each into a buffer of their own, note its checksum and write it past the page cache (O_DIRECT)
where the file system can. So every format costs the same: one read, one gather, one checksum, one direct write.

Buffered writing costs more than all of these together: the kernel finds, zeroes and fills a page for every 4 KiB.
"""

import bisect
import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.pruning.storage.manifest import Digest
from megatron.pruning.storage.views import BLOCK_BYTES, Bits, View

EXTENT_BYTES = BLOCK_BYTES
# Direct writes must be aligned to this in memory, in the file and in length; no device wants more than a page.
_ALIGNMENT = 4096
# How a file system says that it does not have an optional call. (EBADF and ENODEV come from FUSE's.)
UNSUPPORTED = frozenset(
    (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EBADF, errno.ENODEV)
)
# More than processors, because some threads wait for the disk.
_THREADS = min(8, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `stop` of a file: a text, or the tensor called `name`."""

    start: int
    stop: int
    name: str | None
    content: bytes | View


def fill(path: Path, segments: Sequence[Segment], advance: Callable[[int], None]) -> list[Digest]:
    """Write the file at `path` and return the digest of each segment. The caller makes it durable.

    `advance` is told of every so many bytes written. Raises OSError, naming `path`, when the disk is full or fails.
    """
    size = segments[-1].stop
    with _named(path), path.open("w+b", buffering=0) as file:
        descriptor = file.fileno()
        _reserve(descriptor, size)
        with contextlib.suppress(OSError):  # tmpfs, or another that has no direct writes
            _set_direct(descriptor, True)
        work = _Work(descriptor, segments, advance)
        threads = min(_THREADS, -(-size // EXTENT_BYTES) or 1)
        with ThreadPoolExecutor(threads) as pool:
            try:
                for done in [pool.submit(work.run) for _ in range(threads)]:
                    done.result()
            finally:
                work.ended = True
        os.ftruncate(descriptor, size)
    return work.digests


def _reserve(descriptor: int, size: int) -> None:
    """Take the room on the disk, so that a full one is met here and not at the last extent."""
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _set_direct(descriptor: int, direct: bool) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about: calls on descriptors do not know."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


class _Work:
    """The extents of a file, which threads take in turn."""

    def __init__(self, descriptor: int, segments: Sequence[Segment], advance: Callable[[int], None]) -> None:
        self.descriptor, self.segments, self.advance = descriptor, segments, advance
        self.starts = [segment.start for segment in segments]
        self.size = segments[-1].stop
        self.ended = False
        self.digests = [Digest() for _ in segments]
        self._extents = iter(range(0, self.size, EXTENT_BYTES))
        # Pieces of the digests, (segment, digest), by extent: they arrive in any order and are added up in file order.
        self._pieces: dict[int, list[tuple[int, Digest]]] = {}
        self._added = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Write extents until there are none."""
        memory = mmap.mmap(-1, EXTENT_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # begins on a page
        buffer = np.frombuffer(memory, np.uint8)
        try:
            while (start := self._next()) is not None:
                length = min(EXTENT_BYTES, self.size - start)
                pieces = list(self._gather(buffer[:length], start))
                padded = -(-length // _ALIGNMENT) * _ALIGNMENT  # the file is cut to its size at the end
                buffer[length:padded] = 0
                self._write(memoryview(buffer)[:padded], start)
                self._add(start, pieces)
                self.advance(sum(digest.length for index, digest in pieces if self.segments[index].name))
        except BaseException:
            self.ended = True
            raise

    def _next(self) -> int | None:
        with self._lock:
            return None if self.ended else next(self._extents, None)

    def _gather(self, buffer: Bits, start: int) -> Iterator[tuple[int, Digest]]:
        """Bring the bytes from `start` on into `buffer`, and yield the digest of each segment's piece."""
        index, at, stop = bisect.bisect_right(self.starts, start) - 1, start, start + len(buffer)
        while at < stop:
            segment = self.segments[index]
            end = min(segment.stop, stop)
            if end > at:
                out, begin = buffer[at - start : end - start], at - segment.start
                if isinstance(segment.content, bytes):
                    out[:] = np.frombuffer(segment.content, np.uint8, end - at, begin)
                else:
                    segment.content.read_bytes(begin, out)
                yield index, Digest.of(memoryview(out))
            at, index = end, index + 1

    def _write(self, data: memoryview, offset: int) -> None:
        direct = fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & os.O_DIRECT  # before another thread takes it back
        try:
            _write_all(self.descriptor, data, offset)
        except OSError as error:
            if error.errno not in UNSUPPORTED or not direct:
                raise
            _set_direct(self.descriptor, False)  # the file system took the flag, but not this write
            _write_all(self.descriptor, data, offset)

    def _add(self, start: int, pieces: list[tuple[int, Digest]]) -> None:
        with self._lock:
            self._pieces[start] = pieces
            while (ready := self._pieces.pop(self._added, None)) is not None:
                for index, digest in ready:
                    self.digests[index] += digest
                self._added += EXTENT_BYTES


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write `data` in as many calls as it takes; a file system that takes nothing and says nothing has failed."""
    while data:
        if (count := os.pwrite(descriptor, data, offset)) <= 0:
            raise OSError(errno.EIO, "the file system takes no more bytes and does not say why")
        data, offset = data[count:], offset + count


def finish(path: Path, changes: Sequence[tuple[int, bytes]]) -> None:
    """Write small changes, (offset, bytes), into a file that `fill` wrote, and make it durable."""
    with _named(path), path.open("r+b", buffering=0) as file:
        for offset, content in changes:
            _write_all(file.fileno(), content, offset)
        os.fsync(file.fileno())
