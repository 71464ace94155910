"""Which shape a smaller SmolLM2 should have, measured without training: width against depth.

    python benchmarks/shapes.py --work-dir runs/reconstruction      # about ten minutes a shape on a core

The model is SmolLM2-135M (real_model.py), the size 100M parameters. The first shapes that are proposed are pruned,
reconstructed by English text, with one ridge for all weights, and ranked on English that was not seen, as
`--candidates` does it; ended, it goes on where it was. Beside them are shapes that give up one axis alone. Writes
benchmarks/results/shapes.json, from which docs/tables.py makes the table of docs/en/shapes.md; the picture becomes
assets/shapes.png.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from experiment import RESULTS, ROOT, command, machine, write_results
from real_model import real_model, texts

TARGET, CANDIDATES, SEQUENCES, LENGTH = "100M", 9, 16, 512
EVALUATED = 24 * LENGTH  # tokens
ALONE = {"layers": ("--num-layers-remain", 20), "ffn": ("--ffn-hidden-size-remain", 872)}


def main() -> None:
    """Measure, and write the results down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "reconstruction", metavar="DIR")
    parser.add_argument("--json", type=Path, default=RESULTS / "shapes.json", metavar="FILE")
    args = parser.parse_args()
    parent = real_model(args.work_dir)
    train, valid = texts(args.work_dir, parent)["english"]
    save = args.work_dir / "shapes"
    text = (
        "--data-path",
        train,
        "--sequences",
        SEQUENCES,
        "--sequence-length",
        LENGTH,
        "--min-scores-tokens",
        1,
        "--ridge",
        0.01,
    )
    command(
        "prune_llama.py", "--load", parent, "--save", save, "--target-params", TARGET, "--candidates", CANDIDATES,
        "--valid-data-path", valid, "--valid-tokens", EVALUATED, *text,
    )  # fmt: skip
    folder = save.with_name("shapes.candidates")
    measured = json.loads((folder / "shapes.json").read_text())
    shutil.copyfile(folder / "shapes.png", ROOT / "assets" / "shapes.png")
    alone = {axis: shape_alone(args.work_dir, parent, valid, (*flags, *text)) for axis, flags in ALONE.items()}
    write_results(
        args.json,
        {
            "benchmark": "shapes",
            "machine": machine(),
            "model": "SmolLM2-135M",
            "sequences": SEQUENCES,
            "length": LENGTH,
            **{name: measured[name] for name in ("parent", "shapes", "best_first")},
            "alone": alone,
        },
    )


def shape_alone(work: Path, parent: Path, valid: Path, flags: tuple[object, ...]) -> dict[str, Any]:
    """Return the sizes, parameters and loss of a shape that the flags name, measured as the candidates are, once."""
    from megatron.pruning.formats import open_checkpoint

    saved = work / f"alone{flags[0]}"
    losses = saved.with_suffix(".json")
    if not losses.exists():
        command(
            "prune_llama.py", "--load", parent, "--save", saved, "--format", "hf", "--overwrite", *flags,
            "--reconstruct",
        )  # fmt: skip
        command(
            "tools/evaluate.py", "--load", saved, "--data", valid, "--sequence-length", LENGTH, "--max-tokens",
            EVALUATED, "--dtype", "fp32", "--json", losses,
        )  # fmt: skip
    config = open_checkpoint(saved).config
    loss = json.loads(losses.read_text())[0]["loss"]
    return {"sizes": dict(config.sizes), "parameters": config.parameters, "losses": {"0": loss}}


if __name__ == "__main__":
    main()
