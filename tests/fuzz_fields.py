"""Ways to break the files of weights by what their formats mean, field by field.

Each is as those of fuzz_bytes.py: it changes the copy at `path`, and returns what it did.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_bytes import DATA, header_end

# Numbers that mean something to a format: nothing, too little, too much for 31, 32, 63 and 64 bits, and no number.
ODD_NUMBERS: list[Any] = [0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 + 16]
ODD_NUMBERS += [16.0, 15.9, 1e300, True, None, "16", "", [], [16], {}, "0x10", "١٦"]


def chosen(path: Path, random: Random, *suffixes: str) -> Path | None:
    """Return one of the files with one of these endings of its name, if there is any."""
    files = sorted(p for p in path.rglob("*") if p.name.endswith(suffixes) and p.is_file())
    return random.choice(files) if files else None


# Safetensors ----------------------------------------------------------------------------------------------------------


def break_offsets(header: dict[str, Any], random: Random) -> str:
    """Move where the bytes of a tensor are said to lie."""
    name, other = random.choice(sorted(header)), random.choice(sorted(header))
    begin, end = header[name]["data_offsets"]
    kinds: dict[str, Any] = {
        "moved": [begin + 4, end + 4],
        "moved back": [begin - 4, end - 4],
        "longer": [begin, end + 4],
        "shorter": [begin, end - 4],
        "odd": [begin + 1, end],
        "reversed": [end, begin],
        "of another": header[other]["data_offsets"],
        "beyond": [begin + 10**9, end + 10**9],
        "huge": [2**64 - (end - begin), 2**64],
        "one": [begin],
        "three": [begin, end, end],
        "strange": [random.choice(ODD_NUMBERS), random.choice(ODD_NUMBERS)],
        "none": random.choice((None, "0,4", {}, {"0": begin, "1": end})),
    }
    kind = random.choice(sorted(kinds))
    header[name]["data_offsets"] = kinds[kind]
    return f"offsets of {name} {kind}"


def swap_offsets(header: dict[str, Any], random: Random) -> str:
    """Let two tensors of one shape have each other's bytes, which is right in itself."""
    name = random.choice(sorted(header))
    same = [other for other in header if header[other]["shape"] == header[name]["shape"]]
    other = random.choice(sorted(same))
    one, two = header[name]["data_offsets"], header[other]["data_offsets"]
    header[name]["data_offsets"], header[other]["data_offsets"] = two, one
    return f"{DATA}offsets of {name} and {other} swapped"


def break_dtype(header: dict[str, Any], random: Random) -> str:
    """Say another dtype of a tensor: of the same width, of another, or none that there is."""
    name = random.choice(sorted(header))
    kinds = (
        "I32",
        "U32",
        "F64",
        "F16",
        "BF16",
        "F8_E4M3",
        "I8",
        "BOOL",
        "C64",
        "f32",
        "F32 ",
        "float32",
        "",
        None,
        4,
        [],
    )
    header[name]["dtype"] = random.choice(kinds)
    return f"dtype of {name}"


def break_shape(header: dict[str, Any], random: Random) -> str:
    """Say another shape of a tensor."""
    name = random.choice(sorted(header))
    shape = header[name]["shape"]
    at = random.randrange(len(shape))
    kinds: dict[str, Any] = {
        "turned": shape[::-1],
        "flat": [sum(shape)],
        "deep": [*shape, 1],
        "one before": [1, *shape],
        "halved": [*shape[:-1], shape[-1] // 2, 2],
        "more": [*shape[:at], shape[at] + 1, *shape[at + 1 :]],
        "less": [*shape[:at], shape[at] - 1, *shape[at + 1 :]],
        "nothing": [0, *shape],
        "overflow": [2**32, 2**32, *shape],
        "scalar": [],
        "strange": [*shape[:at], random.choice(ODD_NUMBERS), *shape[at + 1 :]],
        "none": random.choice((None, "16", {}, 16)),
    }
    kind = random.choice(sorted(kinds))
    header[name]["shape"] = kinds[kind]
    return f"shape of {name} {kind}"


def break_name(header: dict[str, Any], random: Random) -> str:
    """Rename, lose or add a tensor."""
    name = random.choice(sorted(header))
    kind = random.choice(("lost", "as another layer", "with a space", "upper", "extra", "empty", "path", "half"))
    if kind == "lost":
        del header[name]
    elif kind == "extra":
        header[f"{name}.more"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    else:
        names = {"as another layer": name.replace("layers.1", "layers.2"), "with a space": f"{name} "}
        names |= {"upper": name.upper(), "empty": "", "path": f"../{name}", "half": f"{name}\ud800"}
        header[names[kind]] = header.pop(name)
    return f"name of {name} {kind}"


def break_note(header: dict[str, Any], random: Random) -> str:
    """Say something strange in the header's own metadata, which is a table of text."""
    notes = (
        {"format": 1},
        {"format": None},
        {"format": "tf"},
        {"a": {"b": "c"}},
        [],
        "pt",
        None,
        {"x": "y" * 10**6},
        {},
    )
    header["__metadata__"] = random.choice(notes)
    return "metadata of the header"


def as_header(header: dict[str, Any], random: Random) -> tuple[bytes, str]:
    """Return a header as text, in one of the ways that mean the same or almost."""
    text = json.dumps(header)
    name = random.choice([key for key in header if key != "__metadata__"] or [""])
    kind = random.choice(("", "", "", "", "", "padded", "indented", "twice", "escaped twice", "leading", "mark", "NUL"))
    if kind == "padded":
        text += " " * random.choice((1, 7, 4096))
    elif kind == "indented":
        text = json.dumps(header, indent=1)
    elif kind.endswith("twice") and name:
        spelled = json.dumps(name) if kind == "twice" else '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'
        text = f"{text[:-1]}, {spelled}: {json.dumps(header[name])}}}"
    elif kind == "leading":
        text = f"\n {text}"
    elif kind == "mark":
        text = f"\ufeff{text}"
    elif kind == "NUL":
        text += "\0" * 8
    return text.encode("utf-8", "surrogatepass"), kind


SafetensorsBreaker = Callable[[dict[str, Any], Random], str]
OF_HEADERS: tuple[SafetensorsBreaker, ...] = (
    break_offsets, swap_offsets, break_dtype, break_shape, break_name, break_note,
)  # fmt: skip


def break_safetensors(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change a field of the header of a safetensors file."""
    if (file := chosen(path, random, ".safetensors")) is None:
        return "nothing"
    end, raw = header_end(file), file.read_bytes()
    header = json.loads(raw[8:end])
    notes = header.pop("__metadata__", None)
    said = random.choice(OF_HEADERS)(header, random)
    if notes is not None:
        header = {"__metadata__": notes} | header
    text, kind = as_header(header, random)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return f"{said} {kind} in {file.name}"


# Archives and metadata ------------------------------------------------------------------------------------------------


def change_record(content: bytearray, at: int, width: int, random: Random) -> None:
    """Put another number into a field of an archive."""
    old = int.from_bytes(content[at : at + width], "little")
    new = random.choice(
        (0, 1, old + 1, max(0, old - 1), old * 2, 2 ** (8 * width) - 1, random.randrange(2 ** (8 * width)))
    )
    content[at : at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")


# Where the fields of an archive's three kinds of records lie, by APPNOTE.TXT, 4.3: place and width.
LOCAL = {
    "method": (8, 2),
    "flags": (6, 2),
    "crc": (14, 4),
    "packed": (18, 4),
    "size": (22, 4),
    "name": (26, 2),
    "extra": (28, 2),
}
CENTRAL = {"method": (10, 2), "flags": (8, 2), "crc": (16, 4), "packed": (20, 4), "size": (24, 4), "name": (28, 2)}
CENTRAL |= {"extra": (30, 2), "comment": (32, 2), "offset": (42, 4)}
END = {
    "disk": (4, 2),
    "entries here": (8, 2),
    "entries": (10, 2),
    "size": (12, 4),
    "offset": (16, 4),
    "comment": (20, 2),
}
RECORDS = {"local": (b"PK\3\4", LOCAL), "central": (b"PK\1\2", CENTRAL), "end": (b"PK\5\6", END)}


def break_archive(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change a field of a record of an archive of torch.save, or what lies before and behind it."""
    if (file := chosen(path, random, ".pt", ".bin", ".distcp")) is None:
        return "nothing"
    content = bytearray(file.read_bytes())
    kind = random.choice((*RECORDS, *RECORDS, "before", "behind", "byteorder"))
    if kind == "before":
        content[:0] = random.randbytes(random.choice((1, 64, 4096)))
    elif kind == "behind":
        content += random.choice((b"\0", b"PK\5\6" + bytes(18), bytes(content)))
    elif kind == "byteorder":
        content = bytearray(bytes(content).replace(b"little", b"big"))
        kind = f"{DATA}byteorder"  # which changes its crc and length too
    else:
        mark, fields = RECORDS[kind]
        places = [at for at in range(len(content)) if content.startswith(mark, at)]
        field = random.choice(sorted(fields))
        at, width = fields[field]
        change_record(content, random.choice(places) + at, width, random)
        kind = f"{field} of a {kind} record"
    file.write_bytes(content)
    return f"{kind} of {file.name}"


def break_order(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Write an archive of torch.save anew that says that its numbers are of another byte order."""
    if (file := chosen(path, random, ".pt", ".bin")) is None:
        return "nothing"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as before, zipfile.ZipFile(out, "w") as after:
        for entry in before.infolist():
            with before.open(entry) as stream:
                stream._expected_crc = None  # type: ignore[attr-defined]  # holes that were filled later have none
                content = stream.read()
            after.writestr(zipfile.ZipInfo(entry.filename), b"big" if entry.filename.endswith("byteorder") else content)
    file.write_bytes(out.getvalue())
    return f"{DATA}byteorder of {file.name} is big"


def break_metadata(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change a field of `.metadata`: a tensor's, a chunk's, or a place's."""
    if (file := chosen(path, random, ".metadata")) is None:
        return "nothing"
    content = pickle.loads(file.read_bytes())  # which this program wrote a moment ago
    tensors = {name: entry for name, entry in content.state_dict_metadata.items() if hasattr(entry, "chunks")}
    name = random.choice(sorted(tensors))
    entry, places = tensors[name], content.storage_data
    index = random.choice(sorted(places, key=str))
    what = random.choice(("tensor", "chunk", "chunk", "place", "place", "swap", "index"))
    if what == "tensor":
        what = f"{what} {_break_tensor(content.state_dict_metadata, name, random)}"
    elif what == "chunk":
        what = f"{what} {_break_chunk(entry, random)}"
    elif what == "place":
        field = random.choice(("offset", "length", "relative_path"))
        old = getattr(places[index], field)
        paths = (f"../{old}", f"/{old}", "__0_1.distcp", "__9_9.distcp", "", ".metadata", "a\0b", 5, None)
        numbers = (*ODD_NUMBERS, *(old + step for step in (-64, -1, 1, 64) if isinstance(old, int)))
        object.__setattr__(places[index], field, random.choice(paths if isinstance(old, str) else numbers))
        what = f"{field} of the place of {index.fqn}"
    elif what == "swap":
        same = [key for key in places if places[key].length == places[index].length]
        other = random.choice(sorted(same, key=str))
        places[index], places[other] = places[other], places[index]
        what = f"{DATA}places of {index.fqn} and {other.fqn} swapped"
    else:
        place = places.pop(index)
        if random.random() < 0.7:
            kinds = ({"fqn": f"{index.fqn}x"}, {"fqn": name}, {"offset": None}, {"offset": torch.Size([9, 9])})
            places[type(index)(**({"fqn": index.fqn, "offset": index.offset} | random.choice(kinds)))] = place
        what = f"index of {index.fqn}"
    file.write_bytes(pickle.dumps(content, protocol=2))
    return f"{what} in .metadata"


def _break_tensor(entries: dict[str, Any], name: str, random: Random) -> str:
    kind = random.choice(("lost", "renamed", "dtype", "size", "shape"))
    entry = entries[name]
    if kind == "lost":
        del entries[name]
    elif kind == "renamed":
        entries[random.choice((f"{name}.more", name.replace("decoder", "encoder"), "", "../x", "x\ny"))] = entries.pop(
            name
        )
    elif kind == "dtype":
        entry.properties.dtype = random.choice(
            (torch.float64, torch.int32, torch.bfloat16, torch.complex64, torch.bool)
        )
    elif kind == "size":
        at = random.randrange(len(entry.size))
        numbers = (0, 1, entry.size[at] + 1, max(0, entry.size[at] - 1), 2 * entry.size[at], 2**40, 2**62)
        entry.size = torch.Size([*entry.size[:at], random.choice(numbers), *entry.size[at + 1 :]])
    else:
        entry.size = random.choice((torch.Size(reversed(entry.size)), torch.Size([]), torch.Size([1, *entry.size])))
    return f"{kind} of {name}"


def _break_chunk(entry: Any, random: Random) -> str:
    chunk = random.choice(entry.chunks)
    kind = random.choice(("lost", "twice", "moved", "longer", "shorter", "flat"))
    at = random.randrange(len(chunk.sizes))
    if kind == "lost":
        entry.chunks.remove(chunk)
    elif kind == "twice":
        entry.chunks.append(chunk)
    elif kind == "moved":
        step = random.choice((1, 2, 2**40))
        changed = [*chunk.offsets[:at], chunk.offsets[at] + step, *chunk.offsets[at + 1 :]]
        object.__setattr__(chunk, "offsets", torch.Size(changed))
    elif kind == "flat":
        object.__setattr__(chunk, "sizes", torch.Size([sum(chunk.sizes)]))
    else:
        step = 1 if kind == "longer" else -1
        changed = [*chunk.sizes[:at], max(0, chunk.sizes[at] + step), *chunk.sizes[at + 1 :]]
        object.__setattr__(chunk, "sizes", torch.Size(changed))
    return kind
