"""Two rounds against one at equal tokens, and whether the loss at zero tokens ranks shapes as training does.

    python benchmarks/rounds.py --work-dir runs/rounds      # some twenty minutes on two cores

The parent is the embedded model of 2.4M parameters, the size 0.8M. One round prunes, reconstructs (with one ridge for
all weights) and trains; two rounds do so twice, by equal ratios, with half the tokens each. The shape is the first that
is proposed. Then the first shapes that it proposes are each reconstructed, measured, trained on and measured again:
Spearman's rank correlation says whether the first order is the second. Prints both, and writes
benchmarks/results/rounds.json, from which docs/tables.py makes the tables of docs/en/compress.md and docs/en/shapes.md.

The results are JSON: `benchmark`, `machine`, `parent` (its validation loss in nats), `tokens` in all, `seeds`, `rounds`
(by their number a loss of all seeds: `mean` and `deviation`), `shapes` (of each its `sizes`, `parameters`, and the loss
`at_once` and `trained`), `trained_tokens`, and `spearman`.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from experiment import BATCH, RESULTS, ROOT, SEQUENCE, Experiment, Run, command, machine, show, spread, write_results

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.shapes import Shape, Target, propose

SIZE, STEPS, SEEDS, LR, SHAPES = 800_000, 240, 3, 2e-3, 6


class Rounds(Experiment):
    """The experiment: what is pruned here is reconstructed, too."""

    def reconstruct(self, name: str, parent: Path, size: int, shape: int = 1) -> Path:
        """Return `parent` pruned to the I-th shape of a size, and reconstructed, as Megatron tp1."""
        path = self.work / "start" / name
        if not path.exists():
            command(
                "prune_llama.py", "--load", parent, "--save", path, "--format", "torch", "--target-params", size,
                "--shape", shape, "--reconstruct", "--data-path", self.text() / "train_text_document",
                "--sequences", 64, "--sequence-length", SEQUENCE, "--min-scores-tokens", 1, "--ridge", 0.01,
            )  # fmt: skip
        return path

    def in_rounds(self, rounds: int, seed: int) -> float:
        """Return the loss after so many rounds, which share the tokens."""
        model, whole = self.parent, open_checkpoint(self.parent).config.parameters
        each, found = STEPS // rounds, 0.0
        for number in range(1, rounds + 1):
            size = round(whole ** (1 - number / rounds) * SIZE ** (number / rounds))
            # The first round's start is the same for all seeds.
            name = f"{number} of {rounds}" + (f", seed {seed}" if number > 1 else "")
            start = self.reconstruct(name, model, size)
            run = Run(f"{number} of {rounds} rounds, seed {seed}", start, each, LR, seed, (each,), keep=True)
            found = self.train([run])[run.name][each]
            model = self.trained(run)
        return found


def ranks(values: list[float]) -> np.ndarray:
    """Return the rank of each value, from 0; no two are equal."""
    return np.argsort(np.argsort(values))


def main() -> None:
    """Do what is left of the benchmark, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "rounds", metavar="DIR")
    parser.add_argument("--json", type=Path, default=RESULTS / "rounds.json", metavar="FILE")
    args = parser.parse_args()
    work = Rounds(args.work_dir, jobs=1)
    work.settle({"size": SIZE, "steps": STEPS, "learning rate": LR})
    parent = work.evaluate("parent", work.parent)
    losses = {rounds: [work.in_rounds(rounds, seed) for seed in range(1, SEEDS + 1)] for rounds in (1, 2)}
    shapes: list[Shape] = propose(open_checkpoint(work.parent).config, Target(SIZE), Layout())[:SHAPES]
    found = []
    for number, shape in enumerate(shapes, start=1):
        start = work.reconstruct(f"shape {number}", work.parent, SIZE, number)
        run = Run(f"shape {number}", start, STEPS // 2, LR, 1, (STEPS // 2,))
        found.append(
            {
                **{name: value for name, value in dataclasses.asdict(shape).items() if name in ("sizes", "parameters")},
                "at_once": work.evaluate(f"shape {number}", start),
                "trained": work.train([run])[run.name][STEPS // 2],
            }
        )
    first, second = (ranks([shape[name] for shape in found]) for name in ("at_once", "trained"))
    spearman = float(np.corrcoef(first, second)[0, 1])
    rows = [["rounds", "loss"], *([f"{rounds}", f"{np.mean(values):.4f}"] for rounds, values in losses.items())]
    show(rows)
    axes = ("layers", "hidden", "ffn", "heads")
    show(
        [["shape", *axes, "at once", "trained"]]
        + [
            [f"{number}", *(f"{one['sizes'][axis]}" for axis in axes), f"{one['at_once']:.4f}", f"{one['trained']:.4f}"]
            for number, one in enumerate(found, start=1)
        ]
    )
    print(f"Spearman's rank correlation: {spearman:.2f}")
    write_results(
        args.json,
        {
            "benchmark": "rounds",
            "machine": machine(),
            "parent": parent,
            "tokens": STEPS * BATCH * SEQUENCE,
            "seeds": SEEDS,
            "rounds": {str(rounds): spread(values) for rounds, values in losses.items()},
            "trained_tokens": STEPS // 2 * BATCH * SEQUENCE,
            "shapes": found,
            "spearman": spearman,
        },
    )


if __name__ == "__main__":
    main()
