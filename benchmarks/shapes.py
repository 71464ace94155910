"""Which shape a smaller SmolLM2 should have, measured without training: width against depth.

    python benchmarks/shapes.py --work-dir runs/reconstruction      # about ten minutes a shape on a core

The model is SmolLM2-135M (real_model.py), the size 100M parameters. The first shapes that are proposed are pruned,
reconstructed by English text and ranked on English that was not seen, as `--candidates` does it; ended, it goes on
where it was. Writes benchmarks/results/shapes.json, from which docs/tables.py makes the table of docs/en/shapes.md; the
picture lies in shapes.candidates of the folder.
"""

import argparse
import json
from pathlib import Path

from experiment import RESULTS, ROOT, command, machine, write_results
from real_model import real_model, texts

TARGET, CANDIDATES, SEQUENCES, LENGTH = "100M", 3, 16, 512
EVALUATED = 24 * LENGTH  # tokens


def main() -> None:
    """Measure, and write the results down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "reconstruction", metavar="DIR")
    parser.add_argument("--json", type=Path, default=RESULTS / "shapes.json", metavar="FILE")
    args = parser.parse_args()
    parent = real_model(args.work_dir)
    train, valid = texts(args.work_dir, parent)["english"]
    save = args.work_dir / "shapes"
    command(
        "prune_llama.py", "--load", parent, "--save", save, "--target-params", TARGET, "--candidates", CANDIDATES,
        "--data-path", train, "--valid-data-path", valid, "--sequences", SEQUENCES, "--sequence-length", LENGTH,
        "--valid-tokens", EVALUATED, "--min-scores-tokens", 1,
    )  # fmt: skip
    folder = save.with_name("shapes.candidates")
    measured = json.loads((folder / "shapes.json").read_text())
    write_results(
        args.json,
        {
            "benchmark": "shapes",
            "machine": machine(),
            "model": "SmolLM2-135M",
            "sequences": SEQUENCES,
            "length": LENGTH,
            **{name: measured[name] for name in ("parent", "shapes", "best_first")},
        },
    )


if __name__ == "__main__":
    main()
