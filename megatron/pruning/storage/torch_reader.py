"""Files of torch.save: read safely and lazily, written in one pass, and both without torch.

Such a file is a zip archive that keeps every tensor's storage, uncompressed, in an entry of its own, and a pickle that
says what is made of them. The pickle is read as data (see pickles.py) and the storages stay where they are: a
tensor is a `Tensor`, which tells where its bytes lie.
"""

import bisect
import contextlib
import io
import math
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.pruning.storage.dtypes import BY_STORAGE, BYTES
from megatron.pruning.storage.pickles import NotDataError, Record, read_pickle
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.views import Stored

# A pickle or a zip archive's directory may have this many bytes: several times what the largest Llama needs, its
# optimizer included.
MAX_HEADER_BYTES = 1 << 25
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch wrote first when its files were no archives
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name and its extra field
_DESCRIPTORS = (16, 24)  # bytes of the record that may follow an entry and repeats its checksum and sizes


class Window:
    """A file, or a part of one, as zipfile reads it: no more at once than a header may have."""

    def __init__(self, file: File, start: int = 0, length: int | None = None) -> None:
        length = file.size if length is None else length
        if start + length > file.size:
            raise ValueError(f"{file.path} has {file.size} bytes, but an entry of it ends at {start + length}")
        self.file, self.start, self.length, self.position = file, start, length, 0
        self.failure: OSError | None = None  # of the file system, which zipfile takes for the end of the file

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if self.position < 0:
            raise OSError("a place before the beginning")  # which zipfile expects of a short file
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        count = left if size is None or size < 0 else min(size, left)
        if count > MAX_HEADER_BYTES:
            raise ValueError(f"it has a header of {count:,} bytes, more than the {MAX_HEADER_BYTES:,} that are read")
        content = bytearray(count)
        try:
            self.file.read_into(memoryview(content), self.start + self.position)
        except OSError as error:
            self.failure = error
            raise
        self.position += count
        return bytes(content)


class _Archive:
    """The zip archive of torch.save: its entries by name, without the folder that all of them are in."""

    def __init__(self, window: Window | io.BytesIO) -> None:
        self.window, self.length = window, window.seek(0, io.SEEK_END)
        with zipfile.ZipFile(window) as archive:
            entries = archive.infolist()
            directory = archive.start_dir
        self.entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "data.pkl" not in self.entries:
            raise zipfile.BadZipFile("it has no data.pkl")
        if len(self.entries) != len(entries):
            raise ValueError("it holds an entry twice")
        self.starts = sorted([*(entry.header_offset for entry in entries), directory])  # what each entry ends before
        if "byteorder" in self.entries and (order := self.read("byteorder")) != b"little":
            raise ValueError(f"its byte order is {order[:20]!r}: only little-endian files are read")

    def place(self, name: str) -> tuple[int, int]:
        """Return the first byte, within the window, and the number of bytes of an entry."""
        if (entry := self.entries.get(name)) is None:
            raise ValueError(f"it lacks the entry {name}")
        if entry.header_offset < 0:  # the directory lies earlier than it says
            raise ValueError(f"the entry {name} is not where its directory says")
        self.window.seek(entry.header_offset)
        header = self.window.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
            raise ValueError(f"the entry {name} is not where its directory says")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"the entry {name} is compressed, which torch.save never does")
        name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        begin = entry.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
        if begin + entry.file_size > self.length:
            raise ValueError(f"the entry {name} ends at byte {begin + entry.file_size} of {self.length}")
        self._check_end(name, entry.header_offset, begin + entry.file_size)
        return begin, entry.file_size

    def _check_end(self, name: str, start: int, end: int) -> None:
        """Raise ValueError unless the next entry begins where this one ends: its header alone says where it begins."""
        following = bisect.bisect_right(self.starts, start)
        after = (self.starts[following] if following < len(self.starts) else self.length) - end
        self.window.seek(end)
        if after and not (after in _DESCRIPTORS and self.window.read(4) == b"PK\7\x08"):
            raise ValueError(f"the entry {name} does not end where the next one begins")

    def read(self, name: str) -> bytes:
        """Return the content of a small entry."""
        begin, size = self.place(name)
        self.window.seek(begin)
        content = self.window.read(size)
        # Where torch was told to leave the checksums out, and in holes that are filled later, it is 0.
        if self.entries[name].CRC not in (0, zlib.crc32(content)):
            raise ValueError(f"the checksum of the entry {name} is not that of its content")
        return content


@dataclass(frozen=True)
class _Storage:
    """What a pickle calls a storage: its entry, the class of its elements, and how many it holds."""

    archive: _Archive
    kind: str
    key: str
    elements: int


@dataclass(frozen=True)
class Tensor:
    """A tensor that `load_torch` left in its file: where it begins in a storage, and its strides, in elements."""

    storage: _Storage
    element: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str | None:
        """The project's name of its dtype, None for one that no Llama weight has."""
        return BY_STORAGE.get(self.storage.kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; 0 for one of a dtype that no Llama weight has."""
        return math.prod(self.shape) * BYTES.get(self.dtype or "", 0)

    def raw(self) -> bytes:
        """Return the bytes of its whole storage: for small ones, of any dtype."""
        return self.storage.archive.read(f"data/{self.storage.key}")

    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, in row-major order."""
        expected = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, expected, strict=True))


def load_torch(window: Window) -> Any:
    """Load a file of torch.save, each tensor as a `Tensor`; their data stays in the file (see `stored`).

    Raises ValueError for what is not such a file, is cut short, or holds anything but data.
    """
    with _said(window.file.path, window):
        return _unpickle(_Archive(window))


def pickle_of(path: Path, window: Window | io.BytesIO) -> bytes:
    """Return the pickle of a file of torch.save, which lies at `path` or in a part of it. Raises as `load_torch`."""
    with _said(path, window):
        return _Archive(window).read("data.pkl")


@contextlib.contextmanager
def _said(path: Path, window: Window | io.BytesIO) -> Iterator[None]:
    """Let an error say which file, or whose entry, it is about."""
    whole = isinstance(window, Window) and window.length == window.file.size
    what = f"{path} ({path.stat().st_size} bytes)" if whole else f"an entry of {path}"
    try:
        yield
    except NotDataError as error:
        raise ValueError(f"{path} holds more than data and was not loaded: {error}") from error
    except zipfile.BadZipFile as error:
        if isinstance(window, Window) and window.failure is not None:
            raise window.failure from error
        window.seek(0)
        if window.read(len(_MAGIC)) == _MAGIC:
            raise ValueError(
                f"{what} was saved before torch 1.6, in a format of its own: load it with torch and save it again"
            ) from error
        raise ValueError(f"{what} is not a complete file of torch.save: {error}") from error
    except (ValueError, RuntimeError, LookupError) as error:  # RuntimeError: as zipfile says what it does not read
        raise ValueError(f"{what} is damaged: {error}") from error


def _unpickle(archive: _Archive) -> Any:
    def storage(label: Any) -> _Storage:
        what, kind, key, _, elements = label
        if what != "storage" or not isinstance(kind, str) or not isinstance(key, str) or type(elements) is not int:
            raise ValueError("it names a storage that is none")
        return _Storage(archive, kind, key, elements)

    def tensor(storage: Any, element: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        made = Tensor(storage, element, tuple(shape), tuple(strides))
        numbers = (element, *made.shape, *made.strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("it holds a tensor of a strange kind")
        return made

    makers: Mapping[str, Callable[..., Any]] = {
        "argparse.Namespace": Namespace,
        "torch.Size": tuple,
        "collections.OrderedDict": lambda *items: Record("collections.OrderedDict", items) if items else {},
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        # A tensor with attributes, or of a kind of its own: what would make the plain tensor, and its arguments.
        "torch._tensor._rebuild_from_type_v2": lambda make, kind, args, *_: (
            makers[make](*args) if make in makers else Record(str(kind), args)
        ),
    }
    return read_pickle(archive.read("data.pkl"), makers, storage)


def data_offset(file: File, key: str, tensor: Any) -> int:
    """Return where the data of a tensor that `load_torch` left in `file`, or in a window of it, begins there.

    Raises ValueError for what no Llama weight is, and for a tensor that its storage does not hold.
    """
    if not isinstance(tensor, Tensor):
        kind = tensor.name if isinstance(tensor, Record) else type(tensor).__name__
        raise ValueError(f"{file.path}: {key} is {kind}, not a tensor")
    if tensor.dtype is None:
        raise ValueError(f"{file.path}: {key} is of {tensor.storage.kind}; only {', '.join(BY_STORAGE)} are read")
    if len(tensor.shape) != len(tensor.strides) or not tensor.is_contiguous():
        raise ValueError(f"{file.path}: {key} of shape {tensor.shape} is not contiguous (strides {tensor.strides})")
    try:
        begin, size = tensor.storage.archive.place(f"data/{tensor.storage.key}")
    except ValueError as error:
        raise ValueError(f"{file.path} is damaged: {error}") from error
    start, width = tensor.element * BYTES[tensor.dtype], BYTES[tensor.dtype]
    if size != tensor.storage.elements * width or start + tensor.nbytes > size:
        raise ValueError(
            f"{file.path}: {key} of shape {tensor.shape} from element {tensor.element} on does not fit its storage, of "
            f"{tensor.storage.elements} elements in {size} bytes"
        )
    return begin + start


def stored(file: File, key: str, tensor: Any) -> Stored:
    """Return the view of a tensor that `load_torch` left in `file`. Raises ValueError for what no Llama weight is."""
    offset = data_offset(file, key, tensor)
    return Stored(file, offset, tensor.shape, tensor.dtype)
