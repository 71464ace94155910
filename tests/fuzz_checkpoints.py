"""Break checkpoints in thousands of ways and see that every reader refuses them in one sentence or reads them right.

    python tests/fuzz_checkpoints.py --count 10000 --seed 0
    python tests/fuzz_checkpoints.py --count 2000 --seed 0 --commands    # by the command lines that users type
    python tests/fuzz_checkpoints.py --seed 0 --only 4711          # repeat one case, with its traceback

Each case copies a tiny checkpoint (Hugging Face, Megatron `torch` or `torch_dist`, of several layouts), breaks it and
converts it; with --commands it, its plan, its scores or its manifest, and it is converted, pruned, shown, verified or
looked into as before a training. What must hold, whatever was broken:

- it ends, within seconds and within a bounded memory, in a ValueError or an OSError of one line, or in a checkpoint;
- a refused conversion leaves nothing at its target;
- what was read is the original's weights, bit for bit, unless the change itself was to data or to the model's shape;
- no code of the checkpoint runs: no process starts, nothing outside the target's directory is written.
"""

import argparse
import collections
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import convert as converter
import numpy as np
import show_checkpoint
import torch
from helpers import as_bin, convert, make_llama

import prune_llama
from megatron.pruning.formats import FORMATS, megatron_dist, open_checkpoint, save_checkpoint
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.decide import PruneRequest, decide
from megatron.pruning.plan.scores import Facts, Scores, shapes
from megatron.pruning.plan.scores import write as write_scores
from megatron.pruning.storage.harmless import require_harmless
from megatron.pruning.storage.manifest import verify
from megatron.pruning.storage.views import read_all

SECONDS = 20  # a case takes 0.05
MEGABYTES = 300  # that a case may add; its files have 100 kB
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def make_tiny(path: Path, tied: bool = False, seed: int = 0, **save: Any) -> Path:
    """Save a random Llama of two layers with a tokenizer, in Hugging Face's format."""
    make_llama(path, TINY | {"tie_word_embeddings": tied}, layers=2, vocab=23, seed=seed, **save)
    (path / "generation_config.json").unlink()
    (path / "tokenizer.json").write_text('{"model": {}}')
    return path


def make_bases(top: Path) -> dict[str, Path]:
    """Make the checkpoints that are broken, by name: one model, tied and untied, in every format."""
    bases = {}
    for name, tied in (("untied", False), ("tied", True)):
        one = bases[f"{name} hf"] = make_tiny(top / name / "hf", tied)
        bases[f"{name} hf sharded"] = make_tiny(top / name / "sharded", tied, max_shard_size="7KB")
        bases[f"{name} hf bin"] = as_bin(make_tiny(top / name / "bin", tied))
        for tensor, pipeline, impl in ((1, 1, "local"), (2, 1, "transformer_engine"), (1, 2, "local"), (2, 2, "local")):
            target = bases[f"{name} torch {tensor} {pipeline}"] = top / name / f"torch{tensor}{pipeline}"
            convert(one, target, layout=Layout(tensor, pipeline, 4), transformer_impl=impl)
        bases[f"{name} torch_dist"] = top / name / "dist"
        whole, megatron_dist.SHARD_BYTES = megatron_dist.SHARD_BYTES, 4000  # so that there are several files
        try:
            convert(one, bases[f"{name} torch_dist"], "torch_dist", layout=Layout(vocab_divisor=4))
        finally:
            megatron_dist.SHARD_BYTES = whole
    return bases


def weights_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return every logical weight as bits."""
    return {weight.hf_key(layer): read_all(view) for weight, layer, view in checkpoint.weights()}


# --- Ways to break a checkpoint. Each changes the copy at `path` and returns what it did. A description that begins
# --- with DATA says that weights or the shape were changed in a way that no reader can know.

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
    allowed = [Namespace, torch.Size]
    with torch.serialization.safe_globals(allowed):
        content = torch.load(file, weights_only=True)
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


BREAKERS: tuple[Breaker, ...] = (
    break_bytes,
    break_length,
    break_tree,
    break_json,
    break_pickle,
    break_content,
)


def _alone(file: Path) -> Path:
    """Move a file into a directory of its own, which a breaker takes for a checkpoint, and leave a link to it."""
    folder = file.with_name(f"{file.name}.folder")
    folder.mkdir()
    file.rename(folder / file.name)
    file.symlink_to(folder / file.name)
    return folder


def some_scores(checkpoint: Checkpoint) -> Scores:
    """Return scores that fit a model, of no text at all."""
    sizes = {axis: checkpoint.config.sizes[axis] for axis in ("layers", "hidden", "heads", "groups", "ffn")}
    draw = np.random.default_rng(0)
    facts = Facts(
        parent=fingerprint(checkpoint), text="", dtype="fp32", sizes=sizes, sequences=3, sequences_wanted=3,
        sequence_length=10, loss_sequences=0, positions=10, loss=1.0,
    )  # fmt: skip
    return Scores(facts, {name: draw.random(shape) for name, shape in shapes(sizes).items()})


# --- One case and its guards.


class HangError(BaseException):
    """A case took too long."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise HangError in what takes longer."""

    def ring(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def megabytes(field: str) -> float:
    """Return a size from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "pickle.find_class")
_TEMPORARY = tempfile.gettempdir()
_watch: dict[str, Any] = {"inside": None, "seen": []}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    inside = _watch["inside"]
    if inside is None:
        return
    if event.startswith(_FORBIDDEN):
        _watch["seen"].append(event)
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if isinstance(arguments[0], str) and not arguments[0].startswith((str(inside), _TEMPORARY)):
            _watch["seen"].append(f"write to {arguments[0]}")


class Fuzzer:
    """Make the sound checkpoints once, and try cases on them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.bases = make_bases(top / "bases")
        others = {f"other {seed}": make_tiny(top / "other" / str(seed), seed=seed) for seed in (1, 2)}
        shards = {
            f"{name} torch": convert(source, top / "other" / f"{name} torch", layout=Layout(2, 2, 4))
            for name, source in others.items()
        }
        self.foreign = self.bases | others | shards
        self.wanted = {name: weights_of(open_checkpoint(path)) for name, path in self.bases.items()}
        self.configs = {name: open_checkpoint(path).config for name, path in self.bases.items()}
        self.plans, self.scores = {}, {}
        for name, path in self.bases.items():
            checkpoint = open_checkpoint(path)
            request = PruneRequest(remain={"hidden": 12, "ffn": 12, "heads": 2, "groups": 1}, drop_layers=(1,))
            self.plans[name] = decide(request, checkpoint).to_json().encode()
            write_scores(top / "scores", some_scores(checkpoint))
            self.scores[name] = (top / "scores").read_bytes()
            (top / "scores").unlink()
        sys.addaudithook(_audit)

    def attempt(self, random: Random) -> tuple[str, str]:
        """Break one checkpoint and convert it. Returns the case and how it ended; raises AssertionError if wrongly."""
        name = random.choice(sorted(self.bases))
        source, target = self.top / "source", self.top / "target"
        for leftover in (source, target):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self.bases[name], source)
        breaker = random.choice(BREAKERS)
        said = breaker(source, random, self.foreign)
        case = f"{name}: {breaker.__name__}: {said}"
        format = random.choice(list(FORMATS))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = megabytes("VmRSS")
        try:
            with time_limit(SECONDS), self._watched():
                checkpoint = open_checkpoint(source)
                save_checkpoint(checkpoint, target, format=format, layout=Layout(1, 1, 4))
                config = checkpoint.config
            ended = "read"
        except (ValueError, OSError) as error:
            ended = self._refusal(case, error)
        except HangError:
            raise AssertionError(f"{case}: hangs") from None
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
        assert not _watch["seen"], f"{case}: {_watch['seen']}"
        grown = megabytes("VmHWM") - before
        assert grown < MEGABYTES, f"{case}: {grown:.0f} MB more"
        if ended == "read":
            # What all ranks say alike of the model, or only one does, is believed.
            one_voice = breaker in (break_pickle, break_content) or (breaker is break_tree and name.endswith("1 1"))
            one_voice &= not name.endswith(("1 2", "2 1", "2 2"))
            self._check_read(case, name, config, target, DATA in said, "config.json" in said or one_voice)
        else:
            left = [path.name for path in self.top.iterdir() if path.name not in ("bases", "other", "source")]
            assert not left, f"{case}: left {left}"
        return case, ended

    def command(self, random: Random) -> tuple[str, str]:
        """Break one checkpoint, or a file that goes with it, and run a command on it, as `attempt` does."""
        name = random.choice(sorted(self.bases))
        source, target, beside = self.top / "source", self.top / "target", self.top / "beside"
        for leftover in (source, target, beside):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self.bases[name], source)
        beside.mkdir()
        files = {"plan": beside / "plan.json", "scores": beside / "scores.safetensors"}
        files["plan"].write_bytes(self.plans[name])
        files["scores"].write_bytes(self.scores[name])
        to, plan = ["--load", str(source), "--save", str(target)], ["--plan", str(files["plan"])]
        choice = ["--ffn-hidden-size-remain", "12", "--criterion", "activation", "--min-scores-tokens", "1"]
        formats = ["--format", random.choice(list(FORMATS))]
        commands: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
            "convert": (converter.main, [*to, *formats]),
            "plan": (prune_llama.main, [*to, *plan, *formats]),
            "scores": (prune_llama.main, [*to, *choice, *formats, "--scores", str(files["scores"])]),
            "magnitude": (prune_llama.main, [*to, *choice[:2], *formats, "--criterion", "magnitude"]),
            "show": (show_checkpoint.main, [str(source), "--weights", "--digest"]),
            "verify": (show_checkpoint.main, [str(source), "--verify"]),
            "flags": (show_checkpoint.main, [str(source), "--megatron-flags"]),
            "before a training": (lambda argv: require_harmless(source / "release"), []),
        }
        what = random.choice(sorted(commands))
        if what in files and random.random() < 0.7:
            breaker = random.choice((break_bytes, break_length, break_json))
            said = breaker(_alone(files[what]), random, self.foreign)
        else:
            breaker = random.choice(BREAKERS)
            said = breaker(source, random, self.foreign)
        case = f"{name}: {what}: {breaker.__name__}: {said}"
        run, argv = commands[what]
        shown = io.StringIO()
        Path("/proc/self/clear_refs").write_text("5")
        before = megabytes("VmRSS")
        try:
            with time_limit(SECONDS), self._watched(), redirect_stdout(shown), redirect_stderr(shown):
                run(argv)
            ended = f"{what}: done"
        except (ValueError, OSError) as error:
            ended = f"{what}: {self._refusal(case, error)}"
        except HangError:
            raise AssertionError(f"{case}: hangs") from None
        except BaseException as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
        assert not _watch["seen"], f"{case}: {_watch['seen']}"
        assert (grown := megabytes("VmHWM") - before) < MEGABYTES, f"{case}: {grown:.0f} MB more"
        strange = [c for c in shown.getvalue() if not c.isprintable() and c not in "\n\r"]
        assert not strange, f"{case}: shows {strange[:9]}"
        assert target.exists() == (ended.endswith("done") and "--save" in argv), f"{case}: {ended}, target is there"
        if target.exists():
            weights_of(open_checkpoint(target))
            assert verify(target) == [], f"{case}: its own manifest is wrong"
        left = {path.name for path in self.top.iterdir()} - {"bases", "other", "source", "beside", "target"}
        assert not left, f"{case}: left {left}"
        return case, ended

    @contextmanager
    def _watched(self) -> Iterator[None]:
        _watch["seen"] = []
        _watch["inside"] = self.top
        try:
            yield
        finally:
            _watch["inside"] = None

    def _refusal(self, case: str, error: Exception) -> str:
        text = str(error)
        assert text.strip(), f"{case}: an empty {type(error).__name__}"
        assert len(text) < 20_000, f"{case}: a message of {len(text)} characters: {text[:200]}"
        return f"refused, {type(error).__name__}"

    def _check_read(
        self, case: str, name: str, config: LlamaConfig, target: Path, other_data: bool, other_config: bool
    ) -> None:
        try:
            found = weights_of(open_checkpoint(target))
        except ValueError as error:
            raise AssertionError(f"{case}: its output cannot be read: {error}") from error
        if config != self.configs[name]:
            assert other_config, f"{case}: silently another config: {config}"
            return
        if other_data:
            return
        wanted = self.wanted[name]
        assert found.keys() == wanted.keys(), f"{case}: silently other tensors"
        for key, bits in wanted.items():
            assert np.array_equal(bits, found[key]), f"{case}: silently another {key}"


def main(argv: list[str] | None = None) -> int:
    """Try the cases, print the counts, return 1 when one of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="cases (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random choices (default 0)")
    parser.add_argument("--commands", action="store_true", help="run command lines, not conversions alone")
    parser.add_argument("--only", type=int, metavar="I", help="try case I alone, and show its traceback")
    args = parser.parse_args(argv)
    size = int(megabytes("VmSize") + 4000) << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))  # a runaway ends here, not the machine
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of zipfile, about what is broken on purpose
    counts: collections.Counter[str] = collections.Counter()
    wrong: dict[str, list[int]] = {}
    shm = Path("/dev/shm")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as directory:
        fuzzer = Fuzzer(Path(directory))
        for i in range(args.count) if args.only is None else [args.only]:
            try:
                attempt = fuzzer.command if args.commands else fuzzer.attempt
                case, ended = attempt(Random(f"{args.seed} {i}"))
                counts[ended] += 1
                if args.only is not None:
                    print(case, "->", ended)
            except AssertionError as error:
                counts["WRONG"] += 1
                first = str(error).split(": ", 3)
                signature = f"{first[1]}: {first[-1][:90]}"
                wrong.setdefault(signature, []).append(i)
                if len(wrong[signature]) == 1:
                    print(f"case {i}: {str(error)[:400]}", flush=True)
                if args.only is not None:
                    traceback.print_exc()
    total = sum(counts.values())
    print(f"{total} cases in {time.monotonic() - start:.0f} s:", dict(counts))
    for signature, cases in wrong.items():
        print(f"{len(cases):5} x {signature}  e.g. {cases[:4]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
