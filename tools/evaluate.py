"""Validation loss and perplexity of checkpoints, side by side, whatever their formats and layouts.

    python tools/evaluate.py --load assets/tiny-llama --load runs/pruned --load runs/recovered --data runs/data/valid

The loss is the mean cross entropy in nats over all tokens of consecutive, full windows, computed by transformers'
own model from the logical weights: no conversion is needed first. The training loop's own figures are a little
higher where its vocabulary is padded, since the padding takes part in its softmax.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron.pruning.arguments import hyphenated, new_parser, run
from megatron.pruning.checkpoint import Checkpoint
from megatron.pruning.config import config_to_hf, hf_export_problem
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.quiet import quiet_imports
from megatron.pruning.views import TORCH_NAMES, cast, read_all


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("evaluate.py", __doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--load", type=Path, action="append", required=True, metavar="DIR", help="may be repeated")
    parser.add_argument("--data", type=Path, required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx")
    parser.add_argument("--sequence-length", type=positive, default=512, help="tokens a window (default 512)")
    parser.add_argument(
        "--max-tokens", type=positive, default=200_000, help="of the data, from its start (default 200,000)"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="windows at a time (default 8)")
    parser.add_argument("--dtype", choices=tuple(TORCH_NAMES), default="bf16" if gpu else "fp32", help="to compute in")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="default: a GPU when there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser.parse_args(hyphenated(argv))


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def build(checkpoint: Checkpoint, dtype: str, device: str) -> PreTrainedModel:
    """Return the checkpoint as a transformers model in eval mode. Raises ValueError for what transformers has not."""
    if problem := hf_export_problem(checkpoint.config):
        raise ValueError(f"{checkpoint.path}: {problem}")
    config = AutoConfig.for_model(**config_to_hf(checkpoint.config, dtype))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = {}
    for weight, layer, view in checkpoint.weights():
        bits = torch.from_numpy(read_all(cast(view, dtype)))
        state[weight.hf_key(layer)] = bits.view(getattr(torch, TORCH_NAMES[dtype]))
    if checkpoint.config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return model.to(device).eval()


def windows(prefix: Path, length: int, max_tokens: int, vocabulary: int) -> torch.Tensor:
    """Return [windows, length + 1] consecutive tokens; each window begins with the last token of the one before.

    Raises ValueError when there is no such data, too little of it, or a token that the model does not have.
    """
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise ValueError(f"--data {prefix}: there is no {prefix}{suffix}")
    try:
        data = IndexedDataset(str(prefix))
    except Exception as error:  # its asserts say little
        raise ValueError(f"--data {prefix}: {prefix}.idx is damaged or empty ({error})") from error
    documents, count = [], 0
    for document in data:
        documents.append(torch.from_numpy(document.astype("int64")))
        count += len(document)
        if count > max_tokens:
            break
    tokens = torch.cat(documents)[: max_tokens + 1]
    number = (len(tokens) - 1) // length
    if number < 1:
        raise ValueError(f"--data {prefix} has {len(tokens)} tokens: fewer than one window of {length + 1}")
    if int(tokens.max()) >= vocabulary:
        raise ValueError(f"--data {prefix} holds token {int(tokens.max())}, but the model has {vocabulary}")
    return tokens[: number * length + 1].unfold(0, length + 1, length)


@torch.no_grad()
def loss(model: PreTrainedModel, data: torch.Tensor, batch: int, name: str) -> float:
    """Return the mean cross entropy in nats over every token but the first of each window."""
    total = 0.0
    for part in tqdm(data.split(batch), desc=name, leave=False, disable=not sys.stderr.isatty()):
        part = part.to(model.device)
        logits = model(part[:, :-1]).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / (data.shape[0] * (data.shape[1] - 1))


def main(argv: Sequence[str]) -> None:
    """Evaluate every checkpoint on the same tokens and print one table."""
    args = parse(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU here; leave it out")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no directory {args.json.parent}")
    checkpoints = [open_checkpoint(path) for path in args.load]
    smallest = min(checkpoint.config.vocab_size for checkpoint in checkpoints)
    data = windows(args.data, args.sequence_length, args.max_tokens, smallest)
    results: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        value = loss(build(checkpoint, args.dtype, args.device), data, args.batch_size, str(checkpoint.path))
        results.append({"path": str(checkpoint.path), "parameters": checkpoint.config.parameters, "loss": value})
    width = max(len(result["path"]) for result in results)
    print(f"{data.shape[0] * args.sequence_length:,} tokens of {args.data}")
    print(f"{'checkpoint':{width}}  {'parameters':>15}  {'loss':>8}  {'perplexity':>10}")
    for result in results:
        perplexity = math.exp(result["loss"])
        print(f"{result['path']:{width}}  {result['parameters']:>15,}  {result['loss']:8.4f}  {perplexity:10.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
