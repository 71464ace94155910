"""Lazy tensors: what a weight is made of, read a block of rows at a time.

A `View` has a shape, a dtype and `read_into(rows, out)`. `Stored` reads a tensor that lies in a file; `take`, `concat`
and `cast` build on other views without touching a byte. A writer pulls each output tensor through its view in blocks of
a few MiB, into buffers that are used again and again (the first touch of fresh memory costs ten times a copy), so a
conversion or a pruning needs the memory of a few blocks, whatever the size of the model.

Values are moved as raw bits (signed integers of the element's width), so every bf16, fp16 and fp32 pattern, NaN
payloads included, arrives as it left.
"""

import contextlib
import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.source_file import File

Index = NDArray[np.intp]
Bits = NDArray[Any]

BITS: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 2: np.dtype("<i2")}
# This many bytes are moved at once, and at most as many are read for them where only a part is kept. Smaller blocks
# cost more Python than copying, larger ones leave the processor's cache.
BLOCK_BYTES = 1 << 22
# Two runs of rows closer than this are read in one go: a seek costs more than the bytes between them.
READ_GAP_BYTES = 1 << 14


_free = threading.local()  # its `buffers` are those of this thread that are free


@contextlib.contextmanager
def scratch(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Bits]:
    """Lend an array of arbitrary content, in memory that this thread used before."""
    need = math.prod(shape) * dtype.itemsize
    free: list[Bits] = vars(_free).setdefault("buffers", [])
    buffer = free.pop() if free else np.empty(0, np.uint8)
    if buffer.nbytes < need:
        buffer = np.empty(need, np.uint8)
    try:
        yield buffer[:need].view(dtype).reshape(shape)
    finally:
        free.append(buffer)


class View(ABC):
    """A one- or two-dimensional tensor that is read by rows."""

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def read_into(self, rows: Index, out: Bits) -> None:
        """Fill `out`, bits of shape [len(rows), *self.shape[1:]] in C order, with these rows, in any order."""

    @abstractmethod
    def sources(self) -> Iterator[File]:
        """Yield the files that its bytes come from."""

    def read(self, rows: Index) -> Bits:
        """Return these rows in an array of their own."""
        out: Bits = np.empty((len(rows), *self.shape[1:]), BITS[BYTES[self.dtype]])
        self.read_into(rows, out)
        return out

    def read_bytes(self, start: int, out: Bits) -> None:
        """Fill `out`, bytes, from byte `start` of the tensor on: it may begin and end within a row."""
        row, dtype = self.row_bytes, BITS[BYTES[self.dtype]]
        at, stop = start, start + len(out)
        while at < stop:
            index, inside = divmod(at, row)
            if inside or stop - at < row:
                end = min(at - inside + row, stop)
                with scratch((1, *self.shape[1:]), dtype) as whole:
                    self.read_into(np.array([index]), whole)
                    out[at - start : end - start] = whole.reshape(-1).view(np.uint8)[inside : inside + end - at]
            else:
                end = stop // row * row
                rows = out[at - start : end - start].view(dtype).reshape(-1, *self.shape[1:])
                self.read_into(np.arange(index, end // row), rows)
            at = end

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape[0] * self.row_bytes


class Stored(View):
    """A contiguous, row-major tensor at byte `offset` of a file."""

    def __init__(self, file: File, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype
        if len(shape) not in (1, 2):
            raise ValueError(f"{file.path} holds a tensor of shape {shape}: a Llama's have one or two dims")
        if offset < 0 or offset + self.nbytes > file.size:
            raise ValueError(f"{file.path} has {file.size} bytes, but a tensor of it ends at {offset + self.nbytes}")

    def read_into(self, rows: Index, out: Bits) -> None:
        gap = READ_GAP_BYTES // max(self.row_bytes, 1) + 1
        steps, pieces = np.diff(rows), rows // max(BLOCK_BYTES // max(self.row_bytes, 1), 1)
        for start, stop in _runs((steps < 0) | (steps > gap) | (np.diff(pieces) != 0)):
            first, last = int(rows[start]), int(rows[stop - 1])
            if last - first == stop - start - 1 and (steps[start : stop - 1] == 1).all():
                self._read_run(first, out[start:stop])
                continue
            with scratch((last - first + 1, *self.shape[1:]), out.dtype) as run:
                self._read_run(first, run)
                np.take(run, rows[start:stop] - first, axis=0, out=out[start:stop], mode="clip")

    def sources(self) -> Iterator[File]:
        yield self.file

    def read_bytes(self, start: int, out: Bits) -> None:
        self.file.read_into(memoryview(out), self.offset + start)

    def stretch(self, first: int, count: int) -> "Stored":
        """Return `count` rows from row `first` on."""
        return Stored(self.file, self.offset + first * self.row_bytes, (count, *self.shape[1:]), self.dtype)

    def _read_run(self, first: int, out: Bits) -> None:
        self.file.read_into(memoryview(out.reshape(-1).view(np.uint8)), self.offset + first * self.row_bytes)


def _runs(breaks: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the runs of n items; `breaks[i]` says that one ends between items i and i + 1."""
    return itertools.pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(breaks) + 1])


class Taken(View):
    """Rows (`axis` 0) or columns (`axis` 1) of another view."""

    def __init__(self, parent: View, axis: int, index: Index) -> None:
        self.parent, self.axis, self.index, self.dtype = parent, axis, index, parent.dtype
        self.shape = tuple(len(index) if i == axis else n for i, n in enumerate(parent.shape))
        self._stretch = _stretch(index) if axis == 1 else None
        self._width, self._columns = _wide(index, parent.shape[1], BYTES[self.dtype]) if axis == 1 else (1, index)

    def read_into(self, rows: Index, out: Bits) -> None:
        if self.axis == 0:
            return self.parent.read_into(self.index[rows], out)
        step = max(1, BLOCK_BYTES // max(self.parent.row_bytes, 1))
        with scratch((min(step, len(rows)), self.parent.shape[1]), out.dtype) as block:
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                self.parent.read_into(part, block[: len(part)])
                self._take_columns(block[: len(part)], out[start : start + len(part)])

    def sources(self) -> Iterator[File]:
        return self.parent.sources()

    def _take_columns(self, block: Bits, out: Bits) -> None:
        if self._stretch is not None:
            out[:] = block[:, self._stretch]
        else:
            wide = np.dtype(f"V{self._width * out.itemsize}")
            np.take(block.view(wide), self._columns, axis=1, out=out.view(wide), mode="clip")


def _stretch(index: Index) -> slice | None:
    """Return an index that is one stretch as a slice, else None."""
    first = int(index[0]) if len(index) else 0
    return slice(first, first + len(index)) if (np.diff(index) == 1).all() else None


def _wide(index: Index, columns: int, size: int) -> tuple[int, Index]:
    """Return how many neighbouring columns, of `size` bytes each, can be taken as one, and which of these wider ones.

    Whole heads lie together, so what is kept of them moves in steps of 32 bytes, the most that numpy does in one.
    """
    for width in (32 // size, 16 // size, 8 // size, 4 // size):
        firsts = index[::width]
        if columns % width == 0 and len(index) == len(firsts) * width and (firsts % width == 0).all():
            if np.array_equal(index, (firsts[:, None] + np.arange(width)).ravel()):
                return width, firsts // width
    return 1, index


class Concatenated(View):
    """Views of one dtype side by side along `axis`."""

    def __init__(self, parts: Sequence[View], axis: int) -> None:
        self.parts, self.axis, self.dtype = parts, axis, parts[0].dtype
        sizes = [part.shape[axis] for part in parts]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.shape = tuple(sum(sizes) if i == axis else n for i, n in enumerate(parts[0].shape))

    def read_into(self, rows: Index, out: Bits) -> None:
        if self.axis == 1:
            for part, start in zip(self.parts, self.starts.tolist(), strict=False):
                with scratch((len(rows), part.shape[1]), out.dtype) as block:
                    part.read_into(rows, block)
                    out[:, start : start + part.shape[1]] = block
            return
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for start, stop in _runs(owner[1:] != owner[:-1]):
            which = owner[start]
            self.parts[which].read_into(rows[start:stop] - self.starts[which], out[start:stop])

    def sources(self) -> Iterator[File]:
        return itertools.chain.from_iterable(part.sources() for part in self.parts)

    def read_bytes(self, start: int, out: Bits) -> None:
        if self.axis == 1:
            return super().read_bytes(start, out)
        at, stop = start, start + len(out)
        for part, first in zip(self.parts, (self.starts * self.row_bytes).tolist(), strict=False):
            end = min(first + part.nbytes, stop)
            if first <= at < end:
                part.read_bytes(at - first, out[at - start : end - start])
                at = end


class Cast(View):
    """Another view in another dtype, rounded to nearest even as torch rounds; what is no number stays none."""

    def __init__(self, parent: View, dtype: str) -> None:
        self.parent, self.shape, self.dtype = parent, parent.shape, dtype

    def read_into(self, rows: Index, out: Bits) -> None:
        with scratch((len(rows), *self.shape[1:]), BITS[BYTES[self.parent.dtype]]) as bits:
            self.parent.read_into(rows, bits)
            with np.errstate(over="ignore", invalid="ignore"):  # `_to_fp16` says what does not fit
                values = _to_fp32(bits, self.parent.dtype)
                if self.dtype == "bf16":
                    out[:] = _to_bf16(values)
                else:
                    out[:] = (values if self.dtype == "fp32" else _to_fp16(values)).view(out.dtype)

    def sources(self) -> Iterator[File]:
        return self.parent.sources()


def _to_fp32(bits: Bits, dtype: str) -> NDArray[np.float32]:
    if dtype == "bf16":  # the upper half of an fp32
        return (bits.astype(np.int32) << 16).view(np.float32)
    return bits.view(np.float32) if dtype == "fp32" else bits.view(np.float16).astype(np.float32)


def _to_bf16(values: NDArray[np.float32]) -> Bits:
    bits = values.view(np.uint32)
    half = (bits >> 16) & 1
    half += 0x7FFF  # so that a tie goes to the even neighbour
    half += bits
    half >>= 16
    half[np.isnan(values)] = 0x7FC0
    return half.astype(np.uint16).view(np.int16)


def _to_fp16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    rounded = values.astype(np.float16)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(values)):
        raise ValueError(f"a weight of magnitude {float(np.nanmax(np.abs(values))):.3g} does not fit fp16: choose bf16")
    return rounded


def take(view: View, axis: int, index: Index) -> View:
    """Return `view` at `index` along `axis`; the identity and a take of a take cost nothing."""
    if len(index) == view.shape[axis] and np.array_equal(index, np.arange(len(index))):
        return view
    if isinstance(view, Taken) and view.axis == axis:
        return take(view.parent, axis, view.index[index])
    if isinstance(view, Stored) and axis == 0 and len(index) and (stretch := _stretch(index)) is not None:
        return view.stretch(stretch.start, len(index))
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
    """Yield (byte offset within the tensor, contiguous bits) from first row to last, about `BLOCK_BYTES` at a time.

    The bits are good until the next ones are asked for.
    """
    step = max(1, BLOCK_BYTES // max(view.row_bytes, 1))
    with scratch((min(step, view.shape[0]), *view.shape[1:]), BITS[BYTES[view.dtype]]) as block:
        for start in range(0, view.shape[0], step):
            rows = np.arange(start, min(start + step, view.shape[0]))
            view.read_into(rows, block[: len(rows)])
            yield start * view.row_bytes, block[: len(rows)]


def equal(one: View, other: View, drift: float = 0.0) -> bool:
    """Return whether two tensors have the same bits, or differ by at most the share `drift` of a block's largest value.

    They are read block by block, up to the first that differs.
    """
    if one.shape != other.shape or (one.dtype != other.dtype and not drift):
        return False
    step = max(1, BLOCK_BYTES // max(one.row_bytes, 1))
    for start in range(0, one.shape[0], step):
        rows = np.arange(start, min(start + step, one.shape[0]))
        if one.dtype == other.dtype and np.array_equal(one.read(rows), other.read(rows)):
            continue
        first, second = (cast(view, "fp32").read(rows).view(np.float32) for view in (one, other))
        if not drift or not np.abs(first - second).max() <= drift * np.abs(first).max():
            return False
    return True


def read_all(view: View) -> Bits:
    """Return the whole tensor as bits. For small tensors and for tests: writers read in blocks."""
    return view.read(np.arange(view.shape[0]))
