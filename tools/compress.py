"""From a model and a size to a smaller model: shapes measured, pruned, reconstructed, trained on, compared, exported.

    bash scripts/compress.sh            # says all of this by settings; see there

    python tools/compress.py --load llama-7b --save small --target 3.4B --data-path pile_text_document \\
        --valid-data-path held_out_text_document --tokens 1B,4B --teacher parent --candidates 10 --dry-run

Every round prunes by the same ratio and trains on. Each step is one of the project's own commands, which is printed,
and can be run alone; flags that are not listed here go to prune_llama.py. What is done is written down in
SAVE/compress.json: ended anywhere, the same command goes on where it was. At the end SAVE/report.html shows what
happened.
"""

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive, save_path, without
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.config import said_bytes, short
from megatron.pruning.plan.measured import BEST, ZERO
from megatron.pruning.plan.report import table
from megatron.pruning.plan.shapes import parse_bytes, parse_count
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.output import hold_directory
from megatron.pruning.storage.small_files import parse_as, read_small, replace_durably

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # python tools/... finds what lies beside this folder
import prune_llama  # noqa: E402
from tools.candidates import check_texts  # noqa: E402

STATE_FILE = "compress.json"
STEPS = ("shapes", "prune", "recover", "evaluate", "export", "generate", "report")
AT_ONCE = 4096  # tokens that are evaluated together
PROMPTS = ("The most important", "def main(")
_ROOT = Path(__file__).resolve().parents[1]
# Settings of the scripts that the steps get from here, and none from the shell.
_OURS = (
    "LOAD_PATH SAVE_PATH CHECKPOINT_PATH DATA_PATH VALID_DATA_PATH HF_FORMAT_DIR MEGATRON_FORMAT_DIR TRAIN_ITERS "
    "TEACHER_LOAD TEACHER_SAVE KD_LOAD TENSORBOARD_PATH HIDDEN_SIZE_REMAIN NUM_ATTENTION_HEADS_REMAIN "
    "NUM_QUERY_GROUPS_REMAIN FFN_HIDDEN_SIZE_REMAIN DROP_LAYERS PRUNE_TYPE"
).split()
# Settings of scripts/check_model.sh that a user may have made: they stand in the command that is printed.
_TRAINING = (
    "GPUS_PER_NODE NNODES SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR LR_WARMUP_ITERS "
    "WEIGHT_DECAY CLIP_GRAD SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS LOG_INTERVAL TOKENIZER_TYPE "
    "TOKENIZER_MODEL DTYPE KD_ALPHA KD_TEMPERATURE DISTRIBUTED_OPTIMIZER TP PP"
).split()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="the parent, of any format")
    parser.add_argument(
        "--save", type=save_path, required=True, metavar="DIR", help="folder of everything that is made"
    )
    parser.add_argument(
        "--target", required=True, metavar="SIZE",
        help="parameters (3.4B), bytes at most (8GB), or a share of the parent's parameters (0.5); two, with a comma",
    )  # fmt: skip
    parser.add_argument(
        "--data-path", nargs="+", required=True, metavar="TEXT",
        help="text to reconstruct by and to train on: a prefix, or weights and prefixes",
    )  # fmt: skip
    parser.add_argument(
        "--valid-data-path", required=True, metavar="PREFIX", help="text that all models are compared on"
    )
    parser.add_argument("--tokens", required=True, metavar="N,...", help="tokens to train on, for every round or each")
    parser.add_argument("--rounds", type=positive, metavar="N", help="rounds (default: as many as --tokens names)")
    parser.add_argument(
        "--teacher", choices=("parent", "none"), default="none",
        help="learn what the parent of the first round would say, with KD_ALPHA below 1 the text, too (default none)",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", type=positive, metavar="K", help="measure K shapes a round (default: take the first proposal)"
    )
    parser.add_argument("--measure", default=ZERO, metavar="N", help="as of prune_llama.py (default zero)")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text for parent and result to continue; may be repeated"
    )
    parser.add_argument("--skip", default="", metavar="STEP,...", help=f"steps to leave out, of {', '.join(STEPS)}")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, their tokens and bytes, and stop")
    return parser


@dataclass(frozen=True)
class Step:
    """A command, with the settings of its environment; it trains on `tokens` and writes about so many `bytes`."""

    name: str
    command: Sequence[str]
    settings: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    bytes: float = 0

    def __str__(self) -> str:
        words = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        return " ".join([*words, shlex.join(self.command)])


class Done(msgspec.Struct):
    """A step that was done: what was run, for how long, when it ended, in seconds since 1970, and tokens trained on."""

    command: str
    seconds: float
    ended: float
    tokens: int = 0


class State(msgspec.Struct):
    """What SAVE/compress.json says: the job, which stays the same, and the steps that are done, in order.

    `spent` are the seconds of attempts at a step that did not come to its end.
    """

    job: dict[str, str]
    done: dict[str, Done] = {}
    version: int = 1
    spent: dict[str, float] = {}


def main(argv: Sequence[str]) -> None:
    """Read the flags, and do what is not done yet."""
    words = hyphenated(argv)
    args, further = parser().parse_known_args(words)
    args.save = args.save.absolute()
    parent = open_checkpoint(args.load)
    trained_on = "recover" not in args.skip.split(",") or args.measure != ZERO
    check_texts("--data-path", args.data_path, trained_on)
    check_texts("--valid-data-path", [args.valid_data_path], trained_on)
    steps = list(plan(args, further, parent))
    show(steps, args.save)
    if args.dry_run:
        print("\n".join(f"\n# {step.name}\n{step}" for step in steps))
        return
    if os.environ.get("NNODES", "1") not in ("", "1"):
        raise ValueError(
            f"NNODES is {os.environ['NNODES']}: this goes on one machine; on several, take the steps of --dry-run"
        )
    args.save.mkdir(parents=True, exist_ok=True)
    try:
        held = hold_directory(args.save)
    except BlockingIOError:
        raise ValueError(f"another run is at work in {args.save}: wait for it, or name another --save") from None
    job = {"parent": fingerprint(parent), "flags": shlex.join(without(words, ("--skip", "--save")))}
    try:
        perform_all(steps, args.save / STATE_FILE, job, held)
    finally:
        os.close(held)


def perform_all(steps: Sequence[Step], file: Path, job: Mapping[str, str], held: int) -> None:
    """Do the steps that are not done, and write down each that is. Raises ValueError where one fails.

    What comes after a step that is done now is of another model than before, as where an earlier run skipped it.
    `held` is the lock of the folder.
    """
    state = read_state(file, job)
    for number, step in enumerate(steps, start=1):
        if step.name in state.done:
            continue
        for later in steps[number:]:
            state.done.pop(later.name, None)
        print(f"\n== {number}/{len(steps)} {step.name}\n{step}", flush=True)
        begin, before = time.time(), state.spent.pop(step.name, 0.0)

        def seconds(begin: float = begin, before: float = before) -> float:
            return round(before + time.time() - begin, 1)

        try:
            perform(step, held)
        except BaseException:
            state.spent[step.name] = seconds()
            write_state(file, state)
            raise
        state.done[step.name] = Done(f"{step}", seconds(), round(time.time(), 1), step.tokens)
        write_state(file, state)


def write_state(file: Path, state: State) -> None:
    """Write down what is done."""
    replace_durably(file, msgspec.json.format(msgspec.json.encode(state)) + b"\n")


def read_state(file: Path, job: Mapping[str, str]) -> State:
    """Return what was done already. Raises ValueError where that was another job."""
    if not file.exists():
        state = State(dict(job))
        write_state(file, state)
        return state
    state = parse_as(State, read_small(file), f"{file} says not what was done")
    for name, value in job.items():
        if state.job.get(name) != value:
            raise ValueError(
                f"{file} is of another job, whose {name} are {state.job.get(name)}, not {value}: name another --save"
            )
    return state


def perform(step: Step, held: int) -> None:
    """Run a step, which holds the lock of the folder, too: it may outlive this process, and no other is to begin then.

    Raises ValueError where it fails; it has said why.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OURS} | dict(step.settings)
    done = subprocess.run(step.command, env=environment, pass_fds=[held])
    if done.returncode:
        raise ValueError(f"{step.name} failed, as said above; once that is mended, the same command goes on with it")


def show(steps: Sequence[Step], save: Path) -> None:
    """Print the steps as a table, and whether the disk has room for what they write."""
    rows: list[Sequence[str]] = [("step", "tokens", "writes")]
    for step in steps:
        rows.append(
            (step.name, short(step.tokens) if step.tokens else "", said_bytes(step.bytes) if step.bytes else "")
        )
    total = sum(step.bytes for step in steps)
    rows.append(("in all", short(sum(step.tokens for step in steps)), said_bytes(total)))
    print(table(rows))
    there = next(path for path in (save, *save.parents) if path.exists())
    free = shutil.disk_usage(there).free
    print(f"the disk of {there} has {said_bytes(free)} left", flush=True)
    if free < total:
        print(f"warning: that is less than the {said_bytes(total)} that are written", file=sys.stderr, flush=True)


def plan(args: argparse.Namespace, further: Sequence[str], parent: Checkpoint) -> Iterator[Step]:
    """Yield the steps. Raises ValueError for flags that cannot be."""
    skipped = [name for name in args.skip.split(",") if name]
    if unknown := [name for name in skipped if name not in STEPS]:
        raise ValueError(f"--skip {unknown[0]}: the steps are {', '.join(STEPS)}")
    # Its own mistakes are to be said now, and not after hours.
    asked = prune_llama.parser().parse_args(["--load", "x", "--save", "x", *hyphenated(further)])
    python = os.environ.get("PYTHON", sys.executable)
    source, models = args.load, [args.load]
    tokens = tokens_of_rounds(args)
    step_tokens()  # it says what is not set
    for number, (amount, target) in enumerate(
        zip(tokens, targets_of_rounds(args, parent, len(tokens)), strict=True), 1
    ):
        folder = args.save / f"round{number}"
        parameters = expected_parameters(args, parent, number / len(tokens))
        pruned, recovered = folder / "pruned", folder / "recovered"
        words = [*target, "--data-path", *args.data_path, *further]
        settings = {"LOAD_PATH": f"{source}", "SAVE_PATH": f"{pruned}", "PYTHON": python}
        settings |= {name: value for name in ("GPUS_PER_NODE",) if (value := os.environ.get(name))}
        if args.candidates and "shapes" not in skipped:
            measured = ["--candidates", f"{args.candidates}", "--measure", args.measure]
            if args.measure != ZERO:  # what a step is
                measured += ["--seq-length", os.environ["SEQ_LENGTH"]]
                measured += ["--global-batch-size", os.environ["GLOBAL_BATCH_SIZE"]]
            yield Step(
                f"round {number}: shapes",
                [python, f"{_ROOT / 'prune_llama.py'}", "--load", f"{source}", "--save", f"{pruned}", *words, *measured,
                 "--valid-data-path", args.valid_data_path],
                {"PYTHON": python},
            )  # fmt: skip
        if "prune" not in skipped:
            shape = BEST if args.candidates and "shapes" not in skipped else "1"
            script = ["bash", f"{_ROOT / 'scripts/prune_llama.sh'}", "--shape", shape, "--reconstruct", "--overwrite"]
            written = parameters * BYTES[parent.dtype]
            yield Step(f"round {number}: prune", [*script, *words], settings, bytes=written)
            source = pruned
            models.append(source)
        if "recover" not in skipped:
            seed = [] if asked.seed is None else ["--seed", f"{asked.seed}"]
            yield recover(args, f"round {number}: recover", source, recovered, amount, parameters, seed)
            source = recovered
            models.append(source)
    yield from after(args, asked.valid_tokens, source, models, skipped)


def recover(
    args: argparse.Namespace, name: str, source: Path, save: Path, tokens: int, parameters: float, flags: Sequence[str]
) -> Step:
    """Return the step that trains on."""
    each = step_tokens()
    if tokens < each:
        raise ValueError(f"--tokens {args.tokens}: a step of the training has {each:,}, name as many at least")
    steps = round(tokens / each)
    saves = math.ceil(steps / positive_setting("SAVE_INTERVAL", "500"))
    settings = {name: value for name in _TRAINING if (value := os.environ.get(name))} | {
        "LOAD_PATH": f"{source}",
        "SAVE_PATH": f"{save}",
        "DATA_PATH": " ".join(args.data_path),
        "VALID_DATA_PATH": args.valid_data_path,
        "TRAIN_ITERS": f"{steps}",
        "PYTHON": os.environ.get("PYTHON", sys.executable),
    }
    settings.setdefault("LR_WARMUP_ITERS", f"{min(50, steps // 15)}")
    if args.teacher == "parent":
        settings["TEACHER_LOAD"] = f"{args.load}"
    # Each save has the weights, a copy of them in fp32 and Adam's two moments.
    script = ["bash", f"{_ROOT / 'scripts/check_model.sh'}", *flags]
    return Step(name, script, settings, steps * each, saves * 14 * parameters)


def after(
    args: argparse.Namespace, tokens: int, result: Path, models: Sequence[Path], skipped: Sequence[str]
) -> Iterator[Step]:
    """Yield what comes after the rounds; models are compared on so many tokens."""
    python = os.environ.get("PYTHON", sys.executable)
    losses, exported, samples = (args.save / name for name in ("losses.json", "hf", "samples.json"))
    if "evaluate" not in skipped:
        loads = [word for model in models for word in ("--load", f"{model}")]
        # In windows as long as those of the training, to whose curves the losses are compared.
        length = min(positive_setting("SEQ_LENGTH"), tokens)
        yield Step(
            "evaluate",
            [
                python,
                f"{_ROOT / 'tools/evaluate.py'}",
                *loads,
                "--data",
                args.valid_data_path,
                "--max-tokens",
                f"{tokens}",
                "--sequence-length",
                f"{length}",
                "--batch-size",
                f"{max(1, AT_ONCE // length)}",
                "--json",
                f"{losses}",
            ],
        )
    if "export" not in skipped:
        script = f"{_ROOT / 'tools/checkpoint_conversion/megatron_to_hf.sh'}"
        beside = [] if "evaluate" in skipped else ["--evaluation", f"{losses}"]
        settings = {"MEGATRON_FORMAT_DIR": f"{result}", "HF_FORMAT_DIR": f"{exported}", "PYTHON": python}
        yield Step("export", ["bash", script, "--overwrite", *beside], settings)
    if "generate" not in skipped:
        prompts = [word for prompt in args.prompt or PROMPTS for word in ("--prompt", prompt)]
        yield Step(
            "generate",
            [python, f"{_ROOT / 'tools/generate.py'}", "--load", f"{args.load}", "--load", f"{result}", *prompts,
             "--json", f"{samples}"],
        )  # fmt: skip
    if "report" not in skipped:
        yield Step("report", [python, f"{_ROOT / 'tools/report.py'}", f"{args.save}"])


def tokens_of_rounds(args: argparse.Namespace) -> list[int]:
    """Return the tokens of each round. Raises ValueError where they are not as many as the rounds."""
    tokens = [round(parse_count(text)) for text in args.tokens.split(",")]
    rounds = args.rounds or len(tokens)
    if len(tokens) not in (1, rounds):
        raise ValueError(f"--tokens {args.tokens} names {len(tokens)} amounts, but there are --rounds {rounds}")
    return tokens * (rounds // len(tokens))


def step_tokens() -> int:
    """Return the tokens of a step of the training. Raises ValueError where the environment does not say it."""
    return positive_setting("SEQ_LENGTH") * positive_setting("GLOBAL_BATCH_SIZE")


def positive_setting(name: str, default: str = "") -> int:
    """Return a setting of the training. Raises ValueError where it is no whole number from 1 on."""
    said = os.environ.get(name) or default
    if not said.isdecimal() or not int(said):
        raise ValueError(f"{name} is {said or 'not set'}: it says how the training goes, a whole number from 1 on")
    return int(said)


def targets_of_rounds(args: argparse.Namespace, parent: Checkpoint, rounds: int) -> Iterator[list[str]]:
    """Yield the flags of prune_llama.py that say the size after each round: by equal ratios down to the target."""
    for number in range(1, rounds + 1):
        share, flags = number / rounds, list[str]()
        for text in args.target.split(","):
            flag, whole, size = _read_target(text, parent)
            between = whole ** (1 - share) * size**share
            if number == rounds and (rounds == 1 or flag != "--target-ratio"):
                flags += [flag, text]
            elif flag == "--target-memory":
                flags += [flag, f"{between / 1e3:.0f}kB"]
            else:  # a ratio is one to the model that a round begins with, and not to the first
                flags += ["--target-params", f"{between:.0f}"]
        yield flags


def _read_target(text: str, parent: Checkpoint) -> tuple[str, float, float]:
    """Return the flag that a target is for, the parent's size, and the wanted one: bytes, or parameters."""
    parameters = parent.config.parameters
    if text.rstrip()[-2:].upper() in ("KB", "MB", "GB", "TB", "IB"):
        return "--target-memory", parameters * BYTES[parent.dtype], parse_bytes(text)
    size = parse_count(text)
    if size < 1:
        return "--target-ratio", parameters, size * parameters
    return "--target-params", parameters, size


def expected_parameters(args: argparse.Namespace, parent: Checkpoint, share: float) -> float:
    """Return about how many parameters the model has after a share of the rounds."""
    kinds = [_read_target(text, parent) for text in args.target.split(",")]
    return float(parent.config.parameters * min(size / whole for _, whole, size in kinds) ** share)


def command() -> None:
    """Run as the installed command does."""
    run(main, left="the same command goes on where it was")


if __name__ == "__main__":
    command()
