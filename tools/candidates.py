"""Shapes measured: each is pruned and reconstructed, its loss taken on held-out text; the best few are trained on."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.pruning.cli.flags import without
from megatron.pruning.formats.megatron import TRACKER, tracked_iteration
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.plan.measured import (
    BEST,
    MEASURED_FILE,
    ZERO,
    Measured,
    MeasuredShape,
    folder_of,
    measured_figure,
)
from megatron.pruning.plan.shapes import Shape, Target, parse_count
from megatron.pruning.storage.output import hold_directory
from megatron.pruning.storage.processes import count
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.small_files import read_small, replace_durably

STAGES = ((3, 4), (2, 2), (1, 1))  # how many shapes are trained on, and to which part of the tokens

_ROOT = Path(__file__).resolve().parents[1]
# Flags of prune_llama.py that a single shape's run gets others of, or none.
_OWN = ("--candidates", "--measure", "--save", "--shape")
# Flags of the stock loop that check_model.sh has a setting of the same name for: those given are handed on.
_HANDED_ON = (
    "seq_length micro_batch_size global_batch_size lr min_lr lr_warmup_iters weight_decay clip_grad tokenizer_type "
    "tokenizer_model"
).split()
# Settings of check_model.sh by which a shape comes to another loss.
_TRAINED_BY = (
    "SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR LR_WARMUP_ITERS WEIGHT_DECAY CLIP_GRAD DTYPE TEACHER_LOAD "
    "KD_LOAD KD_ALPHA KD_TEMPERATURE TOKENIZER_TYPE TOKENIZER_MODEL"
).split()
# Settings of the scripts that say what the flags say.
_SETTINGS = (
    "HIDDEN_SIZE_REMAIN NUM_ATTENTION_HEADS_REMAIN NUM_QUERY_GROUPS_REMAIN FFN_HIDDEN_SIZE_REMAIN DROP_LAYERS "
    "PRUNE_TYPE DATA_PATH TP PP SPLIT"
).split()


def check(args: argparse.Namespace) -> None:
    """Raise ValueError unless the flags name the texts that are needed, and this is a single process."""
    if args.candidates < 2:
        raise ValueError(f"--candidates {args.candidates}: at least two shapes can be compared")
    if count() > 1:
        raise ValueError(
            "--candidates starts processes by itself: run it with plain python, and let GPUS_PER_NODE in the "
            "environment say how many"
        )
    if not args.data_path:
        raise ValueError("--candidates reconstructs each shape by a text: add --data-path PREFIX")
    if len(args.valid_data_path or ()) != 1:
        raise ValueError("--candidates compares on one text that is not learned from: add --valid-data-path PREFIX")
    check_texts("--data-path", args.data_path, args.measure != ZERO)
    check_texts("--valid-data-path", args.valid_data_path, args.measure != ZERO)
    for flag, given in (("--plan-only", args.plan_only), ("--shape", args.shape is not None)):
        if given:
            raise ValueError(f"--candidates measures shapes and {flag} decides for one: leave one of them out")
    if args.measure != ZERO:
        _steps(args)


def check_texts(flag: str, words: Sequence[str], trained_on: bool) -> None:
    """Raise ValueError where a text of a flag is not there: it would be said late, and as of another flag.

    One that is `trained_on` must be of tokens.
    """
    for word in words:
        is_weight = len(words) > 1 and re.fullmatch(r"[\d.eE+-]+", word)
        if is_weight or Path(f"{word}.idx").is_file():
            continue
        if not Path(word).is_file():
            raise ValueError(f"{flag} {word}: there is neither {word}.bin and .idx nor a file of this name")
        if trained_on:
            raise ValueError(
                f"{flag} {word} is to be trained on, too: turn it into tokens with tools/preprocess_data.py and name "
                "their prefix"
            )


def _steps(args: argparse.Namespace) -> int:
    """Return the steps of a quarter of the training. Raises ValueError where nothing says what a step is."""
    each = 1
    for name in ("seq_length", "global_batch_size"):
        said = getattr(args, name) or os.environ.get(name.upper(), "")
        if not said.isdecimal() or not int(said):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--measure {args.measure} counts tokens: add {flag} N, of which a step's are made")
        each *= int(said)
    tokens = parse_count(args.measure)
    if tokens < 4 * each:
        raise ValueError(f"--measure {args.measure}: at least four steps, of {each:,} tokens each, can be compared")
    return round(tokens / 4 / each)


def measure(
    words: Sequence[str], args: argparse.Namespace, parent: Checkpoint, target: Target, shapes: Sequence[Shape]
) -> Measured:
    """Measure the shapes, print the ranking, and return it.

    `words` are the command line of prune_llama.py, `args` what it says; `shapes` are the first that it proposes. The
    work is done beside --save, in SAVE.candidates, where the ranking, its picture and the logs stay. What is measured
    is not measured again. Raises ValueError where a step fails, or the folder is that of other shapes.
    """
    folder = folder_of(args.save)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = hold_directory(folder)
    except BlockingIOError:
        raise ValueError(f"another run is measuring shapes in {folder}: wait for it, or name another --save") from None
    try:
        work = _Work(folder, words, args, _known(folder, words, args, parent, target, shapes), held)
        measured = work.run()
    finally:
        os.close(held)
    replace_durably(folder / "shapes.png", measured_figure(measured))
    print(measured.describe())
    print(f"picture: {folder / 'shapes.png'}; take the first with --shape {BEST} --reconstruct instead of --candidates")
    return measured


def _known(
    folder: Path, words: Sequence[str], args: argparse.Namespace, parent: Checkpoint, target: Target,
    shapes: Sequence[Shape],
) -> Measured:  # fmt: skip
    """Return what is measured already: nothing, or what an earlier run of the same command wrote down."""
    config = parent.config
    multiplied = config.parameters - (0 if config.tied else config.vocab_size * config.hidden_size)
    whole = Shape(config.sizes, config.parameters, multiplied, 0.0)

    def unmeasured(shape: Shape) -> MeasuredShape:
        memory = shape.memory(target.bytes_each, target.cached_tokens)
        return MeasuredShape(
            sizes=dict(shape.sizes), parameters=shape.parameters, memory=memory, operations=shape.operations
        )

    job = {"parent": fingerprint(parent), "flags": without(words, ("--save",)), "target": str(target)}
    if args.measure != ZERO:
        job["settings"] = [f"{name}={os.environ[name]}" for name in _TRAINED_BY if os.environ.get(name)]
    nothing = Measured(job=job, parent=unmeasured(whole), shapes=[unmeasured(shape) for shape in shapes])
    file = folder / MEASURED_FILE
    if not file.exists():
        # At once: what lies in the folder from now on is of this job.
        replace_durably(file, nothing.to_json())
        return nothing
    known = Measured.from_json(read_small(file), str(file))
    if known.job != job or [shape.sizes for shape in known.shapes] != [shape.sizes for shape in nothing.shapes]:
        raise ValueError(f"{file} is of other shapes, flags or settings: remove {folder}, or name another --save")
    return known


@dataclass
class _Work:
    """The measuring of one set of shapes in its folder."""

    folder: Path
    words: Sequence[str]
    args: argparse.Namespace
    measured: Measured
    held: int  # the lock of the folder, which a step has, too: it may outlive this process

    def run(self) -> Measured:
        """Measure what is not measured yet."""
        training = self.args.measure != ZERO
        stages = STAGES if training else ()
        total = len(self.measured.shapes) + sum(min(shapes, len(self.measured.shapes)) for shapes, _ in stages)
        known = sum(len(shape.losses) for shape in self.measured.shapes)
        print(f"measuring {len(self.measured.shapes)} shapes; what each step says is in {self.folder}", flush=True)
        progress = Progress("shapes", total, show=True, unit="steps", before=known)
        if not self.measured.parent.losses:
            self._keep(self.measured.parent, 0, self._loss(self.args.load, self.folder / "parent.log"))
        for number in range(1, len(self.measured.shapes) + 1):
            if not self._shape(number).losses:
                self._at_once(number)
                progress.advance(1)
            self._tidy(STAGES[0][0] if training else 0)
        for shapes, part in stages:
            # All have had the stage before, or are being brought to this one: it is by that stage that they are chosen.
            before = self._tokens(2 * part) if part < STAGES[0][1] else 0
            ranked = sorted(
                (n for n in self.measured.ranked() if before in self._shape(n).losses),
                key=lambda n: self._shape(n).losses[before],
            )
            for number in ranked[:shapes]:
                if self._tokens(part) not in self._shape(number).losses:
                    self._train(number, part)
                    progress.advance(1)
        self._tidy(0)
        progress.close()
        return self.measured

    def _shape(self, number: int) -> MeasuredShape:
        return self.measured.shapes[number - 1]

    def _tokens(self, part: int) -> int:
        """Return the tokens of a part of the training: 4 is a quarter of it."""
        sizes = (getattr(self.args, name) or os.environ[name.upper()] for name in ("seq_length", "global_batch_size"))
        length, batch = map(int, sizes)
        return STAGES[0][1] // part * _steps(self.args) * length * batch

    def _tidy(self, most: int) -> None:
        """Remove the checkpoints of all shapes but of the best, as many of them as are trained on later."""
        for number in self.measured.ranked()[most:]:
            shutil.rmtree(self._place(number), ignore_errors=True)

    def _place(self, number: int) -> Path:
        return self.folder / f"shape{number}"

    def _keep(self, shape: MeasuredShape, tokens: int, loss: float) -> None:
        shape.losses[tokens] = loss
        replace_durably(self.folder / MEASURED_FILE, self.measured.to_json())

    def _at_once(self, number: int) -> None:
        """Prune to a shape, reconstruct, and measure."""
        place, log = self._place(number), self.folder / f"shape{number}.log"
        if not (place / "pruned").exists():  # which appears whole or not at all
            words = [*without(self.words, _OWN), "--shape", f"{number}", "--reconstruct"]
            settings = {"LOAD_PATH": f"{self.args.load}", "SAVE_PATH": f"{place / 'pruned'}"}
            place.mkdir(exist_ok=True)
            _run(["bash", f"{_ROOT / 'scripts/prune_llama.sh'}", *words], settings, log, self.held)
        self._keep(self._shape(number), 0, self._loss(place / "pruned", log))

    def _train(self, number: int, part: int) -> None:
        """Train a shape on until it has had a part of the tokens, and measure it."""
        place, log = self._place(number), self.folder / f"shape{number}.log"
        quarter = _steps(self.args)
        until = STAGES[0][1] // part * quarter
        saved = tracked_iteration(place / "trained") if (place / "trained" / TRACKER).is_file() else 0
        if saved != until:
            settings = {
                "LOAD_PATH": place / "pruned",
                "SAVE_PATH": place / "trained",
                "TENSORBOARD_PATH": "",
                "DATA_PATH": " ".join(self.args.data_path),
                "VALID_DATA_PATH": self.args.valid_data_path[0],
                "TRAIN_ITERS": STAGES[0][1] * quarter,  # by which the learning rate falls
                "SAVE_INTERVAL": quarter,
                "EVAL_ITERS": 0,
                "VERBOSE": 1,
            }
            if "LR_WARMUP_ITERS" not in os.environ:
                settings["LR_WARMUP_ITERS"] = STAGES[0][1] * quarter // 15
            settings |= {name.upper(): value for name in _HANDED_ON if (value := getattr(self.args, name)) is not None}
            command = ["bash", f"{_ROOT / 'scripts/check_model.sh'}", "--exit-interval", f"{until}"]
            _run(command, {name: f"{value}" for name, value in settings.items()}, log, self.held)
        self._keep(self._shape(number), self._tokens(part), self._loss(place / "trained", log))

    def _loss(self, checkpoint: Path, log: Path) -> float:
        """Return a checkpoint's loss on the held-out text, as tools/evaluate.py has it."""
        result = self.folder / "loss.json"
        length = self.args.sequence_length
        window = ["--sequence-length", f"{length}"] if length else []
        _run(
            [_python(), f"{_ROOT / 'tools/evaluate.py'}", "--load", f"{checkpoint}", "--data",
             self.args.valid_data_path[0], "--max-tokens", f"{self.args.valid_tokens}", *window, "--json", f"{result}"],
            {}, log, self.held,
        )  # fmt: skip
        loss = float(json.loads(result.read_bytes())[0]["loss"])
        result.unlink()
        return loss


def _python() -> str:
    """Return the Python of all steps: that of the scripts, where the user named one, or this one."""
    return os.environ.get("PYTHON", sys.executable)


def _run(command: Sequence[str], settings: Mapping[str, str], log: Path, held: int) -> None:
    """Run a command with settings of the environment, and a lock; raise ValueError with what it said where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS} | {"PYTHON": _python()}
    with log.open("ab") as out:
        begin = out.tell()
        done = subprocess.run(command, env={**environment, **settings}, stdout=out, stderr=out, pass_fds=[held])
    if done.returncode:
        said = re.findall(r"error: (.*)", log.read_bytes()[begin:].decode(errors="replace"))
        raise ValueError(f"{log.stem}: {said[-1] if said else f'a step of it failed: see {log}'}")
