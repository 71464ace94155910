"""Turn JSON lines into the token files that Megatron trains on.

    python tools/preprocess_data.py --input train.jsonl --output-prefix DATA/train --append-eod --load MODEL --workers 8

    python tools/preprocess_data.py --input a.jsonl b.jsonl --output-prefix DATA/all --append-eod \\
        --tokenizer-model OTHER/tokenizer.model

    python pretrain_gpt.py --train-data-path DATA/train_text_document ...

--load names the checkpoint that is to read the text, of any format: the tokenizer is the one that goes with it.
Each line is an object with a string under "text" (--json-keys names others, each gets files of its own). Written are
PREFIX_text_document.bin, the token ids one document after another, and .idx, the lengths (the format of
megatron.core.datasets.indexed_dataset). Tokens and their order do not depend on --workers. A line that cannot be read
ends the run with its file and number, and nothing is left behind; --skip-bad-lines counts and reports such lines
instead. Existing output of the same name is replaced, by a rename at the end.
"""

import argparse
import json
import logging
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.small_files import alone_at, is_text, new_file_beside
from megatron.pruning.training.quiet import quiet_imports
from megatron.pruning.training.tokenizer import TIKTOKEN, build_tokenizer, name_tokenizer

TOKENIZER_TYPES = (
    "Llama2Tokenizer SentencePieceTokenizer GPTSentencePieceTokenizer HuggingFaceTokenizer GPT2BPETokenizer "
    "TikTokenizer NullTokenizer"
).split()
SUFFIXES = (".bin", ".idx")
CHUNK = 16  # lines that a worker takes at a time
AHEAD = 4  # chunks that wait for each worker


class Line(NamedTuple):
    """One line of an input file; `number` counts from 1."""

    path: str
    number: int
    raw: bytes


class Encoded(NamedTuple):
    """A line's tokens, one array per JSON key, or why there are none."""

    line_bytes: int
    tokens: list[np.ndarray] | None
    complaint: str | None


def main(arguments: Sequence[str]) -> None:
    """Write the token files that the command line asks for.

    Raises ValueError when an input is missing, empty or has a bad line, or the tokenizer cannot be built.
    """
    args = parser().parse_args(hyphenated(arguments))
    if len(set(args.json_keys)) < len(args.json_keys):
        raise ValueError(f"--json-keys {' '.join(args.json_keys)} names a key twice")
    inputs = [Path(path) for path in args.input]
    for path in inputs:
        if not path.is_file():
            raise ValueError(f"--input {path} is not a file")
    total_bytes = sum(path.stat().st_size for path in inputs)
    if not total_bytes:
        raise ValueError(f"--input {' '.join(args.input)} is empty")

    tokenizer = tokenizer_of(args)
    if args.append_eod:
        require_eod(tokenizer, args)
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import DType
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    prefix = Path(args.output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    outputs = [f"{prefix}_{key}_document" for key in args.json_keys]
    asides = {
        f"{output}{suffix}": new_file_beside(Path(f"{output}{suffix}")) for output in outputs for suffix in SUFFIXES
    }
    try:
        documents, tokens, complaints = write(args, inputs, outputs, asides, dtype, tokenizer, total_bytes)
        if not documents:
            raise ValueError(f"--input {' '.join(args.input)} holds no document that has tokens")
        for output in outputs:
            put_in_place(output, asides)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
    skipped = f", {complaints:,} bad lines skipped" if complaints else ""
    print(f"{documents:,} documents, {tokens:,} tokens{skipped}: {', '.join(outputs)}.bin and .idx")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("preprocess_data.py", __doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON lines, in the order to be written"
    )
    data.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="path and beginning of the output's name"
    )
    data.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to tokenize (default: text)"
    )
    data.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    data.add_argument("--skip-bad-lines", action="store_true", help="report and skip what cannot be read")
    data.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that tokenize (default: 1)")
    tokens = parser.add_argument_group("tokenizer", "of a checkpoint, or another, as Megatron's training names it")
    tokens.add_argument("--load", type=Path, metavar="DIR", help="checkpoint whose tokenizer is taken")
    tokens.add_argument("--tokenizer-model", metavar="PATH", help="instead: the file or the folder of a tokenizer")
    tokens.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="kind of tokenizer (default: by its files)")
    tokens.add_argument("--vocab-file", metavar="FILE", help="file of GPT2BPETokenizer")
    tokens.add_argument("--merge-file", metavar="FILE", help="file of GPT2BPETokenizer")
    tokens.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary of NullTokenizer and TikTokenizer")
    tokens.add_argument("--tiktoken-pattern", choices=["v1", "v2"], help="pattern of TikTokenizer")
    return parser


def tokenizer_of(args: argparse.Namespace) -> Any:
    """Return Megatron's tokenizer for these flags, with the defaults of Megatron's training for all others.

    Without a type it is found, in place, by the file, the folder or the checkpoint that is named. Raises ValueError
    when there is none, or Megatron cannot build it.
    """
    vocabulary, places = None, {}
    if args.load is not None:
        checkpoint = open_checkpoint(args.load)
        vocabulary = checkpoint.config.vocab_size if checkpoint.vocab_is_known else None
        places = {"--load": checkpoint.tokenizer_folder}
    name_tokenizer(args, places)
    if args.tokenizer_type == TIKTOKEN:
        args.vocab_size = args.vocab_size or vocabulary
    stock = argparse.Namespace(
        rank=0,
        pad_vocab_size=False,
        metadata_path=None,
        special_tokens=None,
        chat_template=None,
        trust_remote_code=False,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        tokenizer_sentencepiece_legacy=False,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tiktoken_num_special_tokens=1000,
        **{
            name: getattr(args, name)
            for name in vars(args)
            if name.startswith(("tokenizer_", "vocab_", "merge_", "tik"))
        },
    )
    tokenizer = build_tokenizer(stock, vocabulary)
    # A document may have more tokens than the model reads at once: of that transformers warns.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return tokenizer


def require_eod(tokenizer: Any, args: argparse.Namespace) -> None:
    """Raise ValueError unless the tokenizer has an end of a document."""
    try:
        found = tokenizer.eod
    except (AttributeError, NotImplementedError, KeyError, ValueError):
        found = None
    if not isinstance(found, int) or found < 0:
        raise ValueError(
            f"--append-eod: the tokenizer of {args.tokenizer_model or args.tokenizer_type} has no token for the end of "
            "a document: leave it out, or give the tokenizer an eos token"
        )


def write(
    args: argparse.Namespace,
    inputs: list[Path],
    outputs: list[str],
    asides: Mapping[str, Path],
    dtype: type[np.number],
    tokenizer: Any,
    total_bytes: int,
) -> tuple[int, int, int]:
    """Tokenize the inputs, in their order, into `asides`, which has a file for each name that a file is to get.

    `outputs` are these names without suffix, one for each key. Return the numbers of documents, tokens and bad lines.
    `dtype` is that of the token ids on disk, `total_bytes` the size of the inputs. Raises ValueError for a bad line,
    unless they are to be skipped.
    """
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builders = [IndexedDatasetBuilder(str(asides[f"{output}.bin"]), dtype=dtype) for output in outputs]
    documents = tokens = complaints = 0
    progress = Progress("tokenizing", total_bytes, show=True)
    for encoded in _encode_all(args, inputs, tokenizer):
        progress.advance(encoded.line_bytes)
        if encoded.complaint:
            if not args.skip_bad_lines:
                raise ValueError(f"{encoded.complaint} (--skip-bad-lines leaves such lines out)")
            complaints += 1
            print(f"skipped: {encoded.complaint}", file=sys.stderr)
        if encoded.tokens and all(len(ids) for ids in encoded.tokens):
            for builder, ids in zip(builders, encoded.tokens, strict=True):
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
            documents += 1
    progress.close()
    for builder, output in zip(builders, outputs, strict=True):
        builder.finalize(str(asides[f"{output}.idx"]))
    return documents, tokens, complaints


def put_in_place(output: str, asides: Mapping[str, Path]) -> None:
    """Give the two files of `output` their names, so that a reader never finds those of two runs.

    Raises ValueError when another run is at the same.
    """
    with alone_at(Path(output)):
        Path(f"{output}.idx").unlink(missing_ok=True)  # without it the .bin is no text
        for suffix in SUFFIXES:
            asides[output + suffix].rename(output + suffix)


def _encode_all(args: argparse.Namespace, inputs: list[Path], tokenizer: Any) -> Iterator[Encoded]:
    """Yield the inputs' lines, encoded, in their order."""
    _start_worker(args, tokenizer)
    if args.workers == 1:
        yield from map(_encode, _lines(inputs))
        return
    # Forked workers inherit the tokenizer; where there is no fork each builds its own.
    fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(args.workers, context, _start_worker, (args, tokenizer if fork else None))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in batched(_lines(inputs), CHUNK):
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) > args.workers * AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a worker died (killed, or out of memory?); --workers 1 needs the least memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _lines(inputs: list[Path]) -> Iterator[Line]:
    for path in inputs:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield Line(str(path), number, raw)


class _Worker(NamedTuple):
    tokenizer: Any
    keys: list[str]
    append_eod: bool


_worker: _Worker  # of this process


def _start_worker(args: argparse.Namespace, tokenizer: Any = None) -> None:
    global _worker
    if multiprocessing.parent_process():  # the terminal's Ctrl-C is the parent's to answer
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker = _Worker(tokenizer or tokenizer_of(args), args.json_keys, args.append_eod)


def _encode_chunk(lines: tuple[Line, ...]) -> list[Encoded]:
    return [_encode(line) for line in lines]


def _encode(line: Line) -> Encoded:
    """Return the tokens of one line; blank lines give none and no complaint."""
    if not line.raw.strip():
        return Encoded(len(line.raw), None, None)
    tokens = []
    try:
        for text in _texts(line.raw):
            ids = list(_worker.tokenizer.tokenize(text)) if text else []
            if ids and _worker.append_eod:
                ids.append(_worker.tokenizer.eod)
            tokens.append(np.asarray(ids, dtype=np.int64))
    except (ValueError, RuntimeError) as problem:  # a lone surrogate, or a nesting too deep, among others
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        return Encoded(len(line.raw), None, f"{line.path} line {line.number}: {reason}")
    return Encoded(len(line.raw), tokens, None)


def _texts(raw: bytes) -> list[str]:
    """Return the strings under the wanted keys.

    Raises ValueError when the line is no JSON object, or a key is missing or holds something else.
    """
    try:
        record = json.loads(raw.rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
    for key in _worker.keys:
        if key not in record:
            raise ValueError(f'there is no "{key}", only {", ".join(sorted(record)[:5]) or "an empty object"}')
        if not isinstance(record[key], str):
            raise ValueError(f'"{key}" holds {type(record[key]).__name__}, not a string')
        if not is_text(record[key]):
            raise ValueError(f'"{key}" holds half a surrogate pair, which is no text')
    return [record[key] for key in _worker.keys]


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
