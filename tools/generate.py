"""Let an exported Hugging Face checkpoint write a few lines.

python tools/generate.py --load runs/recovered-hf --prompt "def main(" --max-new-tokens 64
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, new_parser, positive


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("generate.py", __doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="a Hugging Face checkpoint")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="tokens to add to each prompt (default 64)")
    return parser


def main(argv: Sequence[str]) -> None:
    """Continue every prompt greedily and print it."""
    args = parser().parse_args(hyphenated(argv))
    if not (args.load / "config.json").is_file():
        raise ValueError(f"--load {args.load} is not a Hugging Face checkpoint: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(args.load)
    model = AutoModelForCausalLM.from_pretrained(args.load).eval()
    for prompt in args.prompt:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            # Greedy text of a small model soon repeats itself; the penalty keeps it moving.
            out = model.generate(tokens, max_new_tokens=args.max_new_tokens, do_sample=False, repetition_penalty=1.2)
        print(f"--- {prompt!r}\n{tokenizer.decode(out[0], skip_special_tokens=True)}\n")


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
