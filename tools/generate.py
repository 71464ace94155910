"""Let a checkpoint of any format write a few lines.

python tools/generate.py --load runs/recovered-hf --prompt "def main(" --max-new-tokens 64
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.pruning.cli.entry import plain, run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.training.hf_model import build, tokenizer_of


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("generate.py", __doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="a checkpoint with a tokenizer")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="tokens to add to each prompt (default 64)"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Continue every prompt greedily and print it."""
    args = parser().parse_args(hyphenated(argv))
    checkpoint = open_checkpoint(args.load)
    tokenizer, model = tokenizer_of(checkpoint), build(checkpoint, checkpoint.dtype, "cpu")
    for prompt in args.prompt:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        # Greedy text of a small model soon repeats itself; the penalty keeps it moving.
        out = model.generate(tokens, max_new_tokens=args.max_new_tokens, do_sample=False, repetition_penalty=1.2)
        print(f"--- {prompt!r}\n{plain(tokenizer.decode(out[0], skip_special_tokens=True))}\n")


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
