"""Megatron-LM checkpoints in the format `torch`: mp_rank_TT[_PPP]/model_optim_rng.pt, one file a model rank."""

import dataclasses
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.pruning.checkpoint import Checkpoint, carried_files_of, check_keys, check_tensor
from megatron.pruning.config import (
    LlamaConfig,
    config_from_args,
    config_to_args,
    config_to_command_line,
    config_to_hf,
)
from megatron.pruning.hf_format import as_json, read_hf_config
from megatron.pruning.layout import Layout, fuse, fused_shape, pad_rows, unfuse
from megatron.pruning.output import OutputFile
from megatron.pruning.table import FIRST, LAST, TABLE, Weight, axes, split_dim
from megatron.pruning.torch_file import TorchFile, load_torch, stored
from megatron.pruning.views import File, Stored, View, cast, concat, take

TRACKER = "latest_checkpointed_iteration.txt"
HF_FILES = "huggingface"  # config.json and tokenizer, carried for the way back
ARGS_FILE = "megatron_args.txt"
RANK_FILE = "model_optim_rng.pt"

_RANK_DIRECTORY = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.weight")
_FUSED = {weight.megatron: [row for row in TABLE if row.megatron == weight.megatron] for weight in TABLE}
_BY_MEGATRON = {megatron: rows[0] for megatron, rows in _FUSED.items()}


def find_iteration(path: Path) -> Path | None:
    """Return the directory of rank files that `path` means: itself, or the one its tracker file names; else None."""
    if (path / TRACKER).is_file():
        latest = (path / TRACKER).read_text(encoding="utf-8").strip()
        if latest != "release" and not latest.isdigit():
            raise ValueError(f"{path / TRACKER} holds {latest[:40]!r}, neither a number nor 'release'")
        directory = path / (latest if latest == "release" else f"iter_{int(latest):07d}")
        if not directory.is_dir():
            raise ValueError(f"{path / TRACKER} names {directory.name}, which is not in {path}")
        return directory
    return path if any(path.glob("mp_rank_*")) else None


class TorchCheckpoint(Checkpoint):
    """A Llama as Megatron-LM's rank files, of any tensor x pipeline layout, even or as an unbalanced pruning left it.

    Raises ValueError on a missing or damaged rank file and on anything missing, unexpected or of another shape.
    """

    format = "torch"

    def __init__(self, path: Path) -> None:
        self.path = path
        directory = find_iteration(path)
        assert directory is not None
        self._root = path if (path / TRACKER).is_file() else directory.parent
        ranks = _rank_files(directory)
        self.iteration = 0
        # (Megatron name, global layer) -> the shards of all tensor ranks
        self._shards: dict[tuple[str, int | None], list[Stored]] = {}
        tensor, pipeline = max(t for t, _ in ranks) + 1, max(p for _, p in ranks) + 1
        for t in range(tensor):
            first_layer = 0
            for p in range(pipeline):
                content = _load_rank(ranks[t, p])
                if (t, p) == (0, 0):
                    self.iteration = int(content.get("iteration") or 0)
                    args = content["args"]
                first_layer += self._collect(ranks[t, p], content, first_layer, tensor, args)
        divisor = int(getattr(args, "make_vocab_size_divisible_by", None) or 128)
        self.layout = Layout(tensor, pipeline, divisor)
        self.config = self._read_config(args, directory)
        self._check()

    def _collect(self, path: Path, content: dict[str, Any], first_layer: int, tensor: int, args: Namespace) -> int:
        """Note every weight of one rank file, and return how many layers it holds."""
        if "model" not in content:
            what = "is of a virtual pipeline (model0, model1, ...)" if "model0" in content else "has no 'model'"
            raise ValueError(f"{path} {what}: not a layout that is read")
        file, layers, tied_copy = File(path), set(), not getattr(args, "untie_embeddings_and_output_weights", False)
        for key, value in content["model"].items():
            if key.endswith("_extra_state") or (tied_copy and key == "output_layer.weight"):
                continue
            layer: int | None = None
            name = key.removesuffix(".weight")
            if match := _LAYER_KEY.fullmatch(key):
                layers.add(int(match[1]))
                layer, name = first_layer + int(match[1]), match[2]
            if name not in _BY_MEGATRON or _BY_MEGATRON[name].per_layer != (layer is not None):
                raise ValueError(f"{path} holds an unexpected tensor: {key}")
            self._shards.setdefault((name, layer), []).append(stored(file, key, value))
        if layers != set(range(len(layers))):
            raise ValueError(f"{path} holds layers {sorted(layers)}: some are missing")
        return len(layers)

    def _read_config(self, args: Namespace, directory: Path) -> LlamaConfig:
        config = config_from_args(args, str(directory))
        carried = self._root / HF_FILES / "config.json"
        if carried.is_file():
            hf = read_hf_config(carried)
            vocab = config.vocab_size if getattr(args, "vocab_size", None) else hf.vocab_size
            config = dataclasses.replace(config, vocab_size=vocab, other=hf.other)
        return config

    def _rank_sizes(self, layer: int | None, rank: int) -> dict[str, int]:
        """Return the axis sizes on one tensor rank: groups, heads and ffn as its shards have them, maybe unevenly."""
        assert self.layout is not None
        sizes = dict(self.config.sizes)
        padded = self._shards["embedding.word_embeddings", None]
        sizes["vocab"] = padded[rank].shape[0]
        if layer is not None:
            attention = self._shards["self_attention.linear_proj", layer][rank].shape[-1]
            sizes["groups"] = attention // (self.config.heads_per_group * self.config.head_dim)
            sizes["heads"] = sizes["groups"] * self.config.heads_per_group
            sizes["ffn"] = self._shards["mlp.linear_fc2", layer][rank].shape[-1]
        return sizes

    def _check(self) -> None:
        assert self.layout is not None
        where, config, tensor = str(self.path), self.config, self.layout.tensor
        expected = {
            (name, layer)
            for name, rows in _FUSED.items()
            for layer in (range(config.num_layers) if rows[0].per_layer else (None,))
            if not (config.tied and name == "output_layer")
        }
        check_keys(where, {_full_key(*key) for key in self._shards}, {_full_key(*key) for key in expected})
        for (name, layer), shards in self._shards.items():
            if len(shards) != tensor:
                raise ValueError(f"{where}: {_full_key(name, layer)} is on {len(shards)} of {tensor} tensor ranks")
        for (name, layer), shards in self._shards.items():
            for rank, shard in enumerate(shards):
                sizes = self._rank_sizes(layer, rank)
                check_tensor(
                    f"{where}, tensor rank {rank}", _full_key(name, layer), shard, fused_shape(_FUSED[name], sizes)
                )
        for axis in ("groups", "ffn"):
            for layer in range(config.num_layers):
                total = sum(self._rank_sizes(layer, rank)[axis] for rank in range(tensor))
                if total != config.sizes[axis]:
                    raise ValueError(
                        f"{where}: layer {layer} has {total} {axis} on all ranks together, "
                        f"but its arguments say {config.sizes[axis]}"
                    )
        if sum(self._rank_sizes(None, rank)["vocab"] for rank in range(tensor)) < config.vocab_size:
            raise ValueError(f"{where}: its embedding has fewer rows than the vocabulary of {config.vocab_size}")

    def weight(self, weight: Weight, layer: int | None) -> View:
        shards = self._shards[weight.megatron, layer]
        dim = split_dim(weight)
        if dim is None:
            return shards[0]
        rows = _FUSED[weight.megatron]
        which = rows.index(weight)
        parts = [unfuse(rows, shard, self._rank_sizes(layer, rank))[which] for rank, shard in enumerate(shards)]
        whole = concat(parts, dim)
        return take(whole, 0, np.arange(self.config.vocab_size)) if weight.dims[0] == "vocab" else whole

    def carried_files(self) -> dict[str, bytes]:
        return carried_files_of(self._root / HF_FILES)


def _full_key(name: str, layer: int | None) -> str:
    return _FUSED[name][0].megatron_key(layer)


def _rank_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Return the file of every (tensor, pipeline) rank. Raises ValueError unless the directories form a full grid."""
    found = {}
    for path in sorted(directory.iterdir()):
        if match := _RANK_DIRECTORY.fullmatch(path.name):
            found[int(match[1]), int(match[2] or 0)] = path / RANK_FILE
    tensor, pipeline = max((t for t, _ in found), default=0) + 1, max((p for _, p in found), default=0) + 1
    for t in range(tensor):
        for p in range(pipeline):
            if (t, p) not in found or not found[t, p].is_file():
                raise ValueError(
                    f"{directory} lacks the file of tensor rank {t}, pipeline rank {p}: {_rank_name(t, p, pipeline)}"
                )
    return found


def _rank_name(t: int, p: int, pipeline: int) -> str:
    return f"mp_rank_{t:02d}_{p:03d}/{RANK_FILE}" if pipeline > 1 else f"mp_rank_{t:02d}/{RANK_FILE}"


def _load_rank(path: Path) -> dict[str, Any]:
    content = load_torch(path)
    if not isinstance(content, dict) or not isinstance(content.get("args"), Namespace):
        raise ValueError(f"{path} carries no Megatron arguments, so the model's shape is unknown")
    return content


def torch_output(
    checkpoint: Checkpoint, layout: Layout, dtype: str | None
) -> tuple[list[OutputFile], dict[str, bytes]]:
    """Return the rank files and the small files of `checkpoint` in the format `torch`, under `release/`.

    A release starts a new training: the stock loader takes no optimizer or iteration from it.
    """
    config = checkpoint.config
    header = {"args": config_to_args(config, layout), "checkpoint_version": 3.0, "iteration": 0}
    files: list[OutputFile] = []
    for p in range(layout.pipeline):
        for t in range(layout.tensor):
            views = {key: cast(view, dtype) for key, view in _rank_views(checkpoint, layout, t, p).items()}
            files.append(TorchFile(f"release/{_rank_name(t, p, layout.pipeline)}", views, header))
    texts = {f"{HF_FILES}/{name}": content for name, content in checkpoint.carried_files().items()}
    texts[f"{HF_FILES}/config.json"] = as_json(config_to_hf(config, dtype or checkpoint.dtype))
    texts[ARGS_FILE] = "".join(f"{line}\n" for line in config_to_command_line(config, layout)).encode()
    texts[TRACKER] = b"release"
    return files, texts


def _rank_views(checkpoint: Checkpoint, layout: Layout, t: int, p: int) -> dict[str, View]:
    """Return the tensors of one rank file by key, in the order of the forward pass."""
    tied, layers = checkpoint.config.tied, layout.layers_of_stage(checkpoint.config.num_layers, p)
    names: list[tuple[str, int | None, int | None]] = []  # Megatron name, global layer, layer on this stage
    if p == 0:
        names += [(weight.megatron, None, None) for weight in FIRST]
    for local, layer in enumerate(layers):
        names += [(name, layer, local) for name, rows in _FUSED.items() if rows[0].per_layer]
    if p == layout.pipeline - 1:
        names += [(weight.megatron, None, None) for weight in LAST if not (tied and weight.name == "lm_head")]
    views = {_full_key(name, local): _rank_view(checkpoint, name, layer, layout, t) for name, layer, local in names}
    if tied and p == layout.pipeline - 1 and p > 0:  # the last stage needs its own copy
        views["output_layer.weight"] = _rank_view(checkpoint, FIRST[0].megatron, None, layout, t)
    return views


def _rank_view(checkpoint: Checkpoint, name: str, layer: int | None, layout: Layout, t: int) -> View:
    """Return what tensor rank `t` holds of the weight or the fused weights called `name`."""
    config, rows = checkpoint.config, _FUSED[name]
    padded = layout.padded_vocab(config.vocab_size)
    bounds = {"vocab": [padded * t // layout.tensor, padded * (t + 1) // layout.tensor]}
    if layer is not None:
        for axis in ("groups", "ffn"):
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
            axis, *inner_axes = axes(weight.dims[dim])
            inner = math.prod(config.sizes[axis] for axis in inner_axes)
            view = take(view, dim, np.arange(bounds[axis][0] * inner, bounds[axis][1] * inner))
        parts.append(view)
    return fuse(rows, parts, sizes)
