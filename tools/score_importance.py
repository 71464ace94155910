"""Scores what matters in a model, by one pass over text: hidden channels, heads, query groups, ffn channels, layers.

    # on one GPU, or without; text as training reads it, or a .jsonl file
    python tools/score_importance.py --load Llama-2-13b-hf --data pile_text_document --save 13b.scores

    # eight processes: tensor parallel 4, two copies that share the text
    torchrun --nproc_per_node 8 tools/score_importance.py --load 13b-tp4 --data pile_text_document --save 13b.scores \\
        --tensor-model-parallel-size 4

    # then prune by the scores
    python prune_llama.py --load 13b-tp4 --save 7b --criterion activation --scores 13b.scores --hidden_size_remain ...

The model is Megatron's own, whatever the format and layout of --load. The scores file is small, says which model it is
of, and is the same for every layout within rounding. A run that was interrupted goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import hyphenated, natural, new_parser, positive
from megatron.pruning.cli.speech import add_speech_flags, speaking
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.scores import read
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.processes import EndedTogether, is_first
from megatron.pruning.training.quiet import quiet_imports
from megatron.pruning.training.tokens import windows

LONGEST = 4096  # tokens of a sequence, unless asked for


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="checkpoint of any format")
    parser.add_argument(
        "--iteration", type=natural, metavar="N", help="iteration of a Megatron source (default: the latest)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="text: PREFIX.bin and .idx, or a .jsonl file, of text or of messages",
    )
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="file of the scores")
    parser.add_argument("--overwrite", action="store_true", help="replace the scores at --save")
    parser.add_argument(
        "--sequences",
        type=positive,
        default=1024,
        metavar="N",
        help="sequences to read, evenly spaced; of a .jsonl the first ones (default 1024)",
    )
    parser.add_argument(
        "--sequence-length",
        type=positive,
        metavar="S",
        help=f"tokens of a sequence (default: as many as the model has positions, at most {LONGEST})",
    )
    parser.add_argument(
        "--layer-loss",
        type=natural,
        default=0,
        metavar="N",
        help="also measure the loss without each layer, on N sequences",
    )
    parser.add_argument(
        "--tensor-model-parallel-size", type=positive, default=1, metavar="T", help="tensor-parallel ranks (default 1)"
    )
    parser.add_argument(
        "--pipeline-model-parallel-size",
        type=positive,
        default=1,
        metavar="P",
        help="pipeline-parallel ranks (default 1)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(TORCH_NAMES), help="dtype to compute in (default: bf16 on GPUs, else fp32)"
    )
    parser.add_argument(
        "--layer-by-layer",
        action="store_true",
        help="hold one layer in each process; it is done where a model that is not cut has no room otherwise",
    )
    add_speech_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Read the flags, and score."""
    args = parser().parse_args(hyphenated(argv))
    with speaking(args) as answer:
        record(args)
        answer(lambda: scores_facts(args.save))


def scores_facts(file: Path) -> dict[str, Any]:
    """Return what a program may want to know of scores."""
    scores = read(file)
    facts: dict[str, Any] = msgspec.to_builtins(scores.facts)
    facts["block_influence"] = scores.block_influence.tolist()
    if scores.facts.loss_sequences:
        facts["loss_rise"] = scores.loss_rise.tolist()
    return {"saved": str(file), **facts}


def record(args: argparse.Namespace) -> None:
    """Read the text through the model and write what was seen."""
    if args.save.exists() and not args.overwrite:
        raise ValueError(f"--save {args.save} exists: add --overwrite to replace it")
    if args.save.is_dir():
        raise ValueError(f"--save {args.save} is a directory: name a file")
    if not args.save.parent.is_dir():
        raise ValueError(f"--save {args.save}: there is no directory {args.save.parent}")
    if args.layer_by_layer and args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1:
        raise ValueError(
            "--layer-by-layer is for a model that is not cut: leave out --tensor-model-parallel-size and "
            "--pipeline-model-parallel-size"
        )
    checkpoint = open_checkpoint(args.load, args.iteration, fetch=True)
    # As little padding of the vocabulary as can be: it would take part in the softmax, in each layout another.
    layout = Layout(args.tensor_model_parallel_size, args.pipeline_model_parallel_size, vocab_divisor=1)
    checkpoint.check_layout(layout)
    positions = checkpoint.config.max_position_embeddings
    length = args.sequence_length or min(positions, LONGEST)
    if length > positions:
        raise ValueError(f"--sequence-length {length} is more than the {positions} positions of {args.load}")
    # torch and Megatron take seconds, and --help and the mistakes above need neither.
    from megatron.pruning.training import cpu_device

    cpu_device.install()
    text = windows(args.data, length, args.sequences, checkpoint, spread=True)
    with quiet_imports():
        import torch
        from megatron.core import parallel_state

        from megatron.pruning.training.record_layerwise import recorder_for
        from megatron.pruning.training.scoring import nothing_yet, score
        from megatron.pruning.training.stock_model import join

    join(layout)
    dtype = args.dtype or ("fp32" if cpu_device.is_installed() else "bf16")
    try:
        empty = nothing_yet(checkpoint, text, args.layer_loss, dtype)
        if is_first():
            print(f"source: {checkpoint}\ntext: {len(text):,} sequences of {length} tokens of {args.data}", flush=True)
        copies, copy = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        with EndedTogether():
            recorder = recorder_for(checkpoint, layout, dtype, length, args.layer_loss > 0, args.layer_by_layer)
            score(args.save, empty, recorder, text, copies, copy)
    finally:
        torch.distributed.destroy_process_group()


def command() -> None:
    """Run as the installed command does."""
    run(main, left="the same command goes on where it was")


if __name__ == "__main__":
    command()
