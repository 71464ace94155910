"""Ways to break what torch.save wrote: hostile opcodes in its pickles, archives packed anew, strange content."""

import io
import pickle
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fuzz_bytes import DATA
from helpers import load_whole


def call(module: str, name: str, argument: str) -> bytes:
    """Return opcodes that call `module.name(argument)`."""
    return f"c{module}\n{name}\n".encode() + b"X" + struct.pack("<I", len(argument)) + argument.encode() + b"\x85R"


LAUGHS = b")" + b"2\x86" * 64  # a tuple of two of a tuple of two of ...
SNIPPETS: list[bytes] = [
    call("posix", "system", "touch RAN"),
    call("os", "system", "touch RAN"),
    call("builtins", "eval", "open('RAN', 'w')"),
    call("builtins", "exec", "open('RAN', 'w')"),
    call("subprocess", "Popen", "true"),
    call("torch", "load", "RAN"),
    call("torch.hub", "load", "RAN"),
    call("numpy", "load", "RAN"),
    call("pathlib", "Path.touch", "RAN"),
    call("argparse", "FileType", "w"),
    call("builtins", "getattr", "x"),
    call("megatron.core", "anything", "x"),
    call("torch._utils", "_rebuild_tensor_v2", "x"),
    call("torch", "Size", "x" * 100),
    call("collections", "OrderedDict", "x"),
    b"(" + b"\x8c\5posix\x8c\6system\x93\x8c\4true\x85R",
    b"i" + b"os\nsystem\n",
    b"(cos\nsystem\nX\4\0\0\0trueo",
    b"]" * 100_000,
    b"(" * 100_000,
    LAUGHS,
    LAUGHS + b"}" + LAUGHS + b"Ns",
    b"}" + b")" + b"q\xfe0h\xfeh\xfe\x86" * 1 + b"Ns",
    b"}" + b")q\xfe" + b"0h\xfeh\xfe\x86q\xfe" * 60 + b"Ns",  # a key that hashes for ever
    b"r" + struct.pack("<I", 2**31 - 1),
    b"r" + struct.pack("<I", 2**32 - 1),
    b"j" + struct.pack("<I", 2**32 - 1),
    b"X" + struct.pack("<I", 2**32 - 1),
    b"\x8d" + struct.pack("<Q", 2**62),
    b"\x8e" + struct.pack("<Q", 2**40),
    b"\x96" + struct.pack("<Q", 2**35),
    b"\x95" + struct.pack("<Q", 2**62),
    b"\x8b" + struct.pack("<i", -1),
    b"\x8b" + struct.pack("<i", 2**31 - 1),
    b"T" + struct.pack("<i", -5),
    b"I" + b"9" * 5000 + b"\n",
    b"}q\x01h\x01h\x01h\x01s",
    b"]q\x01h\x01a",
    b"0",
    b"1",
    b"2",
    b"a",
    b"u",
    b"R",
    b"b",
    b"\x81",
    b"\x92",
    b"\x93",
    b".",
    b"\x80\x05",
    b"\x80\xff",
    b"P1\n",
    b"Q",
    b"\x82\x01",
    b"\x97",
]


def spoil_pickle(raw: bytes, random: Random) -> bytes:
    """Return a pickle with opcodes or operands changed."""
    kind = random.randrange(6)
    at = random.randrange(len(raw))
    if kind == 0:
        return raw[:at] + random.choice(SNIPPETS) + raw[at:]
    if kind == 1:
        return raw[: raw.index(b"\x80") + 2] + random.choice(SNIPPETS) + b"0" * random.randrange(2) + raw[2:]
    if kind == 2:
        return raw[:-1] + random.choice(SNIPPETS) + b"."
    if kind == 3:
        return raw[:at] + bytes([random.choice(b"().0aebsuRQ\x81\x85\x86\x87qrhjXJKM}]N")]) + raw[at + 1 :]
    numbers = [i for i in range(len(raw) - 5) if raw[i : i + 1] in (b"K", b"M", b"J")]
    if kind == 4 and numbers:
        at = random.choice(numbers)
        width = {b"K": 1, b"M": 2, b"J": 4}[raw[at : at + 1]]
        value = random.choice((bytes(width), b"\xff" * width, random.randbytes(width), b"\x01" + bytes(width - 1)))
        return raw[: at + 1] + value + raw[at + 1 + width :]
    names = (
        b"args",
        b"model",
        b"weight",
        b"layers.0",
        b"layers.1",
        b"storage",
        b"Float",
        b"cpu",
        b"__0_0",
        b"Namespace",
    )
    old = random.choice([name for name in names if name in raw] or [b"\x80"])
    new = random.choice((b"\xff" * len(old), b"../../etc/x"[: len(old)].ljust(len(old), b"x"), old.upper()))
    return raw.replace(old, new, random.choice((1, 1000)))


def rezip(raw: bytes, random: Random, change: Callable[[bytes], bytes]) -> bytes:
    """Return a zip archive of torch.save written anew by Python, its pickle changed."""
    kind = random.choice(("", "", "", "", "", "deflated", "bomb", "twice", "lost", "names"))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(out, "w") as after:
        entries = {}
        for entry in before.infolist():
            with before.open(entry) as file:
                file._expected_crc = None  # type: ignore[attr-defined]  # holes that were filled later have none
                entries[entry.filename] = file.read()
        if kind == "lost":
            del entries[random.choice(sorted(entries))]
        for name, content in entries.items():
            if name.endswith("data.pkl"):
                content = change(content)
                if kind == "bomb":
                    content = content[:-1] + bytes(50_000_000)
            how = zipfile.ZIP_DEFLATED if kind in ("deflated", "bomb") else zipfile.ZIP_STORED
            after.writestr(zipfile.ZipInfo(name if kind != "names" else f"../{name}"), content, how)
            if kind == "twice":
                after.writestr(zipfile.ZipInfo(name), content[::-1], how)
    return out.getvalue()


def break_pickle(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Change the pickle of a rank file, of common.pt or of .metadata."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".pt", ".bin") or p.name == ".metadata")
    if not files:
        return "nothing"
    file = random.choice(files)
    raw = file.read_bytes()
    if file.name == ".metadata":
        file.write_bytes(spoil_pickle(raw, random))
    else:
        file.write_bytes(rezip(raw, random, lambda content: spoil_pickle(content, random)))
    return f"pickle of {file.name}"


def hostile_value(random: Random) -> Any:
    """Return something that an argument or an entry should not be."""
    nested: Any = []
    for _ in range(random.choice((1, 3, 40))):
        nested = [nested, nested]
    itself: dict[Any, Any] = {}
    itself["itself"] = itself
    values = (0, -1, 1, 3, 10**9, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x\ny", "../x", None, True, b"x")
    values += (nested, itself, torch.ones(3), torch.Size([2]), Namespace(x=1), (1, 2), {1: 2}, [], np.float64(1.0))
    return random.choice(values)


def break_content(path: Path, random: Random, _: dict[str, Path]) -> str:
    """Load a file of torch.save, change an argument, a tensor or an entry of it, and save it."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".pt", ".bin"))
    if not files:
        return "nothing"
    file = random.choice(files)
    content = load_whole(file)
    model = content.get("model", content)
    tensors = sorted(key for key in model if isinstance(model[key], torch.Tensor))
    kind = random.choice(("argument", "argument", "entry", "tensor" if tensors else "entry"))
    said = ""
    if kind == "argument" and "args" in content:
        name = random.choice(sorted(vars(content["args"])))
        value = random.choice((hostile_value(random), getattr(content["args"], name)))
        if isinstance(value, int) and random.random() < 0.5:
            value = value + random.choice((-1, 1, value))
        setattr(content["args"], name, value)
        kind = f"argument {name}"
    elif kind == "tensor":
        key = random.choice(tensors)
        old = model[key]
        same = [k for k in tensors if model[k].shape == old.shape and k != key]
        changes: dict[str, Callable[[], Any]] = {
            "double": lambda: old.double(),
            "int": lambda: old.int(),
            "strided": lambda: torch.stack([old, old], -1)[..., 0],
            "expanded": lambda: old[:1].expand(old.shape),
            "transposed": lambda: old.T.contiguous().T,
            "short": lambda: old[1:],
            "empty": lambda: old[:0],
            "scalar": lambda: torch.ones(()),
            "3-d": lambda: old[None],
            "value": lambda: hostile_value(random),
            "quantized": lambda: torch.quantize_per_tensor(old, 0.1, 0, torch.qint8),
            "sparse": lambda: old.to_sparse(),
            "meta": lambda: torch.empty(old.shape, device="meta"),
            "complex": lambda: old.to(torch.complex64),
            "shared": lambda: model[random.choice(same)] if same else old,
        }
        kind = random.choice(sorted(changes))
        model[key] = changes[kind]()
        kind = f"tensor {kind} {key}"
        if kind.startswith("tensor expanded"):
            said = DATA  # one row or element looks contiguous
    else:
        holder = random.choice((content, model))
        key = random.choice(sorted(holder, key=str))
        if random.random() < 0.3:
            holder.pop(key)
        elif random.random() < 0.5:
            holder[random.choice(("x", 5, (1, 2), f"{key}.x", "decoder.layers.99.mlp.linear_fc1.weight"))] = holder[key]
        else:
            holder[key] = hostile_value(random)
        kind = f"entry {key}"
    try:
        torch.save(content, file, pickle_protocol=random.choice((2, 2, 2, 4)))
    except (RecursionError, RuntimeError, TypeError, AttributeError, pickle.PicklingError):
        return "nothing"
    return f"{said}{kind} of {file.name}"
