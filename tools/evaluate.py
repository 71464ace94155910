"""Validation loss and perplexity of checkpoints, side by side, whatever their formats and layouts.

    python tools/evaluate.py --load assets/tiny-llama --load runs/recovered \\
        --data runs/data/valid_text_document
    python tools/evaluate.py --load INSTRUCT --load runs/recovered --data runs/data/chat_messages_document --chat
    python tools/evaluate.py --load runs/parent --load runs/recovered --tasks arc_easy,hellaswag  # pip install lm-eval
    torchrun --nproc_per_node 8 tools/evaluate.py --load Llama-2-70b-hf --load 34b --data pile_valid_text_document

The loss is the mean cross entropy in nats over all tokens of consecutive, full windows, computed by transformers'
own model, or Megatron's layers one at a time, from the logical weights: no conversion is needed first. The training
loop's own figures are a little higher where its vocabulary is padded, since the padding takes part in its softmax.

With --chat the loss is that of the assistant's tokens: each conversation is read alone, and what counts is what the
mask beside --data says, or the chat template of a checkpoint with a .jsonl of messages.

Processes of torchrun share the text. Where a model is larger than the memory, they hold one layer at a time of all that
are compared: in bf16 the two ways differ in the third decimal.

--tasks are those of lm-evaluation-harness, its own or those of --task-folder, with the same model and the tokenizer
that lies beside the checkpoint.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive
from megatron.pruning.cli.speech import add_speech_flags, speaking
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.plan.measured import EVALUATED
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.processes import EndedTogether, World, count, is_first
from megatron.pruning.storage.small_files import replace_durably
from megatron.pruning.training.tokens import Tokens, conversations, windows

if TYPE_CHECKING:
    from megatron.pruning.training.evaluation import Evaluation


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
    parser.add_argument(
        "--layer-by-layer",
        action="store_true",
        help="hold one layer of a model at a time; it is done with all of them where one has no room otherwise",
    )
    add_speech_flags(parser, into_file=True)
    return parser


_SHOWN = {"parameters": "{:,}", "perplexity": "{:.2f}"}  # all else has four digits
_MOST = 700.0  # nats a token; e to the power of more is no number
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


def say(text: str) -> None:
    """Print, where this process is the one that speaks."""
    if is_first():
        print(text, flush=True)


def read_text(args: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> tuple[Tokens, Any]:
    """Return the tokens that every checkpoint reads, and with --chat which of them count; say how many they are."""
    smallest = min(checkpoints, key=lambda checkpoint: checkpoint.config.vocab_size)
    length = args.sequence_length
    if args.chat:
        data, counts, cut = conversations(args.data, length, args.max_tokens, smallest)
        longer = f", {cut:,} of them cut to {length} tokens" if cut else ""
        say(f"{int(counts[:, 1:].sum()):,} tokens that count, of {len(data):,} conversations{longer}, of {args.data}")
        return data, counts
    if args.max_tokens < length:
        raise ValueError(f"--max-tokens {args.max_tokens} is less than a window of {length}")
    data = windows(args.data, length, args.max_tokens // length, smallest)
    say(f"{len(data) * length:,} tokens of {args.data}")
    return data, None


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that ask for nothing, or for what cannot be."""
    if not args.data and not args.tasks:
        raise ValueError("give --data, --tasks or both: what the checkpoints are to be compared on")
    if args.chat and not args.data:
        raise ValueError("--chat is about --data: name the prefix of conversations, or a .jsonl file of messages")
    if args.tasks and not importlib.util.find_spec("lm_eval"):
        raise ValueError("--tasks needs lm-evaluation-harness, which is not installed: pip install lm-eval==0.4.13")
    if args.tasks and count() > 1:
        raise ValueError("--tasks are for one process: start it without torchrun")
    if count() > 1 and ":" in (args.device or ""):
        raise ValueError(
            f"--device {args.device} is one device for {count()} processes: leave it out, each has its own"
        )
    for flag, given in (("--tasks", args.tasks), ("--device", args.device)):
        if args.layer_by_layer and given:
            raise ValueError(f"--layer-by-layer is for the loss on --data, wherever a GPU is or none: leave {flag} out")
    if isinstance(args.json, Path) and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no directory {args.json.parent}")


def start(args: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> "Evaluation":
    """Meet the other processes, and see whether models are read whole or one layer at a time: all of them alike."""
    from megatron.pruning.training.evaluation import Evaluation, device_named
    from megatron.pruning.training.room import too_large

    device = device_named(args.device)
    dtype = args.dtype or ("bf16" if device.startswith("cuda") else "fp32")
    world = World.from_environment()
    why = ""
    if not args.layer_by_layer and device in ("cuda", "cpu"):
        why = world.share(next(filter(None, (too_large(one, dtype, device) for one in checkpoints)), ""))
    if why and args.tasks:
        raise ValueError(f"{why}: --tasks take the whole model; without them one layer is held at a time")
    if why and world.rank == 0:
        print(f"note: {why}: of every model one layer is held at a time", file=sys.stderr)
    return Evaluation(world, args.layer_by_layer or bool(why), dtype, device, args.batch_size)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate every checkpoint on the same tokens and tasks, print one table, and return what stands in it."""
    check(args)
    checkpoints = [open_checkpoint(path, fetch=True) for path in args.load]
    # It takes seconds, and --help and the mistakes before this need none of it.
    from megatron.pruning.training.evaluation import task_scores

    data, counts = read_text(args, checkpoints) if args.data else (None, None)
    evaluation = start(args, checkpoints)
    with EndedTogether():
        results = evaluated(args, checkpoints, evaluation, data, counts, task_scores)
    if isinstance(args.json, Path) and is_first():
        replace_durably(args.json, (json.dumps(results, indent=1) + "\n").encode())
    evaluation.close()
    return results


def evaluated(
    args: argparse.Namespace,
    checkpoints: Sequence[Checkpoint],
    evaluation: "Evaluation",
    data: Tokens | None,
    counts: Any,
    task_scores: Callable[..., dict[str, float]],
) -> list[dict[str, Any]]:
    """Evaluate one after the other, print each, and return them. Raises ValueError for a loss that is none."""
    results: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        result: dict[str, Any] = {"path": str(checkpoint.path), "parameters": checkpoint.config.parameters}
        model = evaluation.model(checkpoint)
        if data is not None:
            loss = evaluation.loss(checkpoint, model, data, counts)
            if not loss < _MOST:  # or nothing at all
                raise ValueError(f"{checkpoint.path} has a loss of {loss:g}: was it trained with too large a --lr?")
            result |= {"loss": loss, "perplexity": math.exp(loss)}
        if args.tasks:
            result |= task_scores(checkpoint, model, args.tasks, args.task_folder, args.batch_size, args.limit)
        del model  # before there is the next
        if not results:
            say(row(result, args.load, heading=True))
        say(row(result, args.load))
        results.append(result)
    return results


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
