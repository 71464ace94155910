"""What Megatron's checkpoint formats have in common: names, shards of tensor ranks, the files that lie beside.

`MegatronCheckpoint` turns the shards that a format's reader found into logical weights; `rank_views` is the way back.
"""

import dataclasses
import functools
import math
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.pruning.formats.checks import check_apart, check_keys, check_tensor
from megatron.pruning.formats.huggingface import CONFIG_FILE, read_hf_config
from megatron.pruning.model.axes import BLOCKS, axes_of
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.hf_config import config_to_hf
from megatron.pruning.model.layout import Layout, fuse, fused_shape, pad_rows, unfuse
from megatron.pruning.model.lineage import Lineage
from megatron.pruning.model.megatron_args import config_from_args, config_to_command_line
from megatron.pruning.model.weights import FIRST, LAST, TABLE, WeightRow, all_weights, split_dim
from megatron.pruning.storage.dcp_file import METADATA
from megatron.pruning.storage.small_files import as_json, read_small
from megatron.pruning.storage.views import View, cast, concat, equal, read_all, take

TE = "transformer_engine"  # whose layers a checkpoint is of, as --transformer-impl names them
LOCAL = "local"
TRACKER = "latest_checkpointed_iteration.txt"
HF_FILES = "huggingface"  # config.json and tokenizer, carried for the way back
ARGS_FILE = "megatron_args.txt"
RELEASE = "release"  # the iteration that starts a new training: the stock loader takes no optimizer from it
ITERATIONS = (RELEASE, "iter_*")  # patterns of their directories
RANK_DIRECTORIES = "mp_rank_*"
RANK_FILE = "model_optim_rng.pt"

# Megatron name -> the rows that are fused under it, in order.
FUSED = {weight.megatron: [row for row in TABLE if row.megatron == weight.megatron] for weight in TABLE}

# TransformerEngine's layers own the norm before each linear; the local layers keep it apart.
TE_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm",
}
TE_NAMES = {local: te for te, local in TE_NORMS.items()}
# Before Megatron-core a model was nested dictionaries with other names; checkpoint_version 3.0 orders rows as today.
_OLD_NAMES = {
    "language_model.embedding.word_embeddings": "embedding.word_embeddings",
    "language_model.encoder.final_norm": "decoder.final_layernorm",
    "language_model.encoder.final_layernorm": "decoder.final_layernorm",
    "language_model.output_layer": "output_layer",
    "word_embeddings_for_head": "output_layer",  # the last stage's copy of a tied embedding
    "input_norm": "input_layernorm",
    "post_attention_norm": "pre_mlp_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
# Replicas of a weight may differ by this share of its largest value.
_DRIFT = 0.01
_ITERATION = re.compile(r"iter_(\d{7,18})")  # the name of its directory
_LAYER_KEY = re.compile(r"(?:decoder|language_model\.encoder)\.layers\.(\d+)\.(.+)")


def split_key(key: str) -> tuple[str, int | None]:
    """Return a key's Megatron name, as the table has it, and its layer (None outside the layers)."""
    layer = None
    if match := _LAYER_KEY.fullmatch(key):
        layer, key = int(match[1]), match[2]
    name = TE_NORMS.get(key, key.removesuffix(".weight"))
    return _OLD_NAMES.get(name, name), layer


def full_key(name: str, layer: int | None, te: bool = False) -> str:
    """Return the key of the weights called `name` in `layer`, in the local layers' or TransformerEngine's spelling."""
    key = FUSED[name][0].megatron_key(layer)
    return key.replace(f"{name}.weight", TE_NAMES[name]) if te and name in TE_NAMES else key


def is_known(name: str, layer: int | None) -> bool:
    """Whether a Llama has a weight of this Megatron name, in or outside the layers as `layer` says."""
    return name in FUSED and FUSED[name][0].per_layer == (layer is not None)


def find_iteration(path: Path, iteration: int | None = None) -> Path | None:
    """Return the directory of weights that `path` means: itself, or the one its tracker file names; else None.

    `iteration` names another one than the tracker does. Raises ValueError when that, or the tracker's, is not there.
    """
    if iteration is not None:
        directory = path / iteration_directory(iteration)
        if not directory.is_dir():
            saved = ", ".join(sorted(found.name for found in path.glob("iter_*"))) or "none"
            raise ValueError(f"--iteration {iteration}: {path} has no {directory.name}; saved there: {saved}")
        return directory
    if (path / TRACKER).is_file():
        directory = path / iteration_directory(tracked_iteration(path))
        if not directory.is_dir():
            raise ValueError(f"{path / TRACKER} names {directory.name}, which is not in {path}")
        return directory
    return path if (path / METADATA).is_file() or any(path.glob(RANK_DIRECTORIES)) else None


def tracked_iteration(path: Path) -> int | str:
    """Return what the tracker file of a checkpoint names: an iteration, or `release`. Raises ValueError if neither."""
    latest = read_small(path / TRACKER).decode("utf-8", errors="replace").strip()
    if latest == RELEASE:
        return latest
    if not (latest.isdecimal() and len(latest) < 20):
        raise ValueError(f"{path / TRACKER} holds {latest[:40]!r}, neither a number nor {RELEASE!r}")
    return int(latest)


def iteration_directory(iteration: int | str) -> str:
    """Return the name of the directory that holds the weights of an iteration."""
    return RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}"


def rank_directory(t: int, p: int, pipeline: int) -> str:
    """Return the name of the directory of tensor rank `t`, pipeline rank `p` among `pipeline` stages."""
    return f"mp_rank_{t:02d}_{p:03d}" if pipeline > 1 else f"mp_rank_{t:02d}"


class MegatronCheckpoint(Checkpoint):
    """A Llama of which each tensor rank has a shard of every weight, evenly or as an unbalanced pruning left it."""

    def __init__(self, path: Path, directory: Path, args: Namespace, layout: Layout | None) -> None:
        self.path, self.layout = path, layout
        self.root = path
        above = directory.resolve().parent
        if directory == path and (above / TRACKER).is_file():  # the user named an iteration of a checkpoint
            self.root = above
        self.tokenizer_folder = self.root / HF_FILES
        self.args = args
        trained = _ITERATION.fullmatch(directory.name)
        self.iterations = int(trained[1]) if trained else 0
        # (Megatron name, layer) -> the shards of all tensor ranks
        self.shards: dict[tuple[str, int | None], list[View]] = {}
        self.config = self._read_config(directory)
        self.transformer_impl = TE if getattr(args, "transformer_impl", None) == TE else LOCAL

    @property
    def lineage(self) -> Lineage:
        return super().lineage.trained(self.args, self.iterations) if self.iterations else super().lineage

    def _read_config(self, directory: Path) -> LlamaConfig:
        config = config_from_args(self.args, str(directory))
        carried = self.root / HF_FILES / CONFIG_FILE
        self.vocab_is_known = bool(getattr(self.args, "vocab_size", None)) or carried.is_file()
        if carried.is_file():
            hf, self.left_behind, self.declared_dtype = read_hf_config(carried)
            vocab = config.vocab_size if getattr(self.args, "vocab_size", None) else hf.vocab_size
            config = dataclasses.replace(config, vocab_size=vocab)
            if hf.features == config.features:  # the arguments do not tell families apart that have the same rows
                config = dataclasses.replace(config, family=hf.family, other=hf.other)
        return config

    @functools.cache  # noqa: B019 - a checkpoint lives as long as its process
    def _rank_sizes(self, layer: int | None, rank: int) -> dict[str, int]:
        """Return the axis sizes on one tensor rank: groups, heads and ffn as its shards have them, maybe unevenly."""
        sizes = dict(self.config.sizes)
        sizes["vocab"] = self.shards[FIRST[0].megatron, None][rank].shape[0]
        if layer is not None:
            attention = self.shards["self_attention.linear_proj", layer][rank].shape[-1]
            sizes["groups"] = attention // (self.config.heads_per_group * self.config.head_dim)
            sizes["heads"] = sizes["groups"] * self.config.heads_per_group
            sizes["ffn"] = self.shards["mlp.linear_fc2", layer][rank].shape[-1]
        return sizes

    def _tie(self) -> None:
        """Keep one of the two matrices of a tied model: the last stage has a copy of the embedding, under any name.

        Raises ValueError when the copy is none.
        """
        embedding, head = ((row.megatron, None) for row in (FIRST[0], LAST[-1]))
        if not self.config.tied or head not in self.shards:
            return
        copies = self.shards.pop(head)
        for rank, (one, copy) in enumerate(zip(self.shards.setdefault(embedding, copies), copies, strict=False)):
            if one is not copy and not equal(one, copy, _DRIFT):
                raise ValueError(
                    f"{self.path}: the output layer on tensor rank {rank} is not a copy of the embedding, "
                    "but its arguments say that they are tied: one of them is of another model or another time"
                )

    def check(self) -> None:
        """Raise ValueError unless every weight is there, on all ranks, in the shape that config and ranks imply."""
        self._tie()
        where, config = str(self.path), self.config
        expected = all_weights(config.num_layers, config.tied, config.features)
        keys = {full_key(weight.megatron, layer) for weight, layer in expected}
        check_keys(where, {full_key(*key) for key in self.shards}, keys)
        check_apart((full_key(*key), shard) for key, shards in self.shards.items() for shard in shards)
        ranks = max(len(shards) for shards in self.shards.values())
        for key, shards in self.shards.items():
            if len(shards) != ranks:
                raise ValueError(f"{where}: {full_key(*key)} is on {len(shards)} of {ranks} tensor ranks")
        for (name, layer), shards in self.shards.items():
            for rank, shard in enumerate(shards):
                shape = fused_shape(FUSED[name], self._rank_sizes(layer, rank))
                check_tensor(f"{where}, tensor rank {rank}", full_key(name, layer), shard, shape)
        for axis in BLOCKS:
            for layer in range(config.num_layers):
                total = sum(self._rank_sizes(layer, rank)[axis] for rank in range(ranks))
                if total != config.sizes[axis]:
                    raise ValueError(
                        f"{where}: layer {layer} has {total} {axis} on all ranks together, "
                        f"but its arguments say {config.sizes[axis]}"
                    )
        for (name, layer), shards in self.shards.items():
            if split_dim(FUSED[name][0]) is None:
                _check_replicas(where, full_key(name, layer), shards)
        rows = sum(self._rank_sizes(None, rank)["vocab"] for rank in range(ranks))
        if rows < config.vocab_size:
            raise ValueError(f"{where}: its embedding has {rows} rows for a vocabulary of {config.vocab_size}")

    def weight(self, weight: WeightRow, layer: int | None) -> View:
        shards = self.shards[weight.megatron, layer]
        dim = split_dim(weight)
        if dim is None:
            return shards[0]
        rows = FUSED[weight.megatron]
        which = rows.index(weight)
        parts = [unfuse(rows, shard, self._rank_sizes(layer, rank))[which] for rank, shard in enumerate(shards)]
        whole = concat(parts, dim)
        return take(whole, 0, np.arange(self.config.vocab_size)) if weight.dims[0] == "vocab" else whole

    @property
    def training_layout(self) -> Layout:
        """Its own; that of its arguments where it is cut for no layout and loads in any."""
        if self.layout is not None:
            return self.layout
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "make_vocab_size_divisible_by")
        sizes = [getattr(self.args, name, None) for name in names]
        default = dataclasses.astuple(Layout())
        return Layout(*(size if type(size) is int else usual for size, usual in zip(sizes, default, strict=True)))


def _check_replicas(where: str, key: str, shards: Sequence[View]) -> None:
    """Raise ValueError when the tensor ranks hold different values of a weight that each of them has whole.

    Training may let them drift apart by rounding; shards of different models differ by far more.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN is no reason for a warning
        first, *others = (read_all(cast(shard, "fp32")).view(np.float32).astype(np.float64) for shard in shards)
    for rank, other in enumerate(others, 1):
        largest = np.abs(other - first).max(initial=0.0)  # NaN where only one has an infinity or a NaN
        if not np.array_equal(first, other, equal_nan=True) and not largest <= _DRIFT * np.abs(first).max(initial=0.0):
            raise ValueError(
                f"{where}: {key} on tensor ranks 0 and {rank} differs by up to {largest:.3g}: all ranks should hold "
                "the same, so one of them is of another model or another time"
            )


def rank_views(checkpoint: Checkpoint, layout: Layout, t: int, p: int) -> dict[tuple[str, int | None], View]:
    """Return what model rank (`t`, `p`) holds, by (Megatron name, global layer), in the order of the forward pass."""
    config, is_last = checkpoint.config, p == layout.pipeline - 1
    stage = layout.layers_of_stage(config.num_layers, p)
    views = {}
    for weight, layer in all_weights(config.num_layers, config.tied, config.features):
        key = weight.megatron, layer
        here = layer in stage if layer is not None else (p == 0 if weight in FIRST else is_last)
        if here and key not in views:
            views[key] = _rank_view(checkpoint, *key, layout, t)
    if config.tied and is_last and p > 0:  # the last stage needs its own copy
        views["output_layer", None] = _rank_view(checkpoint, FIRST[0].megatron, None, layout, t)
    return views


def _rank_view(checkpoint: Checkpoint, name: str, layer: int | None, layout: Layout, t: int) -> View:
    """Return what tensor rank `t` holds of the weight or the fused weights called `name`."""
    config, rows = checkpoint.config, FUSED[name]
    padded = layout.padded_vocab(config.vocab_size)
    bounds = {"vocab": [padded * t // layout.tensor, padded * (t + 1) // layout.tensor]}
    if layer is not None:
        for axis in BLOCKS:
            bounds[axis] = checkpoint.boundaries(axis, layer, layout.tensor)[t : t + 2]
        bounds["heads"] = [bound * config.heads_per_group for bound in bounds["groups"]]
    sizes = {**config.sizes, **{axis: stop - start for axis, (start, stop) in bounds.items()}}
    parts = []
    for weight in rows:
        view, dim = checkpoint.weight(weight, layer), split_dim(weight)
        if dim is not None:
            if weight.dims[dim] == "vocab":
                view = pad_rows(view, padded)
            # The split axis is the outermost of its dim: each of its indices stands for `inner` elements.
            axis, *inner_axes = axes_of(weight.dims[dim])
            inner = math.prod(config.sizes[axis] for axis in inner_axes)
            view = take(view, dim, np.arange(bounds[axis][0] * inner, bounds[axis][1] * inner))
        parts.append(view)
    return fuse(rows, parts, sizes)


def side_files(checkpoint: Checkpoint, layout: Layout, dtype: str | None) -> dict[str, bytes]:
    """Return the small files beside the weights: tokenizer and config for the way back, flags, and the tracker."""
    config = checkpoint.config
    beside = {f"{HF_FILES}/{name}": content for name, content in checkpoint.carried_files().items()}
    beside[f"{HF_FILES}/{CONFIG_FILE}"] = as_json(config_to_hf(config, dtype or checkpoint.dtype))
    beside[ARGS_FILE] = "".join(f"{line}\n" for line in config_to_command_line(config, layout)).encode()
    beside[TRACKER] = RELEASE.encode()
    return beside
