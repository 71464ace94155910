"""Text as a model reads it: full windows of tokens, or conversations, of a .bin/.idx pair or a file of records."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.storage.records import are_records, parse_record, records, text_at
from megatron.pruning.training.chat import Conversation, encode, messages_at, require_template
from megatron.pruning.training.hf_model import tokenizer_of
from megatron.pruning.training.tokenizer import HUGGING_FACE, find_tokenizer

Tokens = NDArray[np.int64]


def windows(
    data: Path, length: int, most: int, checkpoint: Checkpoint, spread: bool = False, flag: str = "--data"
) -> Tokens:
    """Return at most `most` windows, `[windows, length + 1]`; each begins with the last token of the one before.

    `data` is the prefix of a .bin and .idx, or a file of records, such as a .jsonl, with "text" or "messages" in each,
    which the tokenizer of `checkpoint` turns into tokens, with the end-of-text token after a text. With `spread` the
    windows are taken evenly from all of a .bin, and not from its start. `flag` is the one that named the data.

    Raises ValueError when there is no such data, too little of it, or a token that the model does not have.
    """
    wanted = length * most + 1
    texts = _of_records(data, checkpoint, flag) if are_records(data) else None
    tokens = open_text(data, flag).tokens if texts is None else _first(texts, wanted)
    number = min((len(tokens) - 1) // length, most)
    if number < 1:
        raise ValueError(f"{flag} {data} has {len(tokens)} tokens: fewer than one window of {length + 1}")
    there = (len(tokens) - 1) // length if spread else number
    starts = (i * there // number * length for i in range(number))
    found = np.stack([tokens[i : i + length + 1] for i in starts])
    _require_vocabulary(found, data, checkpoint, flag)
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


class Conversations(NamedTuple):
    """Conversations, each with zeros after it, and 1 for each token that counts in the loss: both `[number, tokens]`.

    `cut` of them were longer.
    """

    tokens: Tokens
    counts: NDArray[np.uint8]
    cut: int


def conversations(data: Path, length: int, most: int, checkpoint: Checkpoint, flag: str = "--data") -> Conversations:
    """Return the first conversations of a text, `most` tokens together, cut to `length` tokens and one to foretell.

    `data` is the prefix of a text that has a mask, or a file of records with "messages", which go through the chat
    template of `checkpoint`; of these the assistant's turns count.

    Raises ValueError when there is no such data, none of it counts, or it has a token that the model does not have.
    """
    found, cut, count = list[Conversation](), 0, 0
    for tokens, counts in _of_records(data, checkpoint, flag) if are_records(data) else _of_mask(data, flag):
        if count >= most:
            break
        found.append(Conversation(tokens[: length + 1].astype(np.int64), counts[: length + 1]))
        cut += len(tokens) > length + 1
        count += len(found[-1].tokens)
    shape = len(found), max((len(tokens) for tokens, _ in found), default=0)
    all_tokens, all_counts = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.uint8)
    for row, (tokens, counts) in enumerate(found):
        all_tokens[row, : len(tokens)], all_counts[row, : len(tokens)] = tokens, counts
    if not all_counts[:, 1:].any():
        raise ValueError(f"{flag} {data} holds no conversation with a token that counts in its first {length} tokens")
    _require_vocabulary(all_tokens, data, checkpoint, flag)
    return Conversations(all_tokens, all_counts, cut)


def _of_mask(prefix: Path, flag: str) -> Iterator[Conversation]:
    if not has_mask(prefix):
        raise ValueError(
            f"{flag} {prefix} has no mask of what counts, {mask_of(prefix)}.bin and .idx: make both with "
            "tools/preprocess_data.py --chat messages --mask-prompt"
        )
    text = open_text(prefix, flag)
    mask = open_mask(prefix, text, flag)
    stop = 0
    for length in text.lengths.tolist():
        start, stop = stop, stop + length
        yield Conversation(text.tokens[start:stop], mask[start:stop])


def _of_records(file: Path, checkpoint: Checkpoint, flag: str) -> Iterator[Conversation]:
    """Yield the tokens of each record, of its "messages" or its "text", with the end-of-text token after the latter."""
    if not file.is_file():
        raise ValueError(f"{flag} {file} is not a file")
    try:
        tokenizer = tokenizer_of(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"{error}: turn {file} into tokens with tools/preprocess_data.py and name their prefix"
        ) from error
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # As in token files: of Megatron's tokenizers those of Hugging Face alone begin a text as they say.
    begins = find_tokenizer(checkpoint.tokenizer_folder, flag)[0] == HUGGING_FACE
    for line in records(file):
        if not line.raw.strip():
            continue
        try:
            record = parse_record(line.raw)
            if "text" not in record and "messages" in record:
                require_template(tokenizer, flag, checkpoint.tokenizer_folder)
                yield encode(tokenizer, messages_at(record, "messages"), mask_prompt=True)
                continue
            ids = tokenizer(text_at(record, "text"), add_special_tokens=begins, verbose=False)["input_ids"] + end
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{flag} {file} line {line.number}: {error}") from error
        yield Conversation(np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.uint8))


def _first(texts: Iterator[Conversation], wanted: int) -> Tokens:
    """Return the first `wanted` tokens of texts behind each other, or a few more."""
    found, count = [np.zeros(0, dtype=np.int64)], 0
    for tokens, _ in texts:
        found.append(tokens)
        count += len(tokens)
        if count >= wanted:
            break
    return np.concatenate(found)


def _require_vocabulary(tokens: Tokens, data: Path, checkpoint: Checkpoint, flag: str) -> None:
    odd = tokens[(tokens < 0) | (tokens >= checkpoint.config.vocab_size)]
    if len(odd):
        raise ValueError(
            f"{flag} {data} holds token {odd[0]}, but {checkpoint.path} has a vocabulary of "
            f"{checkpoint.config.vocab_size}: it was made with another tokenizer"
        )
