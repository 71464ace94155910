"""What prune_llama.py's command line asks for: a request, a plan file, or shapes of a size."""

import argparse
from pathlib import Path

from megatron.pruning.cli.flags import natural
from megatron.pruning.model.axes import AXIS, PRUNABLE
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.choose import CRITERIA, LAYER_CRITERIA, SEED
from megatron.pruning.plan.decide import DROP_LAYERS, REMAIN_FLAGS, PruneRequest, decide
from megatron.pruning.plan.plan import PRUNE_TYPES, Plan, to_ranges
from megatron.pruning.plan.scores import digest, read_for
from megatron.pruning.plan.shapes import Shape, parse_bytes, parse_count, propose
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.small_files import read_small

LEAST_TOKENS = 32_768  # that scores must come from


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what remains, how it is decided, and of which size shapes are to be proposed."""
    target = parser.add_argument_group("what remains", "what is left out stays as it is; at least one change is needed")
    for name in PRUNABLE:
        axis, more = AXIS[name], ""
        if name == "layers":
            more = "; --layer-criterion says which"
        assert axis.flag is not None  # it can be pruned
        help = f"{axis.words} that remain{'s' * axis.words.endswith('size')}{more}"
        target.add_argument(axis.flag, type=int, metavar="N", dest=f"{name}_remain", help=help)
    target.add_argument(
        DROP_LAYERS,
        type=layer_list,
        default=(),
        metavar="I,J,...",
        help="or: which layers are dropped, numbered from 0",
    )
    size = parser.add_argument_group("or only how large", "shapes are proposed and ranked; no _remain flags then")
    size.add_argument("--target-params", metavar="N", help="parameters, e.g. 3.4B or 700M")
    size.add_argument("--target-memory", metavar="SIZE", help="bytes of the weights, e.g. 8GB or 7.5GiB")
    size.add_argument("--target-ratio", type=float, metavar="R", help="share of the parent's parameters, e.g. 0.5")
    size.add_argument("--shape", type=int, metavar="I", help="take the I-th shape that is proposed")
    size.add_argument(
        "--candidates",
        type=int,
        metavar="K",
        help="train each of the first K shapes for --train-iters steps (default 200) on --data-path, or "
        "--train-data-path and --valid-data-path, with --tokenizer-model; rank them by validation loss",
    )
    _add_criterion_flags(parser.add_argument_group("how it is decided"))


def _add_criterion_flags(group: argparse._ArgumentGroup) -> None:
    kept = "; ".join(f"{name}: {criterion.summary}" for name, criterion in CRITERIA.items())
    dropped = "; ".join(f"{name}: {criterion.summary}" for name, criterion in LAYER_CRITERIA.items())
    group.add_argument("--criterion", choices=tuple(CRITERIA), help=f"what is kept (default random). {kept}")
    group.add_argument(
        "--layer-criterion",
        choices=tuple(LAYER_CRITERIA),
        help=f"which layers are dropped, with {AXIS['layers'].flag} (default spaced). {dropped}",
    )
    group.add_argument(
        "--scores", type=Path, metavar="FILE", help="what tools/score_importance.py wrote for this parent"
    )
    group.add_argument(
        "--min-scores-tokens",
        type=int,
        default=LEAST_TOKENS,
        metavar="N",
        help=f"tokens that scores must come from at least (default {LEAST_TOKENS:,})",
    )
    group.add_argument(
        "--correct-norms",
        action="store_true",
        help="scale the norms' gains for the mean square that the dropped hidden channels took away, by --scores",
    )
    group.add_argument(
        "--prune-type",
        choices=PRUNE_TYPES,
        help="balance (default): the same number is kept in every tensor-parallel block. unbalance: the best are kept "
        "wherever they are; shards may come out uneven",
    )
    group.add_argument("--seed", type=natural, metavar="S", help=f"seed of the random choice (default {SEED})")
    group.add_argument("--plan", type=Path, metavar="FILE", help="apply this plan instead of making one")
    group.add_argument(
        "--plan-only", action="store_true", help="print the plan, write SAVE.prune_plan.json and .png, and stop"
    )
    group.add_argument("--is-prune", action="store_true", help="prune; this is the only mode, older scripts name it")


def layer_list(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of layer numbers."""
    try:
        return tuple(int(item) for item in text.split(",") if item.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer numbers such as 7,13,18") from None


def request_from_flags(args: argparse.Namespace, layout: Layout, shape: Shape | None = None) -> PruneRequest:
    """Return what the flags of prune_llama.py ask for; the sizes are those of a proposed `shape` if there is one."""
    remain = {axis: getattr(args, f"{axis}_remain") for axis in PRUNABLE}
    if shape is not None:
        remain = {axis: shape.sizes[axis] for axis in remain}
    return PruneRequest(
        layout=layout,
        remain={axis: size for axis, size in remain.items() if size is not None},
        drop_layers=args.drop_layers,
        prune_type=args.prune_type,
        criterion=args.criterion,
        layer_criterion=args.layer_criterion,
        seed=args.seed,
        correct_norms=args.correct_norms,
    )


def plan_from_flags(args: argparse.Namespace, parent: Checkpoint, layout: Layout, shape: Shape | None = None) -> Plan:
    """Make the plan, or read and check the one that was given. Raises ValueError for every pruning that cannot be."""
    request = request_from_flags(args, layout, shape)
    if args.plan is not None:
        return _read_plan(args.plan, request, parent, digest(args.scores) if args.scores else None)
    scores = None
    if args.scores is not None:
        if not request.uses_scores:
            raise ValueError(
                f"--scores {args.scores} would not be used: add --criterion activation, or a --layer-criterion that "
                "takes them"
            )
        scores = read_for(args.scores, fingerprint(parent), parent.path, parent.config.sizes, args.min_scores_tokens)
    return decide(request, parent, scores)


def _read_plan(path: Path, request: PruneRequest, parent: Checkpoint, scores: str | None) -> Plan:
    """Read --plan. Raises ValueError where it is of another parent, or other flags contradict it."""
    if not path.is_file():
        raise ValueError(f"--plan {path} is not a file")
    plan = Plan.from_json(read_small(path).decode(errors="replace"), str(path))
    plan.check_parent(parent)
    asked = {
        "seed": (request.seed, plan.evidence.seed),
        "prune_type": (request.prune_type, plan.prune_type),
        "criterion": (request.criterion, plan.evidence.criterion),
        "layer_criterion": (request.layer_criterion, plan.evidence.layer_criterion),
        "scores": (scores, plan.evidence.scores),
    }
    for name, (wanted, has) in asked.items():
        if wanted not in (None, has):
            raise ValueError(f"--plan {path} has {name} {has}, but the flags say {wanted}")
    for axis, size in request.remain.items():
        if size != plan.sizes[axis]:
            raise ValueError(f"--plan {path} keeps {axis} {plan.sizes[axis]}, but the flags ask for {size}")
    if request.correct_norms and not plan.norm_gains:
        raise ValueError(f"--plan {path} corrects no norms, but the flags say --correct-norms")
    if set(request.drop_layers) & set(plan.layers.tolist()):
        raise ValueError(
            f"--plan {path} keeps layers {to_ranges(plan.layers)}, but the flags drop {request.drop_layers}"
        )
    return plan


def shapes_from_flags(args: argparse.Namespace, parent: Checkpoint, layout: Layout) -> list[Shape]:
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
    request = request_from_flags(args, layout)
    if len(asked) > 1 or request.remain or request.drop_layers or args.plan is not None:
        others = asked[1:] or [*REMAIN_FLAGS, "--plan"]
        raise ValueError(f"{asked[0]} proposes all sizes: leave out {', '.join(others)}")
    shapes = propose(parent.config, _wanted_parameters(args, parent), layout, ceiling=args.target_memory is not None)
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
