"""What a checkpoint says of its own model, for --use-checkpoint-args: believed as a flag would be, and no more."""

import argparse
from pathlib import Path
from typing import Any

from megatron.training import checkpointing
from megatron.training.arguments import add_megatron_arguments
from megatron.training.utils import print_rank_0

from megatron.pruning.training.strict_loading import iteration_of, one_sentence, source_of

# What these name is imported or opened; only the command line may have that done.
_COMMANDS = ("spec", "heterogeneous_layers_config_path")


def take_arguments(args: argparse.Namespace) -> None:
    """Let the checkpoint to load say what its model is, as --use-checkpoint-args asks for.

    The stock loader puts whatever the checkpoint holds in the place of flags. Raises ValueError for a value that its
    flag could not have, and for a model that the files are too small for.
    """
    before = dict(vars(args))
    source = source_of(args)
    with one_sentence(source):
        checkpointing.load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        checkpointing.load_args_from_checkpoint(args)
    for name in _COMMANDS:
        if getattr(args, name) != before[name]:
            print_rank_0(f"note: --{name.replace('_', '-')} is taken from the command line alone")
            setattr(args, name, before[name])
    flags = {action.dest: action for action in add_megatron_arguments(argparse.ArgumentParser())._actions}
    for name, value in vars(args).items():
        if value is not None and value is not before.get(name) and not _fits(flags.get(name), value):
            raise ValueError(f"the checkpoint in {source} has {str(value)[:40]!r} for {name}, which cannot be meant")
    if source is not None:
        _refuse_larger_than_files(args, source)


def _fits(flag: argparse.Action | None, value: Any) -> bool:
    """Return whether a flag could have this value; one that there is no flag for is a whole number."""
    if flag is not None and flag.choices is not None:
        return value in flag.choices if isinstance(value, str | int) else False
    if flag is not None and flag.nargs == 0:
        return type(value) is bool
    if flag is None or flag.type is int or flag.type is float:
        whole = flag is None or flag.type is int
        return type(value) in (int, float) and 0 <= value < 1 << 31 and (not whole or value == int(value))
    return isinstance(value, str) if flag.type in (None, str) and flag.nargs is None else True


def _refuse_larger_than_files(args: argparse.Namespace, source: Path) -> None:
    """Raise ValueError where the weights that every layer has would be more than the files have bytes."""
    hidden, layers, heads = args.hidden_size or 0, args.num_layers or 0, args.num_attention_heads or 0
    widths = (args.ffn_hidden_size or hidden, heads * (args.kv_channels or 0))
    weights = hidden * (args.padded_vocab_size or 0) + layers * hidden * max(widths)
    size = sum(file.stat().st_size for file in iteration_of(args, source).rglob("*") if file.is_file())
    if weights > size:
        raise ValueError(f"the checkpoint in {source} says that it has {weights:,} weights or more in {size:,} bytes")
