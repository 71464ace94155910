"""Open a checkpoint of any format, and save one in any: the only module that knows which formats there are."""

from collections.abc import Mapping
from pathlib import Path

from megatron.pruning.formats.huggingface import HfCheckpoint, hf_output
from megatron.pruning.model.checkpoint import PLAN_FILE, Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.storage.output import write_files
from megatron.pruning.storage.processes import World
from megatron.pruning.storage.small_files import read_small

FORMATS = ("hf", "torch", "torch_dist")


def open_checkpoint(path: Path, iteration: int | None = None) -> Checkpoint:
    """Open the checkpoint at `path`; its format is detected. Only headers are read.

    `iteration` chooses among those a Megatron directory holds; None takes the one its tracker file names.

    Raises ValueError when there is none, or when it is damaged or not a dense Llama.
    """
    if not path.exists():
        raise ValueError(f"--load {path}: no such directory")
    if not path.is_dir():
        raise ValueError(f"--load {path} is a file: name the checkpoint's directory")
    if (path / "config.json").is_file() and iteration is None:
        return HfCheckpoint(path)
    from megatron.pruning.formats.megatron import find_iteration

    if (directory := find_iteration(path, iteration)) is not None:
        if (directory / ".metadata").is_file():
            from megatron.pruning.formats.megatron_dist import DistCheckpoint

            return DistCheckpoint(path, directory)
        from megatron.pruning.formats.megatron_torch import TorchCheckpoint

        return TorchCheckpoint(path, directory)
    raise ValueError(
        f"--load {path} is not a checkpoint: it has neither a config.json (Hugging Face) nor a "
        "latest_checkpointed_iteration.txt or mp_rank_* (Megatron)"
    )


def save_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    format: str,
    layout: Layout | None = None,
    dtype: str | None = None,
    transformer_impl: str | None = None,
    overwrite: bool = False,
    texts: Mapping[str, bytes] | None = None,
    world: World | None = None,
) -> None:
    """Write `checkpoint` to the directory `path`, which appears complete or not at all.

    `layout` is for the Megatron formats, `transformer_impl` (None: as the source has it) for `torch`; `dtype` None
    keeps every tensor's own; `texts` are small files to lay beside.
    Raises ValueError, before anything is written, for a layout that does not fit or a `path` not to be replaced.
    """
    source = checkpoint.path.resolve()
    target = path.resolve()
    # The files may lie elsewhere than the directory that names them: a hub's cache links to them.
    near = {source, *source.parents, *(parent for file in checkpoint.files for parent in file.resolve().parents)}
    if target in near or source in target.parents:
        raise ValueError(f"--save {path} and --load {checkpoint.path} overlap: name a directory of its own")
    if format == "hf":
        files, own_texts = hf_output(checkpoint, dtype)
    elif format == "torch":
        from megatron.pruning.formats.megatron_torch import torch_output

        layout = layout or Layout()
        checkpoint.check_layout(layout)
        files, own_texts = torch_output(checkpoint, layout, dtype, transformer_impl or checkpoint.transformer_impl)
    elif format == "torch_dist":
        from megatron.pruning.formats.megatron_dist import dist_output

        layout = layout or Layout()
        layout.check_split(checkpoint.config.sizes, "the model's")  # stored whole, so it must divide evenly when loaded
        layout.check_stages(checkpoint.config.sizes, "the model's")
        files, own_texts = dist_output(checkpoint, layout, dtype)
    else:
        raise ValueError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    plan = checkpoint.root / PLAN_FILE
    kept_plan = {PLAN_FILE: read_small(plan)} if plan.is_file() else {}
    all_texts = {**own_texts, **kept_plan, **(texts or {})}
    write_files(files, all_texts, path, f"writing {path}", overwrite, world or World())
