"""The manifest of a written checkpoint: bytes and crc32 of every file, and how checksums of pieces become one.

`manifest.json` lies at the top of a checkpoint's directory: {"format": 1, "files": {"release/mp_rank_00/...":
{"bytes": 1234, "crc32": "89abcdef"}}}. No loader looks at it. A crc32 finds damage, not malice.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from isal.isal_zlib import crc32, crc32_combine  # twenty times as fast as zlib's

from megatron.pruning.storage.small_files import parse_as, read_small

MANIFEST = "manifest.json"
FORMAT = 1
_READ_BYTES = 1 << 20
_LARGEST = 10_000_000  # bytes of a manifest


@dataclass(frozen=True)
class Digest:
    """Length (bytes) and crc32 of a file, or of a part of one; `a + b` is that of the bytes of b after those of a."""

    length: int = 0
    crc32: int = 0

    @classmethod
    def of(cls, content: bytes | memoryview) -> "Digest":
        """Return the digest of bytes in memory."""
        return cls(len(content), crc32(content))

    def __add__(self, after: "Digest") -> "Digest":
        return Digest(self.length + after.length, crc32_combine(self.crc32, after.crc32, after.length))


class _Entry(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    crc32: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,8}$")]


class _Manifest(msgspec.Struct):
    format: int
    files: dict[str, _Entry]


def manifest_bytes(digests: Mapping[str, Digest]) -> bytes:
    """Return the manifest of files by their name relative to the checkpoint's directory."""
    files = {name: _Entry(digest.length, f"{digest.crc32:08x}") for name, digest in sorted(digests.items())}
    return (json.dumps(msgspec.to_builtins(_Manifest(FORMAT, files)), indent=1) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Digest]:
    """Read a manifest. Raises ValueError when `path` is not one, or names a file outside its directory."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}, so there is nothing to check it against")
    what = f"{path} is not a manifest"
    content = parse_as(_Manifest, read_small(path, _LARGEST), what)
    if content.format != FORMAT:
        raise ValueError(f"{what}: it has format {content.format}, this program reads {FORMAT}")
    for name in content.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{what}: it names {name}, outside its own directory")
    return {name: Digest(entry.bytes, int(entry.crc32, 16)) for name, entry in content.files.items()}


def digest_of(path: Path) -> Digest:
    """Read a file once and return its digest."""
    buffer, total, crc = bytearray(_READ_BYTES), 0, 0
    with path.open("rb", buffering=0) as file:
        with contextlib.suppress(OSError):  # advice, which a file system need not take
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            crc, total = crc32(memoryview(buffer)[:count], crc), total + count
    return Digest(total, crc)


def verify(directory: Path) -> list[str]:
    """Check every file that the manifest of `directory` names, and return one sentence for each that is not right.

    Files that it does not name are left alone. Raises ValueError without a valid manifest.
    """
    problems = []
    files = read_manifest(directory / MANIFEST)
    if not files:  # as a process's own part of it may, but no checkpoint's
        raise ValueError(f"{directory / MANIFEST} is not a manifest: it names no file")
    for name, wanted in files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (size := path.stat().st_size) != wanted.length:
            problems.append(f"{path} has {size} bytes, its manifest says {wanted.length}")
        elif (found := digest_of(path)).crc32 != wanted.crc32:
            problems.append(f"{path} has crc32 {found.crc32:08x}, its manifest says {wanted.crc32:08x}")
    return problems
