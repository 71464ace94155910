"""Convert a Llama checkpoint: any format and layout in, any out, bit for bit, one tensor in memory at a time.

    # Hugging Face to Megatron shards
    python tools/checkpoint_conversion/convert.py --load HF_DIR --save DIR --format torch --tensor-model-parallel-size 4

    # Megatron shards to another layout
    python tools/checkpoint_conversion/convert.py --load DIR --save DIR2 --tensor-model-parallel-size 1

    # Megatron shards to Hugging Face
    python tools/checkpoint_conversion/convert.py --load DIR --save HF_DIR --format hf

The format of --load is detected. Tokenizer files travel along.
"""

import argparse
from collections.abc import Sequence

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
from megatron.pruning.storage.processes import World


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_checkpoint_flags(parser)
    add_layout_flags(parser)
    add_speech_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Open, save."""
    args = parser().parse_args(hyphenated(argv))
    with speaking(args) as answer:
        check_target(args.save, args.overwrite)
        source = open_source(args)
        refuse_idle_layout(args)
        layout = layout_from_flags(args, source.layout)
        world = World.from_environment()
        if world.rank == 0:
            say_source(source)
        save_as_asked(source, args, layout, world)
        world.leave()
        answer(lambda: {"source": facts(source), "saved": facts(open_checkpoint(args.save))})


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
