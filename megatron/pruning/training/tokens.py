"""Text as a model reads it: consecutive, full windows of tokens from a .bin/.idx pair or a .jsonl file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.training.hf_model import tokenizer_of
from megatron.pruning.training.quiet import quiet_imports

Tokens = NDArray[np.int64]


def windows(data: Path, length: int, most: int, checkpoint: Checkpoint, spread: bool = False) -> Tokens:
    """Return at most `most` windows, `[windows, length + 1]`; each begins with the last token of the one before.

    `data` is the prefix of a .bin and .idx, or a .jsonl file with a string under "text" in every line, which the
    tokenizer of `checkpoint` turns into tokens, with the end-of-text token after each. With `spread` the windows are
    taken evenly from all of a .bin, and not from its start.

    Raises ValueError when there is no such data, too little of it, or a token that the model does not have.
    """
    wanted = length * most + 1
    tokens = _from_jsonl(data, wanted, checkpoint) if data.suffix == ".jsonl" else open_text(data, "--data").tokens
    number = min((len(tokens) - 1) // length, most)
    if number < 1:
        raise ValueError(f"--data {data} has {len(tokens)} tokens: fewer than one window of {length + 1}")
    step = ((len(tokens) - 1) // length) // number if spread else 1
    found = np.stack([tokens[i : i + length + 1] for i in range(0, number * step * length, step * length)])
    odd = found[(found < 0) | (found >= checkpoint.config.vocab_size)]
    if len(odd):
        raise ValueError(
            f"--data {data} holds token {odd[0]}, but {checkpoint.path} has a vocabulary of "
            f"{checkpoint.config.vocab_size}: it was made with another tokenizer"
        )
    return found.astype(np.int64)


class Text(NamedTuple):
    """A .bin and .idx: all tokens, mapped into memory, and the length of every document."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]


def open_text(prefix: str | Path, flag: str) -> Text:
    """Open the text of a prefix, which `flag` named; the lengths of its files are checked, the ids are not.

    Raises ValueError when a file is missing, damaged, or not the one that the other was written with.
    """
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                whole = str(prefix).removesuffix(".bin").removesuffix(".idx")
                hint = f"; name the prefix alone, {whole}" if whole != str(prefix) else ""
                raise ValueError(f"{flag} {prefix}: there is no {prefix}{suffix}{hint}")
        try:
            index = IndexedDataset(str(prefix)).index
        except Exception as error:  # its asserts say little
            raise ValueError(f"{flag} {prefix}: {prefix}.idx or .bin is damaged or empty ({error})") from error
    if not np.issubdtype(index.dtype, np.integer):
        raise ValueError(
            f"{flag} {prefix}: {prefix}.idx says that tokens are {np.dtype(index.dtype)}, no whole numbers"
        )
    size, told = Path(f"{prefix}.bin").stat().st_size, int(index.sequence_lengths.sum(dtype=np.int64))
    if size != told * np.dtype(index.dtype).itemsize:
        raise ValueError(
            f"{flag} {prefix}: {prefix}.bin has {size} bytes, which are not the {told} tokens of its .idx: one of them "
            "is cut short, or of another run"
        )
    return Text(np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r"), index.sequence_lengths)


def _from_jsonl(file: Path, wanted: int, checkpoint: Checkpoint) -> Tokens:
    """Return the first `wanted` tokens of a .jsonl file, or a few more."""
    if not file.is_file():
        raise ValueError(f"--data {file} is not a file")
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
                ids = tokenizer(_text_of(line, f"--data {file} line {number}"), add_special_tokens=False, verbose=False)
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
    return text
