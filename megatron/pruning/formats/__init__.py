"""Open a checkpoint of any format, and save one in any. A new format is one module and one entry of `FORMATS`."""

from collections.abc import Mapping
from pathlib import Path

from megatron.pruning.formats import huggingface, megatron_dist, megatron_torch
from megatron.pruning.formats.format import Format, SaveOptions
from megatron.pruning.formats.hub import located
from megatron.pruning.model.checkpoint import Checkpoint, kept_plan
from megatron.pruning.model.layout import Layout
from megatron.pruning.storage import output
from megatron.pruning.storage.processes import World

# By the name that --format takes. The first that detects a path opens it.
FORMATS: dict[str, Format] = {
    format.name: format for format in (huggingface.FORMAT, megatron_torch.FORMAT, megatron_dist.FORMAT)
}


def open_checkpoint(path: Path, iteration: int | None = None, fetch: bool = False) -> Checkpoint:
    """Open the checkpoint at `path`; its format is detected. Only headers are read.

    A model of the Hugging Face hub that lies in its cache may be named as the hub does, `owner/name[@revision]`; with
    `fetch` the cache gets what it does not have.
    `iteration` chooses among those a Megatron directory holds; None takes the one its tracker file names.

    Raises ValueError when there is none, or when it is damaged or not a dense Llama.
    """
    path = located(path, fetch)
    if not path.exists():
        raise ValueError(f"--load {path}: no such directory")
    if not path.is_dir():
        raise ValueError(f"--load {path} is a file: name the checkpoint's directory")
    for format in FORMATS.values():
        if (directory := format.detect(path, iteration)) is not None:
            return format.open(path, directory)
    for pattern, said in _NOT_READ.items():
        if any(path.glob(pattern)):
            raise ValueError(f"--load {path} {said}")
    marks = [format.mark for format in FORMATS.values()]
    formats = {mark: [f.name for f in FORMATS.values() if f.mark == mark] for mark in marks}
    known = " nor a ".join(f"{mark} ({', '.join(names)})" for mark, names in formats.items())
    raise ValueError(f"--load {path} is not a checkpoint: it has neither a {known}")


# What lies in checkpoints that people try, and what to say of them.
_NOT_READ = {
    "adapter_config.json": "is an adapter (LoRA), not a model: merge it into its base model first",
    "consolidated*": "has Meta's own files, which are not read: take the same model in Hugging Face's format",
    "*.gguf": "is a GGUF, which is not read: take the model that it was made of, or convert it with transformers",
    "*.nemo": "is a NeMo archive, which is not read: export it to Hugging Face's format with NeMo",
    "*/.zarray": "is a zarr checkpoint, which is not read: load it with Megatron and save it as torch_dist",
    "*/*/.zarray": "is a zarr checkpoint, which is not read: load it with Megatron and save it as torch_dist",
}


def check_target(path: Path, overwrite: bool) -> None:
    """Raise ValueError if `path` is something that must not be replaced: anything but a checkpoint and --overwrite."""
    output.check_target(path, overwrite, _is_checkpoint)


def check_save(checkpoint: Checkpoint, path: Path, format: str, options: SaveOptions) -> None:
    """Raise ValueError where `save_checkpoint` would, before anything is written: for what takes long until then."""
    _check_apart(checkpoint, output.own_place(path))
    FORMATS[format].write(checkpoint, options)


def save_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    format: str,
    layout: Layout | None = None,
    dtype: str | None = None,
    transformer_impl: str | None = None,
    overwrite: bool = False,
    beside: Mapping[str, bytes] | None = None,
    world: World | None = None,
) -> None:
    """Write `checkpoint` to the directory `path`, which appears complete or not at all.

    `layout`, `dtype` and `transformer_impl` are those of `SaveOptions`; `beside` are small files to lay beside the
    weights. Raises ValueError, before anything is written, for a layout that does not fit or a `path` not to be
    replaced.
    """
    path = output.own_place(path)
    _check_apart(checkpoint, path)
    if format not in FORMATS:
        raise ValueError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    files, own = FORMATS[format].write(checkpoint, SaveOptions(layout or Layout(), dtype, transformer_impl))
    all_beside = {**own, **kept_plan(checkpoint.root), **(beside or {})}
    output.write_files(files, all_beside, path, overwrite, _is_checkpoint, world or World())


def _is_checkpoint(path: Path) -> bool:
    """Tell whether a directory is one that --overwrite may replace: many a folder has a config.json, but no weights."""
    return any(
        (path / format.mark).is_file() and any(any(path.glob(pattern)) for pattern in format.weights)
        for format in FORMATS.values()
    )


def _check_apart(checkpoint: Checkpoint, path: Path) -> None:
    source, target = checkpoint.path.resolve(), path.resolve()
    # The files may lie elsewhere than the directory that names them: a hub's cache links to them.
    near = {source, *source.parents, *(parent for file in checkpoint.files for parent in file.resolve().parents)}
    if target in near or source in target.parents:
        raise ValueError(f"--save {path} and --load {checkpoint.path} overlap: name a directory of its own")
