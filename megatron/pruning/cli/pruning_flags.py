"""What prune_llama.py's command line asks for: a request, a plan file, or shapes of a size."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from megatron.pruning.cli.flags import facts
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.axes import PRUNABLE
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.choose import CRITERIA, LAYER_CRITERIA, LAYER_CRITERION, Criterion, LayerCriterion
from megatron.pruning.plan.decide import REMAIN_FLAGS, PruneRequest, decide
from megatron.pruning.plan.measured import BEST
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.reconstructed import Report
from megatron.pruning.plan.scores import Scores, digest, read_for
from megatron.pruning.plan.shapes import PROPOSALS, Shape, Target, parse_bytes, parse_count, propose
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.small_files import read_small


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


def plan_from_flags(
    args: argparse.Namespace,
    parent: Checkpoint,
    layout: Layout,
    shape: Shape | None = None,
    record: Callable[[], Scores] | None = None,
) -> Plan:
    """Make the plan, or read and check the one that was given; `record` makes scores where they are needed.

    Raises ValueError for every pruning that cannot be.
    """
    request = request_from_flags(args, layout, shape)
    if args.plan is not None:
        return _read_plan(args.plan, request, parent, digest(args.scores) if args.scores else None)
    scores = None
    if args.scores is not None:
        if not request.heeds_scores:
            raise ValueError(
                f"--scores {args.scores} would not be used: add --criterion {_taking(CRITERIA)}, or "
                f"--layer-criterion {_taking(LAYER_CRITERIA)}"
            )
        scores = read_for(args.scores, fingerprint(parent), parent.path, parent.config.sizes, args.min_scores_tokens)
    elif record is not None and request.heeds_scores:
        scores = record()
    return decide(request, parent, scores)


def blind_plan(args: argparse.Namespace, parent: Checkpoint, layout: Layout, shape: Shape | None = None) -> Plan:
    """Return a plan of the sizes that are asked for, or the one that was given, without a look at any scores.

    What cannot be done with it cannot be done with the one by scores either, which takes long to be there. Raises
    ValueError for every pruning that cannot be.
    """
    if args.plan is not None:
        return read_plan(args.plan, parent)
    request = request_from_flags(args, layout, shape)
    spaced = LAYER_CRITERION if request.layer_criterion else None
    return decide(dataclasses.replace(request, criterion=None, layer_criterion=spaced, correct_norms=None), parent)


def _taking(criteria: Mapping[str, Criterion] | Mapping[str, LayerCriterion]) -> str:
    return " or ".join(name for name, criterion in criteria.items() if criterion.needs_scores)


def read_plan(path: Path, parent: Checkpoint) -> Plan:
    """Read --plan. Raises ValueError where there is none, or it is of another parent."""
    if not path.is_file():
        raise ValueError(f"--plan {path} is not a file")
    plan = Plan.from_json(read_small(path).decode(errors="replace"), str(path))
    plan.check_parent(parent)
    return plan


def _read_plan(path: Path, request: PruneRequest, parent: Checkpoint, scores: str | None) -> Plan:
    """Read --plan. Raises ValueError where it is of another parent, or other flags contradict it."""
    plan = read_plan(path, parent)
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
    if request.correct_norms not in (None, bool(plan.norm_gains)):
        has, flag = ("no norms", "--correct-norms") if request.correct_norms else ("norms", "--no-correct-norms")
        raise ValueError(f"--plan {path} corrects {has}, but the flags say {flag}")
    if request.drop_layers and sorted(request.drop_layers) != plan.dropped_layers:
        raise ValueError(f"--plan {path} drops layers {plan.dropped_layers}, but the flags {request.drop_layers}")
    return plan


def pruning_facts(
    args: argparse.Namespace, parent: Checkpoint, plan: Plan, report: Report | None = None
) -> dict[str, Any]:
    """Return what a program may want to know of a pruning: the models, what was decided by what, and the losses."""
    evidence, losses = plan.evidence, report.losses if report else None
    return {
        "parent": facts(parent),
        "pruned": {"sizes": plan.sizes} if args.plan_only else facts(open_checkpoint(args.save)),
        "dropped_layers": plan.dropped_layers,
        "prune_type": plan.prune_type,
        "evidence": msgspec.to_builtins(evidence),
        "norms_corrected": bool(plan.norm_gains),
        "losses": msgspec.to_builtins(losses) if losses else None,
    }


def target_from_flags(args: argparse.Namespace, parent: Checkpoint) -> Target | None:
    """Return what size is asked for, None if none is. Raises ValueError where flags contradict."""
    given = {
        "--target-params": args.target_params,
        "--target-ratio": args.target_ratio,
        "--target-memory": args.target_memory,
    }
    asked = [flag for flag, value in given.items() if value is not None]
    if not asked:
        for flag, value in (("--shape", args.shape), ("--candidates", args.candidates)):
            if value is not None:
                raise ValueError(f"{flag} {value} is of the shapes for a size: add --target-params, or another target")
    elif args.target_params is not None and args.target_ratio is not None:
        raise ValueError("--target-params and --target-ratio both say how many parameters: leave one of them out")
    for flag, value in (("--kv-batch", args.kv_batch), ("--kv-sequence", args.kv_sequence)):
        if value is not None and args.target_memory is None:
            raise ValueError(f"{flag} {value} is of the cache that takes a share of --target-memory: add that")
    if not asked:
        return None
    cached = 0
    if args.kv_batch is not None or args.kv_sequence is not None:
        cached = (args.kv_batch or 1) * (args.kv_sequence or parent.config.max_position_embeddings)
    parameters = None if args.target_params is None else parse_count(args.target_params)
    if args.target_ratio is not None:
        if not 0 < args.target_ratio < 1:
            raise ValueError(f"--target-ratio {args.target_ratio} must lie between 0 and 1")
        parameters = args.target_ratio * parent.config.parameters
    return Target(
        parameters=parameters,
        memory=None if args.target_memory is None else parse_bytes(args.target_memory),
        bytes_each=BYTES[args.dtype or parent.dtype],
        cached_tokens=cached,
    )


def shapes_from_flags(args: argparse.Namespace, parent: Checkpoint, layout: Layout, target: Target) -> list[Shape]:
    """Return the shapes of the wanted size, as many as are to be measured or the one that is taken asks for.

    Raises ValueError where other flags contradict, or there are none.
    """
    request = request_from_flags(args, layout)
    if request.remain or request.drop_layers or args.plan is not None:
        others = ", ".join((*REMAIN_FLAGS, "--plan"))
        raise ValueError(f"a target proposes all sizes: leave out {others}, or the target")
    count = math.inf if args.shape == BEST else max(PROPOSALS, args.candidates or 0, args.shape or 0)
    return propose(parent.config, target, layout, count)
