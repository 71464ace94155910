"""The checks of benchmarks/gpu/check.sh, which starts this: the README's commands on a GPU, beside the CPU's results.

The lines of results.jsonl have `check`, `outcome` (passed, failed or left out), `seconds`, `figures`, from a name to
its `value` and to the `least` and `most` that it may be, `note`, and the `reason` of a check that has not passed.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compare import NEAR, NEAR_SCORES, Figure, difference, loss, near

from megatron.pruning.cli.entry import run
from megatron.pruning.plan import scores
from megatron.pruning.plan.report import table

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PYTHON", sys.executable)
EMBEDDED = ROOT / "assets" / "tiny-llama"
TEXT = ("--sequences", "64", "--sequence-length", "256")
# A run of training, with all that Megatron says of its steps.
SHORT = {"TRAIN_ITERS": 3, "LOG_INTERVAL": 1, "EVAL_ITERS": 0, "VERBOSE": 1}
SPEED_BYTES = 60 << 30  # of a GPU's memory; the speed was measured with 44 GB in use
PACKAGES = ("torch", "transformer-engine", "flash-attn", "megatron-core", "transformers", "numpy")


class LeftOutError(Exception):
    """This machine, or what the checks before have left, does not allow a check; the message says why."""


@dataclass
class Found:
    """What a check has found."""

    figures: list[Figure] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """Runs the project's programs on this machine's GPUs, or on its CPU, with all that they write in one folder."""

    work: Path
    gpus: int
    limit: float  # seconds for one program

    def run(self, name: str, program: str, *words: object, gpu: bool = True, **settings: object) -> Path:
        """Run a script or a program of the repository with environment settings, and return its log.

        Raises ValueError, with the end of what it said, where it fails or takes too long.
        """
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["bash" if program.endswith(".sh") else PYTHON, str(ROOT / program), *map(str, words)]
        settings = {"RUNS": self.work, "TP": 1, "PYTHON": PYTHON, "HF_HUB_OFFLINE": 1} | settings
        hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
        environment = os.environ | hidden | {key: str(value) for key, value in settings.items()}
        with log.open("w") as said:
            process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                status = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                raise ValueError(f"{name} took longer than {self.limit:.0f} seconds: see {log}") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # all that it has started goes with it
                    os.killpg(process.pid, signal.SIGKILL)
        if status:
            raise ValueError(f"{name} ended with status {status}: {last_words(log)}: see {log}")
        return log

    def train(self, name: str, *flags: object, gpu: bool = True, **settings: object) -> Path:
        """Train the pruned model for three steps by check_model.sh, on one GPU or on none, and return the log."""
        settings = {"SAVE_PATH": self.work / name, "GPUS_PER_NODE": 1, **SHORT, **settings}
        cache = self.work / "cache" / name
        return self.run(name, "scripts/check_model.sh", *flags, "--data-cache-path", cache, gpu=gpu, **settings)

    @property
    def text(self) -> Path:
        """The tokens to train on; those of the validation lie beside them."""
        return self.made("data/train_text_document.idx", "text-and-checkpoints").with_suffix("")

    def made(self, path: str, check: str) -> Path:
        """Return what a check has made. Raises LeftOutError where it has not."""
        if not (self.work / path).exists():
            raise LeftOutError(f"it needs {path}, which the check {check} makes")
        return self.work / path


def last_words(log: Path) -> str:
    """Return the line of a log that says best why a program has ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
    telling = telling or [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)] or lines
    return telling[-1][:300] if telling else "it said nothing"


# The checks -----------------------------------------------------------------------------------------------------------


def machine(at: Machine) -> Found:
    """Name what computes here."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    versions.append(f"CUDA {torch.version.cuda}")
    gpu = torch.cuda.get_device_properties(0)
    return Found(
        [Figure("GPUs", at.gpus), Figure("memory of one in GB", gpu.total_memory / 1e9)],
        f"{gpu.name}, {', '.join(versions)}",
    )


def text_and_checkpoints(at: Machine) -> Found:
    """Make what the other checks start from, as the quickstart does: a text, the parent, and the parent cut to half."""
    at.run("text", "assets/make_tiny_llama.py", "--data-only", at.work / "data")
    for part in ("train", "valid"):
        at.run(
            f"tokens-{part}", "tools/preprocess_data.py", "--input", at.work / "data" / f"{part}.jsonl",
            "--output-prefix", at.work / "data" / part, "--tokenizer-type", "Llama2Tokenizer",
            "--tokenizer-model", EMBEDDED / "tokenizer.model", "--append-eod",
        )  # fmt: skip
    at.run("convert", "tools/checkpoint_conversion/hf_to_megatron.sh")
    at.run("cut", "scripts/prune_llama.sh")
    return Found()


def first_losses(at: Machine) -> Found:
    """Train for three steps: the first loss, before a weight has changed, is that of the CPU."""
    at.made("pruned", "text-and-checkpoints")
    expected = loss(at.train("cpu-fp32", gpu=False), "lm loss", 1)
    figures = [Figure("CPU fp32", expected)]
    for dtype, by in NEAR.items():
        log = at.train(f"gpu-{dtype}", DTYPE=dtype)
        figures.append(near(f"GPU {dtype}", loss(log, "lm loss", 1), expected, by))
    return Found(figures, "nats, before the first step")


def distillation(at: Machine) -> Found:
    """Train beside the parent: the first losses of both kinds are those of the CPU."""
    at.made("pruned", "text-and-checkpoints")
    teacher = {"TEACHER_LOAD": at.work / "parent"}
    cpu, gpu = at.train("distilled-cpu", gpu=False, **teacher), at.train("distilled-gpu", **teacher)
    figures = []
    for name in ("lm loss", "kd loss"):
        expected = loss(cpu, name, 1)
        figures.append(Figure(f"CPU fp32, {name}", expected))
        figures.append(near(f"GPU bf16, {name}", loss(gpu, name, 1), expected, NEAR["bf16"]))
    return Found(figures, "nats, before the first step")


def importance(at: Machine) -> Found:
    """Score the parent: the scores are those of the CPU."""
    words = ["--load", EMBEDDED, "--data", at.text, *TEXT]
    found = {}
    for name, gpu, dtype in (("cpu", False, "fp32"), ("fp32", True, "fp32"), ("bf16", True, "bf16")):
        file = at.work / f"{name}.scores"
        at.run(f"scores-{name}", "tools/score_importance.py", *words, "--save", file, "--dtype", dtype, gpu=gpu)
        found[name] = scores.read(file)
    expected = found.pop("cpu")
    figures = [Figure("CPU fp32, loss", expected.facts.loss)]
    for dtype, read in found.items():
        figures.append(near(f"GPU {dtype}, loss", read.facts.loss, expected.facts.loss, NEAR[dtype]))
        off = difference(read.sums, expected.sums)
        figures.append(Figure(f"GPU {dtype}, scores differ by", off, most=NEAR_SCORES[dtype]))
    return Found(figures)


def reconstruction(at: Machine) -> Found:
    """Prune with text on the GPU: the model is as good as the one that the CPU reconstructs, and better than cut."""
    at.made("pruned", "text-and-checkpoints")
    folders = [at.work / "pruned"]
    for name, gpu in (("cpu", False), ("gpu", True)):
        folders.append(at.work / f"reconstructed-{name}")
        settings = {"DATA_PATH": at.text, "SAVE_PATH": folders[-1]}
        at.run(f"reconstruct-{name}", "scripts/prune_llama.sh", *TEXT, gpu=gpu, **settings)
    cut, cpu, gpu = evaluated(at, "evaluate-reconstructed", *folders, dtype="fp32", gpu=False)
    by = NEAR["bf16"]
    return Found([Figure("cut", cut), Figure("CPU", cpu, most=cut), near("GPU", gpu, cpu, by)], "nats, other text")


def evaluation(at: Machine) -> Found:
    """Evaluate the parent with transformers: the loss is that of the CPU."""
    (expected,) = evaluated(at, "evaluate-cpu", EMBEDDED, dtype="fp32", gpu=False)
    figures = [Figure("CPU fp32", expected)]
    for dtype, by in NEAR.items():
        figures.append(near(f"GPU {dtype}", *evaluated(at, f"evaluate-{dtype}", EMBEDDED, dtype=dtype), expected, by))
    return Found(figures, "nats, other text")


def evaluated(at: Machine, name: str, *folders: Path, dtype: str, gpu: bool = True) -> list[float]:
    """Return the loss of each checkpoint in nats, on 65,536 tokens of the text to validate on."""
    file, data = at.work / f"{name}.json", at.text.with_name("valid_text_document")
    words = [word for folder in folders for word in ("--load", folder)]
    words += ["--data", data, "--sequence-length", 256, "--max-tokens", 65536, "--dtype", dtype, "--json", file]
    at.run(name, "tools/evaluate.py", *words, gpu=gpu)
    return [float(result["loss"]) for result in json.loads(file.read_text())]


def resumed(format: str, at: Machine) -> Found:
    """Save and resume: the step after it has the loss that it has in a run which has not ended."""
    at.made("pruned", "text-and-checkpoints")
    words, settings = ["--ckpt-format", format], {"TRAIN_ITERS": 4, "SAVE_INTERVAL": 2}
    cut = {**settings, "SAVE_PATH": at.work / f"resumed-{format}"}
    whole = at.train(f"unbroken-{format}", *words, **settings)
    at.train(f"first-half-{format}", *words, "--exit-interval", 2, **cut)
    rest = at.train(f"second-half-{format}", *words, **cut)
    expected, found = (loss(log, "lm loss", 3) for log in (whole, rest))
    return Found([Figure("unbroken", expected), near("resumed", found, expected, 0.001)], "nats, in the third step")


def generation(at: Machine) -> Found:
    """Export what was trained on the GPU, and let it write: a new prompt is continued."""
    trained = at.made("resumed-torch_dist/latest_checkpointed_iteration.txt", "resuming-torch_dist").parent
    settings = {"MEGATRON_FORMAT_DIR": trained, "HF_FORMAT_DIR": at.work / "exported"}
    at.run("export", "tools/checkpoint_conversion/megatron_to_hf.sh", **settings)
    log = at.run("generate", "tools/generate.py", "--load", at.work / "exported", "--prompt", "def ")
    written = log.read_text(errors="replace").partition("--- 'def '\n")[2].removeprefix("def ")
    return Found([Figure("characters", len(written.strip()), least=1)])


def two_ranks(at: Machine) -> Found:
    """Train on two GPUs, tensor parallel, beside the parent: the first losses are those of one GPU."""
    if at.gpus < 2:
        raise LeftOutError(f"it needs two GPUs, and this machine has {at.gpus}")
    one = at.made("logs/distilled-gpu.log", "distillation")
    top = at.work / "two"
    at.run("cut-in-two", "scripts/transfer.sh", LOAD_PATH=at.work / "pruned", SAVE_PATH=top / "pruned", TP=2)
    two = at.train(
        "two-ranks", RUNS=top, GPUS_PER_NODE=2, TP="", TEACHER_LOAD=at.work / "parent",
        DATA_PATH=at.text, VALID_DATA_PATH=at.text.with_name("valid_text_document"),
    )  # fmt: skip
    figures = []
    for name in ("lm loss", "kd loss"):
        expected = loss(one, name, 1)
        figures.append(Figure(f"one, {name}", expected))
        figures.append(near(f"two, {name}", loss(two, name, 1), expected, NEAR["bf16"]))
    return Found(figures, "nats, before the first step")


def quickstart(at: Machine) -> Found:
    """Run the README's first command: each of its models is better than the one before."""
    top = at.work / "quickstart"
    at.run("quickstart", "scripts/quickstart.sh", QUICKSTART_RUNS=top, TRAIN_ITERS=100, TP="")
    parent, cut, pruned, recovered = (model["loss"] for model in json.loads((top / "losses.json").read_text()))
    return Found([
        Figure("parent", parent), Figure("cut", cut), Figure("reconstructed", pruned, parent, cut),
        Figure("recovered", recovered, parent, pruned),
    ], "nats, other text")  # fmt: skip


def speed(at: Machine) -> Found:
    """Train 1.1B parameters at 4096 tokens, as benchmarks/training.py does, beside the Trainer of transformers."""
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < SPEED_BYTES:
        raise LeftOutError(f"it needs {SPEED_BYTES / 1e9:.0f} GB of GPU memory, and there are {memory / 1e9:.0f}")
    ours, file = "pretrain_gpt.py", at.work / "speed.json"
    log = at.run(
        "speed", "benchmarks/training.py", "--model", "1b", "--sequence-length", 4096, "--micro-batch-size", 4,
        "--steps", 13, "--rounds", 1, "--arms", ours, "transformers Trainer", "--json", file,
    )  # fmt: skip
    arms = json.loads(file.read_text())["arms"]
    if not arms[ours]:
        raise ValueError(f"{ours} has ended: {last_words(log)}: see {log}")
    return Found([Figure(f"{name}, {what}", value) for name, arm in arms.items() for what, value in arm.items()])


CHECKS: dict[str, Callable[[Machine], Found]] = {
    "machine": machine,
    "text-and-checkpoints": text_and_checkpoints,
    "first-losses": first_losses,
    "distillation": distillation,
    "scores": importance,
    "reconstruction": reconstruction,
    "evaluation": evaluation,
    **{f"resuming-{format}": functools.partial(resumed, format) for format in ("torch", "torch_dist")},
    "generation": generation,
    "two-ranks": two_ranks,
    "quickstart": quickstart,
    "speed": speed,
}
FIRST = ("machine", "text-and-checkpoints")  # that run whichever are asked for


# Rows -----------------------------------------------------------------------------------------------------------------


def row(name: str, check: Callable[[Machine], Found], at: Machine) -> dict[str, Any]:
    """Run a check, and return its line; whatever stops it is the line's reason."""
    began, found, outcome, reason = time.monotonic(), Found(), "passed", ""
    try:
        found = check(at)
        if broken := [str(figure) for figure in found.figures if not figure.holds]:
            outcome, reason = "failed", "; ".join(broken)
    except LeftOutError as why:
        outcome, reason = "left out", str(why)
    except Exception as error:
        outcome, reason = "failed", str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return {
        "check": name,
        "outcome": outcome,
        "seconds": round(time.monotonic() - began, 1),
        "figures": {figure.name: figure.facts for figure in found.figures},
        "note": found.note,
        "reason": reason,
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of all rows, and below it how many of them passed."""
    lines = [["check", "outcome", "seconds"]]
    lines += [[row["check"], row["outcome"], f"{row['seconds']:.0f}"] for row in rows]
    heading, *others = table(lines).splitlines()
    for i, row in enumerate(rows):
        figures = ", ".join(f"{name} {figure['value']}" for name, figure in row["figures"].items())
        others[i] += "  " + "; ".join(filter(None, (row["reason"], figures, row["note"])))
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "left out")}
    return "\n".join([heading, *others, "", ", ".join(f"{count} {outcome}" for outcome, count in counts.items())])


def main(argv: Sequence[str]) -> None:
    """Run the checks that are asked for and print their rows; the status is 1 where one that ran has failed."""
    parser = argparse.ArgumentParser("check.sh", description=__doc__)
    parser.add_argument("--gpus", type=int, required=True, help=argparse.SUPPRESS)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[name for name in CHECKS if name not in FIRST],
        default=list(CHECKS),
        metavar="CHECK",
        help=f"some of: {', '.join(name for name in CHECKS if name not in FIRST)} (default: all)",
    )
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="new folder for what is written (default: runs/gpu-DATE-TIME)"
    )
    parser.add_argument(
        "--limit", type=float, default=900, metavar="SECONDS", help="for one program of a check (default 900)"
    )
    args = parser.parse_args(argv)
    work = (args.work_dir or ROOT / "runs" / time.strftime("gpu-%Y%m%d-%H%M%S")).resolve()
    if work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise ValueError(f"--work-dir {work} is there already: name a new folder")
    work.mkdir(parents=True, exist_ok=True)
    at, rows = Machine(work, args.gpus, args.limit), []
    with (work / "results.jsonl").open("w") as file:
        for name, check in CHECKS.items():
            if name in (*FIRST, *args.only):
                rows.append(row(name, check, at))
                line = json.dumps(rows[-1], ensure_ascii=False)
                print(line, flush=True)
                print(line, file=file, flush=True)
    print(f"\n{summary(rows)}\nresults and logs: {work}")
    if any(row["outcome"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(main, left="the results so far stay")
