"""Convert a Llama checkpoint: any format and layout in, any out, bit for bit, one tensor in memory at a time.

    # Hugging Face to Megatron shards
    python tools/checkpoint_conversion/convert.py --load HF_DIR --save DIR --format torch --tensor-model-parallel-size 4

    # Megatron shards to another layout
    python tools/checkpoint_conversion/convert.py --load DIR --save DIR2 --tensor-model-parallel-size 1

    # Megatron shards to Hugging Face
    python tools/checkpoint_conversion/convert.py --load DIR --save HF_DIR --format hf

The format of --load is detected. Tokenizer files travel along. A pruned model in Hugging Face's format has a model
card, README.md, ready for `hf upload`; --evaluation adds what tools/evaluate.py measured.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import (
    add_checkpoint_flags,
    add_layout_flags,
    facts,
    hyphenated,
    layout_from_flags,
    new_parser,
    open_source,
    refuse_idle_layout,
    save_as_asked,
    say_source,
)
from megatron.pruning.cli.speech import add_speech_flags, speaking
from megatron.pruning.formats import check_target, open_checkpoint
from megatron.pruning.formats.card import model_card, read_evaluation
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.lineage import CARD_FILE
from megatron.pruning.storage.processes import World


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_checkpoint_flags(parser)
    add_layout_flags(parser)
    group = parser.add_argument_group("model card", "of a pruned model, in Hugging Face's format")
    group.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="what tools/evaluate.py --json FILE measured, to stand in it"
    )
    add_speech_flags(parser)
    return parser


def card_with_evaluation(args: argparse.Namespace, source: Checkpoint) -> dict[str, bytes]:
    """Return the model card where --evaluation has something to stand in it, by its name.

    Raises ValueError where there is to be no card, and for a file of something else, or of other models.
    """
    if args.evaluation is None:
        return {}
    if args.format != "hf":
        raise ValueError(f"--evaluation {args.evaluation}: --format {args.format} has no model card; leave it out")
    if not source.lineage.steps:
        raise ValueError(f"--evaluation {args.evaluation}: {args.load} was not pruned here and gets no model card")
    return {CARD_FILE: model_card(source, read_evaluation(args.evaluation, source.config.parameters))}


def main(argv: Sequence[str]) -> None:
    """Open, save."""
    args = parser().parse_args(hyphenated(argv))
    with speaking(args) as answer:
        check_target(args.save, args.overwrite)
        source = open_source(args)
        refuse_idle_layout(args)
        layout = layout_from_flags(args, source.layout)
        card = card_with_evaluation(args, source)
        world = World.from_environment()
        if world.rank == 0:
            say_source(source)
        save_as_asked(source, args, layout, world, card)
        world.leave()
        answer(lambda: {"source": facts(source), "saved": facts(open_checkpoint(args.save))})


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
