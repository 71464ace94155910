"""Small files: JSON that is checked as it is read, sizes that are bounded, writes that are durable."""

import contextlib
import json
import math
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

LARGEST_SMALL_FILE = 100_000_000  # bytes; the largest tokenizers have 40 MB


def read_small(path: Path, limit: int = LARGEST_SMALL_FILE) -> bytes:
    """Return the content of a file that should be small.

    Raises ValueError when it has more than `limit` bytes, or is only git-lfs's pointer to it.
    """
    require_plain(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: more than {limit:,} is no such file")
    refuse_pointer(path, content)
    return content


def require_plain(path: Path) -> None:
    """Raise ValueError for what is there and is no file: a pipe would be waited for, a device read without end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file")


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raise ValueError when a file begins as what git-lfs leaves in the place of one that it has not fetched."""
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` where it was cloned")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError, naming `what`, for anything else, also for a name that is in it twice.

    Python reads more than JSON: NaN and infinities, which other readers would refuse in what is written of them.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"it holds {twice[:200]!r} twice")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:40]} is not a number of JSON")
        return value

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and could not be written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what}: it holds {type(value).__name__}, not an object")
    return value


def is_text(value: str) -> bool:
    """Return whether a string can be written: JSON may spell half a surrogate pair, which tokenizers fail on."""
    try:
        value.encode()
        return True
    except UnicodeEncodeError:
        return False


def parse_as[T](kind: type[T], raw: bytes, what: str) -> T:
    """Return a JSON object as a `msgspec.Struct` of this `kind`, whose fields and types it must have.

    Raises ValueError, naming `what` and the place in it, as in "keep.per_layer[3].ffn is missing".
    """
    try:
        found: T = msgspec.convert(parse_json(raw, what), kind, str_keys=True)
        return found
    except msgspec.ValidationError as error:
        told, _, place = str(error).partition(" - at `$")
        place = place.rstrip("`").removeprefix(".")
        if missing := re.fullmatch(r"Object missing required field `(.+)`", told):
            raise ValueError(f"{what}: {'.'.join(filter(None, (place, missing[1])))} is missing") from error
        raise ValueError(f"{what}: {f'{place}: ' if place else ''}{told[:1].lower()}{told[1:]}") from error


def as_json(value: Any) -> bytes:
    """Return `value` as indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file and fsync it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def new_beside(path: Path, what: str, make: Callable[[Path], None]) -> Path:
    """Make something beside `path` that was not there before, with `what` it is in its name."""
    while True:
        aside = path.with_name(f".{path.name}.{what}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileExistsError):
            make(aside)
            return aside


def new_file_beside(path: Path) -> Path:
    """Make an empty file, which was not there before, beside `path`: to be written, and renamed to it when whole."""
    return new_beside(path, "partial", lambda aside: aside.touch(exist_ok=False))


def replace_durably(path: Path, content: bytes) -> None:
    """Write a small file in place of another, if there is one: at every moment the old or the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = new_file_beside(path)
    try:
        write_durably(aside, content)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def alone_at(path: Path, seconds: float = 10.0) -> Iterator[None]:
    """Keep other runs from putting their files in the place of `path` inside of the `with`, on any file system.

    Raises ValueError when one is still at it after so many seconds.
    """
    sign = path.with_name(f".{path.name}.placing")
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(FileExistsError):
            sign.touch(exist_ok=False)
            break
        if time.monotonic() > deadline:
            raise ValueError(f"another run puts its files in the place of {path}; if none does, remove {sign}")
        time.sleep(0.1)
    try:
        yield
    finally:
        sign.unlink(missing_ok=True)
