"""Ways to break any checkpoint: bytes, lengths, the tree of files, JSON.

Each changes the copy at `path` and returns what it did. A description that begins with DATA says that weights or the
shape were changed in a way that no reader can know.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

DATA = "data: "
Breaker = Callable[[Path, Random, dict[str, Path]], str]


def some_file(path: Path, random: Random) -> Path:
    """Return one of the files of a checkpoint."""
    return random.choice(sorted(p for p in path.rglob("*") if p.is_file()))


def header_end(file: Path) -> int:
    """Return how many bytes of a file are not tensors' data, as far as that is easily said."""
    if file.suffix == ".safetensors":
        return 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return file.stat().st_size


def data_ranges(file: Path) -> list[tuple[int, int]]:
    """Return where tensors' data lies in a sound file."""
    raw = file.read_bytes()
    if file.suffix == ".safetensors":
        return [(8 + int.from_bytes(raw[:8], "little"), len(raw))]
    ranges = []
    for start in [i for i in range(len(raw)) if raw.startswith(b"PK\3\4", i)] if raw[:2] == b"PK" else []:
        name_length, extra_length = struct.unpack("<HH", raw[start + 26 : start + 30])
        name = raw[start + 30 : start + 30 + name_length]
        if b"/data/" in name and b"serialization_id" not in name:
            begin = start + 30 + name_length + extra_length
            ends = [raw.find(mark, begin) for mark in (b"PK\3\4", b"PK\7\10", b"PK\1\2")]
            ranges.append((begin, min(end for end in ends if end >= 0)))
    return ranges


def break_bytes(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change a few bytes of a file."""
    file = some_file(path, random)
    raw = bytearray(file.read_bytes())
    ranges = data_ranges(file)
    if not raw:
        return "nothing"
    said = "bytes of "
    for _ in range(random.choice((1, 1, 1, 4, 30))):
        at = random.choice((random.randrange(len(raw)), random.randrange(min(len(raw), header_end(file)))))
        raw[at] = random.choice((raw[at] ^ 1 << random.randrange(8), random.randrange(256), 0, 255))
        if any(a <= at < b for a, b in ranges):
            said = f"{DATA}bytes of "
    file.write_bytes(raw)
    return said + file.name


def break_length(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Cut, empty, lengthen, or shift a file."""
    file = some_file(path, random)
    raw = file.read_bytes()
    at = random.randrange(len(raw) + 1)
    piece = raw[at : at + random.choice((1, 2, 8, 512))]
    kinds = {
        "cut": raw[:at],
        "empty": b"",
        "head lost": raw[at:],
        "longer": raw + random.randbytes(random.choice((1, 8, 4096))),
        "shifted": raw[:at] + random.randbytes(random.choice((1, 2, 8))) + raw[at:],
        "piece lost": raw[:at] + raw[at + len(piece) :],
        "piece twice": raw[:at] + piece + raw[at:],
        "zeros": raw[:at] + bytes(len(piece)) + raw[at + len(piece) :],
        "twice": raw + raw,
    }
    kind = random.choice(sorted(kinds))
    said = DATA if kind == "zeros" and any(a < at + len(piece) and at < b for a, b in data_ranges(file)) else ""
    file.write_bytes(kinds[kind])
    return f"{said}{file.name} {kind}"


def break_tree(path: Path, random: Random, bases: dict[str, Path]) -> str:
    """Remove, mix up or replace files and directories."""
    file = some_file(path, random)
    kind = random.choice(
        ("gone", "directory", "fifo", "link", "device", "loop", "swapped", "foreign", "outside", "extra")
    )
    if kind == "swapped":
        same = [p for p in path.rglob(f"*{file.suffix}") if p.is_file() and p != file]
        if not same:
            return "nothing"
        other = random.choice(sorted(same))
        a, b = file.read_bytes(), other.read_bytes()
        file.write_bytes(b)
        other.write_bytes(a)
        # The others say themselves what they hold; that an entry of one shape is another's only a manifest tells.
        said = DATA if file.suffix == ".distcp" else ""
        return f"{said}swapped {file.relative_to(path)} and {other.relative_to(path)}"
    if kind in ("foreign", "outside"):
        base = bases[random.choice(sorted(bases))]
        found = [p for p in base.rglob("*") if p.name == file.name]
        if not found:
            return "nothing"
        file.unlink()
        chosen = random.choice(sorted(found))
        if kind == "outside":
            file.symlink_to(chosen)
        else:
            shutil.copy(chosen, file)
        return f"{file.relative_to(path)} is {chosen}"
    if kind == "extra":
        name = random.choice(
            ("release/mp_rank_07", "release/mp_rank_00_000", "release/mp_rank_99999999_000", "\n\x1b[2J", "tokenizer\n")
        )
        (path / name).mkdir(parents=True, exist_ok=True)
        return f"extra {name!r}"
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "link":
        file.symlink_to("../" * random.randrange(9) + "etc/passwd")
    elif kind == "loop":
        file.symlink_to(file.name)
    return f"{file.relative_to(path)} {kind}"


HOSTILE_JSON: list[Callable[[Random], Any]] = [
    lambda random: random.choice((0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 2**64, 10**30, -(2**63))),
    lambda random: random.choice((0.5, 1e308, -1e-5, float("nan"), float("inf"), 1.0)),
    lambda random: random.choice(
        ("", "x", "../x", "/etc/passwd", "a/b", "F64", "BF16", "\ud800", "\0", "9" * 5000, "..")
    ),
    lambda random: random.choice((None, True, False, [], {}, [[]], [1], {"a": 1}, [1, 2], [0, 0])),
    lambda random: json.loads("[" * 900 + "]" * 900),
]


def change_node(tree: Any, random: Random) -> str:
    """Change one node of parsed JSON."""
    nodes = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    for holder, key in nodes:
        if isinstance(holder[key], dict | list):
            nodes += [
                (holder[key], k) for k in (holder[key] if isinstance(holder[key], dict) else range(len(holder[key])))
            ]
    if not nodes:
        return "nothing"
    holder, key = random.choice(nodes)
    kind = random.choice(("value", "value", "value", "gone", "renamed", "near"))
    old = holder[key]
    if kind == "gone":
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[random.choice((f"{key}x", "", str(key).replace("0", "1"), "a" * 3000))] = holder.pop(key)
    elif kind == "near" and isinstance(old, int):
        holder[key] = old + random.choice((-1, 1, 8, -8, old))
    else:
        holder[key] = random.choice(HOSTILE_JSON)(random)
    return f"{kind} of {key}"


def break_json(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change a JSON file or the header of a safetensors file."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file())
    if not files:
        return "nothing"
    file = random.choice(files)
    raw, rest = file.read_bytes(), b""
    if file.suffix == ".safetensors":
        end = header_end(file)
        raw, rest = raw[8:end], raw[end:]
    tree = json.loads(raw)
    said = change_node(tree, random)
    text = json.dumps(tree)
    kind = random.choice(("", "", "", "", "deep", "twice", "long number", "bytes"))
    if kind == "deep":
        text = '{"a":' * 200_000
    elif kind == "twice":
        text = text[:-1] + "," + json.dumps(tree)[1:]
    elif kind == "long number":
        text = text.replace("1", "1" * 9000, 1)
    raw = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        raw = raw.replace(b'"', b'"\xff\xfe', 1)
    if file.suffix == ".safetensors":
        length = random.choice((len(raw),) * 8 + (0, len(raw) - 1, len(raw) + 1, 2**40, 2**63, 2**64 - 1, 99_999_999))
        raw = length.to_bytes(8, "little") + raw
    file.write_bytes(raw + rest)
    return f"{file.name} {said} {kind}"
