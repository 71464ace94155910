"""Text as a model reads it: consecutive, full windows of tokens from a .bin/.idx pair or a .jsonl file."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.storage.small_files import is_text
from megatron.pruning.training.hf_model import tokenizer_of

Tokens = NDArray[np.int64]


def windows(
    data: Path, length: int, most: int, checkpoint: Checkpoint, spread: bool = False, flag: str = "--data"
) -> Tokens:
    """Return at most `most` windows, `[windows, length + 1]`; each begins with the last token of the one before.

    `data` is the prefix of a .bin and .idx, or a .jsonl file with a string under "text" in every line, which the
    tokenizer of `checkpoint` turns into tokens, with the end-of-text token after each. With `spread` the windows are
    taken evenly from all of a .bin, and not from its start. `flag` is the one that named the data.

    Raises ValueError when there is no such data, too little of it, or a token that the model does not have.
    """
    wanted = length * most + 1
    tokens = _from_jsonl(data, wanted, checkpoint, flag) if data.suffix == ".jsonl" else open_text(data, flag).tokens
    number = min((len(tokens) - 1) // length, most)
    if number < 1:
        raise ValueError(f"{flag} {data} has {len(tokens)} tokens: fewer than one window of {length + 1}")
    step = ((len(tokens) - 1) // length) // number if spread else 1
    found = np.stack([tokens[i : i + length + 1] for i in range(0, number * step * length, step * length)])
    odd = found[(found < 0) | (found >= checkpoint.config.vocab_size)]
    if len(odd):
        raise ValueError(
            f"{flag} {data} holds token {odd[0]}, but {checkpoint.path} has a vocabulary of "
            f"{checkpoint.config.vocab_size}: it was made with another tokenizer"
        )
    return found.astype(np.int64)


def mask_of(prefix: str | Path) -> str:
    """Return the prefix of the mask of a text: a .bin and .idx, 1 for a token that counts in the loss, else 0."""
    return f"{prefix}_mask"


def has_mask(prefix: str | Path) -> bool:
    """Return whether a text has a mask beside it, or half of one."""
    return any(Path(f"{mask_of(prefix)}{suffix}").exists() for suffix in (".bin", ".idx"))


def open_mask(prefix: str | Path, text: "Text", flag: str) -> NDArray[np.uint8]:
    """Return the mask of a text, `[tokens]`, mapped into memory; its values are not checked.

    Raises ValueError as `open_text` does, and when the documents of the mask have other lengths than those of the text.
    """
    name = mask_of(prefix)
    mask = open_text(name, flag)
    if mask.tokens.dtype != np.uint8 or not np.array_equal(mask.lengths, text.lengths):
        raise ValueError(
            f"{flag} {prefix}: {name} is no mask of it: {len(mask.lengths):,} documents with {len(mask.tokens):,} "
            f"{mask.tokens.dtype} beside {len(text.lengths):,} with {len(text.tokens):,} tokens; make both again with "
            "tools/preprocess_data.py --chat"
        )
    return mask.tokens


class Text(NamedTuple):
    """A .bin and .idx: all tokens, mapped into memory, and the length of every document."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]


def open_text(prefix: str | Path, flag: str) -> Text:
    """Open the text of a prefix, which `flag` named; its files are checked against each other, the ids are not.

    Megatron's own reader believes the .idx, and takes tokens from wherever it says. Raises ValueError when a file is
    missing, damaged, or not the one that the other was written with.
    """
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            whole = str(prefix).removesuffix(".bin").removesuffix(".idx")
            hint = f"; name the prefix alone, {whole}" if whole != str(prefix) else ""
            raise ValueError(f"{flag} {prefix}: there is no {prefix}{suffix}{hint}")
    size = Path(f"{prefix}.bin").stat().st_size
    try:
        dtype, index = _read_index(Path(f"{prefix}.idx"))
        told = _tokens_in(index)
        if not told:
            raise ValueError("it has no tokens")
    except ValueError as error:
        raise ValueError(f"{flag} {prefix}: {prefix}.idx or .bin is damaged or empty ({error})") from error
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{flag} {prefix}: {prefix}.idx says that tokens are {dtype}, no whole numbers")
    if size != told * dtype.itemsize:
        raise ValueError(
            f"{flag} {prefix}: {prefix}.bin has {size} bytes, which are not the {told} tokens of its .idx: one of them "
            "is cut short, or of another run"
        )
    return Text(np.memmap(f"{prefix}.bin", dtype=dtype, mode="r"), index.lengths)


# An .idx as megatron.core.datasets.indexed_dataset writes it: these fields, then for each sequence its length and its
# first byte in the .bin, and for each document its first sequence, and at last their number.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = dict(enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1))
_BLOCK = 1 << 20  # sequences looked at together


class _Index(NamedTuple):
    """The arrays of an .idx, mapped into memory, and the bytes of a token."""

    width: int
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]


def _read_index(path: Path) -> tuple[np.dtype[Any], _Index]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError(f"the .idx has {size} bytes")
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise ValueError("the .idx does not begin as one")
    lengths, pointers, ends = 4 * sequences, 8 * sequences, 8 * documents
    if size not in (
        needed := _HEADER.size + lengths + pointers + ends,
        needed + sequences,
    ):  # some have a mode for each
        raise ValueError(f"the .idx has {size} bytes, which are not the {sequences} sequences that it names")
    at = memoryview(np.memmap(path, mode="r"))[_HEADER.size :]
    dtype = np.dtype(_DTYPES[code])
    return dtype, _Index(
        dtype.itemsize,
        np.frombuffer(at[:lengths], np.int32),
        np.frombuffer(at[lengths : lengths + pointers], np.int64),
        np.frombuffer(at[lengths + pointers : lengths + pointers + ends], np.int64),
    )


def _tokens_in(index: _Index) -> int:
    """Return how many tokens all sequences have. Raises ValueError unless they follow each other without a gap."""
    at = 0
    for start in range(0, len(index.lengths), _BLOCK):
        lengths = index.lengths[start : start + _BLOCK].astype(np.int64)
        stops = at + np.cumsum(lengths)
        if lengths.min() < 0 or np.any(index.pointers[start : start + _BLOCK] != (stops - lengths) * index.width):
            raise ValueError(f"a sequence of the .idx from {start} on does not lie where the one before it ends")
        at = int(stops[-1])
    ends = index.documents
    if len(ends) == 0 or ends[0] != 0 or ends[-1] != len(index.lengths):
        raise ValueError("the documents of the .idx are not those of its sequences")
    for start in range(0, len(ends), _BLOCK):
        if np.any(np.diff(ends[start : start + _BLOCK + 1]) < 0):
            raise ValueError("the documents of the .idx are not in order")
    return at


def _from_jsonl(file: Path, wanted: int, checkpoint: Checkpoint, flag: str) -> Tokens:
    """Return the first `wanted` tokens of a .jsonl file, or a few more."""
    if not file.is_file():
        raise ValueError(f"{flag} {file} is not a file")
    try:
        tokenizer = tokenizer_of(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"{error}: turn {file} into tokens with tools/preprocess_data.py and name their prefix"
        ) from error
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found, count = [np.zeros(0, dtype=np.int64)], 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if count >= wanted:
                break
            if line.strip():
                ids = tokenizer(_text_of(line, f"{flag} {file} line {number}"), add_special_tokens=False, verbose=False)
                found.append(np.asarray(ids["input_ids"] + end, dtype=np.int64))
                count += len(found[-1])
    return np.concatenate(found)


def _text_of(line: bytes, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{where}: no JSON object with a string under "text"') from error
    if not isinstance(text, str):
        raise ValueError(f'{where}: "text" holds {type(text).__name__}, not a string')
    if not is_text(text):
        raise ValueError(f'{where}: "text" holds half a surrogate pair, which is no text')
    return text
