"""Megatron-LM checkpoints in the format `torch_dist`: the weights of all ranks by name in one DCP checkpoint.

Layers are stacked on axis 0 under the names of TransformerEngine's layers, and each tensor is laid out as on one tensor
rank; chunks may cut it anywhere. `common.pt` holds the arguments, or since 0.19 the bytes entry
`common_state/shard_0_1`. Written with common.pt, which every release reads.
"""

import itertools
import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.pruning.formats.format import SHARD_BYTES, Format, Output, SaveOptions, in_shards
from megatron.pruning.formats.megatron import (
    ITERATIONS,
    RELEASE,
    TE_NAMES,
    TRACKER,
    MegatronCheckpoint,
    find_iteration,
    full_key,
    is_known,
    rank_views,
    side_files,
    split_key,
)
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import config_to_args
from megatron.pruning.storage.dcp_file import (
    METADATA,
    Chunk,
    DistFile,
    Entry,
    Piece,
    StoredChunk,
    load_object,
    metadata_bytes,
    object_bytes,
    read_metadata,
)
from megatron.pruning.storage.small_files import as_json
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.torch_reader import Window, load_torch
from megatron.pruning.storage.views import View, cast, concat

COMMON = "common.pt"  # what all ranks know
_STACKED = "decoder.layers."
# The modules of TransformerEngine have an extra state, which the stock loader wants beside each weight: but these are
# Megatron's own, or norms of a layer that the linears after them own.
_WITHOUT_STATE = {"embedding.word_embeddings", "output_layer", *TE_NAMES}
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state", "common_state", "opt_param_scheduler")


class DistCheckpoint(MegatronCheckpoint):
    """A Llama in the format `torch_dist`, as any layout saved it.

    Raises ValueError on anything missing, unexpected, damaged or of another shape.
    """

    format = "torch_dist"

    def __init__(self, path: Path, directory: Path) -> None:
        entries = read_metadata(directory)
        super().__init__(path, directory, _read_args(directory, entries), None)
        self.has_optimizer = any(name.startswith(("optimizer.", "chained_")) for name in entries)
        self._files: dict[Path, File] = {}
        for name, entry in entries.items():
            if "_extra_state" not in name and not name.startswith(_NOT_WEIGHTS):
                self._collect(directory, name, entry)
        self.files = list(self._files)
        self.check()

    def _collect(self, directory: Path, key: str, entry: Entry) -> None:
        name, layer = split_key(key)
        stacked = layer is None and key.startswith(_STACKED)
        if stacked:
            name, _ = split_key(key.replace(_STACKED, f"{_STACKED}0.", 1))
        if not is_known(name, 0 if stacked else layer) or entry.shape is None:
            raise ValueError(f"{directory} holds an unexpected tensor: {key[:200]}")
        if entry.dtype is None:
            raise ValueError(f"{directory}: {key} is of a dtype that no Llama weight has")
        if not entry.shape or (stacked and entry.shape[0] != self.config.num_layers):
            raise ValueError(
                f"{directory}: {key} has shape {entry.shape} in a model of {self.config.num_layers} layers"
            )
        for index in range(entry.shape[0]) if stacked else [None]:
            where = name, index if stacked else layer
            if where in self.shards:
                raise ValueError(f"{directory} holds {key} twice, stacked and by layer")
            self.shards[where] = [self._assemble(directory, key, entry, index)]

    def _assemble(self, directory: Path, key: str, entry: Entry, layer: int | None) -> View:
        """Return a tensor, or one layer of a stacked one, from the chunks that tile it."""
        boxes: dict[int, dict[int, View]] = {}  # first row -> first column -> view
        for chunk in entry.chunks.values():
            if len(chunk.sizes) != len(entry.shape or ()):
                raise ValueError(f"{directory}: {key} has a chunk of shape {chunk.sizes} in a tensor of {entry.shape}")
            offsets, inside = chunk.offsets, None
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + chunk.sizes[0]:
                    continue
                offsets, inside = offsets[1:], layer - offsets[0]
            column = offsets[1] if len(offsets) > 1 else 0
            boxes.setdefault(offsets[0], {})[column] = StoredChunk(
                key, self._file(chunk), chunk, inside, str(entry.dtype)
            )
        shape = (entry.shape or ())[0 if layer is None else 1 :]
        whole = _joined({row: _joined(parts, 1) for row, parts in boxes.items()}, 0)
        if whole is None or whole.shape != shape:
            raise ValueError(f"{directory}: the chunks of {key} do not make up its shape {shape}")
        return whole

    def _file(self, chunk: Chunk) -> File:
        if chunk.path not in self._files:
            if not chunk.path.is_file():
                raise ValueError(f"{chunk.path.parent / METADATA} names {chunk.path.name}, which is not there")
            self._files[chunk.path] = File(chunk.path)
        return self._files[chunk.path]


def _joined(parts: Mapping[int, View | None], axis: int) -> View | None:
    """Return views as one, by where they begin along `axis`; None unless all fit together and leave no gap."""
    starts = sorted(parts)
    found = [part for start in starts if (part := parts[start]) is not None]
    ends = itertools.accumulate(math.prod(part.shape[axis : axis + 1]) for part in found)
    across = {part.shape[:axis] + part.shape[axis + 1 :] for part in found}
    return concat(found, axis) if len(across) == 1 and [0, *ends][:-1] == starts else None


def _read_args(directory: Path, entries: dict[str, Entry]) -> Namespace:
    common: Any = None
    if (directory / COMMON).is_file():
        common = load_torch(Window(File(directory / COMMON)))
    elif (entry := entries.get("common_state/shard_0_1")) and entry.chunks:
        common = load_object(next(iter(entry.chunks.values())))
    if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
        raise ValueError(f"{directory} carries no Megatron arguments, so the model's shape is unknown")
    args: Namespace = common["args"]
    return args


def dist_output(checkpoint: Checkpoint, options: SaveOptions) -> Output:
    """Return the .distcp files and the small files of `checkpoint` in the format `torch_dist`, under RELEASE.

    The layout is a hint for training only: the weights are stored whole and load in any layout. Raises ValueError
    unless the model divides evenly over its ranks, as it must when it is loaded.
    """
    config, layout, dtype = checkpoint.config, options.layout, options.dtype
    layout.check_split(config.sizes, "the model's")
    layout.check_stages(config.sizes, "the model's")
    whole = Layout(vocab_divisor=layout.padded_vocab(config.vocab_size))
    pieces = []
    views = rank_views(checkpoint, whole, 0, 0)
    # The layers of a stacked tensor have one dtype: fp32, which holds each exactly, where they differ.
    dtypes: dict[str, set[str]] = {}
    for (name, _), view in views.items():
        dtypes.setdefault(name, set()).add(view.dtype)
    for (name, layer), view in views.items():
        if dtype is None and len(dtypes[name]) > 1:
            view = cast(view, "fp32")
        full = full_key(name, layer, te=True)
        if layer is not None:
            full = full.replace(f"{_STACKED}{layer}.", _STACKED, 1)
        pieces.append(Piece(full, layer, cast(view, dtype)))
    none = object_bytes([None])
    layers = config.num_layers
    objects = {
        f"{name}._extra_state/shard_0_1"
        if layer is None
        else f"{_STACKED}{name}._extra_state/shard_{layer}_{layers}": none
        for name, layer in views
        if name not in _WITHOUT_STATE and not name.endswith(".bias")
    }
    parts = in_shards(((piece, piece.view.nbytes) for piece in pieces), SHARD_BYTES)
    files = [DistFile(f"{RELEASE}/__{i}_0.distcp", part, objects if i == 0 else {}) for i, part in enumerate(parts)]
    beside = side_files(checkpoint, layout, dtype)
    beside[f"{RELEASE}/{METADATA}"] = metadata_bytes(files, layers)
    beside[f"{RELEASE}/{COMMON}"] = object_bytes(_common(config, layout))
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    beside[f"{RELEASE}/metadata.json"] = as_json({**versions, "common_backend": "torch", "common_backend_version": 1})
    return files, beside


def _common(config: LlamaConfig, layout: Layout) -> dict[str, Any]:
    """Return what `common.pt` holds: what every rank of a training knows."""
    args = config_to_args(config, layout)
    args.ckpt_format = "torch_dist"
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _detect(path: Path, iteration: int | None) -> Path | None:
    directory = find_iteration(path, iteration)
    return directory if directory is not None and (directory / METADATA).is_file() else None


SUMMARY = "Megatron's newer format, one for all layouts"
FORMAT = Format("torch_dist", SUMMARY, TRACKER, _detect, DistCheckpoint, dist_output, weights=ITERATIONS)
