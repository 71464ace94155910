"""What scripts/compress.sh did, on one page: SAVE/report.html, which needs nothing else, and SAVE/report.md.

    python tools/report.py runs/compressed

First stands what was made and whether it is good: the losses of all models on the same text, what they write, how they
recovered. Then come the shapes that were tried and what each round kept and mended, the commands that were run, and the
versions of what ran them. What is not there, because its step was skipped or has not run yet, is left out.
"""

import argparse
import base64
import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.axes import AXIS, PRUNABLE
from megatron.pruning.model.checkpoint import PLAN_FILE
from megatron.pruning.model.config import said_bytes, short
from megatron.pruning.plan.figure import plan_figure, png_of, report_figure
from megatron.pruning.plan.measured import MEASURED_FILE, Measured, folder_of, measured_figure
from megatron.pruning.plan.plan import MADE_BY, Plan
from megatron.pruning.plan.reconstructed import REPORT_FILE, Report
from megatron.pruning.storage.manifest import MANIFEST
from megatron.pruning.storage.small_files import parse_as, parse_json, read_small, replace_durably

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # python tools/... finds what lies beside this folder
from tools.compress import STATE_FILE, State  # noqa: E402
from tools.plot_loss import Curves, Label, plot, read_run, write_beside  # noqa: E402

_VERSIONS = ("torch", "megatron-core", "transformers", "transformer-engine", "numpy")


@dataclass(frozen=True)
class Block:
    """A part of the page: of one of these kinds is what it has, and nothing of the others.

    `heading` stands above what follows, at a `level`; `figures` are few and large, each of (name, figure, what to
    compare it with); `text` is a paragraph; `rows` a table, headed by the first of them; `picture` a PNG, with what it
    shows; `code` are lines as they are; `columns` are texts beside each other, each with its title.
    """

    heading: str = ""
    level: int = 2
    figures: Sequence[tuple[str, str, str]] = ()
    text: str = ""
    rows: Sequence[Sequence[str]] = ()
    picture: bytes = b""
    shows: str = ""
    code: str = ""
    columns: Sequence[tuple[str, str]] = ()

    @property
    def encoded(self) -> str:
        """The picture as base64."""
        return base64.b64encode(self.picture).decode()


@dataclass(frozen=True)
class Run:
    """The folder of a compression, and what it says of itself."""

    folder: Path
    state: State

    @property
    def rounds(self) -> list[Path]:
        """The folders of the rounds, in order."""
        found = [path for path in self.folder.glob("round*") if re.fullmatch(r"round\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def read(self, name: str) -> Any:
        """Return the JSON of a file, None where there is none."""
        file = self.folder / name
        return json.loads(read_small(file)) if file.is_file() else None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="SAVE", help="the folder of a compression")
    return parser


def main(argv: Sequence[str]) -> None:
    """Write the report."""
    folder = parser().parse_args(hyphenated(argv)).folder.absolute()
    if not (folder / STATE_FILE).is_file():
        raise ValueError(f"{folder} has no {STATE_FILE}: name the SAVE_PATH of a scripts/compress.sh")
    state = parse_as(State, read_small(folder / STATE_FILE), f"{folder / STATE_FILE} says not what was done")
    compression = Run(folder, state)
    blocks = [*overview(compression), *samples(compression), *recovery(compression), *rounds(compression),
              *how(compression)]  # fmt: skip
    title = f"{folder.name}: a smaller Llama"
    for number, block in enumerate(blocks):
        if block.picture:
            replace_durably(folder / "report" / f"{number}.png", block.picture)
    for name in ("report.html", "report.md"):
        replace_durably(folder / name, render(name, title, blocks).encode())
        print(f"saved: {folder / name}")


def render(name: str, title: str, blocks: Sequence[Block]) -> str:
    """Return the page. In HTML all text is escaped, and in Markdown what a table or a paragraph would obey."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=name.endswith(".html"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["plain"] = lambda text: re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
    environment.filters["fence"] = lambda text: "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return environment.get_template(f"{name}.jinja").render(title=title, blocks=blocks)


def overview(run: Run) -> Iterator[Block]:
    """Yield what all models are worth."""
    losses = run.read("losses.json")
    if not losses:
        return
    first, last = losses[0], losses[-1]
    share = last["parameters"] / first["parameters"]
    yield Block(
        figures=[
            ("parameters", short(last["parameters"]), f"{share:.0%} of {short(first['parameters'])}"),
            ("held-out loss", f"{last['loss']:.3f}", f"parent: {first['loss']:.3f}"),
            ("perplexity", f"{last['perplexity']:.1f}", f"parent: {first['perplexity']:.1f}"),
            ("time", said_time(sum(done.seconds for done in run.state.done.values())), "all steps together"),
        ]
    )
    exported = "; hf has it in the format of Hugging Face" if (run.folder / "hf/config.json").is_file() else ""
    made = f"{name_of(run, last['path'])} was made from {name_of(run, first['path'])}"
    yield Block(text=f"{made}, in {len(run.rounds)} rounds{exported}." if len(run.rounds) > 1 else f"{made}{exported}.")
    yield Block(heading="Models")
    yield Block(text="All have read the same held-out text; the loss is in nats a token.")
    figures = [name for name in first if name not in ("path", "parameters", "loss", "perplexity")]
    rows = [["model", "parameters", "loss", "perplexity", *figures]]
    for one in losses:
        numbers = [f"{one['loss']:.4f}", f"{one['perplexity']:.2f}", *(f"{one[name]:.4f}" for name in figures)]
        rows.append([name_of(run, one["path"]), f"{one['parameters']:,}", *numbers])
    yield Block(rows=rows)


def said_time(seconds: float) -> str:
    """Write a time in its two largest units: 3 min 25 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {of_hour} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def name_of(run: Run, path: str) -> str:
    """Return what a model is called on the page: its place in the folder, or its own name."""
    place = Path(path)
    return str(place.relative_to(run.folder)) if place.is_relative_to(run.folder) else place.name or path


def rounds(run: Run) -> Iterator[Block]:
    """Yield what each round measured, kept and mended."""
    for number, folder in enumerate(run.rounds, start=1):
        yield Block(heading=f"Round {number}" if len(run.rounds) > 1 else "What was cut")
        pruned = folder / "pruned"
        yield from shapes(folder_of(pruned) / MEASURED_FILE)
        if (pruned / PLAN_FILE).is_file():
            yield Block(heading="What was kept", level=3)
            plan = Plan.from_json(read_small(pruned / PLAN_FILE).decode(), str(pruned / PLAN_FILE))
            rows = [["", "before", "after", "kept"]]
            for axis in PRUNABLE:
                before, after = plan.parent_sizes[axis], plan.sizes[axis]
                rows.append([AXIS[axis].words, f"{before:,}", f"{after:,}", f"{after / before:.0%}"])
            yield Block(rows=rows)
            yield Block(picture=plan_figure(plan), shows="What the plan keeps of each axis, and of each layer.")
        if (pruned / REPORT_FILE).is_file():
            report = Report.from_json(read_small(pruned / REPORT_FILE), str(pruned / REPORT_FILE))
            if report.losses and report.weights:
                told = report.losses
                yield Block(heading="What the reconstruction mended", level=3)
                yield Block(
                    text=f"The cut brought the loss from {told.parent:.3f} to {told.cut:.3f}, refitting the weights "
                    f"that remained to {told.reconstructed:.3f}, without training. They were refitted on "
                    f"{report.sequences:,} sequences of {report.sequence_length:,} tokens; these losses are those of "
                    f"{report.held_out_sequences:,} others of the same text."
                )
                yield Block(
                    picture=report_figure(report), shows="What each layer's weights miss, before the refit and after."
                )


def shapes(file: Path) -> Iterator[Block]:
    """Yield which shapes were tried, and what they are worth."""
    if not file.is_file():
        return
    measured = Measured.from_json(read_small(file), str(file))
    if ranked := measured.ranked():
        yield Block(heading="Shapes", level=3)
        yield Block(text=f"{len(ranked)} shapes were measured; the best is number {ranked[0]}.")
        yield Block(rows=measured.rows())
        yield Block(
            picture=measured_figure(measured), shows="Loss of each shape against parameters, memory and operations."
        )


def recovery(run: Run) -> Iterator[Block]:
    """Yield the losses of the training of all rounds, by tokens."""
    curves = [
        (f"round {number}", folder / "recovered/tensorboard")
        for number, folder in enumerate(run.rounds, start=1)
        if (folder / "recovered/tensorboard").is_dir()
    ]
    read = {}
    for name, directory in curves:
        with contextlib.suppress(ValueError):  # one that has only begun
            read[name] = read_run(directory, False, "lm loss")
    if not read:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    labels, before = [], 0
    # All rounds have steps of as many tokens; where no round is done, it is the steps that are counted.
    done = {name: run.state.done.get(f"{name}: recover") for name in read}
    unit = next((one.tokens // max(read[name].training) for name, one in done.items() if one), 1) or 1
    for name, found in read.items():
        later = [{step + before: loss for step, loss in of.items()} for of in (found.training, found.validation)]
        labels += plot(axes, name, Curves(*later), unit, 10)
        before += max(found.training)
    losses = run.read("losses.json")
    if losses:
        axes.axhline(losses[0]["loss"], linestyle="--", linewidth=1, color="0.4")
        labels.append(Label(losses[0]["loss"], f"parent: {losses[0]['loss']:.3f}", "0.3"))
    axes.set(xlabel="tokens" if unit > 1 else "step", ylabel="loss (nats a token)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    write_beside(axes, labels)
    yield Block(heading="Recovery")
    line = " The line is the parent's loss on the text of the table." if losses else ""
    yield Block(picture=png_of(figure), shows=f"Loss of the training and of the validation.{line}")


def samples(run: Run) -> Iterator[Block]:
    """Yield what the models write, side by side."""
    found = run.read("samples.json")
    if not found:
        return
    yield Block(heading="Samples")
    for one in found:
        asked = " ".join(one["prompt"].split())
        yield Block(heading=asked if len(asked) <= 80 else f"{asked[:79]}…", level=3)
        yield Block(columns=[(name_of(run, text["path"]), text["text"]) for text in one["texts"]])


def how(run: Run) -> Iterator[Block]:
    """Yield the commands, the time they took, what was written, and the versions."""
    yield Block(heading="How it was made")
    yield Block(rows=[["step", "time"], *([name, said_time(done.seconds)] for name, done in run.state.done.items())])
    yield Block(heading="Commands", level=3)
    commands = [f"# {name}\n{done.command}" for name, done in run.state.done.items()]
    yield Block(code="\n\n".join(commands))
    written = [["checkpoint", "bytes", "sha256 of its manifest"]]
    for file in sorted(run.folder.glob(f"**/{MANIFEST}")):
        checkpoint = open_checkpoint(file.parent)
        digest = hashlib.sha256(read_small(file)).hexdigest()[:16]
        written.append([name_of(run, str(file.parent)), said_bytes(checkpoint.nbytes), digest])
    if len(written) > 1:
        yield Block(heading="Checkpoints", level=3)
        yield Block(rows=written)
    yield Block(heading="Versions", level=3)
    versions = [MADE_BY, f"Python {platform.python_version()}"]
    for name in _VERSIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Block(text=f"{', '.join(versions)}.")
    seeds = {parse_json(read_small(folder / "pruned" / PLAN_FILE), "plan").get("seed") for folder in run.rounds
             if (folder / "pruned" / PLAN_FILE).is_file()}  # fmt: skip
    if seeds:
        yield Block(text=f"Seed of the choice: {', '.join(map(str, sorted(seeds, key=str)))}.")


if __name__ == "__main__":
    run(main)
