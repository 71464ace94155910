"""Prune a Llama structurally: fewer layers, heads, query groups, and a narrower hidden and ffn size.

    # Megatron shards in, smaller Megatron shards out, in the same tensor x pipeline layout (plain python does the same)
    torchrun --nproc_per_node 2 prune_llama.py --load DIR --save DIR --is_prune --hidden_size_remain 3072 \\
        --num_attention_heads_remain 24 --ffn_hidden_size_remain 8192 --drop_layers 7,13,18,24

    # Hugging Face in, Megatron TP4 out, in one pass
    python prune_llama.py --load HF_DIR --save DIR --ffn_hidden_size_remain 8192 --tensor-model-parallel-size 4

    # choose by evidence: what tools/score_importance.py saw when the model read text
    python prune_llama.py --load DIR --save DIR --ffn_hidden_size_remain 8192 --num_layers_remain 28 --scores DIR.scores

    # with a text: score, choose, cut, and refit what remains so that it computes what the parent computed
    python prune_llama.py --load DIR --save DIR --ffn_hidden_size_remain 8192 --reconstruct --data-path PREFIX

    # or only say how large: shapes are proposed; take one with --shape, or measure some with --candidates
    python prune_llama.py --load DIR --save DIR --target_params 3.4B
    python prune_llama.py --load DIR --save DIR --target_params 3.4B --candidates 10 --data-path PREFIX \\
        --valid-data-path HELD_OUT

    # look before you leap: decide and print, write only the plan; apply it later
    python prune_llama.py --load DIR --save DIR --drop_layers 7,13 --plan-only
    python prune_llama.py --load DIR --save DIR --plan DIR.prune_plan.json

Flags may be spelled with hyphens or underscores. Megatron's own training flags are accepted, so that one set of
arguments serves pruning and training; those that describe the model must agree with the checkpoint.
"""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import (
    add_checkpoint_flags,
    add_layout_flags,
    add_megatron_flags,
    check_model_flags,
    facts,
    hyphenated,
    layout_from_flags,
    natural,
    new_parser,
    open_source,
    options_from_flags,
    positive,
    save_as_asked,
    say_source,
)
from megatron.pruning.cli.pruning_flags import (
    blind_plan,
    plan_from_flags,
    pruning_facts,
    shapes_from_flags,
    target_from_flags,
)
from megatron.pruning.cli.reconstruction import Reconstructor, add_reconstruction_flags, check_reconstruction_flags
from megatron.pruning.cli.speech import Answer, add_speech_flags, speaking
from megatron.pruning.formats import FORMATS, check_save, check_target
from megatron.pruning.model.axes import AXIS, PRUNABLE
from megatron.pruning.model.checkpoint import PLAN_FILE, Checkpoint
from megatron.pruning.model.hf_config import hf_export_problem
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.choose import (
    CRITERIA,
    CRITERION,
    CRITERION_BY_SCORES,
    LAYER_CRITERIA,
    LAYER_CRITERION,
    LAYER_CRITERION_BY_SCORES,
    SEED,
)
from megatron.pruning.plan.decide import DROP_LAYERS
from megatron.pruning.plan.figure import plan_figure
from megatron.pruning.plan.measured import BEST, EVALUATED, ZERO, best_shape
from megatron.pruning.plan.plan import PRUNE_TYPES, UNBALANCE, Plan
from megatron.pruning.plan.pruned import Pruned
from megatron.pruning.plan.reconstructed import REPORT_FILE, Report
from megatron.pruning.plan.report import cost_of_choice, describe
from megatron.pruning.plan.shapes import Shape, describe_shapes
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.processes import World, is_first
from megatron.pruning.storage.small_files import replace_durably

LEAST_TOKENS = 32_768  # that scores must come from


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_checkpoint_flags(parser)
    add_remain_flags(
        parser.add_argument_group("what remains", "what is left out stays as it is; at least one change is needed")
    )
    add_size_flags(
        parser.add_argument_group("or only how large", "shapes are proposed and ranked; no _remain flags then")
    )
    add_choice_flags(parser.add_argument_group("how it is decided"))
    group = parser.add_argument_group("reconstruction", "by a text, without training; --data-path names it")
    group.add_argument(
        "--reconstruct",
        action="store_true",
        help="refit the weights that remain on text; without --scores, score on it first and choose by contribution",
    )
    add_reconstruction_flags(group, "--data-path")
    add_layout_flags(parser)
    add_speech_flags(parser)
    add_megatron_flags(parser)
    return parser


def add_remain_flags(group: argparse._ArgumentGroup) -> None:
    """Add a flag for each axis that can be pruned."""
    for axis in (AXIS[name] for name in PRUNABLE):
        assert axis.flag is not None  # it can be pruned
        remain = "remains" if axis.words.endswith("size") else "remain"
        which = "; --layer-criterion says which" if axis.name == "layers" else ""
        help = f"{axis.words} that {remain}{which}"
        group.add_argument(axis.flag, type=int, metavar="N", dest=f"{axis.name}_remain", help=help)
    group.add_argument(
        DROP_LAYERS, type=layer_list, default=(), metavar="I,J,...", help="or: which layers are dropped, from 0"
    )


def add_size_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that ask for shapes of a size."""
    group.add_argument("--target-params", metavar="N", help="parameters, e.g. 3.4B or 700M")
    group.add_argument("--target-ratio", type=float, metavar="R", help="or: share of the parent's parameters, e.g. 0.5")
    group.add_argument(
        "--target-memory",
        metavar="SIZE",
        help="bytes at most of weights and cache, e.g. 8GB or 7.5GiB; also with one above",
    )
    group.add_argument(
        "--kv-batch", type=positive, metavar="B",
        help="sequences whose keys and values find room in --target-memory, too (default: 1 with --kv-sequence)",
    )  # fmt: skip
    group.add_argument(
        "--kv-sequence", type=positive, metavar="S",
        help="tokens of each of them (default: as many as the model has positions)",
    )  # fmt: skip
    group.add_argument(
        "--shape",
        type=shape_number,
        metavar="I",
        help="take the I-th proposal; best: the one measured best",
    )
    group.add_argument(
        "--candidates",
        type=positive,
        metavar="K",
        help="reconstruct each of the first K shapes by --data-path, and rank them by their loss on --valid-data-path",
    )
    group.add_argument(
        "--valid-tokens",
        type=positive,
        default=EVALUATED,
        metavar="N",
        help=f"tokens of --valid-data-path, from its start, on which candidates are compared (default {EVALUATED:,})",
    )
    group.add_argument(
        "--measure",
        default=ZERO,
        metavar="N",
        help="of the candidates train the best three on N/4 tokens of --data-path, two of them on N/2, one on N, by "
        f"scripts/check_model.sh (default {ZERO}: no training)",
    )


def shape_number(text: str) -> int | str:
    """Read --shape: a number from 1 on, or `best`."""
    return BEST if text == BEST else positive(text)


def add_choice_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how it is decided what is kept."""
    kept = "; ".join(f"{name}: {criterion.summary}" for name, criterion in CRITERIA.items())
    dropped = "; ".join(f"{name}: {criterion.summary}" for name, criterion in LAYER_CRITERIA.items())
    group.add_argument(
        "--criterion",
        choices=tuple(CRITERIA),
        help=f"what is kept (default: {CRITERION}; with scores {CRITERION_BY_SCORES}). {kept}",
    )
    group.add_argument(
        "--layer-criterion",
        choices=tuple(LAYER_CRITERIA),
        help=f"which layers are dropped, with {AXIS['layers'].flag} (default: {LAYER_CRITERION}; with scores "
        f"{LAYER_CRITERION_BY_SCORES}). {dropped}",
    )
    group.add_argument(
        "--scores", type=Path, metavar="FILE", help="what tools/score_importance.py wrote for this parent"
    )
    group.add_argument(
        "--min-scores-tokens",
        type=natural,
        default=LEAST_TOKENS,
        metavar="N",
        help=f"tokens that scores must come from at least (default {LEAST_TOKENS:,})",
    )
    group.add_argument(
        "--correct-norms",
        action=argparse.BooleanOptionalAction,
        help="scale the norms' gains for the mean square that the dropped hidden channels took away, by scores "
        "(default: where there are scores)",
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


def main(argv: Sequence[str]) -> None:
    """Read the flags, and do what they ask for."""
    flags, words = parser(), hyphenated(argv)
    args = flags.parse_args(words)
    args.words = words
    check_reconstruction_flags(args, flags)
    with speaking(args) as answer:
        prune(args, answer)


def prune(args: argparse.Namespace, answer: Answer) -> None:
    """Propose shapes if only a size was asked for; decide on a plan and show it; write the plan or the checkpoint."""
    if args.plan_only:
        absolute(args.save)
    else:
        check_target(args.save, args.overwrite)
    parent = open_source(args)
    layout = layout_from_flags(args, parent.layout)
    check_model_flags(args, parent.config, layout, args.load)

    shapes = propose(args, parent, layout)
    if shapes and args.shape is None:
        answer(lambda: {"parent": facts(parent), "shapes": [dataclasses.asdict(shape) for shape in shapes]})
        return
    shape = chosen(args, parent, shapes)
    if args.reconstruct:
        world = World.from_environment()
        blind = blind_plan(args, parent, layout, shape)
        if not args.plan_only:
            check_save(Pruned(parent, blind), args.save, args.format, options_from_flags(args, layout))
        work = Reconstructor(args, "--data-path", parent, blind.sizes["hidden"], world)
        plan = plan_from_flags(args, parent, layout, shape, work.scores)
    else:
        plan = plan_from_flags(args, parent, layout, shape)
        world, work = World.from_environment(), None

    model, report = Pruned(parent, plan), None
    if world.rank == 0:
        show(args, plan, parent, model)
        if args.plan_only:
            write_plan(args.save, plan)
    if not args.plan_only:
        report = write(args, plan, model, layout, work, world)
    if work is not None:
        work.close()
    world.leave()
    answer(lambda: pruning_facts(args, parent, plan, report))


def write(
    args: argparse.Namespace, plan: Plan, pruned: Pruned, layout: Layout, work: Reconstructor | None, world: World
) -> Report | None:
    """Write the checkpoint, reconstructed first where that is the `work`; return the report of that."""
    model: Checkpoint = pruned
    report, beside = None, {PLAN_FILE: plan.to_json().encode()}
    if work is not None:
        model, report = work.run(plan)
        beside[REPORT_FILE] = report.to_json()
    save_as_asked(model, args, layout, world, beside)
    if world.rank == 0 and FORMATS[args.format].sharded and plan.prune_type == UNBALANCE and layout.tensor > 1:
        print("its shards may be uneven: merge or re-split them with scripts/transfer.sh before training")
    return report


def propose(args: argparse.Namespace, parent: Checkpoint, layout: Layout) -> list[Shape]:
    """Show the shapes of the size that was asked for, measure the first few if that was asked for, too; return all.

    Raises ValueError where flags contradict.
    """
    target = target_from_flags(args, parent)
    if target is None:
        return []
    shapes = shapes_from_flags(args, parent, layout, target)
    if args.candidates is not None:
        candidates = measuring()
        candidates.check(args)
    if is_first():
        print(describe_shapes(parent.config, shapes, target.bytes_each, target.cached_tokens), flush=True)
    if args.candidates is not None:
        args.save = absolute(args.save)
        candidates.measure(args.words, args, parent, target, shapes[: args.candidates])
    elif args.shape is None and is_first():
        print("nothing was written: take one with --shape, or measure the first few with --candidates")
    return shapes


def measuring() -> ModuleType:
    """Return what measures shapes. Raises ValueError where it is not installed."""
    try:
        from tools import candidates
    except ImportError as error:
        raise ValueError("--candidates runs scripts/*.sh: run prune_llama.py of the repository") from error
    return candidates


def chosen(args: argparse.Namespace, parent: Checkpoint, shapes: list[Shape]) -> Shape | None:
    """Return the shape that --shape names, None where no size was asked for. Raises ValueError where it is none."""
    if not shapes:
        return None
    number = best_shape(absolute(args.save), parent, shapes) if args.shape == BEST else args.shape
    if number > len(shapes):
        raise ValueError(f"--shape {number}: the shapes proposed are 1 to {len(shapes)}")
    return shapes[number - 1]


def show(args: argparse.Namespace, plan: Plan, parent: Checkpoint, pruned: Checkpoint) -> None:
    """Print what the plan does, before it is done."""
    say_source(parent)
    size = pruned.config.parameters * BYTES[args.dtype] if args.dtype else pruned.nbytes
    print(describe(plan, parent.config, pruned.config, parent.nbytes, size), flush=True)
    if args.plan is None and (cost := cost_of_choice(plan)):
        print(
            f"{cost}; to choose by what it does on text, and refit what remains, add --reconstruct --data-path PREFIX, "
            f"or give scripts/prune_llama.sh a DATA_PATH; only to choose: python tools/score_importance.py --load "
            f"{args.load} --data PREFIX --save {args.save}.scores, then add --scores {args.save}.scores",
            file=sys.stderr,
        )
    if args.format != "hf" and (problem := hf_export_problem(pruned.config)):  # as hf it will be refused
        print(f"warning: {problem}", file=sys.stderr)


def write_plan(save: Path, plan: Plan) -> None:
    """Write the plan beside `save` and, where matplotlib is installed, a picture of it."""
    save = absolute(save)
    file, picture = (save.with_name(f"{save.name}.{name}") for name in (PLAN_FILE, "prune_plan.png"))
    replace_durably(file, plan.to_json().encode())
    print(f"plan: {file} (apply it with --plan {file})")
    if importlib.util.find_spec("matplotlib"):
        replace_durably(picture, plan_figure(plan))
        print(f"picture: {picture}")


def absolute(save: Path) -> Path:
    """Return --save as it is from anywhere. Raises ValueError when it has no name of its own."""
    path = save.absolute()
    if not path.name:
        raise ValueError(f"--save {save} has no name")
    return path


def command() -> None:
    """Run as the installed command does."""
    goes_on = any(word.startswith("--reconstruct") for word in sys.argv)
    run(main, left="the same command goes on where it was" if goes_on else "nothing was left behind")


if __name__ == "__main__":
    command()
