"""What torch.save writes, written without torch: a pickle that names torch's classes, in a zip that holds the storages.

The zip is laid out before any tensor is read, and its checksums, which torch itself does not look at, are filled in
once they are known: Python's zipfile and `unzip -t` find the files whole. Importing torch would cost more time than a
billion parameters do, and most of the memory.

Formats: torch/serialization.py (_save, persistent_id), torch/_utils.py (_rebuild_tensor_v2); the zip of APPNOTE.TXT.
"""

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.pruning.storage.dtypes import DTYPES
from megatron.pruning.storage.views import View

_FOLDER = "archive/"
_ALIGNMENT = 64  # of each storage in the file, as torch has it
_4G = 0xFFFFFFFF
_LOCAL, _CENTRAL = "<4s5H3L2H", "<4s6H3L5H2L"
_DATE = 0x21  # 1980-01-01, the first that zip knows: the same bytes whenever they are written


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names and this process need not have."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """An object that a pickle makes by calling `maker` with `args`."""

    maker: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Built:
    """An object that a pickle makes without arguments and gives a state (None: no state)."""

    kind: Global
    state: Any = None


@dataclass(frozen=True, eq=False)
class _Storage:
    """The storage that holds just one tensor."""

    kind: Global
    key: str
    elements: int


_Base: Any = pickle._Pickler  # C's has no place for the classes above


class _Pickler(_Base):  # type: ignore[misc]
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return "storage", value.kind, value.key, "cpu", value.elements
        return None

    def _save_global(self, value: Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    def _save_made(self, value: Made) -> None:
        self.save(value.maker)
        self.save(value.args)
        self.write(pickle.REDUCE)
        self.memoize(value)

    def _save_built(self, value: Built) -> None:
        self.save(value.kind)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.memoize(value)
        if value.state is not None:
            self.save(value.state)
            self.write(pickle.BUILD)

    dispatch: Mapping[type, Callable[..., None]] = {
        **_Base.dispatch, Global: _save_global, Made: _save_made, Built: _save_built,
    }  # fmt: skip


def pickled(value: Any) -> bytes:
    """Return a pickle of protocol 2, as torch writes it."""
    file = io.BytesIO()
    _Pickler(file, 2).dump(value)
    return file.getvalue()


def tensor(view: View, number: int, shape: Sequence[int] | None = None) -> Made:
    """Return the tensor whose bits are `view`'s and whose storage is entry `number`; it may have another shape."""
    shape = tuple(view.shape if shape is None else shape)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    storage = _Storage(Global("torch", DTYPES[view.dtype].storage), str(number), math.prod(shape))
    hooks: OrderedDict[str, Any] = OrderedDict()
    return Made(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, hooks))


def dtype_of(view: View) -> Global:
    """Return the dtype of a view as torch names it."""
    return Global("torch", DTYPES[view.dtype].torch)


def archive(value: Any, storages: Mapping[str, int], checksums: Mapping[str, int]) -> Iterator[bytes | str]:
    """Yield a file of torch.save of `value`: bytes as they are, and a name of `storages` where its bytes lie.

    `storages` has the bytes of each storage, numbered in this order, and `checksums` their crc32 as far as it is known.
    """
    texts = {"data.pkl": pickled(value), "byteorder": b"little"}
    entries: list[tuple[str, int, str | bytes]] = [(name, len(text), text) for name, text in texts.items()]
    entries += [(f"data/{i}", size, name) for i, (name, size) in enumerate(storages.items())]
    entries.append(("version", 2, b"3\n"))
    at, directory = 0, []
    for entry, size, content in entries:
        name = (_FOLDER + entry).encode()
        crc = zlib.crc32(content) if isinstance(content, bytes) else checksums.get(content, 0)
        large = struct.pack("<2H2Q", 1, 16, size, size) if size >= _4G else b""
        padding = -(at + struct.calcsize(_LOCAL) + len(name) + len(large) + 4) % _ALIGNMENT
        extra = large + struct.pack("<2H", 0x4246, padding) + bytes(padding)
        sizes = (_4G, _4G) if large else (size, size)
        header = struct.pack(_LOCAL, b"PK\3\4", 45, 0, 0, 0, _DATE, crc, *sizes, len(name), len(extra)) + name + extra
        directory.append(_central(name, crc, size, at))
        yield header
        yield content
        at += len(header) + size
    yield _end(b"".join(directory), len(entries), at)


def _central(name: bytes, crc: int, size: int, offset: int) -> bytes:
    """Return an entry of a zip's central directory."""
    large = [size, size] * (size >= _4G) + [offset] * (offset >= _4G)
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    fields = (min(size, _4G), min(size, _4G), len(name), len(extra), 0, 0, 0, 0, min(offset, _4G))
    return struct.pack(_CENTRAL, b"PK\1\2", 45, 45, 0, 0, 0, _DATE, crc, *fields) + name + extra


def _end(directory: bytes, count: int, offset: int) -> bytes:
    """Return the central directory, which begins at `offset`, and all that follows it."""
    size = len(directory)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, offset + size, 1)
    short = min(count, 0xFFFF)
    return directory + end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short, short, size, min(offset, _4G), 0)
