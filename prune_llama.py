"""Prune a Llama structurally: fewer layers, heads, query groups, and a narrower hidden and ffn size.

    # Megatron shards in, smaller Megatron shards out, in the same tensor x pipeline layout (plain python does the same)
    torchrun --nproc_per_node 2 prune_llama.py --load DIR --save DIR --is_prune --hidden_size_remain 3072 \\
        --num_attention_heads_remain 24 --ffn_hidden_size_remain 8192 --drop_layers 7,13,18,24

    # Hugging Face in, Megatron TP4 out, in one pass
    python prune_llama.py --load HF_DIR --save DIR --ffn_hidden_size_remain 8192 --tensor-model-parallel-size 4

    # choose by evidence: what tools/score_importance.py saw when the model read text
    python prune_llama.py --load DIR --save DIR --ffn_hidden_size_remain 8192 --num_layers_remain 28 \\
        --criterion activation --layer_criterion block_influence --scores DIR.scores

    # or only say how large: shapes are proposed; take one with --shape, or measure some with --candidates
    python prune_llama.py --load DIR --save DIR --target_params 3.4B

    # look before you leap: decide and print, write only the plan; apply it later
    python prune_llama.py --load DIR --save DIR --drop_layers 7,13 --plan-only
    python prune_llama.py --load DIR --save DIR --plan DIR.prune_plan.json

Flags may be spelled with hyphens or underscores. Megatron's own training flags are accepted, so that one set of
arguments serves pruning and training; those that describe the model must agree with the checkpoint.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import (
    add_checkpoint_flags,
    add_layout_flags,
    add_megatron_flags,
    check_model_flags,
    hyphenated,
    layout_from_flags,
    new_parser,
    save_as_asked,
    say_source,
    set_vocabulary,
)
from megatron.pruning.cli.pruning_flags import add_pruning_flags, plan_from_flags, shapes_from_flags
from megatron.pruning.formats import FORMATS, check_target, open_checkpoint, save_checkpoint
from megatron.pruning.model.checkpoint import PLAN_FILE, Checkpoint
from megatron.pruning.model.hf_config import hf_export_problem
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.figure import plan_figure
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.pruned import Pruned
from megatron.pruning.plan.report import describe
from megatron.pruning.plan.shapes import Shape, describe_shapes
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.processes import World, is_first
from megatron.pruning.storage.small_files import write_durably


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("prune_llama.py", __doc__)
    add_checkpoint_flags(parser)
    add_pruning_flags(parser)
    add_layout_flags(parser)
    add_megatron_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Propose shapes if only a size was asked for; decide on a plan and show it; write the plan or the checkpoint."""
    args = parser().parse_args(hyphenated(argv))
    if not args.plan_only:
        check_target(args.save, args.overwrite)
    parent = open_checkpoint(args.load, args.iteration)
    set_vocabulary(parent, args)
    layout = layout_from_flags(args, parent.layout)
    check_model_flags(args, parent.config, layout, args.load)

    shapes = propose(args, parent, layout)
    if shapes and args.shape is None:
        return
    plan = plan_from_flags(args, parent, layout, shapes[args.shape - 1] if shapes else None)
    pruned = Pruned(parent, plan)

    world = World.from_environment()
    if world.rank == 0:
        show(args, plan, parent, pruned)
        if args.plan_only:
            write_plan(args.save, plan)
    if not args.plan_only:
        save_as_asked(pruned, args, layout, world, beside={PLAN_FILE: plan.to_json().encode()})
        if world.rank == 0 and FORMATS[args.format].sharded and plan.prune_type == "unbalance" and layout.tensor > 1:
            print("its shards may be uneven: merge or re-split them with scripts/transfer.sh before training")
    world.leave()


def propose(args: argparse.Namespace, parent: Checkpoint, layout: Layout) -> list[Shape]:
    """Show the shapes of the size that was asked for, train the first few if that was asked for, too; return them all.

    Raises ValueError where flags contradict.
    """
    shapes = shapes_from_flags(args, parent, layout)
    if shapes and is_first():
        print(describe_shapes(parent.config, shapes, args.dtype or parent.dtype), flush=True)
    if args.candidates is not None:
        measure_candidates(args, parent, layout, shapes[: args.candidates])
    elif shapes and args.shape is None and is_first():
        print("nothing was written: take one with --shape, or measure the first few with --candidates")
    return shapes


def measure_candidates(args: argparse.Namespace, parent: Checkpoint, layout: Layout, shapes: list[Shape]) -> None:
    """Train each of the shapes for a while, and rank them."""
    try:
        from tools import candidates
    except ImportError as error:
        raise ValueError(
            "--candidates trains by scripts/check_model.sh: run prune_llama.py of the repository"
        ) from error
    candidates.check(args)

    def prune(shape: Shape, path: Path) -> None:
        pruned = Pruned(parent, plan_from_flags(args, parent, layout, shape))
        save_checkpoint(pruned, path, format="torch", layout=layout, dtype=args.dtype, overwrite=True)

    candidates.measure(shapes, absolute(args.save), args, prune)


def show(args: argparse.Namespace, plan: Plan, parent: Checkpoint, pruned: Pruned) -> None:
    """Print what the plan does, before it is done."""
    say_source(parent)
    size = pruned.config.parameters * BYTES[args.dtype] if args.dtype else pruned.nbytes
    print(describe(plan, parent.config, pruned.config, parent.nbytes, size), flush=True)
    if problem := hf_export_problem(pruned.config):
        print(f"warning: {problem}", file=sys.stderr)


def write_plan(save: Path, plan: Plan) -> None:
    """Write the plan beside `save` and, where matplotlib is installed, a map of what it keeps."""
    save = absolute(save)
    file, picture = (save.with_name(f"{save.name}.{name}") for name in (PLAN_FILE, "prune_plan.png"))
    write_durably(file, plan.to_json().encode())
    print(f"plan: {file} (apply it with --plan {file})")
    if importlib.util.find_spec("matplotlib"):
        write_durably(picture, plan_figure(plan))
        print(f"map:  {picture}")


def absolute(save: Path) -> Path:
    """Return --save with its ".." resolved, but no links. Raises ValueError when it has no name of its own."""
    path = Path(os.path.abspath(save))  # noqa: PTH100
    if not path.name:
        raise ValueError(f"--save {save} has no name")
    return path


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
