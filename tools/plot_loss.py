"""Draw the loss curves of training runs from their TensorBoard directories.

    python tools/plot_loss.py --run "recovered=runs/recovered/tensorboard" --line parent=1.51 --output loss.png

Each --run gives the training loss as a line and the validation loss as points; each --line a level to compare with.
With --sequence-length the x axis counts tokens, otherwise iterations.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.pruning.arguments import hyphenated, new_parser, run

# Megatron's tags: by iteration, and by sample (for the number of tokens).
TRAIN, VALIDATION = "lm loss", "lm loss validation"
PER_SAMPLE = " vs samples"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("plot_loss.py", __doc__)
    parser.add_argument("--run", action="append", required=True, type=named, metavar="NAME=DIR", help="may be repeated")
    parser.add_argument("--line", action="append", default=[], type=level, metavar="NAME=LOSS", help="may be repeated")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens a sample: count tokens on the x axis")
    parser.add_argument("--title", default="", help="above the plot")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf")
    return parser.parse_args(hyphenated(argv))


def named(text: str) -> tuple[str, str]:
    """Split NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def level(text: str) -> tuple[str, float]:
    """Split NAME=LOSS."""
    name, value = named(text)
    return name, float(value)


def read_run(directory: Path) -> EventAccumulator:
    """Open a TensorBoard directory. Raises ValueError when it holds no training loss."""
    if not directory.is_dir():
        raise ValueError(f"--run: {directory} is not a directory")
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    if TRAIN not in events.Tags()["scalars"]:
        raise ValueError(f"--run: {directory} holds no TensorBoard scalar {TRAIN!r}")
    return events


def scalars(events: EventAccumulator, tag: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one scalar, in order; later runs win where a resume repeated a step."""
    if tag not in events.Tags()["scalars"]:
        return [], []  # no validation yet
    by_step = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
    return sorted(by_step), [by_step[step] for step in sorted(by_step)]


def main(argv: Sequence[str]) -> None:
    """Draw."""
    args = parse(argv)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    suffix, tokens = (PER_SAMPLE, args.sequence_length) if args.sequence_length else ("", 1)
    for name, directory in args.run:
        events = read_run(Path(directory))
        steps, values = scalars(events, TRAIN + suffix)
        (line,) = axes.plot(
            [step * tokens for step in steps], values, linewidth=1, alpha=0.6, label=f"{name}, training"
        )
        steps, values = scalars(events, VALIDATION + suffix)
        points = [step * tokens for step in steps]
        axes.plot(points, values, "o-", color=line.get_color(), label=f"{name}, validation")
    for i, (name, value) in enumerate(args.line):
        axes.axhline(value, linestyle="--", color=f"C{7 + i}", label=f"{name}: {value:.3f}")
    axes.set(xlabel="tokens" if args.sequence_length else "iteration", ylabel="loss (nats a token)", title=args.title)
    axes.grid(alpha=0.3)
    axes.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)
    print(f"saved: {args.output}")


if __name__ == "__main__":
    run(main)
