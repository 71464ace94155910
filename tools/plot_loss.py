"""Draw the loss curves of training runs, from their TensorBoard directories or from the logs that they printed.

    # how a pruned model recovers, by tokens, beside its parent
    python tools/plot_loss.py --run "7B=runs/7b/tensorboard" --line parent=1.50 --sequence-length 4096 --output loss.png

    # the same shape from a random start
    python tools/plot_loss.py --run pruned=pruned.log --run "from scratch=scratch.log" --sequence-length 4096 \\
        --smooth 20 --output loss_vs_scratch.png

Each --run gives the training loss, the language model's or another by --loss, as a line, and the validation loss as
points; each --line a level to compare with. Names stand beside the plot, at the height of what they name, so that no
legend covers a curve. With --sequence-length the x axis counts tokens, otherwise iterations.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive
from megatron.pruning.cli.stock_log import read_step, read_validation

# How Megatron's TensorBoard tags go on after the name of a loss; the second is by sample (for the number of tokens).
# With --multiple-validation-sets each set has a tag; the curve is that of the first.
VALIDATION, PER_SAMPLE = (" validation", " validation-0"), " vs samples"


@dataclass
class Curves:
    """The losses of one run in nats a token, by what the x axis counts: iterations, or samples."""

    training: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        type=named,
        metavar="NAME=PATH",
        help="TensorBoard directory or log of a training; may be repeated",
    )
    parser.add_argument(
        "--line", action="append", default=[], type=level, metavar="NAME=LOSS", help="horizontal line; may be repeated"
    )
    parser.add_argument(
        "--sequence-length", type=positive, metavar="N", help="tokens a sample: count tokens on the x axis"
    )
    parser.add_argument(
        "--smooth", type=positive, default=1, metavar="N", help="points of the training loss to average (default 1)"
    )
    parser.add_argument(
        "--loss", default="lm loss", metavar="NAME", help='which one: "lm loss" (default), "kd loss" or "hidden loss"'
    )
    parser.add_argument("--ylim", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of the y axis")
    parser.add_argument("--title", default="", help="title above the plot")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf")
    return parser


def named(text: str) -> tuple[str, str]:
    """Split NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def level(text: str) -> tuple[str, float]:
    """Split NAME=LOSS."""
    name, value = named(text)
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None


def read_run(path: Path, by_samples: bool, loss: str) -> Curves:
    """Return one loss of a TensorBoard directory or of a log. Raises ValueError where there is none."""
    if path.is_dir():
        curves = read_tensorboard(path, loss, PER_SAMPLE if by_samples else "")
    elif path.is_file():
        curves = read_log(path, by_samples, loss)
    else:
        raise ValueError(f"--run: there is no {path}")
    if not curves.training:
        raise ValueError(f"--run: {path} holds no training loss, neither as TensorBoard scalar {loss!r} nor as a log")
    return curves


def read_tensorboard(directory: Path, loss: str, suffix: str) -> Curves:
    """Read a TensorBoard directory; later runs win where a resume repeated a step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    there = events.Tags()["scalars"]

    def scalars(tag: str) -> dict[int, float]:
        found = sorted(events.Scalars(tag), key=lambda event: event.wall_time) if tag in there else []
        return {event.step: event.value for event in found}

    validation = {k: v for tag in VALIDATION for k, v in scalars(loss + tag + suffix).items()}
    return Curves(scalars(loss + suffix), validation)


def read_log(file: Path, by_samples: bool, loss: str) -> Curves:
    """Read what the training loop printed; later lines win."""
    curves, samples = Curves(), dict[int, int]()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if (step := read_step(line)) is not None and loss in step.losses:
            samples[step.number] = int(step.value("consumed samples"))
            curves.training[samples[step.number] if by_samples else step.number] = step.losses[loss]
        elif (evaluation := read_validation(line)) is not None:
            iteration, text, losses = evaluation
            placed = text in ("", " on validation set") and (iteration in samples or not by_samples)
            if placed and loss in losses:
                curves.validation[samples[iteration] if by_samples else iteration] = losses[loss]
    return curves


def smoothed(curve: dict[int, float], points: int) -> tuple[list[int], list[float]]:
    """Return the curve in order, each value the mean of the last `points`."""
    steps = sorted(curve)
    sums = np.cumsum([0.0, *(curve[step] for step in steps)])
    ends = np.arange(1, len(steps) + 1)
    starts = np.maximum(ends - points, 0)
    return steps, ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


class Label(NamedTuple):
    """What stands beside the plot at the height of a loss, in nats a token."""

    loss: float
    text: str
    color: Any


def plot(axes: Any, name: str, curves: Curves, unit: int, points: int) -> list[Label]:
    """Draw the curves of a run, `unit` on the x axis for each of their steps; return their labels."""
    labels = []
    color = None
    for what, (steps, values), style in (
        ("training", smoothed(curves.training, points), {"linewidth": 1.0, "alpha": 0.6}),
        ("validation", smoothed(curves.validation, 1), {"marker": "o", "markersize": 4.0}),
    ):
        if not steps:
            continue
        (line,) = axes.plot([step * unit for step in steps], values, color=color, **style)
        color = line.get_color()
        text = f"{name}, {what}"
        if len(steps) == 1:
            line.set_marker("o")  # a line of one point would not be seen
            text += f": {values[0]:.3f}"
        labels.append(Label(values[-1], text, color))
    return labels


def write_beside(axes: Any, labels: Sequence[Label], gap: float = 0.05) -> None:
    """Write the labels to the right of the plot, at least `gap` of its height apart, each with a line to its loss."""
    low, high = axes.get_ylim()
    shown = sorted(label for label in labels if low <= label.loss <= high)
    wanted = np.array([(label.loss - low) / (high - low) for label in shown])
    apart = gap * np.arange(len(shown))
    heights = np.maximum.accumulate(wanted - apart)  # pushed up by those below
    heights = np.minimum(heights, 1 - gap * max(len(shown) - 1, 0)) + apart
    for label, height in zip(shown, heights, strict=True):
        axes.annotate(
            label.text,
            xy=(1, label.loss),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=label.color,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": label.color, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkB": 0},
        )


def main(argv: Sequence[str]) -> None:
    """Draw."""
    args = parser().parse_args(hyphenated(argv))
    import matplotlib  # it takes a second, and --help and a mistake in a flag need none of it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    labels = []
    for name, path in args.run:
        curves = read_run(Path(path), bool(args.sequence_length), args.loss)
        labels += plot(axes, name, curves, args.sequence_length or 1, args.smooth)
    for name, value in args.line:
        axes.axhline(value, linestyle="--", linewidth=1, color="0.4")
        labels.append(Label(value, f"{name}: {value:.3f}", "0.3"))
    axes.set(
        xlabel="tokens" if args.sequence_length else "iteration", ylabel=f"{args.loss} (nats a token)", title=args.title
    )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if args.sequence_length:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if args.ylim:
        axes.set_ylim(*args.ylim)
    axes.grid(alpha=0.3)
    write_beside(axes, labels)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)
    plt.close(figure)
    print(f"saved: {args.output}")


if __name__ == "__main__":
    run(main)
