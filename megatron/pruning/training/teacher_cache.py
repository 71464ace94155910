"""A teacher's answers on disk: of every token of a training order its K most likely next tokens and the others' mass.

A folder holds `teacher.json`, which says what was asked of whom, and safetensors files of some samples each, named by
the number of the first in the order of the training. Of a sample [sequence] there are

    log_probs    [sequence, K]  fp16 or fp32  the K largest log-probabilities, natural, the largest first
    tokens       [sequence, K]  uint16        which tokens they are of: the lower 16 bits
    tokens_high  [sequence, K]  uint8         the bits above, where the vocabulary has more than 65,536 tokens
    log_rest     [sequence]     fp32          the logarithm of what all other tokens have together
    digest       [8]            uint8         blake2b of the tokens that the teacher read

A sample is found by its number and known by its digest, so that it may be read in any layout and batch, and is never
taken for another. What lies in the folder is data: it is checked as it is read.
"""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron.pruning.storage.small_files import as_json, parse_as, read_small, replace_durably

FACTS = "teacher.json"
FILE_BYTES = 2**28  # of a file, about
_FILE = re.compile(r"samples-\d{10,}\.safetensors")
_VERSION, _DIGEST = 1, 8
_DTYPES: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32}
_SPELLED = {"F16": np.float16, "F32": np.float32, "U16": np.uint16, "U8": np.uint8}
_LOW = 65536  # tokens that 16 bits tell apart


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the answers of a cache are to: all of it must be the same for a run to go on with it.

    `teacher` is the fingerprint of the checkpoint; the two resets are Megatron's flags of these names, and with
    `documents_apart` no token attends to another document.
    """

    version: int = _VERSION
    teacher: str
    vocab_size: int
    sequence_length: int
    samples: int
    top_k: int
    temperature: float
    dtype: str
    reset_position_ids: bool
    reset_attention_mask: bool
    documents_apart: bool
    samples_per_file: int = 0

    def with_files(self) -> "Facts":
        """Return the same, with as many samples in a file as FILE_BYTES holds."""
        per_sample = self.sequence_length * self.bytes_per_token + _DIGEST
        return msgspec.structs.replace(self, samples_per_file=max(1, FILE_BYTES // per_sample))

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk for each token of the text."""
        return sum(np.dtype(dtype).itemsize * (self.top_k if wide else 1) for dtype, wide in self.tensors.values())

    @property
    def tensors(self) -> dict[str, tuple[Any, bool]]:
        """The tensors of a file but the digests, by name: their dtypes, and whether they have K values a token."""
        high = {"tokens_high": (np.uint8, True)} if self.vocab_size > _LOW else {}
        return {
            "log_probs": (_DTYPES[self.dtype], True),
            "tokens": (np.uint16, True),
            **high,
            "log_rest": (np.float32, False),
        }


class TeacherCache:
    """The answers in a folder. `path` is the folder, and `facts` what they are to."""

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path, self.facts = path, facts
        self._opened: tuple[int, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> "TeacherCache":
        """Open a whole cache. Raises ValueError when there is none, it is not whole or it is not to be understood."""
        if not (path / FACTS).is_file():
            raise ValueError(f"there is no {FACTS} in it: --kd-save records a teacher")
        cache = cls(path, _read_facts(path / FACTS))
        there = len(cache._there())
        if there < cache.files or cache.missing():
            raise ValueError(f"{cache.files - there} of its {cache.files} files are not there: record the rest first")
        return cache

    @classmethod
    def create(cls, path: Path, facts: Facts) -> "TeacherCache":
        """Begin a cache, or go on with one. Raises ValueError where one is there to something else.

        As long as none of its files is there, it may become one to anything: a run may have found no room for it.
        """
        begun = path.is_dir() and any(path.glob("samples-*"))
        if (path.exists() and not path.is_dir()) or (begun and not (path / FACTS).is_file()):
            raise ValueError(f"it is no folder of --kd-save: there is no {FACTS} in it")
        if not begun:
            replace_durably(path / FACTS, as_json(msgspec.to_builtins(facts.with_files())))
        cache = cls(path, _read_facts(path / FACTS))
        there, asked = (msgspec.to_builtins(one) for one in (cache.facts, facts))
        for name in asked:
            if name != "samples_per_file" and there[name] != asked[name]:
                raise ValueError(f"it was begun with {name} {there[name]}, and this run has {asked[name]}")
        return cache

    @property
    def files(self) -> int:
        """How many files there are, or are to be."""
        return -(-self.facts.samples // self.facts.samples_per_file)

    def samples(self, number: int) -> range:
        """Return the samples of a file."""
        first = number * self.facts.samples_per_file
        return range(first, min(first + self.facts.samples_per_file, self.facts.samples))

    def file(self, number: int) -> Path:
        """Return the path of a file."""
        return self.path / f"samples-{self.samples(number).start:010d}.safetensors"

    def missing(self) -> list[int]:
        """Return the files that are not there."""
        there = self._there()
        return [number for number in range(self.files) if self.file(number).name not in there]

    def _there(self) -> set[str]:
        return {entry.name for entry in os.scandir(self.path) if _FILE.fullmatch(entry.name)}

    def bytes_of(self, files: Sequence[int]) -> int:
        """Return how large these files are together."""
        per_sample = self.facts.sequence_length * self.facts.bytes_per_token + _DIGEST
        return sum(len(self.samples(number)) for number in files) * per_sample

    def write(
        self, number: int, texts: np.ndarray, log_probs: np.ndarray, tokens: np.ndarray, log_rest: np.ndarray
    ) -> None:
        """Write a file, which is there whole or not at all.

        `texts` are the tokens of its samples, `[samples, sequence]`; the other three are what a `TopK` has of them,
        with these two dims first.
        """
        kept = {
            "log_probs": np.maximum(log_probs, np.finfo(np.float16).min),  # nothing is as unlikely as that
            "tokens": tokens % _LOW,
            "tokens_high": tokens // _LOW,
            "log_rest": log_rest,
        }
        tensors = {name: np.ascontiguousarray(kept[name].astype(dtype)) for name, (dtype, _) in self._tensors()}
        tensors["digest"] = np.stack([digest(text) for text in texts])
        replace_durably(self.file(number), save(tensors))

    def read(self, sample: int, text: np.ndarray) -> dict[str, np.ndarray]:
        """Return what the teacher answered to a sample, whose tokens are `text`, `[sequence]`.

        `log_probs` and `tokens` (int32) are `[sequence, K]`, `log_rest` `[sequence]`. Raises ValueError where the
        teacher read another text, or the file is damaged.
        """
        if not 0 <= sample < self.facts.samples:
            raise ValueError(f"{self.path} has {self.facts.samples} samples, and the training asks for number {sample}")
        number, at = divmod(sample, self.facts.samples_per_file)
        with self._damage(number):
            file = self._open(number)
            read = file.get_slice("digest")[at]
            found = {name: file.get_slice(name)[at] for name, _ in self._tensors()}
        if read.tobytes() != digest(text).tobytes():
            raise ValueError(
                f"sample {sample} of {self.path} is of another text: the training must have the data, the order, the "
                "--seed and the --train-iters with which the teacher was recorded"
            )
        tokens = found.pop("tokens").astype(np.int32)
        if "tokens_high" in found:
            tokens += found.pop("tokens_high").astype(np.int32) * _LOW
        with self._damage(number):
            if tokens.max() >= self.facts.vocab_size or not all(np.isfinite(found["log_probs"]).ravel()):
                raise ValueError("its numbers are no answers")
        return {**found, "tokens": tokens}

    def _tensors(self) -> Any:
        return self.facts.tensors.items()

    def _open(self, number: int) -> Any:
        if self._opened is None or self._opened[0] != number:
            file: Any = safe_open(self.file(number), "np")
            count, sequence, k = len(self.samples(number)), self.facts.sequence_length, self.facts.top_k
            wanted = {
                name: (dtype, (count, sequence, k)[: 3 if wide else 2]) for name, (dtype, wide) in self._tensors()
            }
            wanted["digest"] = (np.uint8, (count, _DIGEST))
            for name, (dtype, shape) in wanted.items():
                part = file.get_slice(name)
                if tuple(part.get_shape()) != shape or _SPELLED.get(part.get_dtype()) != dtype:
                    raise ValueError(f"{name} is {part.get_dtype()} of shape {part.get_shape()}, not of {list(shape)}")
            self._opened = number, file
        return self._opened[1]

    @contextlib.contextmanager
    def _damage(self, number: int) -> Iterator[None]:
        """Say which file it is that cannot be read."""
        try:
            yield
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{self.file(number)} is damaged: {error}") from error


def digest(text: np.ndarray) -> np.ndarray:
    """Return the digest of a sample's tokens."""
    return np.frombuffer(hashlib.blake2b(text.astype("<i8").tobytes(), digest_size=_DIGEST).digest(), np.uint8)


def _read_facts(file: Path) -> Facts:
    """Read what a cache says of itself. Raises ValueError where it is not to be understood or cannot be."""
    facts = parse_as(Facts, read_small(file), str(file))
    if facts.version != _VERSION:
        raise ValueError(f"{file} is of version {facts.version}, and this program knows {_VERSION}")
    counts = (facts.vocab_size, facts.sequence_length, facts.samples, facts.samples_per_file, facts.top_k)
    known = facts.dtype in _DTYPES and 0 < facts.temperature < math.inf
    if not known or min(counts) < 1 or max(counts) >= 2**53 or facts.top_k > facts.vocab_size:
        raise ValueError(f"{file} is damaged: it says {msgspec.to_builtins(facts)}"[:500])
    return facts
