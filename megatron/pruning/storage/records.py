"""Files of records, read one record after the other: JSON lines, plain or compressed, and Parquet."""

import contextlib
import glob
import gzip
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron.pruning.storage.small_files import is_text

_ROWS = 256  # of a Parquet file that are in memory at once
_READ = 1 << 16  # bytes of a .zst that are decompressed at once


class Record(NamedTuple):
    """One record of a file, as JSON; `number` counts from 1, `read` are the bytes of the file since the one before."""

    path: str
    number: int
    raw: bytes
    read: int


def are_records(path: Path) -> bool:
    """Return whether a path has the name of a file of records."""
    return path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"))


def find_files(patterns: Sequence[str], flag: str) -> list[Path]:
    """Return the files that `flag` names, those of a pattern such as `part-*.jsonl` in the order of their names.

    Raises ValueError where there is no such file.
    """
    found: list[Path] = []
    for pattern in patterns:
        if Path(pattern).exists() or not glob.has_magic(pattern):
            found.append(Path(pattern))
        elif files := sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207 - it may be absolute
            found += map(Path, files)
        else:
            raise ValueError(f"{flag} {pattern} matches no file")
    for path in found:
        if not path.is_file():
            raise ValueError(f"{flag} {path} is not a file")
    return found


def records(path: Path, keys: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of a file, by the end of its name: .gz, .zst, .parquet, or lines. Blank lines count as records.

    Of a Parquet file each row is a record, with the columns of the `keys` alone where it has them all. Raises
    ValueError for a file that is damaged, and for one whose library is not installed.
    """
    if path.suffix == ".parquet":
        yield from _rows(path, keys)
        return
    with path.open("rb") as file, contextlib.closing(_decompressed(path, file)) as lines:
        number = before = 0
        try:
            for number, raw in enumerate(lines, start=1):
                at = file.tell() if lines is not file else before + len(raw)
                yield Record(str(path), number, raw, at - before)
                before = at
        except Exception as error:  # each way to compress has errors of its own
            if lines is file:
                raise
            raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def parse_record(raw: bytes) -> dict[str, Any]:
    """Return a record. Raises ValueError when it is no JSON object."""
    try:
        record = json.loads(raw.rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
    return record


def value_at(record: dict[str, Any], key: str) -> Any:
    """Return what a record has under a key, or under a path of keys with dots between. ValueError: there is nothing."""
    if key in record:
        return record[key]
    inner: Any = record
    for part in key.split("."):
        if not isinstance(inner, dict) or part not in inner:
            raise ValueError(f'there is no "{key}", only {", ".join(sorted(record)[:5]) or "an empty object"}')
        inner = inner[part]
    return inner


def text_at(record: dict[str, Any], key: str) -> str:
    """Return the string under a key or a path of keys. Raises ValueError where there is none."""
    text = value_at(record, key)
    if not isinstance(text, str):
        raise ValueError(f'"{key}" holds {type(text).__name__}, not a string')
    if not is_text(text):
        raise ValueError(f'"{key}" holds half a surrogate pair, which is no text')
    return text


def _decompressed(path: Path, file: BinaryIO) -> Any:
    """Return the lines of an open file."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix == ".zst":
        return io.BufferedReader(_Frames(file, _library("zstandard", path).ZstdDecompressor()))
    return file


class _Frames(io.RawIOBase):
    """What the frames of a .zst hold. The reader of zstandard itself takes a file that is cut short for a whole one."""

    def __init__(self, file: BinaryIO, decompressor: Any) -> None:
        self.file, self.decompressor = file, decompressor
        self.frame: Any = None  # the one that is begun
        self.compressed, self.plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, and return with how many bytes. Raises EOFError where the last frame has no end."""
        while not self.plain:
            self.compressed = self.compressed or self.file.read(_READ)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("it is cut short")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.plain = memoryview(self.frame.decompress(self.compressed))
            self.compressed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        count = min(len(buffer), len(self.plain))
        buffer[:count], self.plain = self.plain[:count], self.plain[count:]
        return count


def _rows(path: Path, keys: Sequence[str]) -> Iterator[Record]:
    parquet = _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        columns = {key if key in file.schema_arrow.names else key.split(".")[0] for key in keys}
        batches = file.iter_batches(_ROWS, columns=sorted(columns) if columns <= {*file.schema_arrow.names} else None)
        size, count, number = path.stat().st_size, max(1, file.metadata.num_rows), 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                share = size * number // count - size * (number - 1) // count
                yield Record(str(path), number, json.dumps(row, default=str).encode(), share)
    except (OSError, importlib.import_module("pyarrow").ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _library(name: str, path: Path) -> Any:
    """Return a library that not every installation has. Raises ValueError, with what to do, where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ValueError(f"{path} needs {package}, which is not installed: pip install {package}") from error
