"""Files of torch.distributed.checkpoint (DCP): `.metadata` says where each chunk of each tensor lies in .distcp files.

`.metadata` is a pickle, read as data (see pickles.py). Each entry of a .distcp file is a whole file of torch.save,
read as torch_reader.py reads those.
"""

import functools
import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.pruning.storage.dtypes import BY_TORCH_NAME
from megatron.pruning.storage.output import OutputFile
from megatron.pruning.storage.pickles import NotDataError, Record, read_pickle
from megatron.pruning.storage.small_files import read_small
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.torch_reader import MAX_HEADER_BYTES, Window, data_offset, load_torch
from megatron.pruning.storage.torch_writer import Built, Global, Made, archive, dtype_of, pickled, tensor
from megatron.pruning.storage.views import Bits, Index, Stored, View

METADATA = ".metadata"


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
    """A tensor or bytes object: its shape and dtype (None: bytes), and its chunks by their offsets."""

    shape: tuple[int, ...] | None
    dtype: str | None
    chunks: dict[tuple[int, ...], Chunk] = field(default_factory=dict)


def read_metadata(directory: Path) -> dict[str, Entry]:
    """Return what a DCP checkpoint holds, by name. Raises ValueError when its `.metadata` is not right."""
    path = directory / METADATA
    try:
        return _entries(directory, read_pickle(read_small(path, MAX_HEADER_BYTES), {"torch.Size": tuple}))
    except NotDataError as error:
        raise ValueError(f"{path} holds more than data and was not loaded: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # whatever is not the expected record
        raise ValueError(f"{path} is not the metadata of a checkpoint: {error}") from error


def _entries(directory: Path, content: Record) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    sizes = {}
    for name, entry in content["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise ValueError(f"it names something {reprlib.repr(name)}, which is not text")
        is_tensor = isinstance(entry.state, dict) and "chunks" in entry.state
        entries[name] = Entry(_numbers(entry["size"]), _dtype(entry["properties"])) if is_tensor else Entry(None, None)
        for chunk in entry["chunks"] if is_tensor else ():
            offsets, box = _numbers(chunk["offsets"]), _numbers(chunk["sizes"])
            if not len(offsets) == len(box) == len(entries[name].shape or ()):
                raise ValueError(f"{name} of shape {entries[name].shape} has a chunk at {offsets} of {box}")
            sizes[name, offsets] = box
    places: list[tuple[str, int, int, str]] = []
    for index, place in content["storage_data"].items():
        name, offsets, file = index["fqn"], _numbers(index.state.get("offset") or ()), place["relative_path"]
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"it names {file}, outside its own directory")
        start, length = _numbers((place["offset"], place["length"]))
        if name not in entries or offsets in entries[name].chunks:
            raise ValueError(f"it places {name} at {offsets} twice, or without saying what it is")
        box = sizes.get((name, offsets), ())
        entries[name].chunks[offsets] = Chunk(directory / file, start, length, offsets, box)
        places.append((file, start, start + length, name))
    for before, after in itertools.pairwise(sorted(places)):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(f"{before[3]} and {after[3]} share bytes of {after[0]} from {after[1]} on")
    return entries


def _dtype(properties: Record) -> str | None:
    """Return the project's name of a tensor's dtype, None for one that no Llama weight has."""
    found = properties["dtype"] if isinstance(properties.state, dict) else properties.state[0]
    return BY_TORCH_NAME.get(found)


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} should be numbers from 0 on")
    return numbers


def load_object(chunk: Chunk) -> Any:
    """Return a bytes object: it is data, loaded as a rank file is, and lies in a list of one."""
    content = load_torch(Window(File(chunk.path), chunk.start, chunk.length))
    return content[0] if isinstance(content, list) and len(content) == 1 else content


class StoredChunk(View):
    """One layer of a chunk (`layer` None: all of it); where its bytes lie is looked up when they are wanted."""

    def __init__(self, name: str, file: File, chunk: Chunk, layer: int | None, dtype: str) -> None:
        self.name, self.file, self.chunk, self.layer, self.dtype = name, file, chunk, layer, dtype
        self.shape = chunk.sizes if layer is None else chunk.sizes[1:]

    @functools.cached_property
    def _stored(self) -> Stored:
        chunk = self.chunk
        tensor = load_torch(Window(self.file, chunk.start, chunk.length))
        offset = chunk.start + data_offset(self.file, self.name, tensor) + (self.layer or 0) * self.nbytes
        if (tensor.shape, tensor.dtype) != (chunk.sizes, self.dtype):
            raise ValueError(
                f"{self.file.path}: {self.name} is {tensor.shape} of {tensor.dtype}, "
                f"its metadata says {chunk.sizes} of {self.dtype}"
            )
        return Stored(self.file, offset, self.shape, self.dtype)

    def read_into(self, rows: Index, out: Bits) -> None:
        self._stored.read_into(rows, out)

    def sources(self) -> Iterator[File]:
        yield self.file


def object_bytes(value: Any) -> bytes:
    """Return a bytes object as DCP holds it: a file of torch.save."""
    return b"".join(part for part in archive(value, {}, {}) if isinstance(part, bytes))


@dataclass(frozen=True)
class Piece:
    """A tensor to write: one layer of a stacked one (`layer`), or a whole one (None)."""

    name: str
    layer: int | None
    view: View

    @property
    def key(self) -> str:
        """Name of the piece in its file."""
        return f"{self.name} {self.layer}"

    def parts(self, checksums: Mapping[str, int]) -> Iterator[bytes | str]:
        """Yield the piece as a file of torch.save of its own; see OutputFile."""
        return archive(tensor(self.view, 0, self.sizes), {self.key: self.view.nbytes}, checksums)

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
        super().__init__(name, {piece.key: piece.view for piece in pieces})
        self.pieces, self.objects = pieces, objects

    def places(self) -> Iterator[tuple[str, Piece | None, int, int]]:
        """Yield (name, piece or None for an object, start, length) of every entry, in file order."""
        start = 0
        for piece in self.pieces:
            between = sum(len(part) for part in piece.parts({}) if isinstance(part, bytes))
            yield piece.name, piece, start, between + piece.view.nbytes
            start += between + piece.view.nbytes
        for name, content in self.objects.items():
            yield name, None, start, len(content)
            start += len(content)

    def parts(self, checksums: Mapping[str, int]) -> Iterator[bytes | str]:
        for piece in self.pieces:
            yield from piece.parts(checksums)
        yield from self.objects.values()


def _checkpoint_class(name: str, module: str = "metadata") -> Global:
    return Global(f"torch.distributed.checkpoint.{module}", name)


def _size(numbers: Sequence[int]) -> Made:
    return Made(Global("torch", "Size"), (tuple(numbers),))


def metadata_bytes(files: Sequence[DistFile], layers: int) -> bytes:
    """Return the `.metadata` of these files; stacked tensors have `layers` layers.

    The records are those of torch/distributed/checkpoint/metadata.py, with the state that each pickles itself with.
    """
    index, info = _checkpoint_class("MetadataIndex"), _checkpoint_class("_StorageInfo", "filesystem")
    strided = Made(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Made(_checkpoint_class("_MEM_FORMAT_ENCODING"), (0,))
    tensors: dict[str, Built] = {}
    places = {}
    for file in files:
        for name, piece, start, length in file.places():
            place = Built(info, {"relative_path": Path(file.name).name, "offset": start, "length": length})
            if piece is None:
                tensors[name] = Built(_checkpoint_class("BytesStorageMetadata"))
                places[Built(index, {"fqn": name, "index": None})] = place
                continue
            if name not in tensors:
                whole = piece.sizes if piece.layer is None else (layers, *piece.sizes[1:])
                # dtype, layout, requires_grad, memory format, pinned memory
                properties = (dtype_of(piece.view), strided, False, contiguous, False)
                state = {"properties": Built(_checkpoint_class("TensorProperties"), properties), "size": _size(whole)}
                tensors[name] = Built(_checkpoint_class("TensorStorageMetadata"), {**state, "chunks": []})
            chunk = {"offsets": _size(piece.offsets), "sizes": _size(piece.sizes)}
            tensors[name].state["chunks"].append(Built(_checkpoint_class("ChunkStorageMetadata"), chunk))
            places[Built(index, {"fqn": name, "index": None, "offset": chunk["offsets"]})] = place
    whole_state = {"state_dict_metadata": tensors, "planner_data": None, "storage_data": places}
    return pickled(Built(_checkpoint_class("Metadata"), {**whole_state, "storage_meta": None, "version": None}))
