"""Megatron-LM checkpoints in the format `torch`: mp_rank_TT[_PPP]/model_optim_rng.pt, one file a model rank."""

import re
import reprlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.pruning.formats.format import Format, Output, SaveOptions
from megatron.pruning.formats.megatron import (
    ITERATIONS,
    RANK_DIRECTORIES,
    RANK_FILE,
    RELEASE,
    TE,
    TRACKER,
    MegatronCheckpoint,
    find_iteration,
    full_key,
    is_known,
    rank_directory,
    rank_views,
    side_files,
    split_key,
)
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import config_from_args, config_to_args
from megatron.pruning.model.weights import FIRST
from megatron.pruning.storage.dcp_file import METADATA
from megatron.pruning.storage.output import OutputFile
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.torch_reader import Window, load_torch, stored
from megatron.pruning.storage.torch_writer import archive, tensor
from megatron.pruning.storage.views import View, cast

# Buffers that are recomputed from the arguments, not weights.
_IGNORED = re.compile(r"(?:.+\.)?(?:rotary_pos_emb|rotary_emb)\..+")
_EXPERT_DIRECTORY = re.compile(r"mp_rank_\d+_\d+_\d+")
_RANK_DIRECTORY = re.compile(r"mp_rank_(\d{2,})(_\d{3,})?")


class TorchCheckpoint(MegatronCheckpoint):
    """A Llama as Megatron-LM's rank files, of any tensor x pipeline layout.

    Raises ValueError on a missing or damaged rank file and on anything missing, unexpected or of another shape.
    """

    format = "torch"

    def __init__(self, path: Path, directory: Path) -> None:
        ranks = _rank_files(directory)
        tensor, pipeline = max(t for t, _ in ranks) + 1, max(p for _, p in ranks) + 1
        first = _load_rank(ranks[0, 0])
        args = first["args"]
        divisor = getattr(args, "make_vocab_size_divisible_by", None) or 128
        if type(divisor) is not int:
            raise ValueError(f"{ranks[0, 0]}: make_vocab_size_divisible_by is {type(divisor).__name__}, not a number")
        layout = Layout(tensor, pipeline, divisor)
        super().__init__(path, directory, args, layout)
        numbers: dict[tuple[int, int], Any] = {}
        self.has_optimizer = "optimizer" in first or any(directory.glob(f"{RANK_DIRECTORIES}/distrib_optim.pt"))
        for t in range(tensor):
            contents = [first if (t, p) == (0, 0) else _load_rank(ranks[t, p]) for p in range(pipeline)]
            for p, content in enumerate(contents):
                _check_layout(ranks[t, p], content["args"], layout)
                _check_same(ranks[0, 0], first, ranks[t, p], content)
                numbers[t, p] = content["args"].__dict__.get("rank")
            chunks = [_chunks(ranks[t, p], content) for p, content in enumerate(contents)]
            first_layer = 0
            # Virtual pipelines deal their chunks out in rounds: chunk 0 of every stage, then chunk 1, ...
            for v in range(max(map(len, chunks))):
                for p in range(pipeline):
                    if v >= len(chunks[p]):
                        raise ValueError(f"{ranks[t, p]} has {len(chunks[p])} model chunks, another stage has more")
                    ends = (v, p) == (0, 0), (v + 1, p + 1) == (len(chunks[p]), pipeline)
                    first_layer += self._collect(ranks[t, p], chunks[p][v], first_layer, *ends)
        _check_order(ranks, numbers)
        self.files = list(ranks.values())
        self.check()

    def _collect(self, path: Path, model: dict[str, Any], first_layer: int, is_first: bool, is_last: bool) -> int:
        """Note every weight of one model chunk of a rank file, and return how many layers it holds.

        The embedding belongs to the first chunk of all stages, the final norm and the output layer to the last.
        """
        file, layers = File(path), set()
        for key, value in model.items():
            name, layer = split_key(key)
            if key.endswith("_extra_state") or _IGNORED.fullmatch(key):
                continue
            if not is_known(name, layer):
                raise ValueError(f"{path} holds an unexpected tensor: {key[:200]}")
            if layer is None and not (is_first if name == FIRST[0].megatron else is_last):
                raise ValueError(f"{path} holds {key}, which belongs to another pipeline stage: its files are mixed up")
            if key.endswith(".layer_norm_weight"):
                self.transformer_impl = TE
            if layer is not None:
                layers.add(layer)
                layer += first_layer
            self.shards.setdefault((name, layer), []).append(stored(file, key, value))
        if layers != set(range(len(layers))):
            raise ValueError(f"{path} holds layers {sorted(layers)}: some are missing")
        return len(layers)


def _check_layout(path: Path, args: Namespace, layout: Layout) -> None:
    """Raise ValueError unless a rank file was saved in the layout that the directory has."""
    for name, found in (
        ("tensor_model_parallel_size", layout.tensor),
        ("pipeline_model_parallel_size", layout.pipeline),
    ):
        if (said := getattr(args, name, found)) != found:
            said = reprlib.repr(said)
            raise ValueError(f"{path.parent.parent} has rank files for {name} {found}, but {path} says {said}")


def _check_order(ranks: Mapping[tuple[int, int], Path], numbers: Mapping[tuple[int, int], Any]) -> None:
    """Raise ValueError unless the numbers of the processes that saved the files ascend from 0 on.

    Tensor ranks are numbered first, then data parallel and pipeline ranks. A converter may call all of them 0, or none,
    or number each stage anew.
    """
    if not any(numbers.values()) or not all(isinstance(number, int) for number in numbers.values()):
        return
    for (t, p), number in numbers.items():
        for before, least in (((t - 1, p), 1), ((t, p - 1), 0)):
            if before in numbers and number < numbers[before] + least:
                raise ValueError(
                    f"{ranks[t, p]} was saved by process {number} and {ranks[before]} by {numbers[before]}: "
                    "the files of these ranks are mixed up"
                )


def _check_same(first_path: Path, first: dict[str, Any], path: Path, content: dict[str, Any]) -> None:
    """Raise ValueError unless two rank files are of one checkpoint."""
    was, found = first.get("iteration"), content.get("iteration")
    if not isinstance(found, int | str | None) or found != was:
        raise ValueError(f"{path} is of iteration {reprlib.repr(found)}, but {first_path} of {reprlib.repr(was)}")
    a, b = (config_from_args(each["args"], str(where)) for each, where in ((first, first_path), (content, path)))
    if a != b:
        raise ValueError(f"{path} and {first_path} are of different models: their arguments disagree")


def _chunks(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the model chunks of a rank file (one, or several of a virtual pipeline), each by flat keys."""
    numbered = [key for key in content if re.fullmatch(r"model\d+", str(key))]
    names = ["model"] if "model" in content else [f"model{i}" for i in range(len(numbered))]
    chunks = [content.get(name) for name in names]
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise ValueError(f"{path} has no 'model'")
    return [_flat(path, chunk) for chunk in chunks if chunk is not None]


def _flat(path: Path, nested: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted keys."""
    found: dict[str, Any] = {}
    waiting, seen = [("", nested)], set()
    while waiting:
        prefix, mapping = waiting.pop(0)
        if id(mapping) in seen or len(prefix) > 1000:
            raise ValueError(f"{path}: its 'model' is nested in itself")
        seen.add(id(mapping))
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                waiting.append((f"{name}.", value))
            elif name in found:
                raise ValueError(f"{path} holds {name[:200]} twice")
            else:
                found[name] = value
    return found


def _rank_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Return the file of every (tensor, pipeline) rank. Raises ValueError unless the directories form a full grid."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(directory.iterdir()):
        if _EXPERT_DIRECTORY.fullmatch(path.name):
            raise ValueError(f"{directory} is cut over experts ({path.name}): only dense models are read")
        if match := _RANK_DIRECTORY.fullmatch(path.name):
            rank = int(match[1]), int((match[2] or "_0")[1:])
            if rank in found:
                names = f"{found[rank].parent.name} and {path.name}"
                raise ValueError(f"{directory} has two directories for one rank: {names}")
            found[rank] = path / RANK_FILE
    tensor, pipeline = max((t for t, _ in found), default=0) + 1, max((p for _, p in found), default=0) + 1
    for t in range(tensor):
        for p in range(pipeline):
            if (t, p) not in found or not found[t, p].is_file():
                name = f"{rank_directory(t, p, pipeline)}/{RANK_FILE}"
                raise ValueError(f"{directory} lacks the file of tensor rank {t}, pipeline rank {p}: {name}")
    return found


def _load_rank(path: Path) -> dict[str, Any]:
    content = load_torch(Window(File(path)))
    if not isinstance(content, dict) or not isinstance(content.get("args"), Namespace):
        raise ValueError(f"{path} carries no Megatron arguments, so the model's shape is unknown")
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or not version >= 2.0:
        version = reprlib.repr(version)
        raise ValueError(f"{path} has checkpoint_version {version}: before 2.0 the rows of qkv have another order")
    return content


def torch_output(checkpoint: Checkpoint, options: SaveOptions) -> Output:
    """Return the rank files and the small files of `checkpoint` in the format `torch`, under RELEASE.

    Raises ValueError unless the model can be cut to the layout.
    """
    layout, dtype = options.layout, options.dtype
    checkpoint.check_layout(layout)
    te = (options.transformer_impl or checkpoint.transformer_impl) == TE
    header = {"checkpoint_version": 3.0, "iteration": 0}
    files: list[OutputFile] = []
    for p in range(layout.pipeline):
        first_layer = layout.layers_of_stage(checkpoint.config.num_layers, p).start
        for t in range(layout.tensor):
            views = {
                full_key(name, None if layer is None else layer - first_layer, te): cast(view, dtype)
                for (name, layer), view in rank_views(checkpoint, layout, t, p).items()
            }
            args = config_to_args(checkpoint.config, layout)
            args.rank = p * layout.tensor + t  # as the process's that saves it: tells when files are mixed up
            name = f"{RELEASE}/{rank_directory(t, p, layout.pipeline)}/{RANK_FILE}"
            files.append(TorchFile(name, views, {"args": args, **header}))
    return files, side_files(checkpoint, layout, dtype)


class TorchFile(OutputFile):
    """A Megatron rank file: `header` plus {"model": the views by key}."""

    def __init__(self, name: str, views: Mapping[str, View], header: Mapping[str, Any]) -> None:
        super().__init__(name, views)
        self.header = header

    def parts(self, checksums: Mapping[str, int]) -> Iterator[bytes | str]:
        model = {key: tensor(view, number) for number, (key, view) in enumerate(self.views.items())}
        sizes = {key: view.nbytes for key, view in self.views.items()}
        return archive({**self.header, "model": model}, sizes, checksums)


def _detect(path: Path, iteration: int | None) -> Path | None:
    directory = find_iteration(path, iteration)
    if directory is None or (directory / METADATA).is_file() or any(directory.glob("*/.zarray")):
        return None
    return directory


SUMMARY = "Megatron-LM's mp_rank_TT[_PPP] shards"
FORMAT = Format("torch", SUMMARY, TRACKER, _detect, TorchCheckpoint, torch_output, sharded=True, weights=ITERATIONS)
