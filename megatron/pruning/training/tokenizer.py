"""The tokenizer that goes with a checkpoint: found by its files, and built by Megatron.

transformers is never given a checkpoint's own directory, and no code of a tokenizer is ever run: what it reads is a
copy of the files that may travel with a model, without the settings that name code.
"""

import argparse
import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.pruning.formats.huggingface import CONFIG_FILE
from megatron.pruning.formats.megatron import HF_FILES
from megatron.pruning.model.checkpoint import carried_files_of, require_inside
from megatron.pruning.model.hf_config import RUNS_CODE
from megatron.pruning.storage.small_files import as_json, parse_json, read_small, write_durably
from megatron.pruning.training.quiet import quiet_imports

HUGGING_FACE, SENTENCE_PIECE, TIKTOKEN = "HuggingFaceTokenizer", "Llama2Tokenizer", "TikTokenizer"
NULL = "NullTokenizer"  # tokens are numbers, and there is no file
_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# How the JSON begins that Megatron reads for tiktoken, and a line of tiktoken's own files, which transformers reads.
_TIKTOKEN_JSON = re.compile(rb'\s*\[\s*\{\s*"(rank|token_bytes|token_str)"')
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def find_tokenizer(place: Path, named_by: str) -> tuple[str, Path]:
    """Return Megatron's type of a tokenizer, and its path: the file, or the folder that transformers reads.

    `place` is a checkpoint of Megatron's with a folder of Hugging Face's files, one of Hugging Face's, a folder of a
    tokenizer or its file, which the flag `named_by` named. Where a folder has several kinds, the one that transformers
    takes is the model's own.

    Raises ValueError where there is none.
    """
    if place.is_file():
        return _type_of(place), place if _type_of(place) != HUGGING_FACE else place.parent
    if not place.is_dir():
        raise ValueError(f"{named_by} {place}: no such file or directory")
    folder = place / HF_FILES if (place / HF_FILES).is_dir() else place
    for name in _NAMES:
        if (folder / name).is_file():
            return find_tokenizer(folder / name, named_by)
    for file in sorted(folder.glob("*.json")):
        if _type_of(file) == TIKTOKEN:
            return TIKTOKEN, file
    raise ValueError(
        f"{named_by} {place} has no tokenizer, neither {', '.join(_NAMES)} nor tiktoken's JSON in {folder}: name the "
        "one that made the text with --tokenizer-model (TOKENIZER_MODEL)"
    )


def _type_of(file: Path) -> str:
    with file.open("rb") as content:
        beginning = content.read(4096)
    if file.suffix == ".json":
        return TIKTOKEN if _TIKTOKEN_JSON.match(beginning) else HUGGING_FACE
    return HUGGING_FACE if _TIKTOKEN_LINE.match(beginning) else SENTENCE_PIECE


def name_tokenizer(args: argparse.Namespace, places: Mapping[str, Path | str]) -> None:
    """Let flags that say no tokenizer say one, in place: --tokenizer-model, or that of the first of `places` with one.

    `args` are Megatron's flags; `places` are directories of checkpoints, by the flags that named them. Raises
    ValueError where there is none.
    """
    if args.tokenizer_type is not None:
        return
    if args.tokenizer_model is not None:
        places = {"--tokenizer-model": args.tokenizer_model}
    missing = ValueError("no tokenizer was named, nor a checkpoint that has one: give --tokenizer-model")
    for flag, place in places.items():
        try:
            args.tokenizer_type, found = find_tokenizer(Path(place), flag)
        except ValueError as error:
            missing = error
        else:
            args.tokenizer_model = str(found)
            return
    raise missing


def build_tokenizer(args: argparse.Namespace, vocabulary: int | None = None) -> Any:
    """Return Megatron's tokenizer for its flags in `args`.

    Raises ValueError when there is no such file, Megatron cannot build it, or it has more tokens than the `vocabulary`
    of the model.
    """
    kind, path = args.tokenizer_type, args.tokenizer_model
    if getattr(args, "trust_remote_code", False):
        raise ValueError("--trust-remote-code: no code of a tokenizer is run here: leave it out")
    if kind in (HUGGING_FACE, SENTENCE_PIECE, TIKTOKEN) and path is None:
        raise ValueError(f"--tokenizer-type {kind} needs --tokenizer-model, or leave it out: it is found by the files")
    if kind in (SENTENCE_PIECE, TIKTOKEN) and not Path(path).is_file():
        raise ValueError(f"--tokenizer-model {path}: no such file")
    with quiet_imports():
        from megatron.core.tokenizers.utils import build_tokenizer as megatron
    with contextlib.ExitStack() as stack:
        if kind == HUGGING_FACE and path is not None and Path(path).is_dir():
            args.tokenizer_model = str(stack.enter_context(folder_of(tokenizer_files(Path(path)))))
        try:
            tokenizer = megatron.build_tokenizer(args)
        except Exception as error:
            reason = str(error).replace(f"{args.tokenizer_model}", f"{path}")
            raise ValueError(
                f"cannot build the tokenizer of --tokenizer-type {kind} --tokenizer-model {path}: {reason}"
            ) from error
        finally:
            args.tokenizer_model = path
    if vocabulary is not None and kind != NULL:
        require_vocabulary(tokenizer.vocab_size, vocabulary, path or kind)
    return tokenizer


def require_vocabulary(tokens: int, vocabulary: int, name: Path | str) -> None:
    """Raise ValueError when a tokenizer of this name has more tokens than the vocabulary of the model."""
    if tokens > vocabulary:
        raise ValueError(
            f"the tokenizer {name} has {tokens} tokens and the model a vocabulary of {vocabulary}: name the model's "
            "own with --tokenizer-model (TOKENIZER_MODEL)"
        )


@contextlib.contextmanager
def folder_of(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Lay files out, by name, in a folder that goes with the `with`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            write_durably(Path(folder, name), content)
        yield Path(folder)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return what transformers may read of a tokenizer's folder, by name."""
    home = folder.parent if folder.name == HF_FILES else folder
    files = carried_files_of(folder, home)
    if (config := folder / CONFIG_FILE).is_file():
        require_inside(config, home)
        values = parse_json(read_small(config), str(config))
        files[CONFIG_FILE] = as_json({name: value for name, value in values.items() if name not in RUNS_CODE})
    return files
