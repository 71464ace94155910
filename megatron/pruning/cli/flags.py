"""What the entry points share on the command line: two spellings of a flag, checkpoints, layouts, Megatron's flags."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron.pruning.formats import FORMATS, open_checkpoint, save_checkpoint
from megatron.pruning.formats.format import SaveOptions
from megatron.pruning.formats.megatron import LOCAL, TE
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import (
    DEFAULT_ROPE_FACTOR,
    LLAMA_ARGS,
    OF_THE_TRAINING,
    flag_of,
    model_args,
)
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.output import own_place
from megatron.pruning.storage.processes import World

_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "make_vocab_size_divisible_by")
_FLAGS_FILE = Path(__file__).with_name("megatron_flags.txt")


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a script's docstring and that takes no abbreviated flag."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if (value := natural(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def natural(text: str) -> int:
    """Read a number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def save_path(text: str) -> Path:
    """Read a path of what is to be written."""
    return own_place(Path(text))


def hyphenated(argv: Sequence[str]) -> list[str]:
    """Return `argv` with the flags' underscores turned into hyphens, so that both spellings work; values stay."""
    return [_hyphenated_flag(word) if word.startswith("--") else word for word in argv]


def _hyphenated_flag(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the words of a command line, hyphenated, without these flags, of which each has one value."""
    left: list[str] = []
    for word in words:
        if left and left[-1] in flags:  # its value
            left.pop()
        elif word.partition("=")[0] not in flags or word in flags:
            left.append(word)
    return left


@functools.cache
def megatron_flags() -> dict[str, str]:
    """Return Megatron's flags (hyphenated, with `--`) and the number of values of each: 0, 1, 3, + or *."""
    lines = _FLAGS_FILE.read_text(encoding="utf-8").splitlines()
    return {f"--{flag}": arity for arity, flag in (line.split() for line in lines if not line.startswith("#"))}


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """Let `parser` accept every Megatron flag that it does not define itself; `--help` does not list them."""
    for flag, arity in megatron_flags().items():
        if flag in parser._option_string_actions:
            continue
        if arity == "0":
            parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
        else:
            nargs = {"1": None}.get(arity, int(arity) if arity.isdigit() else arity)
            parser.add_argument(flag, nargs=nargs, help=argparse.SUPPRESS)


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a source and a target checkpoint."""
    formats = "; ".join(f"{format.name}: {format.summary}" for format in FORMATS.values())
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="DIR",
        help="source: a directory, or a model of the Hugging Face hub, owner/name[@revision], which is fetched to the "
        "hub's cache unless it is there; the format is detected",
    )
    group.add_argument(
        "--iteration", type=natural, metavar="N", help="iteration of a Megatron source (default: the latest)"
    )
    group.add_argument(
        "--save", type=save_path, required=True, metavar="DIR", help="target; it must not exist, or be empty"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --save")
    group.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help=f"format of the target (default: the source's; torch where another has no layout and one is asked for). "
        f"{formats}",
    )
    group.add_argument(
        "--dtype", choices=tuple(BYTES), help="dtype of the target (default: every tensor keeps its own, bit for bit)"
    )
    group.add_argument(
        "--transformer-impl",
        choices=(LOCAL, TE),
        help="whose layers will load a torch target: they name the norms differently (default: the source's)",
    )
    group.add_argument(
        "--vocab-size", metavar="N", help="vocabulary without padding, for a Megatron source that does not say it"
    )


def open_source(args: argparse.Namespace) -> Checkpoint:
    """Open --load by the flags of `add_checkpoint_flags`; a --format that was left out becomes what it stands for.

    Raises ValueError as `open_checkpoint` does, and for a --vocab-size that is not the source's.
    """
    source = open_checkpoint(args.load, args.iteration, fetch=True)
    _set_vocabulary(source, args)
    if args.format is None:
        for_megatron = any(getattr(args, name) is not None for name in (*_LAYOUT, "transformer_impl"))
        args.format = "torch" if for_megatron and not FORMATS[source.format].parallel else source.format
    return source


def _set_vocabulary(source: Checkpoint, args: argparse.Namespace) -> None:
    """Give a source that does not know its vocabulary the one of --vocab-size.

    Raises ValueError when the source knows another, or has fewer rows.
    """
    if args.vocab_size is None:
        return
    if not args.vocab_size.isdecimal():
        raise ValueError(f"--vocab-size {args.vocab_size}: not a whole number")
    size, rows = int(args.vocab_size), source.config.vocab_size
    if source.vocab_is_known and size != rows:
        raise ValueError(f"--vocab-size {size} disagrees with {source.path}, whose model has {rows}")
    if not 1 <= size <= rows:
        raise ValueError(f"--vocab-size {size} must lie between 1 and the {rows} rows of {source.path}")
    source.config = dataclasses.replace(source.config, vocab_size=size)
    source.vocab_is_known = True


def say_source(source: Checkpoint) -> None:
    """Print what the source is, and what of it is left behind."""
    print(f"source: {source}", flush=True)
    if source.left_behind:
        print(f"note: of its config.json, what would have a reader run code stays: {', '.join(source.left_behind)}")
    if source.has_optimizer:
        print("note: the optimizer state of the source stays behind: a training of the result begins with a fresh one")
    if not source.vocab_is_known:
        print(
            f"warning: the source does not say its vocabulary: all {source.config.vocab_size} rows are kept, "
            "padding or not; give --vocab-size",
            file=sys.stderr,
        )


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a program may want to know of a checkpoint, as JSON can hold it."""
    layout = checkpoint.layout
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline} if layout else None,
        "dtype": checkpoint.dtype,
        "parameters": checkpoint.config.parameters,
        "bytes": checkpoint.nbytes,
        "sizes": checkpoint.config.sizes,
        "origin": msgspec.to_builtins(checkpoint.lineage.origin),
    }


def options_from_flags(args: argparse.Namespace, layout: Layout) -> SaveOptions:
    """Return how the flags of `add_checkpoint_flags` want a checkpoint saved."""
    return SaveOptions(layout, args.dtype, args.transformer_impl)


def save_as_asked(
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    layout: Layout,
    world: World,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Save by the flags of `add_checkpoint_flags`, and print where. Raises ValueError as `save_checkpoint` does."""
    save_checkpoint(
        checkpoint,
        args.save,
        format=args.format,
        layout=layout,
        dtype=args.dtype,
        transformer_impl=args.transformer_impl,
        overwrite=args.overwrite,
        beside=beside,
        world=world,
    )
    if world.rank == 0:
        print(f"saved: {args.save} ({args.format}{f' {layout}' if FORMATS[args.format].parallel else ''})")


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the target's layout; left out, the source's layout is kept."""
    group = parser.add_argument_group(
        "layout of the target", "default: the source's, or 1 x 1 where source or target has none"
    )
    group.add_argument("--tensor-model-parallel-size", type=int, metavar="N", help="tensor-parallel ranks")
    group.add_argument("--pipeline-model-parallel-size", type=int, metavar="M", help="pipeline-parallel ranks")
    group.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="D",
        help="the vocabulary is padded to a multiple of D * N (default 128)",
    )


def refuse_idle_layout(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag of the layout where the target's format has none."""
    for name in _LAYOUT:
        if (value := getattr(args, name)) is not None and not FORMATS[args.format].parallel:
            raise ValueError(f"{flag_of(name)} {value}: --format {args.format} has no layout; leave it out")


def layout_from_flags(args: argparse.Namespace, source: Layout | None) -> Layout:
    """Return the target's layout. Raises ValueError for a size that no layout has."""
    default = source if source is not None and FORMATS[args.format].parallel else Layout()
    return Layout(
        default.tensor if args.tensor_model_parallel_size is None else args.tensor_model_parallel_size,
        default.pipeline if args.pipeline_model_parallel_size is None else args.pipeline_model_parallel_size,
        default.vocab_divisor if args.make_vocab_size_divisible_by is None else args.make_vocab_size_divisible_by,
    )


def check_model_flags(args: argparse.Namespace, config: LlamaConfig, layout: Layout, where: Path) -> None:
    """Raise ValueError where a Megatron flag that describes the model disagrees with the checkpoint."""
    wanted = {**LLAMA_ARGS, **model_args(config, layout), "layernorm_epsilon": config.norm_epsilon}
    given = {name: getattr(args, name, None) for name in wanted if name not in OF_THE_TRAINING}
    # Megatron heeds these only with another flag, and then takes a default for granted.
    heeded = args.use_rope_scaling and config.rope_scaling is not None
    given["rope_scaling_factor"] = (args.rope_scaling_factor or DEFAULT_ROPE_FACTOR) if heeded else None
    given["num_query_groups"] = (args.num_query_groups or 1) if args.group_query_attention else None
    given["group_query_attention"] = None
    for name, value in given.items():
        if value in (None, False) or value == wanted[name]:
            continue
        if value is True or isinstance(wanted[name], str | None) or _number(name, value) != wanted[name]:
            shown = "" if value is True else f" {value}"
            raise ValueError(f"{flag_of(name)}{shown} disagrees with {where}, whose model has {wanted[name]}")
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        if getattr(args, name, None) is not None:
            raise ValueError(f"{flag_of(name)}: checkpoints of a virtual pipeline are not written; leave it out")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag_of(name)} {text}: not a number") from None
