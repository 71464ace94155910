"""Broken text: JSON lines and tokenizers that preprocess_data.py reads, and the .bin and .idx that come of them.

Each case is a fork of this process. What comes of a broken line is a sentence or, when such lines are skipped, all
other documents in their order; what is opened of a broken .bin and .idx is what was written, or nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import preprocess_data
from commands import ROOT
from fuzz_bytes import DATA, HOSTILE_JSON, Breaker, break_bytes, break_json, break_length
from fuzz_guards import Child
from helpers import digests, write_documents

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.training import tokens
from megatron.pruning.training.quiet import quiet_imports

with quiet_imports():
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron.pruning.training.data_checks import check_data

MODEL = ROOT / "assets/tiny-llama"
TEXTS = [
    "def f(x):\n    return  x\n",
    "héllo ☃\ttab",
    "    ",
    "a" * 300,
    "<s> one</s>\n\n\n  two  ",
    "plain words " * 40,
]
KINDS = {
    "Llama2Tokenizer": ("tokenizer.model",),
    "HuggingFaceTokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "NullTokenizer": (),
}

# Lines ----------------------------------------------------------------------------------------------------------------

ODD_LINES = [
    b"",
    b"{",
    b"}",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"text": null}',
    b'{"text": 1}',
    b'{"text": ["a"]}',
    b"\0",
    b"\xff\xfe",
    b'{"text": "\\ud800"}',
    b'{"text": "\\ud83d\\ude00"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "\\u0000"}',
    b'{"\\ud800": 1}',
    b'{"text": "a"} x',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a\x01"}',
    b"{'text': 'a'}",
    b'{"\\u001b[2J": 1}',
    b'{"text": NaN}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"text": ' + b"9" * 5000 + b"}",
    b'{"n": ' + b"9" * 5000 + b', "text": "a"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "' + b"a " * 300_000 + b'"}',
    b'{"' + b"k" * 100_000 + b'": 1}',
    b'{"text": "a\r"}',
    b"\x0c",
    "{\u2028}".encode(),
    b'{"text": "\\x"}',
    b'{"text": "a"}\r',
]


def break_line(raw: bytes, random: Random) -> tuple[bytes, str]:
    """Break one of the lines of a file, or all of it."""
    lines = raw.split(b"\n")
    at = random.randrange(len(lines))
    kind = random.choice(("odd", "odd", "odd", "value", "byte", "joined", "ends", "whole"))
    if kind == "odd":
        lines[at] = random.choice(ODD_LINES)
    elif kind == "value":
        lines[at] = json.dumps({"text": random.choice(HOSTILE_JSON)(random)}).encode()
    elif kind == "byte" and lines[at]:
        line = bytearray(lines[at])
        line[random.randrange(len(line))] = random.randrange(256)
        lines[at] = bytes(line)
    elif kind == "joined":
        lines[at : at + 2] = [b"".join(lines[at : at + 2])]
    elif kind == "ends":
        return raw.replace(b"\n", random.choice((b"\r\n", b"\r", b"\n\n", b"\0", b"\x1e"))), kind
    else:
        whole = (raw.decode().encode("utf-16"), b"\xef\xbb\xbf" + raw, raw[:-1], b"\n" * 3, b"", raw[: len(raw) // 2])
        return random.choice(whole), kind
    return b"\n".join(lines), f"{kind} {at}"


class Texts:
    """JSON lines, and what preprocess_data.py makes of each of them with each tokenizer."""

    def __init__(self, top: Path) -> None:
        self.top = top
        preprocess_data.text_tokenizer(self._args("NullTokenizer", MODEL))  # imports Megatron, once
        self.lines = {
            kind: [
                json.dumps({"text": f"{n} {n + 1}" if kind == "NullTokenizer" else text})
                for n, text in enumerate(TEXTS * 2)
            ]
            for kind in KINDS
        }
        self.documents = {kind: self._each_line(kind) for kind in KINDS}

    def attempt(self, random: Random) -> tuple[str, str]:
        """Break an input and preprocess it. Returns the case and how it ended; raises AssertionError if wrongly."""
        source, out = self.top / "source", self.top / "out"
        for leftover in (source, out):
            shutil.rmtree(leftover, ignore_errors=True)
        kind = random.choice(sorted(KINDS))
        model = Path(shutil.copytree(MODEL, source))
        raw = "".join(f"{line}\n" for line in self.lines[kind]).encode()
        said = "the tokenizer"
        if KINDS[kind] and random.random() < 0.3:
            said = f"{DATA}{_break_tokenizer(model, kind, random)}"
        else:
            raw, said = break_line(raw, random)
        file = source / "text.jsonl"
        file.write_bytes(raw)
        out.mkdir()
        if random.random() < 0.5:  # files of an earlier run, which only a whole new one replaces
            for suffix in (".bin", ".idx"):
                (out / f"p_text_document{suffix}").write_text("mine")
        before = digests(out)
        words = ["--input", str(file), "--output-prefix", str(out / "p"), *_tokenizer(kind, model)]
        skips = random.random() < 0.5
        words += ["--skip-bad-lines"] * skips + ["--workers", random.choice("1112")]
        case = f"{kind}: {'skipping' if skips else 'strict'}: {said}"
        ended = Child(self.top, "text", preprocess_data.main, words, ("os.fork", "pickle.find_class")).wait()
        strange = [c for c in ended.said + ended.out if not c.isprintable() and c not in "\n\r"]
        assert not strange, f"{case}: shows {strange[:9]}"
        if not ended.require(case):
            assert digests(out) == before, f"{case}: refused, but {sorted(digests(out))}"
            return f"{case}: {ended.last}", "refused"
        assert len(digests(out)) == 2, f"{case}: left {sorted(digests(out))}"
        found = _documents(out / "p_text_document")
        if DATA not in said:
            kept = [line for line in raw.split(b"\n") if line in self.documents[kind]]
            wanted = iter(found)
            assert all(self.documents[kind][line] in wanted for line in kept), f"{case}: silently other documents"
        return case, "done"

    def _each_line(self, kind: str) -> dict[bytes, bytes]:
        """Return the tokens of each sound line, as its own tokenizer makes them."""
        tokenizer = preprocess_data.text_tokenizer(self._args(kind, MODEL))
        tokenized = {line: tokenizer.tokenize(json.loads(line)["text"]) for line in self.lines[kind]}
        return {line.encode(): np.asarray(ids, np.int64).tobytes() for line, ids in tokenized.items() if len(ids)}

    def _args(self, kind: str, model: Path) -> argparse.Namespace:
        words = ["--input", "x", "--output-prefix", "x", *_tokenizer(kind, model)]
        return preprocess_data.parser().parse_args(words)


def _tokenizer(kind: str, model: Path) -> list[str]:
    where = model / "tokenizer.model" if kind == "Llama2Tokenizer" else model
    return [
        "--tokenizer-type",
        kind,
        *(["--vocab-size", "500"] if not KINDS[kind] else ["--tokenizer-model", str(where)]),
    ]


def _break_tokenizer(model: Path, kind: str, random: Random) -> str:
    """Break one of the files of a tokenizer, which then may make other tokens."""
    name = random.choice(KINDS[kind])
    alone = model / "alone"
    alone.mkdir()
    (model / name).rename(alone / name)
    breakers: list[Breaker] = [break_bytes, break_length, *([break_json] if name.endswith(".json") else [])]
    said = random.choice(breakers)(alone, random, {})
    (alone / name).rename(model / name)
    alone.rmdir()
    return said


def _documents(prefix: Path) -> list[bytes]:
    text = tokens.open_text(prefix, "--data")
    stops = np.cumsum(text.lengths)[:-1]
    return [part.astype(np.int64).tobytes() for part in np.split(np.asarray(text.tokens), stops)]


# Tokens ---------------------------------------------------------------------------------------------------------------

# Where the fields of an .idx lie: magic, version, dtype, sequences, documents; then lengths, pointers, documents.
HEADER = {"magic": (0, 9), "version": (9, 8), "dtype": (17, 1), "sequences": (18, 8), "documents": (26, 8)}


def break_index(raw: bytes, documents: int, random: Random) -> tuple[bytes, str]:
    """Change a field of an .idx, by what it means."""
    places = dict(HEADER)
    at = 34
    for what, width, count in (("length", 4, documents), ("pointer", 8, documents), ("document", 8, documents + 1)):
        places |= {f"{what} {number}": (at + width * number, width) for number in range(count)}
        at += width * count
    numbered = [name for name in places if name not in HEADER]
    kind = random.choice((*HEADER, *random.sample(numbered, 8), "two lengths"))
    content = bytearray(raw)

    def put(name: str, change: Callable[[int], int]) -> None:
        start, width = places[name]
        old = int.from_bytes(content[start : start + width], "little", signed=width == 4)
        content[start : start + width] = (change(old) % 2 ** (8 * width)).to_bytes(width, "little")

    if kind == "two lengths":  # their sum stays
        one, other = random.sample([name for name in numbered if name.startswith("length")], 2)
        by = random.choice((1, 3, 1000))
        put(one, lambda old: old + by)
        put(other, lambda old: old - by)
    else:
        steps = (
            lambda n: n + 1,
            lambda n: n - 1,
            lambda n: -n,
            lambda n: 0,
            lambda n: 2 * n,
            lambda n: 2**31,
            lambda n: 2**62,
        )
        put(kind, random.choice((*steps, lambda n: 2**64 - 1, lambda n: random.randrange(2**16), lambda n: n + 2**32)))
    return bytes(content), f"{kind} of the .idx"


class Tokens:
    """A .bin and .idx, and what is in them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.base = top / "base"
        self.base.mkdir()
        draw = np.random.default_rng(0)
        self.sound = [draw.integers(0, 400, length) for length in (50, 1, 30, 7, 80, 16, 33, 20)]
        write_documents(self.base / "text", *self.sound)
        write_documents(self.base / "other", *self.sound[:3])
        self.checkpoint = open_checkpoint(MODEL)
        ended, self.wanted = self._read(self.base / "text")
        assert ended.require("sound"), ended.said

    def attempt(self, random: Random) -> tuple[str, str]:
        """Break a text and open it. Returns the case and how it ended; raises AssertionError if wrongly."""
        source = self.top / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for suffix in (".bin", ".idx"):
            shutil.copy(self.base / f"text{suffix}", source)
        kind = random.choice(
            ("field", "field", "field", "field", "bytes", "length", "other", "none", "directory", "fifo")
        )
        victim = source / f"text{random.choice(('.bin', '.idx'))}"
        if kind == "field":
            index = source / "text.idx"
            raw, said = break_index(index.read_bytes(), len(self.sound), random)
            index.write_bytes(raw)
        elif kind in ("bytes", "length"):
            said = (break_bytes if kind == "bytes" else break_length)(source, random, {})
            said = f"{DATA}{said}" if ".bin" in said else said  # any token may be meant
        else:
            said = f"{victim.name} is {kind}"
            victim.unlink()
            if kind == "other":
                shutil.copy(self.base / f"other{victim.suffix}", victim)
            elif kind == "directory":
                victim.mkdir()
            elif kind == "fifo":
                os.mkfifo(victim)
        case = f"tokens: {kind}: {said}"
        ended, found = self._read(source / "text")
        if not ended.require(case):
            return f"{case}: {ended.last}", "refused"
        assert found == self.wanted or DATA in said, f"{case}: silently other tokens"
        return case, "read"

    def _read(self, prefix: Path) -> tuple[Any, list[str]]:
        report = self.top / "found"
        report.unlink(missing_ok=True)

        def main(_: Sequence[str]) -> None:
            report.write_text(json.dumps(self._all_of(prefix)))

        ended = Child(self.top, "tokens", main, []).wait()
        return ended, json.loads(report.read_text()) if report.exists() else []

    def _all_of(self, prefix: Path) -> list[str]:
        """Open a text as training and evaluation do, then read every document as Megatron does."""
        stock: dict[str, Any] = dict.fromkeys(
            "train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path".split()
        )
        stock |= {"mock_data": False, "data_path": [str(prefix)], "split": "80,20,0", "vocab_size": 400}
        stock |= {"full_validation": False}
        stock |= {"tokenizer_type": "NullTokenizer", "tensor_model_parallel_size": 1, "make_vocab_size_divisible_by": 8}
        check_data(argparse.Namespace(**stock))
        found = tokens.windows(prefix, 16, 9, self.checkpoint)
        data = IndexedDataset(str(prefix))
        each = [np.asarray(data[number]).astype(np.int64).tobytes() for number in range(len(data))]
        for first, last in zip(data.document_indices[:-1], data.document_indices[1:], strict=True):
            [data[number] for number in range(first, last)]
        return [hashlib.sha256(part).hexdigest() for part in (found.tobytes(), *each)]
