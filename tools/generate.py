"""Let checkpoints of any format write, side by side: what a pruned model still can, and what it can again.

    python tools/generate.py --load runs/recovered-hf --prompt "def main(" --max-new-tokens 64

    # parent and result beside each other, as a chat, a prompt a line
    python tools/generate.py --load runs/parent --load runs/recovered --prompts questions.txt --chat --temperature 0.7

Without a temperature a model writes what it takes for likeliest, which is the same each time; to repeat itself, which
small models soon do, it is less ready (transformers' repetition_penalty of 1.2).
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.pruning.cli.entry import plain, run
from megatron.pruning.cli.flags import hyphenated, natural, new_parser, positive
from megatron.pruning.cli.speech import add_speech_flags, speaking
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.plan.choose import SEED
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.small_files import as_json, read_small, replace_durably
from megatron.pruning.training.hf_model import build, tokenizer_of

PENALTY = 1.2  # of a repetition, where the likeliest is taken: a small model soon repeats itself


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--load",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="a checkpoint with a tokenizer; may be repeated, to compare",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="file of prompts, a line each")
    parser.add_argument(
        "--chat", action="store_true", help="ask: each prompt is a user's message, put into the model's chat template"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="tokens to add to each prompt (default 64)"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="draw the tokens, from probabilities at this temperature (default 0: take the likeliest, with a penalty "
        "for repetition)",
    )
    parser.add_argument("--seed", type=natural, default=SEED, metavar="S", help=f"seed of the draws (default {SEED})")
    parser.add_argument(
        "--dtype", choices=tuple(TORCH_NAMES), help="dtype to compute in (default: the checkpoint's own)"
    )
    parser.add_argument("--device", metavar="NAME", help="device to compute on (default: a GPU when there is one)")
    add_speech_flags(parser, into_file=True)
    return parser


def temperature(text: str) -> float:
    """Read a temperature."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the flags. Raises ValueError where there are none."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise ValueError(f"--prompts {args.prompts}: no such file")
        prompts += [line for line in read_small(args.prompts).decode(errors="replace").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT, or --prompts FILE with a line a prompt")
    return prompts


def write(checkpoint: Checkpoint, prompts: Sequence[str], args: argparse.Namespace, device: str) -> list[str]:
    """Return what a model makes of each prompt: the whole text, or its answer in a chat.

    Raises ValueError where it has no tokenizer, or no template for a chat.
    """
    import torch

    tokenizer = tokenizer_of(checkpoint)
    if args.chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: {checkpoint.path} has no chat template: leave it out")
    model = build(checkpoint, args.dtype or checkpoint.dtype, device)
    how: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": PENALTY}
    if args.temperature:
        how = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    texts = []
    for prompt in prompts:
        if args.chat:
            said = [{"role": "user", "content": prompt}]
            given = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            given = tokenizer(prompt, return_tensors="pt")
        tokens = given["input_ids"].to(device)
        torch.manual_seed(args.seed)  # for each prompt anew, so that the models that are compared draw alike
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.max_new_tokens, **how)[
            0
        ]
        texts.append(tokenizer.decode(out[tokens.shape[1] :] if args.chat else out, skip_special_tokens=True))
    return texts


def main(argv: Sequence[str]) -> None:
    """Read the flags, and let every checkpoint continue every prompt."""
    args = parser().parse_args(hyphenated(argv))
    with speaking(args) as answer:
        texts = generate(args)
        answer(lambda: texts)


def generate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Let every checkpoint continue every prompt, print it by prompt, and return it: what each path wrote."""
    prompts = prompts_of(args)
    checkpoints = [open_checkpoint(path, fetch=True) for path in args.load]
    # It imports torch, which takes seconds that --help and the mistakes above do not need.
    from megatron.pruning.training.evaluation import device_named

    device = device_named(args.device)
    written = [write(checkpoint, prompts, args, device) for checkpoint in checkpoints]
    found: list[dict[str, Any]] = []
    for prompt, *texts in zip(prompts, *written, strict=True):
        print(f"--- {prompt!r}")
        for path, text in zip(args.load, texts, strict=True):
            if len(texts) > 1:
                print(f"[{path}]")
            print(f"{plain(text)}\n")
        wrote = [{"path": str(path), "text": text} for path, text in zip(args.load, texts, strict=True)]
        found.append({"prompt": prompt, "texts": wrote})
    if isinstance(args.json, Path):
        replace_durably(args.json, as_json(found))
    return found


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
