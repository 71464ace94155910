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

from megatron.pruning.cli import candidates
from megatron.pruning.cli.entry import is_first, run
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
from megatron.pruning.cli.pruning_flags import SEED, decide, proposals
from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.model.checkpoint import PLAN_FILE, Checkpoint
from megatron.pruning.model.hf_config import hf_export_problem
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.figure import plan_figure
from megatron.pruning.plan.plan import CRITERIA, LAYER_CRITERIA, PRUNE_TYPES
from megatron.pruning.plan.pruned import Pruned
from megatron.pruning.plan.report import describe
from megatron.pruning.plan.shapes import Shape, describe_shapes
from megatron.pruning.storage.output import check_target
from megatron.pruning.storage.processes import World
from megatron.pruning.storage.small_files import write_durably
from megatron.pruning.storage.views import BYTES

LEAST_TOKENS = 32_768  # that scores must come from


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("prune_llama.py", __doc__)
    add_checkpoint_flags(parser)
    target = parser.add_argument_group("what remains", "left out: unchanged; at least one change is needed")
    target.add_argument("--hidden-size-remain", type=int, metavar="N", help="hidden size")
    target.add_argument("--num-attention-heads-remain", type=int, metavar="N", help="attention (query) heads")
    target.add_argument("--num-query-groups-remain", type=int, metavar="N", help="query groups (key/value heads)")
    target.add_argument("--ffn-hidden-size-remain", type=int, metavar="N", help="ffn hidden size")
    target.add_argument("--drop-layers", type=layer_list, default=(), metavar="I,J,...", help="layers to drop, from 0")
    target.add_argument("--num-layers-remain", type=int, metavar="N", help="or: how many; --layer-criterion says which")
    size = parser.add_argument_group("or only how large", "shapes are proposed and ranked; no _remain flags then")
    size.add_argument("--target-params", metavar="N", help="parameters, e.g. 3.4B or 700M")
    size.add_argument("--target-memory", metavar="SIZE", help="bytes of the weights, e.g. 8GB or 7.5GiB")
    size.add_argument("--target-ratio", type=float, metavar="R", help="of the parent's parameters, e.g. 0.5")
    size.add_argument("--shape", type=int, metavar="I", help="take the I-th shape that is proposed")
    size.add_argument(
        "--candidates",
        type=int,
        metavar="K",
        help="train each of the first K for --train-iters steps (default 200) on --data-path, or --train-data-path "
        "and --valid-data-path, with --tokenizer-model; rank them by validation loss",
    )
    how = parser.add_argument_group("how it is decided")
    how.add_argument("--is-prune", action="store_true", help="prune; the only mode, accepted for older scripts")
    how.add_argument(
        "--prune-type",
        choices=PRUNE_TYPES,
        help="balance (default): the same number in every tensor-parallel block; unbalance: anywhere, shards may come "
        "out uneven",
    )
    how.add_argument(
        "--criterion",
        choices=CRITERIA,
        help="random (default); magnitude: the L2 norm of all weights an index touches; activation: what --scores saw",
    )
    how.add_argument(
        "--layer-criterion",
        choices=LAYER_CRITERIA,
        help="with --num-layers-remain: spaced (default), or by --scores: block_influence (drop what changes its input "
        "least), contiguous (the block that does), loss (what the loss misses least)",
    )
    how.add_argument("--scores", type=Path, metavar="FILE", help="what tools/score_importance.py wrote for this parent")
    how.add_argument(
        "--min-scores-tokens",
        type=int,
        default=LEAST_TOKENS,
        metavar="N",
        help=f"refuse scores from less text (default {LEAST_TOKENS:,})",
    )
    how.add_argument(
        "--correct-norms",
        action="store_true",
        help="scale the norms' gains for the mean square that the dropped hidden channels took away, by --scores",
    )
    how.add_argument("--seed", type=seed, help=f"of the random choice (default {SEED})")
    how.add_argument("--plan", type=Path, metavar="FILE", help="apply this plan instead of making one")
    how.add_argument(
        "--plan-only", action="store_true", help="print the plan, write SAVE.prune_plan.json and .png, and stop"
    )
    add_layout_flags(parser)
    add_megatron_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    return parser().parse_args(hyphenated(argv))


def seed(text: str) -> int:
    """Read a seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def layer_list(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of layer numbers."""
    try:
        return tuple(int(item) for item in text.split(",") if item.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer numbers such as 7,13,18") from None


def measure_candidates(args: argparse.Namespace, parent: Checkpoint, layout: Layout, shapes: list[Shape]) -> None:
    """Train each of the first shapes for a while, and rank them."""
    candidates.check(args)

    def prune(shape: Shape, path: Path) -> None:
        pruned = Pruned(parent, decide(args, parent, layout, shape))
        save_checkpoint(pruned, path, format="torch", layout=layout, dtype=args.dtype, overwrite=True)

    candidates.measure(shapes[: args.candidates], Path(os.path.abspath(args.save)), args, prune)  # noqa: PTH100


def main(argv: Sequence[str]) -> None:
    """Decide, show, write."""
    args = parse(argv)
    if not args.plan_only:
        check_target(args.save, args.overwrite)
    parent = open_checkpoint(args.load, args.iteration)
    set_vocabulary(parent, args)
    layout = layout_from_flags(args, parent.layout)
    check_model_flags(args, parent.config, layout, args.load)
    shapes = proposals(args, parent, layout)
    if shapes and is_first():
        print(describe_shapes(parent.config, shapes, args.dtype or parent.dtype), flush=True)
    if args.candidates is not None:
        measure_candidates(args, parent, layout, shapes)
        return
    if shapes and args.shape is None:
        if is_first():
            print("nothing was written: take one with --shape, or measure the first few with --candidates")
        return
    plan = decide(args, parent, layout, shapes[args.shape - 1] if shapes else None)
    pruned = Pruned(parent, plan)

    world = World.from_environment()
    if world.rank == 0:
        say_source(parent)
        size = pruned.config.parameters * BYTES[args.dtype] if args.dtype else pruned.nbytes
        print(describe(plan, parent.config, pruned.config, parent.nbytes, size), flush=True)
        if problem := hf_export_problem(pruned.config):
            print(f"warning: {problem}", file=sys.stderr)
    plan_text = plan.to_json().encode()
    if args.plan_only:
        save = Path(os.path.abspath(args.save))  # noqa: PTH100 - resolves "..", but no links
        if not save.name:
            raise ValueError(f"--save {args.save} has no name")
        file, picture = (save.with_name(f"{save.name}.{name}") for name in (PLAN_FILE, "prune_plan.png"))
        if world.rank == 0:
            write_durably(file, plan_text)
            print(f"plan: {file} (apply it with --plan {file})")
            if importlib.util.find_spec("matplotlib"):
                write_durably(picture, plan_figure(plan))
                print(f"map:  {picture}")
        world.leave()
        return
    save_as_asked(pruned, args, layout, world, texts={PLAN_FILE: plan_text})
    if world.rank == 0 and args.format == "torch" and plan.prune_type == "unbalance" and layout.tensor > 1:
        print("its shards may be uneven: merge or re-split them with scripts/transfer.sh before training")
    world.leave()


if __name__ == "__main__":
    run(main)
