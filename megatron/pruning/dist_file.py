"""Files of torch.distributed.checkpoint (DCP): `.metadata` says where each chunk of each tensor lies in .distcp files.

`.metadata` is a pickle of a protocol that torch's weights-only unpickler does not read. `_Inert` stands in for every
class in it, and nothing else can be reached: unpickling builds plain records and runs no code of torch or anybody. Each
entry of a .distcp file is a whole file of torch.save, read as torch_file.py reads those.
"""

import functools
import io
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.pruning.output import OutputFile
from megatron.pruning.torch_file import DTYPES, data_offset, load_torch
from megatron.pruning.views import TORCH_NAMES, Bits, File, Index, Stored, View

METADATA = ".metadata"


class _Inert:
    """A record in the place of whatever class a pickle names."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _InertUnpickler(pickle.Unpickler):
    """Builds records only: every class is inert, a torch.Size a tuple, a dtype its name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name.isidentifier():
            return f"torch.{name}"  # a dtype: a string in its place cannot be called
        if module.split(".")[0] in ("torch", "pathlib", "megatron", "collections"):
            return type(name, (_Inert,), {})
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, or a bytes object (offsets and sizes empty), as one entry of a .distcp file."""

    path: Path
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor or bytes object: its shape and dtype (None: bytes) and its chunks."""

    shape: tuple[int, ...] | None
    dtype: str | None
    chunks: tuple[Chunk, ...]


def read_metadata(directory: Path) -> dict[str, Entry]:
    """Return what a DCP checkpoint holds, by name. Raises ValueError when its `.metadata` is not right."""
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            content = _InertUnpickler(file).load()
        shapes, dtypes, sizes = {}, {}, {}
        for name, entry in content.state_dict_metadata.items():
            shapes[name] = _numbers(entry.size) if hasattr(entry, "size") else None
            dtypes[name] = _dtype(entry.properties) if hasattr(entry, "properties") else None
            for chunk in getattr(entry, "chunks", ()):
                sizes[name, _numbers(chunk.offsets)] = _numbers(chunk.sizes)
        chunks: dict[str, list[Chunk]] = {}
        for index, place in content.storage_data.items():
            offsets = _numbers(getattr(index, "offset", None) or ())
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it names {place.relative_path}, outside its own directory")
            start, length = _numbers((place.offset, place.length))
            box = sizes.get((index.fqn, offsets), ())
            found = Chunk(directory / place.relative_path, start, length, offsets, box)
            chunks.setdefault(index.fqn, []).append(found)
        return {name: Entry(shape, dtypes[name], tuple(chunks.get(name, ()))) for name, shape in shapes.items()}
    except Exception as error:  # whatever a damaged pickle runs into
        raise ValueError(f"{path} is not the metadata of a checkpoint: {error}") from error


def _dtype(properties: Any) -> str | None:
    """Return the project's name of a tensor's dtype, None for one that no Llama weight has."""
    found = properties.dtype if hasattr(properties, "dtype") else properties.state[0]
    return {f"torch.{theirs}": ours for ours, theirs in TORCH_NAMES.items()}.get(found)


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} should be numbers from 0 on")
    return numbers


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: File, start: int, length: int) -> None:
        if start + length > file.size:
            raise ValueError(f"{file.path} has {file.size} bytes, but an entry of it ends at {start + length}")
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.length - self.position))
        self.file.read_into(view[:count], self.start + self.position)
        self.position += count
        return count


def load_object(chunk: Chunk) -> Any:
    """Return a bytes object: it is data, loaded as a rank file is, and lies in a list of one."""
    content = load_torch(chunk.path, _Window(File(chunk.path), chunk.start, chunk.length))
    return content[0] if isinstance(content, list) and len(content) == 1 else content


class StoredChunk(View):
    """One layer of a chunk (`layer` None: all of it); where its bytes lie is looked up when they are wanted."""

    def __init__(self, name: str, file: File, chunk: Chunk, layer: int | None, dtype: str) -> None:
        self.name, self.file, self.chunk, self.layer, self.dtype = name, file, chunk, layer, dtype
        self.shape = chunk.sizes if layer is None else chunk.sizes[1:]

    @functools.cached_property
    def _stored(self) -> Stored:
        chunk = self.chunk
        tensor = load_torch(self.file.path, _Window(self.file, chunk.start, chunk.length))
        offset = chunk.start + data_offset(self.file, self.name, tensor) + (self.layer or 0) * self.nbytes
        if (tuple(tensor.shape), DTYPES[tensor.dtype]) != (chunk.sizes, self.dtype):
            raise ValueError(
                f"{self.file.path}: {self.name} is {tuple(tensor.shape)} of {tensor.dtype}, "
                f"its metadata says {chunk.sizes} of {self.dtype}"
            )
        return Stored(self.file, offset, self.shape, self.dtype)

    def read(self, rows: Index) -> Bits:
        return self._stored.read(rows)


@functools.cache
def _envelope(shape: tuple[int, ...], dtype: str) -> tuple[bytes, int, bytes]:
    """Return a file of torch.save of one tensor as what stands before its data, their length, and what stands after."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "archive"
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=getattr(torch, TORCH_NAMES[dtype])), path)
        file = File(path)
        view = stored_bytes(file, load_torch(path))
        head, tail = bytearray(view[0]), bytearray(file.size - sum(view))
        file.read_into(memoryview(head), 0)
        file.read_into(memoryview(tail), sum(view))
    return bytes(head), view[1], bytes(tail)


def stored_bytes(file: File, tensor: torch.Tensor) -> tuple[int, int]:
    """Return where the data of a file's only tensor begins, and its length."""
    return data_offset(file, "tensor", tensor), tensor.numel() * tensor.element_size()


def object_bytes(value: Any) -> bytes:
    """Return a bytes object as DCP holds it: a file of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Piece:
    """A tensor to write: one layer of a stacked one (`layer`), or a whole one (None)."""

    name: str
    layer: int | None
    view: View

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of its chunk."""
        return self.view.shape if self.layer is None else (1, *self.view.shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Offsets of its chunk in the whole tensor."""
        return (self.layer or 0, *[0] * (len(self.sizes) - 1))


class DistFile(OutputFile):
    """A .distcp file of pieces, each one chunk, and of bytes objects by name."""

    def __init__(self, name: str, pieces: Sequence[Piece], objects: Mapping[str, bytes]) -> None:
        super().__init__(name, {f"{piece.name} {piece.layer}": piece.view for piece in pieces})
        self.pieces, self.objects = pieces, objects

    def places(self) -> Iterator[tuple[str, Piece | None, int, int]]:
        """Yield (name, piece or None for an object, start, length) of every entry, in file order."""
        start = 0
        for piece in self.pieces:
            head, size, tail = _envelope(piece.sizes, piece.view.dtype)
            length = len(head) + size + len(tail)
            yield piece.name, piece, start, length
            start += length
        for name, content in self.objects.items():
            yield name, None, start, len(content)
            start += len(content)

    def lay_out(self, path: Path) -> dict[str, int]:
        offsets = {}
        with path.open("wb") as file:
            for name, piece, start, _ in self.places():
                file.seek(start)
                if piece is None:
                    file.write(self.objects[name])
                    continue
                head, size, tail = _envelope(piece.sizes, piece.view.dtype)
                file.write(head)
                offsets[f"{name} {piece.layer}"] = file.tell()
                file.seek(size, io.SEEK_CUR)
                file.write(tail)
        return offsets


def metadata_bytes(files: Sequence[DistFile], layers: int) -> bytes:
    """Return the `.metadata` of these files; stacked tensors have `layers` layers."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, Any] = {}
    places = {}
    for file in files:
        for name, piece, start, length in file.places():
            place = _StorageInfo(Path(file.name).name, start, length)
            if piece is None:
                tensors[name] = BytesStorageMetadata()
                places[MetadataIndex(name)] = place
                continue
            whole = piece.sizes if piece.layer is None else (layers, *piece.sizes[1:])
            dtype = getattr(torch, TORCH_NAMES[piece.view.dtype])
            entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(whole), [])
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
            tensors.setdefault(name, entry).chunks.append(chunk)
            places[MetadataIndex(name, chunk.offsets)] = place
    return pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=places))
