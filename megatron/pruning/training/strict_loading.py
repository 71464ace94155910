"""What must hold of a checkpoint before and while the stock loader reads it, so that all of it is loaded or nothing.

The stock loader warns and trains from random weights where a weight is missing, a file cannot be read, or there is no
checkpoint at all. Each of these is a ValueError of one sentence here. (megatron_patches.py has the loader call it.)
"""

import argparse
import bisect
import contextlib
import math
import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.training import get_args
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.api import CheckpointException  # derives from BaseException

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.formats.checks import a_few, compare_weights
from megatron.pruning.formats.huggingface import CONFIG_FILE
from megatron.pruning.formats.megatron import (
    HF_FILES,
    RANK_DIRECTORIES,
    RANK_FILE,
    RELEASE,
    TE_NORMS,
    TRACKER,
    iteration_directory,
    rank_directory,
    tracked_iteration,
)
from megatron.pruning.formats.megatron_dist import COMMON
from megatron.pruning.model.checkpoint import carried_files_of, kept_plan, require_inside
from megatron.pruning.model.lineage import LINEAGE_FILE
from megatron.pruning.storage.dcp_file import METADATA, Chunk, Entry, read_metadata
from megatron.pruning.storage.harmless import require_harmless
from megatron.pruning.storage.small_files import parse_json, read_small, replace_durably
from megatron.pruning.training.direct_start import refuse_start, start_files, start_of

MOST_CELLS = 1 << 24  # of the grid on which the chunks of a weight are looked at: a layer has one or a few a rank

# How the stock scheduler refuses to resume a run under other flags.
_SCHEDULE = re.compile(
    r"OptimizerParamScheduler: class input value (.+) and checkpoint ?value (.+) for (.+) do not match"
)

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # how the names of its tensors begin

# The name of a norm inside of a layer -> its name in the other kind of layers: TransformerEngine's <-> the local ones.
_OTHER_NORM = {theirs: f"{ours}.weight" for theirs, ours in TE_NORMS.items()}
_OTHER_NORM |= {ours: theirs for theirs, ours in _OTHER_NORM.items()}

# Before the files are read --------------------------------------------------------------------------------------


def require_checkpoint(args: argparse.Namespace) -> None:
    """Refuse a --load that would silently start from random weights, and one whose files are not all there.

    A new run may name the same new directory in --load and --save; then its second start resumes. With
    --pretrained-checkpoint the first start takes its weights from there. Raises ValueError when there is no whole
    checkpoint where one was asked for.
    """
    source = source_of(args)
    if source is not None:
        require_files(args, source)
    elif (start := start_of(args)) is not None:
        refuse_start(args, start)
    elif args.load is not None:
        new = args.save is not None and Path(args.load).resolve() == Path(args.save).resolve()
        if not new or args.finetune or args.use_checkpoint_args or args.exit_on_missing_checkpoint:
            raise ValueError(f"--load {args.load} holds no checkpoint: no {TRACKER} there")
        print_rank_0(f"no checkpoint in {args.load} yet: starting from random weights")
    elif args.finetune or args.use_checkpoint_args or args.exit_on_missing_checkpoint:
        raise ValueError("no checkpoint was named: give --load")


def source_of(args: argparse.Namespace) -> Path | None:
    """Return what directory the stock loader will read: --load if it has a checkpoint, or --pretrained-checkpoint."""
    for directory in (args.load, args.pretrained_checkpoint):
        if directory is not None and Path(directory, TRACKER).is_file():
            return Path(directory)
    return None


def require_files(args: argparse.Namespace, source: Path) -> None:
    """Check that the checkpoint's files are there, none is cut short, and they are those of this run's layout.

    Raises ValueError with one sentence that names the file.
    """
    folder = iteration_of(args, source)
    if not folder.is_dir():
        raise ValueError(f"the checkpoint in {source} is not whole: there is no {folder.name} in it")
    require_harmless(folder)
    files = sorted(folder.glob(f"{RANK_DIRECTORIES}/{RANK_FILE}"))
    if not files:
        if not is_dist(args, source):
            raise ValueError(f"{folder} holds no checkpoint: neither {RANK_DIRECTORIES}/{RANK_FILE} nor {METADATA}")
        if (folder / COMMON).exists() or (folder / CONFIG_FNAME).exists():  # torch_dcp and fsdp_dtensor have neither
            _require_backend(folder / CONFIG_FNAME)
        return
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ranks = [rank_directory(t, p, pp) for t in range(tp) for p in range(pp)]
    found = [file.parent.name for file in files]
    if sorted(ranks) != found and not args.use_mp_args_from_checkpoint_args:
        raise ValueError(
            f"{folder} holds {a_few(found)} and this run, tensor size {tp} and pipeline size {pp}, "
            f"reads {a_few(ranks)}: reshard it with scripts/transfer.sh"
        )


def _require_backend(file: Path) -> None:
    """Check the file by which dist_checkpointing finds its reader; of one that is broken it says no name."""
    said = parse_json(read_small(file), str(file))
    backend, version = said.get("sharded_backend"), said.get("sharded_backend_version", 1)
    if not isinstance(backend, str) or type(version) is not int:
        raise ValueError(f"{file} is damaged: sharded_backend is {backend!r}, of version {version!r}"[:300])


def iteration_of(args: argparse.Namespace, source: Path) -> Path:
    """Return the folder of the weights that the stock loader will read: the newest, or that of --ckpt-step.

    Raises ValueError when the tracker file is damaged.
    """
    return source / iteration_directory(args.ckpt_step or tracked_iteration(source))


def is_dist(args: argparse.Namespace, source: Path) -> bool:
    """Tell whether the weights that the stock loader will read are of torch_dist (or its kin, which have .metadata)."""
    return (iteration_of(args, source) / METADATA).is_file()


def carry_files(args: argparse.Namespace) -> None:
    """Write the tokenizer's files, configuration and plan of the checkpoint beside --save, unless they are there.

    A later export and a second pruning read them. Rank 0 writes them, once, before training; what a checkpoint from
    elsewhere has beside it may be anything, so that only these go on.
    """
    source, start = source_of(args), start_of(args)
    if args.rank != 0 or not args.save:
        return
    if start is not None:
        _lay_beside(args.save, start_files(start))
    elif source is not None and source.resolve() != Path(args.save).resolve():
        _lay_beside(args.save, _files_beside(source, iteration_of(args, source)))


def _files_beside(source: Path, weights: Path) -> dict[str, bytes]:
    found = {f"{HF_FILES}/{name}": content for name, content in carried_files_of(source / HF_FILES, source).items()}
    if (config := source / HF_FILES / CONFIG_FILE).is_file():
        require_inside(config, source)
        found[f"{HF_FILES}/{CONFIG_FILE}"] = read_small(config)
    found |= kept_plan(source)
    if (lineage := f"{HF_FILES}/{LINEAGE_FILE}") in found:
        with contextlib.suppress(ValueError):  # the stock loader may read what is not read here
            found[lineage] = open_checkpoint(weights).lineage.to_json()  # with the training that the weights are of
    return found


def _lay_beside(save: str, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        target = Path(save, name)
        if not target.exists():
            replace_durably(target, content)


# While the files are read ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_sentence(directory: str | Path | None) -> Iterator[None]:
    """Turn every way in which the stock loader fails, or gives up with exit status 0, into a ValueError.

    Its sentence names the checkpoint and what was wrong with it.
    """
    try:
        yield
    except ValueError as error:
        if str(error).startswith("Could not find parameter group"):
            raise ValueError(
                f"the optimizer state in {directory} was saved under another --lr or --min-lr, which Megatron cannot "
                "change on resuming: give the same again, or --finetune to take the weights alone"
            ) from error
        raise
    except SystemExit as leave:
        if leave.code:
            raise
        reason = leave.__context__ or "see the lines above"
        raise ValueError(f"cannot load the checkpoint in {directory}: {_first_line(reason)}") from leave
    except (Exception, CheckpointException) as error:
        if other := _SCHEDULE.match(str(error)):
            here, there, what = other.groups()
            unit = " samples" * ("iterations" in what)  # iterations times the global batch size
            raise ValueError(
                f"the checkpoint in {directory} has another schedule: its {what} is {there}{unit} and this run's "
                f"{here}{unit}; add --override-opt-param-scheduler to go on with this run's schedule"
            ) from error
        raise ValueError(f"cannot load the checkpoint in {directory}: {_first_line(error)}") from error


def checked_load(
    model: torch.nn.Module,
    load: Callable[..., Any],
    source: Path,
    filled: list[torch.nn.Module],
    state: dict[str, Any],
    strict: bool = True,
) -> Any:
    """Load `state`, as read from `source`, into `model` by `load`, its stock `load_state_dict`; `strict` or not.

    The model joins those that are `filled`: stages of a virtual pipeline that a file lacks are passed over in silence.

    Raises ValueError, before anything is loaded, unless the names and shapes of all weights agree.
    """
    expected = {name: tuple(weight.shape) for name, weight in _weights(model.state_dict()).items()}
    renamed = _with_norms_named_as_in(expected, state)
    found = {name: tuple(weight.shape) for name, weight in _weights(renamed).items()}
    compare_weights(source, expected, found)
    filled.append(model)
    if renamed.keys() != state.keys():
        _refuse_flat_optimizer(source)
    return load(renamed, strict=False)  # only `_extra_state`, which may be left out, can differ now


def _with_norms_named_as_in(names: Container[str], state: dict[str, Any]) -> dict[str, Any]:
    """Return `state`, of a `torch` checkpoint, with each norm under that one of its two names that is among `names`.

    TransformerEngine's linears own the norm before them, and say so in its name; the local layers keep it apart.
    (`torch_dist` has one name for both.)
    """

    def renamed(name: str) -> str:
        inside = re.fullmatch(r"(decoder\.layers\.\d+\.)(.+)", name)
        other = inside[1] + _OTHER_NORM.get(inside[2], inside[2]) if inside else name
        return other if other in names and other not in state else name

    return {renamed(name): value for name, value in state.items()}


def _refuse_flat_optimizer(source: Path) -> None:
    """Raise ValueError where the distributed optimizer's state would be loaded into weights of another order.

    It lies flat in the order of the weights, which TransformerEngine's layers and the local ones do not share.
    """
    args = get_args()
    resumes = not args.finetune and not args.no_load_optim and iteration_of(args, source).name != RELEASE
    if args.use_distributed_optimizer and resumes:
        raise ValueError(
            f"the checkpoint in {source} is of other layers (--transformer-impl) than this run's: its distributed "
            "optimizer cannot be resumed; add --no-load-optim, or --finetune"
        )


def checked_dist_load(
    load: Callable[..., Any], source: Path, wanted: dict[str, Any], directory: str, *rest: Any, **kw: Any
) -> Any:
    """Return what `load`, the stock `dist_checkpointing.load`, reads of what is `wanted` from `directory` of `source`.

    Raises ValueError, before anything is loaded, unless the names and shapes of all ranks' weights are those stored.
    """
    mine: dict[str, tuple[int, ...]] = {}
    for key, part in wanted.items():
        if re.fullmatch(r"model\d*", key):
            for value in nested_values(part):
                pieces = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
                mine |= {piece.key: tuple(piece.global_shape) for piece in pieces if isinstance(piece, ShardedTensor)}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    expected = {name: shape for shapes in everyone for name, shape in shapes.items()}
    stored = dist_checkpointing.load_tensors_metadata(directory)
    found = {name: tuple(tensor.global_shape) for name, tensor in stored.items() if not _OPTIMIZER.match(name)}
    compare_weights(source, expected, found)
    entries = read_metadata(Path(directory))
    _refuse_holes(Path(directory), entries, expected)
    return load(_without_new_extra_states(wanted, entries), directory, *rest, **kw)


def _without_new_extra_states(wanted: dict[str, Any], entries: Container[str]) -> dict[str, Any]:
    """Return what is wanted without the `_extra_state` of modules that had none when the checkpoint was saved.

    TransformerEngine's modules have one, which is empty but for fp8, and versions of it differ in which ones do.
    """

    def is_new(value: Any) -> bool:
        is_object = isinstance(value, ShardedObject) and value.key.endswith("_extra_state")
        return is_object and value.unique_key not in entries

    return {
        part: {name: value for name, value in held.items() if not is_new(value)} if isinstance(held, dict) else held
        for part, held in wanted.items()
    }


def _refuse_holes(folder: Path, entries: Mapping[str, Entry], expected: Container[str]) -> None:
    """Raise ValueError unless the chunks of every weight cover it: torch leaves what none has as it was."""
    for name, entry in entries.items():
        if name in expected and entry.shape is not None and not _is_covered(entry.shape, entry.chunks.values()):
            raise ValueError(f"{folder / METADATA}: the chunks of {name} do not make up its shape {entry.shape}")


def _is_covered(shape: tuple[int, ...], chunks: Collection[Chunk]) -> bool:
    """Return whether chunks cover a shape, on the grid of their own edges."""
    if not all(len(chunk.offsets) == len(chunk.sizes) == len(shape) for chunk in chunks):
        return False
    edges = []
    for dimension, whole in enumerate(shape):
        starts = {chunk.offsets[dimension] for chunk in chunks}
        stops = {chunk.offsets[dimension] + chunk.sizes[dimension] for chunk in chunks}
        edges.append(sorted({0, whole, *starts, *stops}))
    if any(edge[-1] > whole for edge, whole in zip(edges, shape, strict=True)):
        return False
    if math.prod(map(len, edges)) > MOST_CELLS:  # no layout cuts a weight like that
        return False
    covered = np.zeros([len(edge) - 1 for edge in edges], dtype=bool)
    for chunk in chunks:
        box = [
            slice(bisect.bisect_left(edge, start), bisect.bisect_left(edge, start + size))
            for edge, start, size in zip(edges, chunk.offsets, chunk.sizes, strict=True)
        ]
        covered[tuple(box)] = True
    return bool(covered.all())


def _weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("_extra_state") and value is not None}


def _first_line(error: object) -> str:
    """Return what an error says in one line, and not how torch would have a file run instead."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    # Below the advice stands what was wrong, on that line or after empty ones.
    if told := re.search(r"(?s:.*)(?:WeightsUnpickler error:|from a trusted source\.)\s+(.+)", str(error)):
        return told[1].split(". Please use")[0]
    lines = str(error).strip().splitlines()
    return lines[0].split(". This is an internal miniz error")[0] if lines else type(error).__name__
