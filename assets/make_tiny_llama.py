"""Makes assets/tiny-llama, the small Llama that the project carries to show itself on.

    python assets/make_tiny_llama.py --data-only DIR                # only its text: DIR/train.jsonl and DIR/valid.jsonl
    python assets/make_tiny_llama.py                                # everything, in about 40 minutes on two cores
    python assets/make_tiny_llama.py --minutes 2 --save TINY --work RUN   # a rehearsal

The text is Python's own standard library, so that nothing has to be fetched. The tokenizer is SentencePiece BPE with
byte fallback and gives back every source text unchanged; its Hugging Face form differs in that a literal <s> or </s> in
a text becomes the special token. Training is the stock Megatron loop (pretrain_gpt.py); what is made lies under --work,
and an interrupted run goes on where it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Modules of the standard library, by folder, as Python 3.12 and 3.13 have them; what a Python lacks is left out. Not
# among them: tests, tables (encodings, HTML entities, pydoc topics), and modules that 3.13 dropped or made packages.
TRAIN = {
    "": (
        "__future__ _aix_support _collections_abc _compat_pickle _compression _markupbase _osx_support "
        "_py_abc _pydatetime _pydecimal _pyio _pylong _sitebuiltins _strptime _threading_local _weakrefset "
        "abc argparse ast base64 bdb bz2 cProfile code codecs codeop colorsys compileall configparser "
        "contextlib copy copyreg dataclasses difflib dis doctest enum filecmp fileinput fnmatch ftplib "
        "functools genericpath getopt getpass gettext glob gzip hashlib hmac imaplib inspect io ipaddress "
        "linecache locale lzma mailbox mimetypes modulefinder netrc ntpath numbers opcode operator optparse "
        "os pdb pickle pickletools pkgutil platform poplib posixpath pprint profile pstats pty py_compile "
        "pyclbr pydoc quopri random reprlib rlcompleter runpy shutil site smtplib socket socketserver ssl "
        "stat stringprep subprocess symtable tabnanny tarfile tempfile timeit tokenize traceback tracemalloc "
        "turtle types typing warnings weakref webbrowser zipimport"
    ),
    "asyncio": (
        "__main__ base_events base_subprocess coroutines events futures locks proactor_events protocols "
        "queues runners selector_events sslproto staggered streams subprocess taskgroups tasks timeouts "
        "transports unix_events windows_events windows_utils"
    ),
    "collections": "__init__",
    "concurrent/futures": "_base process thread",
    "ctypes": "__init__ _aix util wintypes",
    "ctypes/macholib": "dyld",
    "curses": "__init__ has_key textpad",
    "dbm": "__init__ dumb",
    "email": (
        "_encoded_words _header_value_parser _parseaddr _policybase base64mime charset contentmanager errors "
        "feedparser generator header headerregistry parser policy quoprimime utils"
    ),
    "email/mime": "audio image",
    "html": "__init__ parser",
    "http": "__init__ client cookiejar server",
    "idlelib": (
        "autocomplete autocomplete_w autoexpand browser calltip calltip_w codecontext colorizer config "
        "config_key configdialog debugger debugger_r debugobj editor filelist format grep help help_about "
        "history hyperparser iomenu macosx mainmenu multicall outwin parenmatch pathbrowser percolator "
        "pyparse pyshell query redirector replace rpc run runscript scrolledlist search searchbase sidebar "
        "squeezer stackviewer textview tooltip tree zoomheight"
    ),
    "importlib": "__init__ _bootstrap _bootstrap_external abc util",
    "importlib/metadata": "__init__",
    "importlib/resources": "_adapters _common abc readers",
    "json": "__init__ tool",
    "logging": "__init__ handlers",
    "multiprocessing": (
        "connection context forkserver heap managers popen_spawn_win32 process queues reduction "
        "resource_sharer resource_tracker shared_memory sharedctypes spawn synchronize util"
    ),
    "multiprocessing/dummy": "__init__",
    "re": "__init__ _casefix _compiler _constants",
    "sqlite3": "__main__ dbapi2 dump",
    "tkinter": "__init__ dnd filedialog font messagebox simpledialog ttk",
    "unittest": "__init__ async_case case loader main mock result runner util",
    "urllib": "parse request",
    "venv": "__init__",
    "wsgiref": "headers simple_server util validate",
    "xml/dom": "__init__ domreg expatbuilder minicompat minidom pulldom xmlbuilder",
    "xml/etree": "ElementInclude ElementTree",
    "xml/sax": "__init__ _exceptions expatreader handler saxutils xmlreader",
    "xmlrpc": "server",
    "zipfile": "__init__",
    "zipfile/_path": "__init__",
    "zoneinfo": "_common _tzpath _zoneinfo",
}
VALID = {
    "": (
        "bisect calendar cmd csv fractions graphlib heapq plistlib queue sched selectors shelve shlex statistics "
        "string textwrap threading trace uuid wave zipapp"
    ),
    "email": "message",
    "http": "cookies",
    "idlelib": "searchengine undo",
    "json": "decoder encoder",
    "logging": "config",
    "multiprocessing": "pool",
    "re": "_parser",
    "tomllib": "_parser",
    "unittest": "suite",
    "urllib": "robotparser",
    "wsgiref": "handlers",
    "xml/etree": "ElementPath",
    "xmlrpc": "client",
}

VOCAB = 1024
SEQUENCE = 512  # tokens
# The model, in the names of Hugging Face's Llama configuration.
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 160,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "max_position_embeddings": SEQUENCE,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
BATCH = 16  # sequences a step
RATE = 2.5e-3  # peak learning rate
STEPS_PER_MINUTE = 52  # on two cores: turns --minutes into a number of steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the text, the tokenizer, the checkpoint and the Hugging Face folder, each unless it is there.

    Args:
        arguments: the command line without the program's name; None means sys.argv.

    Raises:
        ValueError: a step failed; one sentence.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-only", metavar="DIR", help="write DIR/train.jsonl and DIR/valid.jsonl and stop")
    parser.add_argument("--work", metavar="DIR", default=str(ROOT / "runs" / "tiny-llama"), help="where it is made")
    parser.add_argument("--save", metavar="DIR", default=str(ROOT / "assets" / "tiny-llama"), help="the finished model")
    parser.add_argument("--minutes", type=float, default=35.0, help="of training on two cores (default: 35)")
    parser.add_argument("--processes", type=int, default=2, help="that train side by side (default: 2)")
    args = parser.parse_args(arguments)

    if args.data_only:
        write_text(Path(args.data_only))
        return
    work = Path(args.work)
    checkpoint = work / "checkpoint"
    write_text(work)
    write_tokenizer(work / "train.jsonl", checkpoint / "huggingface")
    for name in ("train", "valid"):
        tokenize(work / f"{name}.jsonl", work / name, checkpoint / "huggingface")
    train(work, checkpoint, steps=int(args.minutes * STEPS_PER_MINUTE), processes=args.processes)
    export(checkpoint, Path(args.save))


# Text ----------------------------------------------------------------------------------------------------------------


def write_text(folder: Path) -> None:
    """Writes train.jsonl and valid.jsonl: one document, a source file, a line.

    Raises:
        ValueError: this Python's library cannot be read.
    """
    library = Path(sysconfig.get_path("stdlib"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, modules in (("train", TRAIN), ("valid", VALID)):
        paths = [library / package / f"{stem}.py" for package, stems in modules.items() for stem in stems.split()]
        present = [path for path in paths if path.is_file()]
        if len(present) < len(paths) / 2:
            raise ValueError(f"the standard library in {library} has only {len(present)} of {len(paths)} source files")
        target = folder / f"{name}.jsonl"
        aside = target.with_suffix(".partial")
        with aside.open("w", encoding="utf-8") as file:
            for path in present:
                text = path.read_text(encoding="utf-8")
                file.write(json.dumps({"text": text, "source": path.relative_to(library).as_posix()}) + "\n")
        aside.rename(target)
        lacking = f" ({len(paths) - len(present)} are not in this Python)" if len(present) < len(paths) else ""
        print(f"{target}: {len(present)} source files{lacking}, {target.stat().st_size / 1e6:.1f} MB", flush=True)


def texts(path: Path) -> list[str]:
    """The documents of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


# Tokenizer -----------------------------------------------------------------------------------------------------------


def write_tokenizer(corpus: Path, folder: Path) -> None:
    """Trains the tokenizer and writes it as SentencePiece and as Hugging Face want it, with the model's configuration.

    Args:
        corpus: JSON lines to learn the pieces from.
        folder: for tokenizer.model, tokenizer.json, tokenizer_config.json, config.json and generation_config.json.
    """
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    documents = texts(corpus)
    train_pieces((line for text in documents for line in text.splitlines() if line), folder / "tokenizer.model")
    write_fast_tokenizer(folder / "tokenizer.model", folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}, indent=2) + "\n"
    )
    config = MODEL | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_pieces(lines: Iterable[str], model: Path) -> None:
    """Trains SentencePiece BPE so that any text comes back unchanged.

    No character is normalized, no space is added or dropped; runs of spaces become pieces of their own, and what has no
    piece (the newline, the tab, other scripts) is spelled in bytes. Ids 0, 1, 2 are unk, bos, eos as in Llama.
    """
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(model.with_suffix("")),
        model_type="bpe",
        vocab_size=VOCAB,
        character_coverage=0.9999,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    model.with_suffix(".vocab").unlink()


def write_fast_tokenizer(model: Path, folder: Path) -> None:
    """Writes the same tokenizer as tokenizer.json and tokenizer_config.json.

    SentencePiece joins the pair whose piece comes first in its list; the merges say that pair by pair.
    """
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(str(model))
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    ids = {name: index for index, name in enumerate(names)}
    special = names[:3]
    joinable = {name for index, name in enumerate(names) if index > 2 and not pieces.is_byte(index)}
    merges = [
        [name[:cut], name[cut:]]
        # A piece's score is minus the order in which it was learned.
        for name in sorted(joinable, key=lambda name: -pieces.get_score(ids[name]))
        for cut in range(1, len(name))
        if name[:cut] in joinable and name[cut:] in joinable
    ]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name} | added for index, name in enumerate(special)],
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": SEQUENCE,
        "unk_token": names[0],
        "bos_token": names[1],
        "eos_token": names[2],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def tokenize(jsonl: Path, prefix: Path, tokenizer: Path) -> None:
    """Makes Megatron's token files of a text, through tools/preprocess_data.py."""
    if Path(f"{prefix}_text_document.idx").is_file():
        return
    run(
        [
            ROOT / "tools" / "preprocess_data.py",
            "--append-eod",
            "--workers",
            "2",
            "--tokenizer-type",
            "Llama2Tokenizer",
        ],
        ["--tokenizer-model", tokenizer / "tokenizer.model", "--input", jsonl, "--output-prefix", prefix],
    )


# Training and export -------------------------------------------------------------------------------------------------


def train(work: Path, checkpoint: Path, steps: int, processes: int) -> None:
    """Trains from scratch, or goes on, with the stock loop.

    Args:
        work: where the token files lie.
        checkpoint: read and written; `huggingface/` in it is already there.
        steps: of the whole schedule.
        processes: data-parallel ranks on this machine; together they may use all cores.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    if tracker.is_file() and int(tracker.read_text()) >= steps:
        return
    run(
        f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split(),
        [ROOT / "pretrain_gpt.py", *training_flags(work, checkpoint, steps, processes)],
        OMP_NUM_THREADS=str(threads),
    )


def training_flags(work: Path, checkpoint: Path, steps: int, processes: int) -> list[str]:
    """The command line of pretrain_gpt.py; the model's part is `MODEL` in Megatron's words."""
    tokens_of = {name: str(work / f"{name}_text_document") for name in ("train", "valid")}
    flags: dict[str, Any] = {
        "--num-layers": MODEL["num_hidden_layers"],
        "--hidden-size": MODEL["hidden_size"],
        "--ffn-hidden-size": MODEL["intermediate_size"],
        "--num-attention-heads": MODEL["num_attention_heads"],
        "--group-query-attention": None,
        "--num-query-groups": MODEL["num_key_value_heads"],
        "--kv-channels": MODEL["head_dim"],
        "--max-position-embeddings": MODEL["max_position_embeddings"],
        "--position-embedding-type": "rope",
        "--rotary-base": int(MODEL["rope_theta"]),
        "--norm-epsilon": MODEL["rms_norm_eps"],
        "--normalization": "RMSNorm",
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--untie-embeddings-and-output-weights": None,
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--init-method-std": 0.05,  # about 0.6 / sqrt(hidden size), for a model this narrow
        "--seq-length": SEQUENCE,
        "--tokenizer-type": "Llama2Tokenizer",
        "--tokenizer-model": checkpoint / "huggingface" / "tokenizer.model",
        "--make-vocab-size-divisible-by": 128,
        "--train-data-path": tokens_of["train"],
        "--valid-data-path": tokens_of["valid"],
        "--data-cache-path": work / "cache",
        "--micro-batch-size": BATCH // processes,
        "--global-batch-size": BATCH,
        "--train-iters": steps,
        "--lr": RATE,
        "--min-lr": RATE / 50,
        "--lr-decay-style": "cosine",
        "--lr-warmup-iters": max(1, steps // 20),
        "--weight-decay": 0.1,
        "--adam-beta2": 0.98,
        "--clip-grad": 1.0,
        "--bf16": None,
        "--log-interval": 20,
        "--eval-interval": max(1, steps // 8),
        "--eval-iters": 20,
        "--ckpt-format": "torch",
        "--save-interval": max(1, steps // 8),
        "--save": checkpoint,
        "--load": checkpoint,
    }
    return [str(word) for flag, value in flags.items() for word in ([flag] if value is None else [flag, value])]


def export(checkpoint: Path, folder: Path) -> None:
    """Hands the checkpoint to Hugging Face in bfloat16, through tools/checkpoint_conversion/convert.py."""
    run(
        [ROOT / "tools" / "checkpoint_conversion" / "convert.py", "--load", checkpoint, "--save", folder],
        "--format hf --dtype bf16 --overwrite".split(),
    )
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (folder / name).exists():
            shutil.copy2(checkpoint / "huggingface" / name, folder / name)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")


def run(program: Sequence[str | Path], flags: Sequence[str | Path], **environment: str) -> None:
    """Runs a Python program with more environment variables.

    Raises:
        ValueError: it failed; it has said why.
    """
    command = [sys.executable, *map(str, program), *map(str, flags)]
    if subprocess.run(command, env=os.environ | environment, check=False).returncode:
        raise ValueError(f"this step failed: {' '.join(command[1:4])} ...")


if __name__ == "__main__":
    try:
        main()
    except ValueError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(1)
