"""Turn JSON lines into the token files that Megatron trains on.

    python tools/preprocess_data.py --input train.jsonl --output-prefix DATA/train --append-eod --load MODEL --workers 8

    python tools/preprocess_data.py --input 'part-*.jsonl.gz' more.parquet --json-key meta.body --append-eod \\
        --output-prefix DATA/all --tokenizer-model OTHER/tokenizer.model

    # conversations, {"messages": [{"role": "user", "content": "..."}, ...]}, of which the assistant's turns are learned
    python tools/preprocess_data.py --input chat.jsonl --output-prefix DATA/chat --load INSTRUCT --chat messages \\
        --mask-prompt

    python pretrain_gpt.py --train-data-path 0.7 DATA/train_text_document 0.3 DATA/chat_messages_document ...

--load names the checkpoint that is to read the text, of any format: the tokenizer is the one that goes with it.
Each line is an object with a string under "text" (--json-keys names others, each gets files of its own; a.b is "b" in
"a"). Written are PREFIX_text_document.bin, the token ids one document after another, and .idx, the lengths (the format
of megatron.core.datasets.indexed_dataset). Of conversations, whose tokens are those of the tokenizer's own chat
template, there is a second pair, PREFIX_messages_document_mask.bin and .idx: 1 for a token that counts in the loss, 0
for another; training and evaluate.py find it by its name. Files may be compressed, .gz or .zst, or Parquet.

Tokens and their order do not depend on --workers. A line that cannot be read ends the run with its file and number, and
nothing is left behind; --skip-bad-lines counts and reports such lines instead. Existing output of the same name is
replaced, by a rename at the end.
"""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.records import Record, find_files, parse_record, records, text_at
from megatron.pruning.storage.small_files import alone_at, new_file_beside
from megatron.pruning.training.chat import encode, messages_at, require_template
from megatron.pruning.training.hf_model import tokenizer_in, tokenizer_of
from megatron.pruning.training.quiet import quiet_imports
from megatron.pruning.training.tokenizer import (
    TIKTOKEN,
    build_tokenizer,
    name_tokenizer,
    require_vocabulary,
    tokenizer_files,
)
from megatron.pruning.training.tokens import mask_of

TOKENIZER_TYPES = (
    "Llama2Tokenizer SentencePieceTokenizer GPTSentencePieceTokenizer HuggingFaceTokenizer GPT2BPETokenizer "
    "TikTokenizer NullTokenizer"
).split()
SUFFIXES = (".bin", ".idx")
CHUNK = 16  # lines that a worker takes at a time
AHEAD = 4  # chunks that wait for each worker


class Encoded(NamedTuple):
    """What became of a record: an array for each file of tokens, or a complaint, or neither if there was nothing in it.

    `left_out` are tokens of a conversation that is longer than --max-length.
    """

    read: int
    arrays: list[np.ndarray] | None = None
    complaint: str | None = None
    left_out: int = 0


@dataclass
class Told:
    """What is said at the end."""

    documents: int = 0
    tokens: int = 0
    counted: int = 0  # tokens that the mask says count
    complaints: int = 0
    cut: int = 0  # conversations
    left_out: int = 0  # tokens of these
    silent: int = 0  # conversations without a token that counts
    cut_silent: int = 0  # conversations of which no such token is left


def main(arguments: Sequence[str]) -> None:
    """Write the token files that the command line asks for.

    Raises ValueError when an input is missing, empty or has a bad line, the tokenizer cannot be built, or it has no
    template for conversations.
    """
    args = parser().parse_args(hyphenated(arguments))
    check(args)
    inputs = find_files(args.input, "--input")
    total_bytes = sum(path.stat().st_size for path in inputs)
    if not total_bytes:
        raise ValueError(f"--input {' '.join(args.input)} is empty")

    # Importing Megatron would import the compiler of its kernels, of which none runs here, for a second.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    tokenizer = chat_tokenizer(args) if args.chat else text_tokenizer(args)
    if args.append_eod:
        require_eod(tokenizer, args)
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import DType
    dtype = DType.optimal_dtype(len(tokenizer) if args.chat else tokenizer.vocab_size)
    prefix = Path(args.output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{prefix}_{key}_document" for key in ([args.chat] if args.chat else args.json_keys)]
    outputs: dict[str, type[np.number]] = dict.fromkeys(texts, dtype)
    if args.chat:
        outputs[mask_of(texts[0])] = np.uint8
    for text in texts:
        with alone_at(Path(text)):  # what a killed run left in the way is told now, and not after hours
            pass
    asides = {
        f"{output}{suffix}": new_file_beside(Path(f"{output}{suffix}")) for output in outputs for suffix in SUFFIXES
    }
    try:
        told = write(args, inputs, outputs, asides, tokenizer, total_bytes)
        if not told.documents:
            raise ValueError(f"--input {' '.join(args.input)} holds no document that has tokens" + said(told, args))
        for text in texts:
            put_in_place(text, asides)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
    mask = f", of which {told.counted:,} count in the loss" if args.chat else ""
    print(
        f"{told.documents:,} documents, {told.tokens:,} tokens{mask}{said(told, args)}: {', '.join(texts)}.bin and .idx"
    )


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together; --json-keys gets its default."""
    for flag in ("mask_prompt", "max_length"):
        if getattr(args, flag) and not args.chat:
            raise ValueError(f"--{flag.replace('_', '-')} is for conversations: add --chat messages")
    for flag in ("append_eod", "json_keys"):
        if getattr(args, flag) and args.chat:
            why = "a chat template writes its own ends" if flag == "append_eod" else "--chat names the key itself"
            raise ValueError(f"--{flag.replace('_', '-')} cannot be combined with --chat: {why}; leave it out")
    args.json_keys = args.json_keys or ["text"]
    if len(set(args.json_keys)) < len(args.json_keys):
        raise ValueError(f"--json-keys {' '.join(args.json_keys)} names a key twice")


def said(told: Told, args: argparse.Namespace) -> str:
    """Return what else is to be said of what was read."""
    parts = {
        f"{told.complaints:,} bad lines skipped": told.complaints,
        f"{told.silent:,} conversations left out, without a turn of the assistant": told.silent,
        f"{told.cut_silent:,} conversations left out, of which --max-length {args.max_length} leaves no turn of the "
        "assistant": told.cut_silent,
        f"{told.cut:,} conversations cut to --max-length {args.max_length}, {told.left_out:,} tokens": told.cut,
    }
    return "".join(f", {part}" for part, count in parts.items() if count)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines, also .gz or .zst, or Parquet, in the order to be written; 'part-*.jsonl' names several",
    )
    data.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="path and beginning of the output's name"
    )
    data.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        metavar="KEY",
        help="keys to tokenize; a.b is what lies under b in a (default: text)",
    )
    data.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    data.add_argument("--skip-bad-lines", action="store_true", help="report and skip what cannot be read")
    data.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that tokenize (default: 1)")
    chat = parser.add_argument_group("conversations")
    chat.add_argument("--chat", metavar="KEY", help="key of a list of messages, for the tokenizer's chat template")
    chat.add_argument("--mask-prompt", action="store_true", help="let only the assistant's turns count in the loss")
    chat.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens of a conversation; what is longer is cut there"
    )
    tokens = parser.add_argument_group("tokenizer", "of a checkpoint, or another, as Megatron's training names it")
    tokens.add_argument("--load", type=Path, metavar="DIR", help="checkpoint whose tokenizer is taken")
    tokens.add_argument("--tokenizer-model", metavar="PATH", help="instead: the file or the folder of a tokenizer")
    tokens.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="kind of tokenizer (default: by its files)")
    tokens.add_argument("--vocab-file", metavar="FILE", help="file of GPT2BPETokenizer")
    tokens.add_argument("--merge-file", metavar="FILE", help="file of GPT2BPETokenizer")
    tokens.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary of NullTokenizer and TikTokenizer")
    tokens.add_argument("--tiktoken-pattern", choices=["v1", "v2"], help="pattern of TikTokenizer")
    return parser


def chat_tokenizer(args: argparse.Namespace) -> Any:
    """Return transformers' tokenizer of a checkpoint or a folder. Raises ValueError without one that has a template."""
    if args.tokenizer_model is None and args.load is None:
        raise ValueError("--chat needs a tokenizer with a chat template: name its checkpoint with --load")
    if args.tokenizer_model is not None:
        place = Path(args.tokenizer_model)
        folder = place if place.is_dir() else place.parent
        tokenizer = tokenizer_in(tokenizer_files(folder), folder)
    else:
        checkpoint = open_checkpoint(args.load, fetch=True)
        place, tokenizer = args.load, tokenizer_of(checkpoint)
        if checkpoint.vocab_is_known:
            require_vocabulary(len(tokenizer), checkpoint.config.vocab_size, place)
    require_template(tokenizer, "--chat", place)
    return tokenizer


def text_tokenizer(args: argparse.Namespace) -> Any:
    """Return Megatron's tokenizer for these flags, with the defaults of Megatron's training for all others.

    Without a type it is found, in place, by the file, the folder or the checkpoint that is named. Raises ValueError
    when there is none, or Megatron cannot build it.
    """
    vocabulary, places = None, {}
    if args.load is not None:
        checkpoint = open_checkpoint(args.load, fetch=True)
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
    outputs: Mapping[str, type[np.number]],
    asides: Mapping[str, Path],
    tokenizer: Any,
    total_bytes: int,
) -> Told:
    """Tokenize the inputs, in their order, into `asides`, which has a file for each name that a file is to get.

    `outputs` are these names without suffix and what numbers they hold, one for each array of a document; `total_bytes`
    is the size of the inputs. Raises ValueError for a bad line, unless they are to be skipped.
    """
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builders = [IndexedDatasetBuilder(str(asides[f"{output}.bin"]), dtype=dtype) for output, dtype in outputs.items()]
    told, written = Told(), dict.fromkeys(outputs, 0)
    progress = Progress("tokenizing", total_bytes, show=True)
    for encoded in _encode_all(args, inputs, tokenizer):
        progress.advance(encoded.read)
        if encoded.complaint:
            if not args.skip_bad_lines:
                raise ValueError(f"{encoded.complaint} (--skip-bad-lines leaves such lines out)")
            told.complaints += 1
            print(f"skipped: {encoded.complaint}", file=sys.stderr)
        if not encoded.arrays or not any(len(ids) for ids in encoded.arrays):
            continue
        if args.chat and not encoded.arrays[1].any():
            told.silent += not encoded.left_out
            told.cut_silent += encoded.left_out > 0
            continue
        for builder, output, ids in zip(builders, outputs, encoded.arrays, strict=True):
            if len(ids):
                builder.add_document(ids, [len(ids)])
                written[output] += 1
        told.documents += 1
        told.tokens += len(encoded.arrays[0]) if args.chat else sum(map(len, encoded.arrays))
        told.counted += int(encoded.arrays[1].sum()) if args.chat else 0
        told.cut += encoded.left_out > 0
        told.left_out += encoded.left_out
    progress.close()
    if told.documents and (empty := [output for output, count in written.items() if not count]):
        raise ValueError(f"--input {' '.join(args.input)} holds nothing that has tokens for {empty[0]}")
    for builder, output in zip(builders, outputs, strict=True):
        builder.finalize(str(asides[f"{output}.idx"]))
    return told


def put_in_place(text: str, asides: Mapping[str, Path]) -> None:
    """Give the files of a text their names, so that a reader never finds those of two runs, or tokens without a mask.

    Raises ValueError when another run is at the same.
    """
    with alone_at(Path(text)):
        names = [f"{output}{suffix}" for output in (mask_of(text), text) for suffix in SUFFIXES]
        for name in reversed(names):  # without its .idx the .bin is no text
            Path(name).unlink(missing_ok=True)
        for name in names:
            if name in asides:
                asides[name].rename(name)


def _encode_all(args: argparse.Namespace, inputs: list[Path], tokenizer: Any) -> Iterator[Encoded]:
    """Yield the inputs' lines, encoded, in their order."""
    _start_worker(args, tokenizer)
    if args.workers == 1:
        yield from map(_encode, _records(inputs, args))
        return
    # Forked workers inherit the tokenizer; where there is no fork each builds its own.
    fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(args.workers, context, _start_worker, (args, tokenizer if fork else None))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in batched(_records(inputs, args), CHUNK):
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) > args.workers * AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a worker died (killed, or out of memory?); --workers 1 needs the least memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _records(inputs: list[Path], args: argparse.Namespace) -> Iterator[Record]:
    for path in inputs:
        yield from records(path, [args.chat] if args.chat else args.json_keys)


class _Worker(NamedTuple):
    tokenizer: Any
    args: argparse.Namespace


_worker: _Worker  # of this process


def _start_worker(args: argparse.Namespace, tokenizer: Any = None) -> None:
    global _worker
    if multiprocessing.parent_process():  # the terminal's Ctrl-C is the parent's to answer
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if tokenizer is None:
        tokenizer = chat_tokenizer(args) if args.chat else text_tokenizer(args)
    _worker = _Worker(tokenizer, args)


def _encode_chunk(chunk: tuple[Record, ...]) -> list[Encoded]:
    return [_encode(record) for record in chunk]


def _encode(record: Record) -> Encoded:
    """Return what becomes of a record; blank lines give no tokens and no complaint."""
    if not record.raw.strip():
        return Encoded(record.read)
    try:
        values = parse_record(record.raw)
        if _worker.args.chat:
            return _conversation(values, record.read)
        return Encoded(record.read, [_document(text_at(values, key)) for key in _worker.args.json_keys])
    except (ValueError, RuntimeError) as problem:  # a lone surrogate, or a nesting too deep, among others
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        return Encoded(record.read, complaint=f"{record.path} line {record.number}: {reason}")


def _document(text: str) -> np.ndarray:
    ids = list(_worker.tokenizer.tokenize(text)) if text else []
    if ids and _worker.args.append_eod:
        ids.append(_worker.tokenizer.eod)
    return np.asarray(ids, dtype=np.int64)


def _conversation(values: dict[str, Any], read: int) -> Encoded:
    args = _worker.args
    tokens, counts = encode(_worker.tokenizer, messages_at(values, args.chat), args.mask_prompt)
    longest = args.max_length or len(tokens)
    return Encoded(read, [tokens[:longest], counts[:longest]], left_out=max(0, len(tokens) - longest))


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
