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
import dataclasses
import sys
from collections.abc import Sequence

from megatron.pruning.arguments import (
    add_checkpoint_flags,
    add_layout_flags,
    hyphenated,
    layout_from_flags,
    new_parser,
    run,
    say_source,
)
from megatron.pruning.checkpoint import Checkpoint
from megatron.pruning.config import LlamaConfig
from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.output import check_target
from megatron.pruning.processes import World


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("convert.py", __doc__)
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="without padding, where a Megatron source does not say"
    )
    add_layout_flags(parser)
    return parser.parse_args(hyphenated(argv))


def with_vocabulary(source: Checkpoint, size: int) -> LlamaConfig:
    """Return the source's config with another vocabulary. Raises ValueError if it has fewer rows."""
    if not 1 <= size <= source.config.vocab_size:
        raise ValueError(
            f"--vocab-size {size} must lie between 1 and the {source.config.vocab_size} rows of {source.path}"
        )
    return dataclasses.replace(source.config, vocab_size=size)


def main(argv: Sequence[str]) -> None:
    """Open, save."""
    args = parse(argv)
    check_target(args.save, args.overwrite)
    source = open_checkpoint(args.load, args.iteration)
    if args.vocab_size is not None:
        source.config = with_vocabulary(source, args.vocab_size)
    layout = layout_from_flags(args, source.layout)
    world = World.from_environment()
    if world.rank == 0:
        say_source(source)
        if args.vocab_size is None and not source.vocab_is_known:
            print(
                f"warning: the source does not say its vocabulary: all {source.config.vocab_size} rows are kept, "
                "padding or not; give --vocab-size",
                file=sys.stderr,
            )
    save_checkpoint(
        source,
        args.save,
        format=args.format,
        layout=layout,
        dtype=args.dtype,
        transformer_impl=args.transformer_impl,
        overwrite=args.overwrite,
        world=world,
    )
    if world.rank == 0:
        print(f"saved: {args.save} ({args.format}{f' {layout}' if args.format != 'hf' else ''})")
    world.leave()


if __name__ == "__main__":
    run(main)
