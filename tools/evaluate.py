"""Validation loss and perplexity of checkpoints, side by side, whatever their formats and layouts.

    python tools/evaluate.py --load assets/tiny-llama --load runs/pruned --load runs/recovered --data runs/data/valid
    python tools/evaluate.py --load INSTRUCT --load runs/recovered --data runs/data/chat_messages_document --chat
    python tools/evaluate.py --load runs/parent --load runs/recovered --tasks arc_easy,hellaswag  # pip install lm-eval

The loss is the mean cross entropy in nats over all tokens of consecutive, full windows, computed by transformers'
own model from the logical weights: no conversion is needed first. The training loop's own figures are a little
higher where its vocabulary is padded, since the padding takes part in its softmax.

With --chat the loss is that of the assistant's tokens: each conversation is read alone, and what counts is what the
mask beside --data says, or the chat template of a checkpoint with a .jsonl of messages.

--tasks are those of lm-evaluation-harness, its own or those of --task-folder, with the same model and the tokenizer
that lies beside the checkpoint.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive
from megatron.pruning.cli.speech import add_speech_flags, speaking
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.plan.measured import EVALUATED
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.small_files import replace_durably
from megatron.pruning.training.tokens import Tokens, conversations, windows


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--load", type=Path, action="append", required=True, metavar="DIR", help="checkpoint; may be repeated"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PREFIX",
        help="text to take the loss of: PREFIX.bin and .idx, or a .jsonl, .jsonl.gz, .jsonl.zst or .parquet",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="take the loss of what counts alone: --data has a mask beside it, or is a .jsonl of messages",
    )
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), metavar="NAMES", help="tasks, separated by commas"
    )
    parser.add_argument("--task-folder", type=Path, metavar="DIR", help="folder of tasks of your own, as YAML")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="documents of each task, the first N (default: all)"
    )
    parser.add_argument(
        "--sequence-length", type=positive, default=512, metavar="N", help="tokens of a window (default 512)"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=EVALUATED,
        metavar="N",
        help=f"tokens of the data, from its start (default {EVALUATED:,})",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="windows that are computed at once (default 8)"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(TORCH_NAMES),
        help="dtype to compute in (default: bf16 on a GPU, else fp32)",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="device to compute on (default: a GPU when there is one)",
    )
    add_speech_flags(parser, into_file=True)
    return parser


_SHOWN = {"parameters": "{:,}", "perplexity": "{:.2f}"}  # all else has four digits
_NARROWEST = 14  # columns of a figure: those of 70B parameters


def row(result: Mapping[str, Any], paths: Sequence[Path], heading: bool = False) -> str:
    """Return the line of a checkpoint in the table of those at `paths`, or the table's heading."""
    path, *figures = result
    longest = max(len(str(path)) for path in ("checkpoint", *paths))
    cells = figures if heading else [_SHOWN.get(name, "{:.4f}").format(result[name]) for name in figures]
    widths = [max(len(name), _NARROWEST) for name in figures]
    first = "checkpoint" if heading else result[path]
    return "  ".join([first.ljust(longest), *(cell.rjust(n) for cell, n in zip(cells, widths, strict=True))])


def main(argv: Sequence[str]) -> None:
    """Read the flags, and compare."""
    args = parser().parse_args(hyphenated(argv))
    with speaking(args) as answer:
        results = compare(args)
        answer(lambda: results)


def read_text(args: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> tuple[Tokens, Any]:
    """Return the tokens that every checkpoint reads, and with --chat which of them count; say how many they are."""
    smallest = min(checkpoints, key=lambda checkpoint: checkpoint.config.vocab_size)
    length = args.sequence_length
    if args.chat:
        data, counts, cut = conversations(args.data, length, args.max_tokens, smallest)
        longer = f", {cut:,} of them cut to {length} tokens" if cut else ""
        print(f"{int(counts[:, 1:].sum()):,} tokens that count, of {len(data):,} conversations{longer}, of {args.data}")
        return data, counts
    if args.max_tokens < length:
        raise ValueError(f"--max-tokens {args.max_tokens} is less than a window of {length}")
    data = windows(args.data, length, args.max_tokens // length, smallest)
    print(f"{len(data) * length:,} tokens of {args.data}")
    return data, None


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate every checkpoint on the same tokens and tasks, print one table, and return what stands in it."""
    if not args.data and not args.tasks:
        raise ValueError("give --data, --tasks or both: what the checkpoints are to be compared on")
    if args.chat and not args.data:
        raise ValueError("--chat is about --data: name the prefix of conversations, or a .jsonl file of messages")
    if args.tasks and not importlib.util.find_spec("lm_eval"):
        raise ValueError("--tasks needs lm-evaluation-harness, which is not installed: pip install lm-eval==0.4.13")
    file = args.json if isinstance(args.json, Path) else None
    if file and not file.parent.is_dir():
        raise ValueError(f"--json {file}: there is no directory {file.parent}")
    # They take seconds, and --help and the mistakes above need none of them.
    from megatron.pruning.training.evaluation import device_named, loss, task_scores
    from megatron.pruning.training.hf_model import build

    device = device_named(args.device)
    dtype = args.dtype or ("bf16" if device.startswith("cuda") else "fp32")
    checkpoints = [open_checkpoint(path, fetch=True) for path in args.load]
    data = counts = None
    if args.data:
        data, counts = read_text(args, checkpoints)
    results: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        model = build(checkpoint, dtype, device)
        result: dict[str, Any] = {"path": str(checkpoint.path), "parameters": checkpoint.config.parameters}
        if data is not None:
            result["loss"] = loss(model, data, args.batch_size, str(checkpoint.path), counts)
            result["perplexity"] = math.exp(result["loss"])
        if args.tasks:
            result |= task_scores(checkpoint, model, args.tasks, args.task_folder, args.batch_size, args.limit)
        if not results:
            print(row(result, args.load, heading=True))
        print(row(result, args.load), flush=True)
        results.append(result)
    if file:
        replace_durably(file, (json.dumps(results, indent=1) + "\n").encode())
    return results


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
