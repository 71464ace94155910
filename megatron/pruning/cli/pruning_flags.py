"""From prune_llama.py's command line to a plan, or to proposals of shapes; flags that contradict are refused here."""

import argparse

from megatron.pruning.cli.entry import is_first
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.choose import Criterion, random_criterion
from megatron.pruning.plan.decide import FLAG_OF_AXIS, Target, layers_to_drop, make_plan, resolve_target
from megatron.pruning.plan.magnitude import magnitude
from megatron.pruning.plan.plan import Plan, to_ranges
from megatron.pruning.plan.scores import Calibration, digest, read_for
from megatron.pruning.plan.shapes import Shape, parse_bytes, parse_count, propose
from megatron.pruning.storage.small_files import read_small
from megatron.pruning.storage.views import BYTES

SEED = 1234


def read_scores(args: argparse.Namespace, parent: Checkpoint) -> Calibration | None:
    """Read --scores, if given. Raises ValueError for scores that are not of this parent or not enough, or missing."""
    needing = {"--criterion activation": args.criterion == "activation", "--correct-norms": args.correct_norms}
    if args.scores is None:
        for flag in (flag for flag, given in needing.items() if given):
            raise ValueError(f"{flag} needs --scores FILE, which tools/score_importance.py makes from text")
        return None
    if not any(needing.values()) and args.layer_criterion in (None, "spaced"):
        raise ValueError(
            f"--scores {args.scores} would not be used: add --criterion activation, or a --layer-criterion by scores"
        )
    return read_for(args.scores, fingerprint(parent), parent.path, parent.config.sizes, args.min_scores_tokens)


def sizes_of(args: argparse.Namespace) -> dict[str, int | None]:
    """Return the sizes that the _remain flags name, by axis; None: unchanged."""
    return {
        "hidden": args.hidden_size_remain,
        "heads": args.num_attention_heads_remain,
        "groups": args.num_query_groups_remain,
        "ffn": args.ffn_hidden_size_remain,
    }


def target_of(args: argparse.Namespace, parent: Checkpoint, shape: Shape | None, scores: Calibration | None) -> Target:
    """Return what is to remain, by the flags or by a proposed shape. Raises ValueError where flags contradict."""
    sizes, remain, drop_layers = sizes_of(args), args.num_layers_remain, args.drop_layers
    if shape is not None:
        sizes, remain = {axis: shape.sizes[axis] for axis in sizes}, shape.sizes["layers"]
    if remain is not None:
        if drop_layers:
            raise ValueError("--drop-layers and --num-layers-remain both say which layers remain: give one of them")
        drop_layers = layers_to_drop(args.layer_criterion or "spaced", parent.config.num_layers, remain, scores)
    elif args.layer_criterion:
        raise ValueError(f"--layer-criterion {args.layer_criterion} says which layers: add --num-layers-remain N")
    return Target(**sizes, drop_layers=drop_layers)


def decide(args: argparse.Namespace, parent: Checkpoint, layout: Layout, shape: Shape | None = None) -> Plan:
    """Make the plan, or read and check the one that was given. Raises ValueError for every pruning that cannot be."""
    if args.plan is not None:
        return given_plan(args, parent)
    scores = read_scores(args, parent)
    target = target_of(args, parent, shape, scores)
    # Refuses, if it must, before the weights are read for their magnitude.
    sizes = resolve_target(target, parent.config)
    if args.correct_norms and sizes["hidden"] == parent.config.hidden_size:
        raise ValueError("--correct-norms is for a smaller hidden size: add --hidden-size-remain, or leave it out")
    name, seed = args.criterion or "random", SEED if args.seed is None else args.seed
    criterion: Criterion = random_criterion(seed, parent.config.sizes)
    if name == "magnitude":
        criterion = magnitude(parent, show=is_first())
    elif name == "activation" and scores is not None:
        criterion = scores.criterion()
    by_number = shape is not None or args.num_layers_remain is not None
    return make_plan(
        parent,
        target,
        criterion,
        layout=layout,
        prune_type=args.prune_type or "balance",
        criterion_name=name,
        layer_criterion=(args.layer_criterion or "spaced") if by_number else None,
        seed=seed,
        scores_digest=digest(args.scores) if args.scores else None,
        calibration=scores,
        correct_norms=args.correct_norms,
    )


def given_plan(args: argparse.Namespace, parent: Checkpoint) -> Plan:
    """Read --plan. Raises ValueError where it is of another parent, or other flags contradict it."""
    if not args.plan.is_file():
        raise ValueError(f"--plan {args.plan} is not a file")
    plan = Plan.from_json(read_small(args.plan).decode(errors="replace"), str(args.plan))
    plan.check_parent(parent)
    given = {name: getattr(args, name) for name in ("seed", "prune_type", "criterion", "layer_criterion")}
    given["scores_digest"] = digest(args.scores) if args.scores else None
    for name, value in given.items():
        if value not in (None, found := getattr(plan, name)):
            raise ValueError(f"--plan {args.plan} has {name} {found}, but the flags say {value}")
    for axis, size in {**sizes_of(args), "layers": args.num_layers_remain}.items():
        if size not in (None, plan.sizes[axis]):
            raise ValueError(f"--plan {args.plan} keeps {axis} {plan.sizes[axis]}, but the flags ask for {size}")
    if args.correct_norms and not plan.norm_gains:
        raise ValueError(f"--plan {args.plan} corrects no norms, but the flags say --correct-norms")
    if set(args.drop_layers) & set(plan.layers.tolist()):
        raise ValueError(
            f"--plan {args.plan} keeps layers {to_ranges(plan.layers)}, but the flags drop {args.drop_layers}"
        )
    return plan


def proposals(args: argparse.Namespace, parent: Checkpoint, layout: Layout) -> list[Shape]:
    """Return the shapes of the wanted size, none if no size was asked for. Raises ValueError where flags contradict."""
    given = {
        "--target-params": args.target_params,
        "--target-memory": args.target_memory,
        "--target-ratio": args.target_ratio,
    }
    asked = [flag for flag, value in given.items() if value is not None]
    if not asked:
        for flag, value in (("--shape", args.shape), ("--candidates", args.candidates)):
            if value is not None:
                raise ValueError(f"{flag} {value} is of the shapes for a size: add --target-params, or another target")
        return []
    named = (*sizes_of(args).values(), args.num_layers_remain, args.drop_layers or None, args.plan)
    if len(asked) > 1 or any(value is not None for value in named):
        others = asked[1:] or [*FLAG_OF_AXIS.values(), "--num-layers-remain", "--plan"]
        raise ValueError(f"{asked[0]} proposes all sizes: leave out {', '.join(others)}")
    wanted = _wanted_parameters(args, parent)
    shapes = propose(parent.config, wanted, layout, ceiling=args.target_memory is not None)
    if args.shape is not None and not 1 <= args.shape <= len(shapes):
        raise ValueError(f"--shape {args.shape}: the shapes proposed are 1 to {len(shapes)}")
    return shapes


def _wanted_parameters(args: argparse.Namespace, parent: Checkpoint) -> float:
    if args.target_params is not None:
        return parse_count(args.target_params)
    if args.target_memory is not None:
        return parse_bytes(args.target_memory) / BYTES[args.dtype or parent.dtype]
    if not 0 < args.target_ratio < 1:
        raise ValueError(f"--target-ratio {args.target_ratio} must lie between 0 and 1")
    return float(args.target_ratio * parent.config.parameters)
