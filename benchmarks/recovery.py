"""Is pruning worth it? A pruned model trained on, beside the same shape trained from a random start.

    python benchmarks/recovery.py --work-dir runs/recovery      # some hours on two cores

The embedded model is pruned to 53.6% (hidden 128, ffn 288, 6 layers) by random and by activation scores, and trained on
with the language-model loss and with distillation from its parent, each on a tenth of the tokens that the parent was
trained on. The same shape starts from random weights and gets all of them. Three seeds; the learning rate of each arm
is tuned in shorter runs of its own, by factors of two until both neighbours of the best are worse. Prints the table for
the READMEs, with how many tokens from scratch each arm is worth, and draws assets/loss.png and
assets/loss_vs_scratch.png.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from experiment import BATCH, PARENT, ROOT, SEQUENCE, Experiment, Run, mean_and_spread

PARENT_TOKENS = 1820 * 16 * 512  # see tools/make_tiny_llama.py
STEP_TOKENS = SEQUENCE * BATCH
SHAPE = ("--hidden-size-remain", 128, "--ffn-hidden-size-remain", 288, "--num-layers-remain", 6)
SHARE = 0.1  # of the parent's tokens, for the pruned arms
MARKS = (0.02, 0.05, 0.1)  # shares of the parent's tokens at which the pruned arms are measured
SCRATCH_MARKS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
ARMS = ("from scratch", "random, LM loss", "random, distillation", "activation, LM loss", "activation, distillation")
CONTROL = "the parent itself, LM loss"  # one seed, at the learning rate of the first pruned arm
FIRST_RATES = (1e-3, 2e-3)


def steps_of(share: float, scale: float) -> int:
    """Return how many steps are a share of the parent's tokens, in whole hundredths: at each a checkpoint is saved."""
    return round(share * 100) * max(2, round(scale * 0.01 * PARENT_TOKENS / STEP_TOKENS))


def main() -> None:
    """Do what is left of the experiment, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "recovery", metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a core each (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--scratch-seeds", type=int, nargs="+", metavar="SEED", help="from scratch (default: --seeds)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all token counts; below 1 only shows that it runs")
    parser.add_argument("--figures", type=Path, default=ROOT / "assets", metavar="DIR")
    args = parser.parse_args()
    experiment = Experiment(args.work_dir.resolve(), args.jobs)

    def run(arm: str, seed: int, lr: float, tune: bool = False) -> Run:
        marks = [steps_of(share, args.scale) for share in (SCRATCH_MARKS if arm == ARMS[0] else MARKS)]
        if tune:  # from scratch on a tenth of the tokens, the pruned arms on a third of theirs
            marks = [marks[-1] // (10 if arm == ARMS[0] else 3)]
        flags = ("--teacher-load", str(PARENT)) if arm.endswith("distillation") else ()
        name = f"{'tune-' if tune else ''}{arm.replace(', ', '-').replace(' ', '_')}-{seed}" + f"-{lr:g}" * tune
        return Run(name, start(experiment, arm, seed), marks[-1], lr, seed, tuple(sorted(set(marks))), flags)

    first = args.seeds[0]
    best = tune(experiment, lambda arm, lr: run(arm, first, lr, tune=True))
    seeds = dict.fromkeys(ARMS, args.seeds) | {ARMS[0]: args.scratch_seeds or args.seeds}
    seeds[CONTROL], best[CONTROL] = [first], best[ARMS[1]]
    runs = {(arm, seed): run(arm, seed, best[arm]) for arm in seeds for seed in seeds[arm]}  # the longest first
    losses = experiment.train(list(runs.values()))
    parent = experiment.evaluate("parent", PARENT)
    curves: dict[str, dict[int, list[float]]] = {}
    for arm in seeds:
        by_seed = [losses[runs[arm, seed].name] for seed in seeds[arm]]
        curves[arm] = {mark * STEP_TOKENS: [found[mark] for found in by_seed] for mark in by_seed[0]}
    report(curves, best, parent)
    draw(curves, parent, args.figures)


def tune(experiment: Experiment, run: Callable[[str, float], Run]) -> dict[str, float]:
    """Return the learning rate of each arm that neither its half nor its double beats."""
    losses: dict[str, dict[float, float]] = {arm: {} for arm in ARMS}
    wanted = dict.fromkeys(ARMS, FIRST_RATES)
    while any(wanted.values()):
        runs = {(arm, lr): run(arm, lr) for arm in ARMS for lr in wanted[arm]}
        for (arm, lr), found in zip(runs, experiment.train(list(runs.values())).values(), strict=True):
            losses[arm][lr] = min(found.values())
        best = {arm: min(tried, key=tried.__getitem__) for arm, tried in losses.items()}
        wanted = {arm: tuple(lr for lr in (best[arm] / 2, best[arm] * 2) if lr not in losses[arm]) for arm in ARMS}
    return best


def start(experiment: Experiment, arm: str, seed: int) -> Path:
    """Return the checkpoint that an arm starts from."""
    if arm == CONTROL:
        return experiment.convert("parent", PARENT)
    scores = ("--criterion", "activation", "--scores", experiment.scores())
    if arm.startswith("activation"):
        return experiment.prune("activation", *SHAPE, *scores)
    pruned = experiment.prune(f"random-{seed}", *SHAPE, "--seed", seed)
    return experiment.random_start(f"scratch-{seed}", pruned, seed) if arm == ARMS[0] else pruned


def worth(loss: float, scratch: dict[int, list[float]]) -> str:
    """Return how many tokens from scratch give this loss, by linear interpolation between the marks."""
    tokens, values = list(scratch), np.minimum.accumulate([float(np.mean(row)) for row in scratch.values()])
    if not values[-1] <= loss <= values[0]:
        return f"more than {tokens[-1] / 1e6:.1f}M" if loss < values[-1] else f"less than {tokens[0] / 1e6:.1f}M"
    return f"{np.interp(-loss, -values, tokens) / 1e6:.1f}M"


def report(curves: dict[str, dict[int, list[float]]], best: dict[str, float], parent: float) -> None:
    """Print one row for each arm, one column for each mark."""
    marks = list(curves[ARMS[0]])
    print(f"\nparent: {parent:.3f} after {PARENT_TOKENS / 1e6:.1f}M tokens; mean ± standard deviation over seeds\n")
    print("| | " + " | ".join(f"{tokens / 1e6:.2f}M" for tokens in marks) + " | learning rate | worth from scratch |")
    print("|---" * (len(marks) + 3) + "|")
    for arm, losses in curves.items():
        cells = [mean_and_spread(losses[tokens]) if tokens in losses else "" for tokens in marks]
        equal = "" if arm == ARMS[0] else worth(float(np.mean(list(losses.values())[-1])), curves[ARMS[0]])
        print(f"| {arm} | " + " | ".join([*cells, f"{best[arm]:g}", equal]) + " |")


def draw(curves: dict[str, dict[int, list[float]]], parent: float, folder: Path) -> None:
    """Draw the arms by tokens, and the pruned model beside a random start."""
    for name, arms, title, scale in (
        ("loss.png", ARMS[1:], "recovery of the pruned model", "linear"),
        ("loss_vs_scratch.png", (ARMS[0], *ARMS[3:]), "pruned, and from a random start", "log"),
    ):
        figure({arm: curves[arm] for arm in arms}, parent, title, scale, folder / name)
        print(f"figure: {folder / name}")


def figure(curves: dict[str, dict[int, list[float]]], parent: float, title: str, scale: str, path: Path) -> None:
    """Draw mean and spread over the seeds by tokens, on a linear or a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm, marks in curves.items():
        tokens: Sequence[float] = [count / 1e6 for count in marks]
        spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in marks.values()]
        axes.errorbar(tokens, [np.mean(values) for values in marks.values()], spread, marker="o", capsize=3, label=arm)
    axes.axhline(parent, color="0.5", linestyle="--", label=f"parent, {PARENT_TOKENS / 1e6:.1f}M tokens")
    axes.set(xlabel="million tokens", ylabel="validation loss (nats a token)", title=title, xscale=scale)
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=120)
    plt.close(canvas)


if __name__ == "__main__":
    main()
