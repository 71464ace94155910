"""Say what a checkpoint is: format, layout, shape, dtype, parameters, files; with --weights, every logical weight.

    python tools/show_checkpoint.py runs/pruned
    python tools/show_checkpoint.py runs/pruned --weights
    python tools/show_checkpoint.py assets/tiny-llama --digest
    python tools/show_checkpoint.py runs/pruned --verify        # is every file still as it was written?

--verify reads every file again and compares its length and crc32 with the manifest.json that lies beside them since
they were written; it names each file that differs or is missing (status 1), and those that came later.

The digest is of the constants and the logical weights: the same for the same model in every format and layout, so that
a conversion of any size can be checked without loading a model. It changes with the dtype (weights of several dtypes
that Megatron fuses become fp32 there).
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.pruning.cli.entry import plain, run
from megatron.pruning.cli.flags import facts, hyphenated, natural, new_parser, positive
from megatron.pruning.cli.speech import add_speech_flags, speaking
from megatron.pruning.formats import FORMATS, open_checkpoint
from megatron.pruning.model.checkpoint import PLAN_FILE, Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import config_to_command_line
from megatron.pruning.storage.manifest import MANIFEST, read_manifest, verify
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.views import View, blocks, cast


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint of any format")
    parser.add_argument(
        "--iteration", type=natural, metavar="N", help="iteration of a Megatron checkpoint (default: the latest)"
    )
    parser.add_argument("--weights", action="store_true", help="list every logical weight: shape, dtype, L2 norm")
    parser.add_argument("--verify", action="store_true", help=f"check all files against {MANIFEST}")
    parser.add_argument(
        "--megatron-flags",
        action="store_true",
        help="print only the flags with which pretrain_gpt.py trains it, a word a line",
    )
    for kind in ("tensor", "pipeline"):
        flag, help = f"--{kind}-model-parallel-size", f"with --megatron-flags: {kind}-parallel ranks (default: its own)"
        parser.add_argument(flag, type=positive, metavar="N", help=help)
    parser.add_argument(
        "--digest", action="store_true", help="print the digest of the constants and all logical weights"
    )
    add_speech_flags(parser)
    return parser


def describe(checkpoint: Checkpoint) -> str:
    """Return a few lines about the checkpoint, from its headers alone."""
    config = checkpoint.config
    size = sum(path.stat().st_size for path in checkpoint.files)
    lines = {
        "format": checkpoint.format + (f", {checkpoint.layout}" if checkpoint.layout else ""),
        **({"names of": checkpoint.transformer_impl} if checkpoint.format == "torch" else {}),
        "optimizer": "yes, never carried on" if checkpoint.has_optimizer else "no",
        "directory": str(checkpoint.files[0].parent if len(checkpoint.files) == 1 else _common(checkpoint.files)),
        "files": f"{len(checkpoint.files)}, {size:,} bytes",
        "dtype": ", ".join(sorted({view.dtype for _, _, view in checkpoint.weights()})),
        "parameters": f"{config.parameters:,}",
        "layers": str(config.num_layers),
        "hidden size": str(config.hidden_size),
        "ffn hidden size": str(config.ffn_hidden_size),
        "attention": f"{config.num_attention_heads} heads in {config.num_query_groups} groups, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size}" + (", tied" if config.tied else ""),
        "rope": f"theta {config.rope_theta:g}" + (f", {dict(config.rope_scaling)}" if config.rope_scaling else ""),
        "norm epsilon": f"{config.norm_epsilon:g}",
        "max positions": str(config.max_position_embeddings),
        **({"first parent": first_parent(checkpoint)} if checkpoint.lineage.origin.name else {}),
        "pruned": f"by {PLAN_FILE}" if (checkpoint.root / PLAN_FILE).is_file() else "no plan beside it",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def first_parent(checkpoint: Checkpoint) -> str:
    """Return what is known of the model of the hub that a checkpoint is, or was pruned from."""
    origin = checkpoint.lineage.origin
    commit = origin.commit and f"commit {origin.commit[:12]}"
    return ", ".join(filter(None, (origin.name, commit, origin.license_name or origin.license)))


def _common(paths: Sequence[Path]) -> Path:
    parents = [set(path.parents) for path in paths]
    return max(set.intersection(*parents), key=lambda path: len(path.parts))


def norm(view: View) -> float:
    """Return the L2 norm of a weight, summed in double precision."""
    squares = (np.square(bits.view(np.float32), dtype=np.float64).sum() for _, bits in blocks(cast(view, "fp32")))
    return float(np.sqrt(sum(squares)))


def digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of the constants and all logical weights: name, dtype, shape and bytes, in forward order."""
    total = hashlib.sha256(json.dumps(checkpoint.config.constants, sort_keys=True).encode())
    progress = Progress("reading", checkpoint.nbytes, show=True)
    for weight, layer, view in checkpoint.weights():
        total.update(f"{weight.hf_key(layer)} {view.dtype} {view.shape}\n".encode())
        for _, bits in blocks(view):
            total.update(memoryview(bits).cast("B"))
            progress.advance(bits.nbytes)
    progress.close()
    return total.hexdigest()


def layout_to_train(checkpoint: Checkpoint, tensor: int | None, pipeline: int | None) -> Layout:
    """Return the layout of a training with so many ranks, by default those of the checkpoint.

    The vocabulary has the rows of padding that lie in the files, or those of a conversion where there are none.
    """
    own = checkpoint.training_layout
    tensor, pipeline = tensor or own.tensor, pipeline or own.pipeline
    if tensor == own.tensor or not FORMATS[checkpoint.format].parallel:
        return Layout(tensor, pipeline, own.vocab_divisor)
    return Layout(tensor, pipeline, max(1, own.padded_vocab(checkpoint.config.vocab_size) // tensor))


def check_files(directory: Path) -> None:
    """Print what is not as the manifest says. Raises ValueError when a file differs or is missing, or without one."""
    named = read_manifest(directory / MANIFEST)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    problems = verify(directory)
    for line in problems + [
        f"{directory / name} is not in the manifest" for name in sorted(found - {*named, MANIFEST})
    ]:
        print(plain(line))
    if problems:
        raise ValueError(f"{len(problems)} of the {len(named)} files of {directory} are not as they were written")
    print(f"verified: all {len(named)} files, {sum(digest.length for digest in named.values()):,} bytes")


def main(argv: Sequence[str]) -> None:
    """Read the flags, and show."""
    args = parser().parse_args(hyphenated(argv))
    with speaking(args) as answer:
        found = show(args)
        answer(lambda: found)


def show(args: argparse.Namespace) -> dict[str, Any]:
    """Open, print, and return what was printed."""
    if args.verify:  # first: what is damaged may not open
        check_files(args.path)
    checkpoint = open_checkpoint(args.path, args.iteration)
    if args.megatron_flags:
        layout = layout_to_train(checkpoint, args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
        words = [word for line in config_to_command_line(checkpoint.config, layout) for word in line.split()]
        print("\n".join(words))
        return {"megatron_flags": words}
    print(plain(describe(checkpoint)))
    found = facts(checkpoint) | ({"verified": True} if args.verify else {})
    if args.weights:
        found["weights"] = []
        for weight, layer, view in checkpoint.weights():
            name, length = weight.hf_key(layer), norm(view)
            print(f"{name:50}  {' x '.join(map(str, view.shape)):>15}  {view.dtype}  norm {length:.6g}")
            found["weights"].append({"name": name, "shape": view.shape, "dtype": view.dtype, "norm": length})
    if args.digest:
        found["digest"] = digest(checkpoint)
        print(f"digest  {found['digest']}")
    return found


def command() -> None:
    """Run as the installed command does."""
    run(main)


if __name__ == "__main__":
    command()
