"""Prune a Llama structurally: fewer layers, heads, query groups, and a narrower hidden and ffn size.

    # Megatron shards in, smaller Megatron shards out, in the same tensor x pipeline layout (plain python does the same)
    torchrun --nproc_per_node 2 prune_llama.py --load DIR --save DIR --is_prune --hidden_size_remain 3072 \\
        --num_attention_heads_remain 24 --ffn_hidden_size_remain 8192 --drop_layers 7,13,18,24

    # Hugging Face in, Megatron TP4 out, in one pass
    python prune_llama.py --load HF_DIR --save DIR --ffn_hidden_size_remain 8192 --tensor-model-parallel-size 4

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

from megatron.pruning.arguments import (
    add_checkpoint_flags,
    add_layout_flags,
    add_megatron_flags,
    check_model_flags,
    hyphenated,
    is_first,
    layout_from_flags,
    new_parser,
    run,
    say_source,
    set_vocabulary,
)
from megatron.pruning.checkpoint import PLAN_FILE, Checkpoint
from megatron.pruning.choose import random_criterion
from megatron.pruning.config import hf_export_problem
from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.importance import magnitude
from megatron.pruning.layout import Layout
from megatron.pruning.output import check_target, write_durably
from megatron.pruning.plan import (
    PRUNE_TYPES,
    Plan,
    Target,
    describe,
    make_plan,
    resolve_target,
    spaced_layers,
    to_ranges,
)
from megatron.pruning.plan_figure import plan_figure
from megatron.pruning.processes import World
from megatron.pruning.pruned import Pruned
from megatron.pruning.views import BYTES

SEED = 1234


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("prune_llama.py", __doc__)
    add_checkpoint_flags(parser)
    target = parser.add_argument_group("what remains", "left out: unchanged; at least one change is needed")
    target.add_argument("--hidden-size-remain", type=int, metavar="N", help="hidden size")
    target.add_argument("--num-attention-heads-remain", type=int, metavar="N", help="attention (query) heads")
    target.add_argument("--num-query-groups-remain", type=int, metavar="N", help="query groups (key/value heads)")
    target.add_argument("--ffn-hidden-size-remain", type=int, metavar="N", help="ffn hidden size")
    target.add_argument("--drop-layers", type=layer_list, default=(), metavar="I,J,...", help="layers to drop, from 0")
    target.add_argument("--num-layers-remain", type=int, metavar="N", help="or: drop others, evenly spaced")
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
        choices=("random", "magnitude"),
        help="random (default), or magnitude: the L2 norm of all weights an index touches",
    )
    how.add_argument("--seed", type=seed, help=f"of the random choice (default {SEED})")
    how.add_argument("--plan", type=Path, metavar="FILE", help="apply this plan instead of making one")
    how.add_argument(
        "--plan-only", action="store_true", help="print the plan, write SAVE.prune_plan.json and .png, and stop"
    )
    add_layout_flags(parser)
    add_megatron_flags(parser)
    return parser.parse_args(hyphenated(argv))


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


def decide(args: argparse.Namespace, parent: Checkpoint, layout: Layout) -> Plan:
    """Make the plan, or read and check the one that was given. Raises ValueError for every pruning that cannot be."""
    drop_layers = args.drop_layers
    if args.num_layers_remain is not None:
        if drop_layers:
            raise ValueError("--drop-layers and --num-layers-remain both say which layers remain: give one of them")
        drop_layers = spaced_layers(parent.config.num_layers, args.num_layers_remain)
    target = Target(
        hidden=args.hidden_size_remain,
        heads=args.num_attention_heads_remain,
        groups=args.num_query_groups_remain,
        ffn=args.ffn_hidden_size_remain,
        drop_layers=drop_layers,
    )
    if args.plan is None:
        resolve_target(target, parent.config)  # refuses, if it must, before the weights are read for their magnitude
        seed = SEED if args.seed is None else args.seed
        name = args.criterion or "random"
        criterion = (
            random_criterion(seed, parent.config.sizes) if name == "random" else magnitude(parent, show=is_first())
        )
        return make_plan(
            parent,
            target,
            criterion,
            layout=layout,
            prune_type=args.prune_type or "balance",
            criterion_name=name,
            seed=seed,
        )
    plan = Plan.from_json(args.plan.read_text(encoding="utf-8", errors="replace"), str(args.plan))
    plan.check_parent(parent)
    for name in ("seed", "prune_type", "criterion"):
        if (value := getattr(args, name)) not in (None, getattr(plan, name)):
            raise ValueError(f"--plan {args.plan} has {name} {getattr(plan, name)}, but the flags say {value}")
    if target != Target():
        wanted = resolve_target(target, parent.config)
        for axis, size in wanted.items():
            if size != plan.sizes[axis]:
                raise ValueError(f"--plan {args.plan} keeps {axis} {plan.sizes[axis]}, but the flags ask for {size}")
        if drop_layers and set(drop_layers) & set(plan.layers.tolist()):
            raise ValueError(
                f"--plan {args.plan} keeps layers {to_ranges(plan.layers)}, but the flags drop {drop_layers}"
            )
    return plan


def main(argv: Sequence[str]) -> None:
    """Decide, show, write."""
    args = parse(argv)
    if not args.plan_only:
        check_target(args.save, args.overwrite)
    parent = open_checkpoint(args.load, args.iteration)
    set_vocabulary(parent, args)
    layout = layout_from_flags(args, parent.layout)
    check_model_flags(args, parent.config, layout, args.load)
    plan = decide(args, parent, layout)
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
    save_checkpoint(
        pruned,
        args.save,
        format=args.format,
        layout=layout,
        dtype=args.dtype,
        transformer_impl=args.transformer_impl,
        overwrite=args.overwrite,
        texts={PLAN_FILE: plan_text},
        world=world,
    )
    if world.rank == 0:
        print(f"saved: {args.save} ({args.format}{f' {layout}' if args.format != 'hf' else ''})")
        if args.format == "torch" and plan.prune_type == "unbalance" and layout.tensor > 1:
            print("its shards may be uneven: merge or re-split them with scripts/transfer.sh before training")
    world.leave()


if __name__ == "__main__":
    run(main)
