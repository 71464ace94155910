"""Reconstruct what a plan cuts: refit the weights that remain on text, so that they compute what the parent computed.

    # cut by a plan, however it was made, and reconstruct; Hugging Face in, Hugging Face out
    python tools/reconstruct.py --load Llama-2-13b-hf --plan 7b.prune_plan.json --data pile_text_document --save 7b \\
        --format hf

    # what the model is for: several texts, by weight; eight GPUs share them
    torchrun --nproc_per_node 8 tools/reconstruct.py --load 13b-tp4 --plan 7b.prune_plan.json --save 7b \\
        --data 0.7 pile_text_document 0.3 code_text_document

No step of training is taken: each layer is solved for in closed form, one after the other, and nothing but one layer is
in memory. The result is a plain Llama. An interrupted run goes on at the layer where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import (
    add_checkpoint_flags,
    add_layout_flags,
    hyphenated,
    layout_from_flags,
    new_parser,
    open_source,
    options_from_flags,
    refuse_idle_layout,
    save_as_asked,
    say_source,
)
from megatron.pruning.cli.pruning_flags import pruning_facts, read_plan
from megatron.pruning.cli.reconstruction import Reconstructor, add_reconstruction_flags
from megatron.pruning.cli.speech import add_speech_flags, speaking
from megatron.pruning.formats import check_save, check_target
from megatron.pruning.model.checkpoint import PLAN_FILE
from megatron.pruning.plan.pruned import Pruned
from megatron.pruning.plan.reconstructed import REPORT_FILE
from megatron.pruning.storage.processes import World


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_checkpoint_flags(parser)
    add_layout_flags(parser)
    group = parser.add_argument_group("reconstruction")
    group.add_argument("--plan", type=Path, required=True, metavar="FILE", help="what is cut, by prune_llama.py")
    add_reconstruction_flags(group, "--data", required=True)
    add_speech_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Open, cut, reconstruct, save."""
    args = parser().parse_args(hyphenated(argv))
    with speaking(args) as answer:
        check_target(args.save, args.overwrite)
        parent = open_source(args)
        refuse_idle_layout(args)
        layout = layout_from_flags(args, parent.layout)
        plan = read_plan(args.plan, parent)
        world = World.from_environment()
        if world.rank == 0:
            say_source(parent)
        check_save(Pruned(parent, plan), args.save, args.format, options_from_flags(args, layout))
        work = Reconstructor(args, "--data", parent, plan.sizes["hidden"], world)
        model, report = work.run(plan)
        beside = {PLAN_FILE: plan.to_json().encode(), REPORT_FILE: report.to_json()}
        save_as_asked(model, args, layout, world, beside)
        work.close()
        world.leave()
        answer(lambda: pruning_facts(args, parent, plan, report))


def command() -> None:
    """Run as the installed command does."""
    run(main, left="the same command goes on where it was")


if __name__ == "__main__":
    command()
