"""Lazy tensors: what a weight is made of, read a block of rows at a time.

A `View` has a shape, a dtype and `read(rows)`. `Stored` reads a tensor that lies in a file; `take`, `concat` and `cast`
build on other views without touching a byte. A writer pulls each output tensor through its view in blocks of about one
MiB (`blocks`), so a conversion or a pruning needs the memory of a few blocks, whatever the size of the model.

Values are moved as raw bits (signed integers of the element's width), so every bf16, fp16 and fp32 pattern, NaN
payloads included, arrives as it left.
"""

import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.intp]
Bits = NDArray[Any]

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BITS: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 2: np.dtype("<i2")}
BLOCK_BYTES = 1 << 20
# Two runs of rows closer than this are read in one go: a seek costs more than the bytes between them.
READ_GAP_BYTES = 1 << 16


class View(ABC):
    """A one- or two-dimensional tensor that is read by rows."""

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def read(self, rows: Index) -> Bits:
        """Return rows `rows` (any order, repeats allowed) as bits, shape [len(rows), *self.shape[1:]]."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape[0] * self.row_bytes


class File:
    """A file opened for positioned reads, once, when the first byte is wanted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._descriptor: int | None = None
        self._opening = threading.Lock()

    def _open(self) -> int:
        with self._opening:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptor

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` on; raises ValueError if the file ends first."""
        done, descriptor = 0, self._open()
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{self.path} ends at byte {offset + done}, {len(buffer) - done} bytes too early")
            done += count

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)


class Stored(View):
    """A contiguous, row-major tensor at byte `offset` of a file."""

    def __init__(self, file: File, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype
        if len(shape) not in (1, 2):
            raise ValueError(f"{file.path} holds a tensor of shape {shape}: a Llama's have one or two dims")
        if offset < 0 or offset + self.nbytes > file.size:
            raise ValueError(f"{file.path} has {file.size} bytes, but a tensor of it ends at {offset + self.nbytes}")

    def read(self, rows: Index) -> Bits:
        out: Bits = np.empty((len(rows), *self.shape[1:]), BITS[BYTES[self.dtype]])
        gap = READ_GAP_BYTES // max(self.row_bytes, 1) + 1
        steps = np.diff(rows)
        bounds = [0, *(np.flatnonzero((steps < 0) | (steps > gap)) + 1).tolist(), len(rows)]
        for start, stop in itertools.pairwise(bounds):
            first, last = int(rows[start]), int(rows[stop - 1])
            if last - first == stop - start - 1 and (steps[start : stop - 1] == 1).all():
                self._read_run(first, out[start:stop])
            else:
                run = np.empty((last - first + 1, *self.shape[1:]), out.dtype)
                self._read_run(first, run)
                np.take(run, rows[start:stop] - first, axis=0, out=out[start:stop], mode="clip")
        return out

    def _read_run(self, first: int, out: Bits) -> None:
        self.file.read_into(memoryview(out.reshape(-1).view(np.uint8)), self.offset + first * self.row_bytes)


class Taken(View):
    """Rows (`axis` 0) or columns (`axis` 1) of another view."""

    def __init__(self, parent: View, axis: int, index: Index) -> None:
        self.parent, self.axis, self.index, self.dtype = parent, axis, index, parent.dtype
        self.shape = tuple(len(index) if i == axis else n for i, n in enumerate(parent.shape))

    def read(self, rows: Index) -> Bits:
        if self.axis == 0:
            return self.parent.read(self.index[rows])
        block = self.parent.read(rows)
        out: Bits = np.empty((len(rows), len(self.index)), block.dtype)
        np.take(block, self.index, axis=1, out=out, mode="clip")
        return out


class Concatenated(View):
    """Views of one dtype side by side along `axis`."""

    def __init__(self, parts: Sequence[View], axis: int) -> None:
        self.parts, self.axis, self.dtype = parts, axis, parts[0].dtype
        sizes = [part.shape[axis] for part in parts]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.shape = tuple(sum(sizes) if i == axis else n for i, n in enumerate(parts[0].shape))

    def read(self, rows: Index) -> Bits:
        if self.axis == 1:
            return np.concatenate([part.read(rows) for part in self.parts], axis=1)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        out: Bits = np.empty((len(rows), *self.shape[1:]), BITS[BYTES[self.dtype]])
        for part in np.unique(owner):
            mine = owner == part
            out[mine] = self.parts[part].read(rows[mine] - self.starts[part])
        return out


class Cast(View):
    """Another view in another dtype, rounded to nearest even as torch rounds."""

    def __init__(self, parent: View, dtype: str) -> None:
        self.parent, self.shape, self.dtype = parent, parent.shape, dtype

    def read(self, rows: Index) -> Bits:
        import torch  # only a change of dtype needs it; a plain move of bits starts without

        before, after = (getattr(torch, TORCH_NAMES[dtype]) for dtype in (self.parent.dtype, self.dtype))
        values = torch.from_numpy(self.parent.read(rows)).view(before)
        rounded = values.to(after)
        if after == torch.float16 and not torch.equal(rounded.isfinite(), values.isfinite()):
            raise ValueError(f"a weight of magnitude {float(values.abs().max()):.3g} does not fit fp16: choose bf16")
        result: Bits = rounded.view({4: torch.int32, 2: torch.int16}[BYTES[self.dtype]]).numpy()
        return result


def take(view: View, axis: int, index: Index) -> View:
    """Return `view` at `index` along `axis`; the identity and a take of a take cost nothing."""
    if len(index) == view.shape[axis] and np.array_equal(index, np.arange(len(index))):
        return view
    if isinstance(view, Taken) and view.axis == axis:
        return take(view.parent, axis, view.index[index])
    return Taken(view, axis, index)


def concat(parts: Sequence[View], axis: int) -> View:
    """Return `parts` joined along `axis`. Parts of different dtypes become fp32, which holds each of them exactly."""
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        parts = [cast(part, "fp32") for part in parts]
    return parts[0] if len(parts) == 1 else Concatenated(parts, axis)


def cast(view: View, dtype: str | None) -> View:
    """Return `view` in `dtype` (None: as it is)."""
    return view if dtype is None or dtype == view.dtype else Cast(view, dtype)


def blocks(view: View) -> Iterator[tuple[int, Bits]]:
    """Yield (byte offset within the tensor, contiguous bits) from first row to last, about `BLOCK_BYTES` at a time."""
    step = max(1, BLOCK_BYTES // max(view.row_bytes, 1))
    for start in range(0, view.shape[0], step):
        rows = np.arange(start, min(start + step, view.shape[0]))
        yield start * view.row_bytes, np.ascontiguousarray(view.read(rows))


def read_all(view: View) -> Bits:
    """Return the whole tensor as bits. For small tensors and for tests: writers use `blocks`."""
    return view.read(np.arange(view.shape[0]))
