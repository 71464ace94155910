"""Reconstruction on the command line: its flags, and the way from them to a model that can be saved."""

import argparse
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron.pruning.cli.flags import positive
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.figure import report_figure
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.reconstructed import AUTO, Report, Ridge
from megatron.pruning.plan.scores import Scores, read
from megatron.pruning.storage.output import hold_directory
from megatron.pruning.storage.processes import EndedTogether, World
from megatron.pruning.storage.small_files import replace_durably

SEQUENCES, LONGEST = 128, 2048


def add_reconstruction_flags(group: argparse._ArgumentGroup, data: str, required: bool = False) -> None:
    """Add the flags of a reconstruction; `data` is the one that names the text."""
    group.add_argument(
        data,
        nargs="+",
        metavar="TEXT",
        required=required,
        help="text to learn from: prefixes of .bin and .idx, or .jsonl files, of text or of messages; with weights "
        "before them, as in 0.7 a 0.3 b: a mix of what the model is for",
    )
    group.add_argument(
        "--sequences", type=positive, default=SEQUENCES, metavar="N",
        help=f"sequences to learn from; a ninth as many more are held out (default {SEQUENCES})",
    )  # fmt: skip
    group.add_argument(
        "--sequence-length", type=positive, metavar="S",
        help=f"tokens of a sequence (default: as many as the model has positions, at most {LONGEST})",
    )  # fmt: skip
    group.add_argument(
        "--ridge", type=ridge, default=AUTO, metavar="R",
        help="how strongly weights are held to the cut ones, in units of their inputs' mean square; it grows where the "
        f"held-out text asks for it; {AUTO}: of each weight what is best on the held-out text; inf refits nothing "
        f"(default {AUTO})",
    )  # fmt: skip
    group.add_argument(
        "--rotate-hidden", action="store_true",
        help="rotate the hidden states before they are cut, so that less is lost; the output layer must not be tied",
    )  # fmt: skip
    group.add_argument(
        "--untie", action="store_true", help="give a model whose output layer is its embedding one of its own"
    )


_OPTIONS = ("sequences", "sequence_length", "ridge", "rotate_hidden", "untie")


def check_reconstruction_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise ValueError where prune_llama.py is to reconstruct without a text, or is told how without being told to."""
    if args.reconstruct and not args.data_path:
        raise ValueError("--reconstruct learns from text: add --data-path PREFIX")
    reconstructs = args.reconstruct or args.candidates is not None
    if args.shape is not None and args.data_path and not reconstructs:
        raise ValueError(
            f"--shape {args.shape} with --data-path, but without --reconstruct, would not look at the text: "
            "add --reconstruct, or leave --data-path out"
        )
    for name in _OPTIONS:
        if not reconstructs and getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} is for a reconstruction: add --reconstruct")


def check_tie(args: argparse.Namespace, parent: Checkpoint, hidden: int) -> None:
    """Raise ValueError where the output layer must be untied and is not to be, or is untied already."""
    config = parent.config
    if args.untie and not config.tied:
        raise ValueError(f"--untie: the output layer of {parent.path} has weights of its own already; leave it out")
    if args.rotate_hidden and config.tied and not args.untie:
        raise ValueError(
            f"--rotate-hidden needs an output layer of its own, but that of {parent.path} is its embedding: add "
            f"--untie, which costs {config.vocab_size * hidden:,} parameters"
        )


def ridge(text: str) -> Ridge:
    """Read a ridge."""
    if text == AUTO:
        return AUTO
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value <= 1e4 or value == float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 to 10000 nor inf, nor {AUTO}")
    return value


class Reconstructor:
    """The text that a flag names, and what is done with it, in a directory of its own beside --save.

    Raises ValueError for a text that is not there or not the model's, and for flags that do not fit the model; `hidden`
    is the hidden size that is to remain.
    """

    def __init__(self, args: argparse.Namespace, flag: str, parent: Checkpoint, hidden: int, world: World) -> None:
        from megatron.pruning.training import cpu_device
        from megatron.pruning.training.calibration import calibration

        self.args, self.parent, self.world = args, parent, world
        check_tie(args, parent, hidden)
        text: Sequence[str] = getattr(args, flag.lstrip("-").replace("-", "_"))
        positions = parent.config.max_position_embeddings
        length = args.sequence_length or min(positions, LONGEST)
        if length > positions:
            raise ValueError(f"--sequence-length {length} is more than the {positions} positions of {args.load}")
        cpu_device.install()
        self.calibration = calibration(text, length, args.sequences, parent, flag)
        self.work: Path = args.save.with_name(f".{args.save.name}.reconstruction")
        if world.rank == 0:
            self.hold = claim(self.work)
        self._join()
        if world.rank == 0:
            print(f"text: {self._said_of_text()}; what is unfinished lies in {self.work}", flush=True)

    def scores(self) -> Scores:
        """Score the parent on the text that is learned from, with a copy of it, or a layer, in each process."""
        from megatron.pruning.training import cpu_device
        from megatron.pruning.training.record_layerwise import recorder_for
        from megatron.pruning.training.scoring import nothing_yet, score

        file, text = self.work / "scores", self.calibration.tokens[~self.calibration.held_out]
        dtype = "fp32" if cpu_device.is_installed() else "bf16"
        wanted = nothing_yet(self.parent, text, 0, dtype)
        if self.world.share("there" if _is_of(file, wanted) else "missing") == "missing":
            with EndedTogether():
                recorder = recorder_for(self.parent, Layout(vocab_divisor=1), dtype, text.shape[1] - 1)
                score(file, wanted, recorder, text, self.world.size, self.world.rank)
        self.world.barrier()
        return read(file)

    def run(self, plan: Plan) -> tuple[Checkpoint, Report]:
        """Reconstruct the model that a plan cuts; return it, and the report, which goes beside it."""
        import torch

        from megatron.pruning.training.reconstruct import Options, Text
        from megatron.pruning.training.reconstruct_checkpoint import Job

        options = Options(self.args.ridge, self.args.rotate_hidden, self.args.untie)
        device = torch.device("cuda", torch.cuda.current_device())
        text = Text(self.calibration, device, self.world.rank, self.world.size)
        with EndedTogether():
            job = Job(self.parent, plan, text, options, self.args.dtype, self.work, self.world)
            model, report = job.run()
        if self.world.rank == 0:
            print(describe_report(report), flush=True)
            if importlib.util.find_spec("matplotlib") and report.weights:
                picture = self.args.save.with_name(f"{self.args.save.name}.reconstruct.png")
                replace_durably(picture, report_figure(report))
                print(f"by layer: {picture}", flush=True)
        return model, report

    def close(self) -> None:
        """Part from the other processes, and take the directory of what was unfinished away."""
        import torch

        torch.distributed.destroy_process_group()
        if self.world.rank == 0:
            shutil.rmtree(self.work)
            os.close(self.hold)

    def _join(self) -> None:
        from megatron.pruning.training.quiet import quiet_imports

        with quiet_imports():
            from megatron.pruning.training.stock_model import join

            join(Layout(), self.world)

    def _said_of_text(self) -> str:
        text = self.calibration
        shares = ", ".join(f"{name} ({share:.0%})" for name, share in text.shares.items())
        held_out = int(text.held_out.sum())
        return f"{len(text.tokens) - held_out} sequences of {text.length} tokens of {shares}, {held_out} held out"


# What a run leaves in its directory of what is unfinished.
_OURS = re.compile(
    r"states|reconstruct\.json|(?:first|last|basis|layer-\d{5})\.safetensors|\.*scores[\w.]*|\.[\w.-]+\.partial-\w+"
)


def claim(work: Path) -> int:
    """Make the directory of what is unfinished, unless it is there, and lock it; return the lock.

    Raises ValueError where it is somebody's own, for it is removed at the end, or another run is at work in it.
    """
    check_ours(work)
    work.mkdir(parents=True, exist_ok=True)
    try:
        return hold_directory(work, tell=True)
    except BlockingIOError:
        raise ValueError(f"another reconstruction is at work in {work}: wait for it, or name another --save") from None


def check_ours(work: Path) -> None:
    """Raise ValueError where the directory of what is unfinished holds something that no reconstruction made."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ValueError(f"{work} is no directory that a reconstruction made: move it away, or name another --save")
    for path in work.iterdir() if work.exists() else ():
        if not _OURS.fullmatch(path.name):
            raise ValueError(f"{path} was made by no reconstruction: move it away, or name another --save")


def _is_of(file: Path, wanted: Scores) -> bool:
    """Return whether a scores file is there, and is of this model and text."""
    try:
        return read(file).same_job(wanted)
    except ValueError:
        return False


def describe_report(report: Report) -> str:
    """Return what a reconstruction gave, in a line."""
    losses = report.losses
    assert losses is not None  # it is finished
    damage = losses.cut - losses.parent
    gone = f", {(losses.cut - losses.reconstructed) / damage:.0%} of the damage gone" if damage > 0 else ""
    return (
        f"loss on held-out text, in nats a token: parent {losses.parent:.3f}, cut {losses.cut:.3f}, reconstructed "
        f"{losses.reconstructed:.3f}{gone}"
    )
