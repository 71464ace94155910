"""Files that are read: at any place, by several threads, and the same file from the first byte to the last.

A file that another program replaces or changes while it is read would give weights of two models, so each has an
identity, taken when it is first seen and compared whenever it is opened again and at the end.
"""

import contextlib
import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path

from megatron.pruning.storage.small_files import refuse_pointer, require_plain

LARGEST_POINTER = 1024  # bytes of what git-lfs leaves in the place of a file
MOST_OPEN = 64  # files at once: checkpoints have thousands, and a process may have 256


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return what tells a file from another that has come into its place, or from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class File:
    """A file for positioned reads; it is opened when a byte is wanted, and may be closed again between two reads."""

    def __init__(self, path: Path) -> None:
        require_plain(path)
        self.number = next(_numbers)
        self.path, status = path, path.stat()
        self.identity, self.size = _identity(status), status.st_size
        if self.size < LARGEST_POINTER:
            refuse_pointer(path, path.read_bytes())

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` on; raises ValueError if the file ends first."""
        done = 0
        with _open_files.lent(self) as descriptor:
            while done < len(buffer):
                try:
                    count = os.preadv(descriptor, [buffer[done:]], offset + done)
                except OSError as error:  # says the path, which preadv does not know
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                if count == 0:
                    raise ValueError(f"{self.path} ends at byte {offset + done}, {len(buffer) - done} bytes too early")
                done += count

    def check_unchanged(self, status: os.stat_result) -> None:
        """Raise ValueError unless `status`, of its path or a descriptor, is that of the file as it was at first."""
        if _identity(status) != self.identity:
            raise ValueError(f"{self.path} was changed or replaced while it was read: nothing was saved; start again")

    def __del__(self) -> None:
        # This may run at any moment, also while the table below is looked through: it is told, and closes it later.
        if (number := getattr(self, "number", None)) is not None:
            _open_files.unread.append(number)


class _OpenFiles:
    """The descriptors of the files that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # by the number of a File
        self.unread: deque[int] = deque()  # numbers of Files that nobody has any more
        self._uses: dict[int, int] = {}

    @contextlib.contextmanager
    def lent(self, file: File) -> Iterator[int]:
        """Lend the descriptor of `file`, which stays open meanwhile."""
        key = file.number
        with self._lock:
            while self.unread:
                self._close(self.unread.popleft())
            if key not in self._descriptors:
                self._close_idle(MOST_OPEN - 1)
                self._descriptors[key] = _opened(file)
            self._descriptors.move_to_end(key)
            self._uses[key] = self._uses.get(key, 0) + 1
            descriptor = self._descriptors[key]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._uses[key] -= 1

    def _close_idle(self, most: int) -> None:
        """Close those that were not used for longest, until there are at most so many or all are in use."""
        for key in [key for key in self._descriptors if not self._uses.get(key)]:
            if len(self._descriptors) <= most:
                return
            self._close(key)

    def _close(self, key: int) -> None:
        self._uses.pop(key, None)
        if (descriptor := self._descriptors.pop(key, None)) is not None:
            os.close(descriptor)


def _opened(file: File) -> int:
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file.check_unchanged(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


_open_files, _numbers = _OpenFiles(), itertools.count()
