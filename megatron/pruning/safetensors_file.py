"""Files of safetensors: an 8-byte length, a JSON header of names, dtypes, shapes and offsets, then the bytes.

Format: https://github.com/huggingface/safetensors#format. Read without the library because its numpy side has no bf16
and its torch side would cost a second of start-up.
"""

import json
from pathlib import Path

from megatron.pruning.output import OutputFile
from megatron.pruning.views import File, Stored

_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_ALIGNMENT = 512  # of the first tensor, so that whole blocks can be written directly


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Return a view of every tensor of the file. Raises ValueError for a file that is cut short or not safetensors."""
    file = File(path)
    length_bytes = bytearray(8)
    file.read_into(memoryview(length_bytes), 0)
    length = int.from_bytes(length_bytes, "little")
    if length > min(_MAX_HEADER_BYTES, file.size - 8):
        raise ValueError(f"{path} claims a header of {length} bytes, but the file has {file.size}")
    raw = bytearray(length)
    file.read_into(memoryview(raw), 8)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {key: _tensor(file, 8 + length, key, entry) for key, entry in header.items()}
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} has no valid safetensors header: {error!r}") from error


def _tensor(file: File, data_start: int, key: str, entry: dict[str, object]) -> Stored:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(offsets) != 2:  # type: ignore[arg-type]
        raise ValueError(f"{file.path}: {key} has shape {shape} and offsets {offsets}")
    if dtype not in _DTYPES:
        raise ValueError(f"{file.path}: {key} has dtype {dtype}; only {', '.join(_DTYPES)} are read")
    begin, end = numbers[-2:]
    tensor = Stored(file, data_start + begin, tuple(numbers[:-2]), _DTYPES[str(dtype)])
    if tensor.nbytes != end - begin:
        raise ValueError(f"{file.path}: {key} of shape {shape} needs {tensor.nbytes} bytes, but has {end - begin}")
    return tensor


class SafetensorsFile(OutputFile):
    """A safetensors file of the views by key."""

    def lay_out(self, path: Path) -> dict[str, int]:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for key, view in self.views.items():
            offsets[key] = end
            end += view.nbytes
            header[key] = {"dtype": _NAMES[view.dtype], "shape": view.shape, "data_offsets": [offsets[key], end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
        return {key: 8 + len(raw) + offset for key, offset in offsets.items()}
