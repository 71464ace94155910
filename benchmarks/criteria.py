"""What each way of choosing is worth, on the embedded model: validation loss right after pruning and on the way back.

    python benchmarks/criteria.py --work-dir runs/criteria      # about an hour and a half on two cores

Width: hidden 160 -> 128 and ffn 384 -> 256 in all 8 layers. Depth: 6 of the 8 layers. Every arm is trained on by
scripts/check_model.sh with three seeds (of the order of the data, and of the random choice); its learning rate is the
best of four in a shorter run of its own. Prints a table, writes benchmarks/results/criteria.json, from which
docs/tables.py makes the table of docs/en/choose.md, and draws assets/criteria.png.

The results are JSON: `benchmark`, `machine`, `seeds` (their number), `step_tokens`, `parent` (its validation loss in
nats), and `arms`, from the name of an arm to its `learning_rate` and its `loss` after each number of steps: a `mean`
and, where the seeds differ, a `deviation`.
"""

import argparse
from pathlib import Path

import numpy as np
from experiment import (
    BATCH,
    PARENT,
    RESULTS,
    ROOT,
    SEQUENCE,
    Experiment,
    Run,
    machine,
    show,
    spread,
    spread_text,
    write_results,
)

WIDTH = ("--hidden-size-remain", 128, "--ffn-hidden-size-remain", 256)
DEPTH = ("--num-layers-remain", 6)
ARMS = {
    "width, random": (*WIDTH, "--criterion", "random"),
    "width, magnitude": (*WIDTH, "--criterion", "magnitude"),
    "width, activation": (*WIDTH, "--criterion", "activation", "--scores", "SCORES", "--no-correct-norms"),
    "width, activation, norms corrected": (*WIDTH, "--criterion", "activation", "--scores", "SCORES"),
    "depth, spaced": (*DEPTH, "--layer-criterion", "spaced"),
    "depth, block influence": (*DEPTH, "--layer-criterion", "block_influence", "--scores", "SCORES"),
    "depth, contiguous": (*DEPTH, "--layer-criterion", "contiguous", "--scores", "SCORES"),
}  # fmt: skip
MARKS = (100, 300, 1000)
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
TUNED = 200  # steps of a run that only tells learning rates apart


def main() -> None:
    """Do what is left of the experiment, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "criteria", metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a core each (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--figure", type=Path, default=ROOT / "assets" / "criteria.png", metavar="PNG")
    parser.add_argument("--json", type=Path, default=RESULTS / "criteria.json", metavar="FILE")
    args = parser.parse_args()
    experiment = Experiment(args.work_dir.resolve(), args.jobs)
    scores = experiment.scores()

    def start(arm: str, seed: int) -> Path:
        flags = [scores if flag == "SCORES" else flag for flag in ARMS[arm]]
        seeded = ("--seed", seed) if arm == "width, random" else ()
        return experiment.prune(short(arm) + (f"-{seed}" if seeded else ""), *flags, *seeded)

    first = args.seeds[0]
    tuning = [
        Run(f"tune-{short(arm)}-{lr:g}", start(arm, first), TUNED, lr, first, (TUNED,))
        for arm in ARMS
        for lr in LEARNING_RATES
    ]
    tuned = experiment.train(tuning)
    best = {arm: min(LEARNING_RATES, key=lambda lr, arm=arm: tuned[f"tune-{short(arm)}-{lr:g}"][TUNED]) for arm in ARMS}
    # Seed by seed, so that what is there after an interruption compares all arms.
    runs = {
        (arm, seed): Run(f"{short(arm)}-{seed}", start(arm, seed), MARKS[-1], best[arm], seed, MARKS)
        for seed in args.seeds
        for arm in ARMS
    }
    losses = experiment.train(list(runs.values()))
    parent = experiment.evaluate("parent", PARENT)
    table: dict[str, list[list[float]]] = {}  # [1 + marks][seeds]
    for arm in ARMS:
        at_once = [experiment.evaluate(f"{runs[arm, s].start.name}@0", runs[arm, s].start) for s in args.seeds]
        table[arm] = [at_once, *([losses[runs[arm, s].name][mark] for s in args.seeds] for mark in MARKS)]
    print(f"\nparent: {parent:.3f}; {len(args.seeds)} seeds, mean ± standard deviation\n")
    found = {arm: [spread(row) for row in rows] for arm, rows in table.items()}
    heading = ("", "right after", *(f"{mark} steps" for mark in MARKS), "learning rate")
    show([heading, *((arm, *map(spread_text, row), f"{best[arm]:g}") for arm, row in found.items())])
    arms = {
        arm: {"learning_rate": best[arm], "loss": dict(zip(map(str, (0, *MARKS)), row, strict=True))}
        for arm, row in found.items()
    }
    facts = {"benchmark": "criteria", "machine": machine(), "seeds": len(args.seeds), "step_tokens": SEQUENCE * BATCH}
    write_results(args.json, {**facts, "parent": parent, "arms": arms})
    draw(table, parent, args.figure)
    print(f"\nfigure: {args.figure}")


def short(arm: str) -> str:
    """Return an arm's name for files."""
    return arm.replace(", ", "-").replace(" ", "_")


def draw(table: dict[str, list[list[float]]], parent: float, path: Path) -> None:
    """Draw the losses over the tokens trained on, width and depth side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, kind in zip(panels, ("width", "depth"), strict=True):
        places = np.arange(1 + len(MARKS))
        for arm, rows in table.items():
            if arm.startswith(kind):
                label = arm.removeprefix(f"{kind}, ")
                spread = [np.std(row, ddof=1) if len(row) > 1 else 0 for row in rows]
                axes.errorbar(places, [np.mean(row) for row in rows], spread, marker="o", capsize=3, label=label)
        axes.axhline(parent, color="0.5", linestyle="--", label="parent")
        thousands = [mark * SEQUENCE * BATCH / 1e3 for mark in MARKS]
        axes.set_xticks(places, ["right after", *(f"{k:,.0f}k tokens" for k in thousands)])
        axes.set(title={"width": "hidden and ffn", "depth": "layers"}[kind])
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("validation loss (nats)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
