"""Files of safetensors: an 8-byte length, a JSON header of names, dtypes, shapes and offsets, then the bytes.

Format: https://github.com/huggingface/safetensors#format. Read without the library because its numpy side has no bf16
and its torch side would cost a second of start-up.
"""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from megatron.pruning.storage.dtypes import BY_SAFETENSORS, DTYPES
from megatron.pruning.storage.output import OutputFile
from megatron.pruning.storage.small_files import parse_json
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.views import Stored

_MAX_HEADER_BYTES = 10_000_000  # ten times what the largest Llama needs; the format would allow ten times more
_ALIGNMENT = 64  # of the first tensor, for readers that map the file


def read_safetensors(path: Path, ignored: re.Pattern[str] | None = None) -> dict[str, Stored]:
    """Return a view of every tensor of the file, but those whose names are `ignored`, whatever they are.

    Raises ValueError for a file that is cut short or not safetensors.
    """
    file = File(path)
    length_bytes = bytearray(8)
    file.read_into(memoryview(length_bytes), 0)
    length = int.from_bytes(length_bytes, "little")
    if length > file.size - 8:
        raise ValueError(f"{path} claims a header of {length} bytes, but the file has {file.size}")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"{path} has a header of {length:,} bytes: more than {_MAX_HEADER_BYTES:,} is no Llama's")
    raw = bytearray(length)
    file.read_into(memoryview(raw), 8)
    header = parse_json(bytes(raw), f"the header of {path}")
    header.pop("__metadata__", None)
    # As the format wants it: the tensors fill the rest of the file, without a gap and without sharing a byte.
    places = {key: _place(path, key, entry) for key, entry in header.items()}
    end = 0
    for key, (begin, stop) in sorted(places.items(), key=lambda item: item[1]):
        if begin != end:
            raise ValueError(
                f"{path}: {key} begins at byte {8 + length + begin}, but what lies before it ends at {8 + length + end}"
            )
        end = stop
    if 8 + length + end != file.size:
        raise ValueError(f"{path} has {file.size} bytes, but its tensors end at byte {8 + length + end}")
    return {
        key: _tensor(file, 8 + length, key, entry)
        for key, entry in header.items()
        if ignored is None or not ignored.fullmatch(key)
    }


def _place(path: Path, key: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{path}: {key} has offsets {reprlib.repr(offsets)}")
    return offsets[0], offsets[1]


def _tensor(file: File, data_start: int, key: str, entry: Any) -> Stored:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not _are_counts(shape):
        raise ValueError(f"{file.path}: {key} has shape {reprlib.repr(shape)}")
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise ValueError(
            f"{file.path}: {key} has dtype {reprlib.repr(dtype)}; only {', '.join(BY_SAFETENSORS)} are read"
        )
    if len(shape) not in (1, 2):
        raise ValueError(f"{file.path}: {key} has shape {shape}: a Llama's have one or two dims")
    begin, end = _place(file.path, key, entry)
    tensor = Stored(file, data_start + begin, tuple(shape), BY_SAFETENSORS[dtype])
    if tensor.nbytes != end - begin:
        raise ValueError(f"{file.path}: {key} of shape {shape} needs {tensor.nbytes} bytes, but has {end - begin}")
    return tensor


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


class SafetensorsFile(OutputFile):
    """A safetensors file of the views by key."""

    def parts(self, checksums: Mapping[str, int]) -> Iterator[bytes | str]:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, view in self.views.items():
            start, end = end, end + view.nbytes
            header[key] = {"dtype": DTYPES[view.dtype].safetensors, "shape": view.shape, "data_offsets": [start, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
        yield len(raw).to_bytes(8, "little") + raw
        yield from self.views
