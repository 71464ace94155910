"""Is pruning worth it? A pruned model trained on, beside the same shape trained from a random start.

    python benchmarks/recovery.py --work-dir runs/recovery      # some hours on two cores
    python benchmarks/recovery.py --family 100m --text TEXT     # on a GPU, in bf16

A parent is trained from random weights. It is pruned to about half, by random, by activation scores, and by
contribution with rotation and reconstruction, and trained on with the language-model loss and with distillation from
the parent, each on a tenth of the tokens that the parent was trained on. The small shape starts from random weights,
too, and gets all of them. Three seeds; the learning rate of each arm is tuned in shorter runs of its own, by factors of
two until both neighbours of the best are worse (the parent takes that of the small shape), unless --learning-rate is
given, which all of them take then. Prints a table, with how
many tokens from scratch each arm is worth, writes benchmarks/results/recovery-FAMILY.json, from which docs/tables.py
makes the table of docs/en/recover.md, and draws assets/loss.png and assets/loss_vs_scratch.png. With --parent, that
checkpoint of the family's shape is pruned instead; the tokens are the family's.

The results are JSON: `benchmark`, `family`, `machine`, `seeds` (their number), `step_tokens`, `parameters` of the
parent and of the pruned model, `parent` (its validation loss in nats), and `arms`, from the name of an arm to its
`learning_rate`, its `loss` after each number of tokens, of a pruned one from 0 on (a `mean` and, of several seeds, a
`deviation`), and what it is `worth`: the `tokens` with which the small shape comes to the same loss from a random
start, and whether it is `about` so many, `more than` all that were tried, or `less than` the fewest.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import RESULTS, ROOT, SCORED, Experiment, Run, machine, show, spread, spread_text, write_results

from megatron.pruning.formats import open_checkpoint


@dataclass(frozen=True)
class Family:
    """A parent and what it is pruned to, as changes of the embedded model's configuration, and how all are trained."""

    parent: Mapping[str, int]
    pruned: Mapping[str, int]
    sequence: int  # tokens
    batch: int  # sequences a step
    tokens: int  # of the parent's training


FAMILIES = {
    # 2.4M parameters -> 1.3M, as many tokens as the embedded model had
    "tiny": Family({}, {"hidden_size": 128, "intermediate_size": 288, "num_hidden_layers": 6}, 256, 4, 1820 * 16 * 512),
    # 102M -> 55M
    "100m": Family(
        {
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
            "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
        },
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 14}, 1024, 32, 100_000_000,
    ),
}  # fmt: skip
PRUNE_FLAGS = {
    "hidden_size": "--hidden-size-remain",
    "intermediate_size": "--ffn-hidden-size-remain",
    "num_hidden_layers": "--num-layers-remain",
}
MARKS = (0.02, 0.05, 0.1)  # shares of the parent's tokens at which the pruned arms are measured; the last is all
SCRATCH_MARKS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SCRATCH = "from scratch"
PRUNED = tuple(
    f"{how}, {loss}" for how in ("random", "activation", "reconstructed") for loss in ("LM loss", "distillation")
)
PARENT = "the parent"  # one seed, at the learning rate from scratch
CONTROL = "the parent, trained on"  # one seed, at the learning rate of the first pruned arm
FIRST_RATES = (1e-3, 2e-3)
SETTINGS = ("family", "parent", "text", "scale")  # that a folder's results are of


def main() -> None:
    """Do what is left of the experiment, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "recovery", metavar="DIR")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="tiny")
    parser.add_argument("--parent", type=Path, metavar="DIR", help="prune this one")
    parser.add_argument("--text", type=Path, metavar="DIR", help="with train.jsonl and valid.jsonl")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default 2, on a GPU 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--learning-rate", type=float, metavar="LR", help="of every run, instead of tuned ones")
    parser.add_argument("--scale", type=float, default=1.0, help="of all token counts")
    parser.add_argument("--figures", type=Path, default=ROOT / "assets", metavar="DIR")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the results are written (default: benchmarks/results/recovery-FAMILY.json; with --parent or "
        "--scale: nowhere)",
    )
    args = parser.parse_args()
    if args.family != "tiny" and args.text is None:
        parser.error(f"--family {args.family} needs --text: the embedded model's has 3 million tokens")
    if args.parent is not None and open_checkpoint(args.parent).config.tied:
        parser.error(f"--parent {args.parent} ties its output layer to its embedding, and cannot be rotated")
    family, first = FAMILIES[args.family], args.seeds[0]
    jobs = args.jobs or (1 if torch.cuda.is_available() else 2)
    experiment = Experiment(args.work_dir.resolve(), jobs, args.parent, family.sequence, family.batch, args.text)
    experiment.settle({"first seed": first, **{name: getattr(args, name) for name in SETTINGS}})
    plan = Plan(experiment, family, args.scale)

    def rates_of(*arms: str) -> dict[str, float]:
        if args.learning_rate is not None:
            return dict.fromkeys(arms, args.learning_rate)
        return tune(experiment, arms, lambda arm, lr: plan.run(arm, first, lr, tuned=True))

    rates = rates_of(SCRATCH)
    wanted = [(SCRATCH, seed) for seed in args.seeds]
    if args.parent is None:
        rates[PARENT] = rates[SCRATCH]
        wanted.insert(0, (PARENT, first))
    losses = plan.train(wanted, rates)
    plan.compare_shapes(first)
    rates |= rates_of(*PRUNED)
    rates[CONTROL] = rates[PRUNED[0]]
    losses |= plan.train([*((arm, seed) for arm in PRUNED for seed in args.seeds), (CONTROL, first)], rates)

    curves: dict[str, dict[int, list[float]]] = {}
    for (arm, _), by_step in losses.items():
        for step, loss in by_step.items():
            curves.setdefault(arm, {}).setdefault(step * plan.step_tokens, []).append(loss)
    for arm in PRUNED:
        curves[arm] = {0: plan.before(arm, args.seeds), **curves[arm]}
    parent = experiment.evaluate("parent", experiment.parent)
    arms = summary(curves, rates)
    print(f"\nparent: {parent:.3f}; mean ± standard deviation over seeds\n")
    show(rows(arms))
    file = args.json or (RESULTS / f"recovery-{args.family}.json" if args.parent is None and args.scale == 1 else None)
    if file is not None:
        sizes = {"parent": open_checkpoint(experiment.parent), "pruned": open_checkpoint(plan.start(PRUNED[0], first))}
        parameters = {name: checkpoint.config.parameters for name, checkpoint in sizes.items()}
        facts = {"benchmark": "recovery", "family": args.family, "machine": machine(), "seeds": len(args.seeds)}
        facts |= {"step_tokens": plan.step_tokens, "parameters": parameters, "parent": parent}
        write_results(file, {**facts, "arms": arms})
    draw(curves, parent, args.figures)


class Plan:
    """Which run is meant by an arm and a seed."""

    def __init__(self, experiment: Experiment, family: Family, scale: float) -> None:
        self.experiment, self.family = experiment, family
        self.step_tokens = family.sequence * family.batch
        self.hundredth = max(2, round(scale * 0.01 * family.tokens / self.step_tokens))  # at each a checkpoint is saved

    def run(self, arm: str, seed: int, lr: float, tuned: bool = False) -> Run:
        """Return the run of an arm, or the shorter one that tells learning rates apart."""
        whole = arm in (SCRATCH, PARENT)
        marks = [round(share * 100) * self.hundredth for share in (SCRATCH_MARKS if whole else MARKS)]
        if tuned:  # from scratch on a tenth of the tokens, the pruned arms on a third of theirs
            marks = [marks[-1] // (10 if whole else 3)]
        flags = ("--teacher-load", str(self.experiment.parent)) if arm.endswith("distillation") else ()
        name = f"{'tune-' * tuned}{arm.replace(', ', '-').replace(' ', '_')}-{seed}" + f"-{lr:g}" * tuned
        return Run(
            name, self.start(arm, seed), marks[-1], lr, seed, tuple(sorted(set(marks))), flags, keep=arm == PARENT
        )

    def start(self, arm: str, seed: int) -> Path:
        """Return the checkpoint that an arm starts from."""
        experiment, family = self.experiment, self.family
        if arm == SCRATCH:
            return experiment.random_start(f"scratch-{seed}", {**family.parent, **family.pruned}, seed)
        if arm == PARENT:
            return experiment.random_start(f"parent-{seed}", family.parent, seed)
        if arm == CONTROL:
            return experiment.convert("parent", experiment.parent)
        shape = [word for name, size in family.pruned.items() for word in (PRUNE_FLAGS[name], size)]
        if arm.startswith("activation"):
            scores = ("--criterion", "activation", "--scores", experiment.scores(), "--no-correct-norms")
            return experiment.prune("activation", *shape, *scores)
        if arm.startswith("reconstructed"):
            text = ("--data-path", experiment.text() / "train_text_document", "--sequence-length", family.sequence)
            how = ("--criterion", "contribution", "--rotate-hidden", "--reconstruct", "--sequences", SCORED)
            return experiment.prune("reconstructed", *shape, *how, *text)
        return experiment.prune(f"random-{seed}", *shape, "--seed", seed)

    def before(self, arm: str, seeds: Sequence[int]) -> list[float]:
        """Return the loss with which an arm starts, by seed."""
        starts = [self.start(arm, seed) for seed in seeds]
        return [self.experiment.evaluate(f"{start.name}@0", start) for start in starts]

    def compare_shapes(self, seed: int) -> None:
        """End the program where pruned models are not of the shape that starts from scratch."""
        scratch, pruned = ((self.start(arm, seed) / "megatron_args.txt").read_text() for arm in (SCRATCH, PRUNED[0]))
        if scratch != pruned:
            raise SystemExit(f"error: pruned, the parent is not what starts from scratch:\n{pruned}\n{scratch}")

    def train(
        self, wanted: Sequence[tuple[str, int]], rates: Mapping[str, float]
    ) -> dict[tuple[str, int], dict[int, float]]:
        """Return the loss at each mark of these arms and seeds; the first of them start first."""
        runs = {(arm, seed): self.run(arm, seed, rates[arm]) for arm, seed in wanted}
        losses = self.experiment.train(list(runs.values()))
        for arm, seed in wanted:
            if arm == PARENT:
                self.experiment.parent = self.experiment.trained(runs[arm, seed])
        return {key: {step: losses[run.name][step] for step in run.marks} for key, run in runs.items()}


def tune(experiment: Experiment, arms: Sequence[str], run: Callable[[str, float], Run]) -> dict[str, float]:
    """Return the learning rate of each arm that neither its half nor its double beats."""
    losses: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    wanted: dict[str, tuple[float, ...]] = dict.fromkeys(arms, FIRST_RATES)
    while any(wanted.values()):
        runs = {(arm, lr): run(arm, lr) for arm in arms for lr in wanted[arm]}
        for (arm, lr), found in zip(runs, experiment.train(list(runs.values())).values(), strict=True):
            losses[arm][lr] = min(found.values())
        best = {arm: min(tried, key=tried.__getitem__) for arm, tried in losses.items()}
        wanted = {arm: tuple(lr for lr in (best[arm] / 2, best[arm] * 2) if lr not in losses[arm]) for arm in arms}
    return best


def worth(loss: float, scratch: dict[int, list[float]]) -> dict[str, str | int]:
    """Return how many tokens from scratch give this loss, by linear interpolation between the marks."""
    tokens, values = list(scratch), np.minimum.accumulate([float(np.mean(row)) for row in scratch.values()])
    if not values[-1] <= loss <= values[0]:
        more = loss < values[-1]
        return {"is": "more than" if more else "less than", "tokens": tokens[-1 if more else 0]}
    return {"is": "about", "tokens": round(float(np.interp(-loss, -values, tokens)))}


def summary(curves: dict[str, dict[int, list[float]]], rates: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return the arms as the results hold them."""
    arms: dict[str, dict[str, Any]] = {}
    for arm, losses in curves.items():
        by_tokens = {str(tokens): spread(values) for tokens, values in losses.items()}
        arms[arm] = {"learning_rate": rates[arm], "loss": by_tokens}
        if arm not in (SCRATCH, PARENT):
            arms[arm]["worth"] = worth(float(np.mean(list(losses.values())[-1])), curves[SCRATCH])
    return arms


def rows(arms: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    """Return a table for the terminal: one row for each arm, one column for each mark."""
    marks = sorted({int(tokens) for arm in arms.values() for tokens in arm["loss"]})
    shown: list[Sequence[str]] = [
        ("", *(f"{tokens / 1e6:.2f}M" for tokens in marks), "learning rate", "worth from scratch")
    ]
    for name, arm in arms.items():
        cells = [spread_text(arm["loss"][str(tokens)]) if str(tokens) in arm["loss"] else "" for tokens in marks]
        equal = f"{arm['worth']['is']} {arm['worth']['tokens'] / 1e6:.1f}M" if "worth" in arm else ""
        shown.append((name, *cells, f"{arm['learning_rate']:g}", equal))
    return shown


def draw(curves: dict[str, dict[int, list[float]]], parent: float, folder: Path) -> None:
    """Draw the arms by tokens, and the pruned model beside a random start."""
    for name, arms, title, scale in (
        ("loss.png", PRUNED, "recovery of the pruned model", "linear"),
        ("loss_vs_scratch.png", (SCRATCH, *PRUNED[2:]), "pruned, and from a random start", "log"),
    ):
        figure({arm: curves[arm] for arm in arms}, parent, title, scale, folder / name)
        print(f"figure: {folder / name}")


def figure(curves: dict[str, dict[int, list[float]]], parent: float, title: str, scale: str, path: Path) -> None:
    """Draw mean and spread over the seeds by tokens, on a linear or a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    canvas, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm, marks in curves.items():
        drawn = {count / 1e6: values for count, values in marks.items() if count or scale == "linear"}
        spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in drawn.values()]
        means = [np.mean(values) for values in drawn.values()]
        axes.errorbar(list(drawn), means, spread, marker="o", capsize=3, label=arm)
    axes.axhline(parent, color="0.5", linestyle="--", label="parent")
    axes.set(xlabel="million tokens", ylabel="validation loss (nats a token)", title=title, xscale=scale)
    axes.margins(y=0.06)
    if scale == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=120)
    plt.close(canvas)


if __name__ == "__main__":
    main()
