"""Shapes measured: each is pruned, trained on for a while by scripts/check_model.sh, and ranked by validation loss."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.pruning.cli.stock_log import read_validation
from megatron.pruning.model.axes import PRUNABLE
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.plan.report import table
from megatron.pruning.plan.shapes import Shape
from megatron.pruning.storage.processes import count
from megatron.pruning.storage.small_files import replace_durably
from megatron.pruning.training.tokenizer import name_tokenizer

STEPS = 200
_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_model.sh"

# Flags of the stock loop that check_model.sh has a setting of the same name for: those given are handed on.
_HANDED_ON = (
    "seq_length micro_batch_size global_batch_size lr min_lr lr_warmup_iters weight_decay clip_grad eval_iters split "
    "tokenizer_type tokenizer_model"
).split()


def check(args: argparse.Namespace, parent: Checkpoint) -> None:
    """Raise ValueError unless the flags name text to train on, there is a tokenizer, and this is a single process."""
    if args.candidates < 2:
        raise ValueError(f"--candidates {args.candidates}: at least two shapes can be compared")
    if count() > 1:
        raise ValueError("--candidates starts the training processes by itself: run it with plain python")
    if not (args.data_path or (args.train_data_path and args.valid_data_path)):
        raise ValueError("--candidates needs text: give --data-path PREFIX, or --train-data-path and --valid-data-path")
    for flag, given in (("--plan-only", args.plan_only), ("--shape", args.shape is not None)):
        if given:
            raise ValueError(f"--candidates measures shapes and {flag} decides for one: leave one of them out")
    if args.train_iters is not None and not (args.train_iters.isdecimal() and int(args.train_iters) > 1):
        raise ValueError(f"--train-iters {args.train_iters} is not a whole number from 2 on")
    name_tokenizer(argparse.Namespace(**vars(args)), {"--load": parent.tokenizer_folder})


def measure(
    shapes: Sequence[Shape], save: Path, args: argparse.Namespace, prune: Callable[[Shape, Path], None]
) -> list[float]:
    """Prune to each shape, train it on, print the ranking; return the losses by shape.

    `shapes` are numbered from 1 for the user. The work is done beside `save`, in SAVE.candidates, where logs and the
    ranking stay. `args` has the stock loop's own flags, too, and `prune` writes the checkpoint of a shape to a path.
    Raises ValueError when a training fails; what was measured before is in the ranking file.
    """
    steps = int(args.train_iters or STEPS)
    folder = save.with_name(f"{save.name}.candidates")
    folder.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    for number, shape in enumerate(shapes, start=1):
        work, log = folder / f"shape{number}", folder / f"shape{number}.log"
        shutil.rmtree(work, ignore_errors=True)
        try:
            prune(shape, work / "pruned")
            print(f"shape {number} of {len(shapes)}: {steps} steps of training (log: {log})", flush=True)
            losses.append(_train(work, log, args, steps))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        ranking = [{"shape": i, "loss": loss, **shapes[i - 1].sizes} for i, loss in enumerate(losses, start=1)]
        replace_durably(folder / "losses.json", (json.dumps(ranking, indent=1) + "\n").encode())
    order = sorted(range(len(shapes)), key=lambda i: losses[i])
    rows: list[Sequence[str]] = [("rank", "shape", *PRUNABLE, "parameters", f"loss after {steps} steps")]
    for rank, i in enumerate(order, start=1):
        sizes = [f"{shapes[i].sizes[axis]:,}" for axis in PRUNABLE]
        rows.append((f"{rank}", f"{i + 1}", *sizes, f"{shapes[i].parameters:,}", f"{losses[i]:.4f}"))
    print(table(rows))
    print(f"take the first with --shape {order[0] + 1} instead of --candidates")
    return losses


def _train(work: Path, log: Path, args: argparse.Namespace, steps: int) -> float:
    """Train the checkpoint in `work` on, and return its validation loss at the end."""
    data = args.train_data_path or args.data_path
    settings = {
        "LOAD_PATH": work / "pruned",
        "SAVE_PATH": work / "trained",
        "TENSORBOARD_PATH": work / "tensorboard",
        "DATA_PATH": " ".join(data),
        "VALID_DATA_PATH": " ".join(args.valid_data_path) if args.train_data_path else "",
        "TRAIN_ITERS": steps,
        "EVAL_INTERVAL": steps,
        "SAVE_INTERVAL": steps,
        "VERBOSE": 1,
    }
    if "LR_WARMUP_ITERS" not in os.environ:
        settings["LR_WARMUP_ITERS"] = steps // 15
    settings |= {name.upper(): value for name in _HANDED_ON if (value := getattr(args, name)) is not None}
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(["bash", _SCRIPT, "--no-save-optim"], env=environment, stdout=out, stderr=out)
    text = log.read_text(encoding="utf-8", errors="replace")
    read = (read_validation(line) for line in text.splitlines())
    found = [said[2]["lm loss"] for said in read if said is not None and not said[1]]
    if done.returncode or not found:
        reason = re.findall(r"error: (.*)", text) or [f"see {log}"]
        raise ValueError(f"training {work.name} failed: {reason[-1]}")
    if not math.isfinite(loss := found[-1]):
        raise ValueError(f"training {work.name} ended at a loss of {loss}: try a smaller --lr (log: {log})")
    return loss
