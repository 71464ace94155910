"""Hugging Face checkpoints: a directory of config.json, safetensors (or the older pytorch_model .bin) and tokenizer."""

import dataclasses
import re
import reprlib
from pathlib import Path
from typing import Any

from megatron.pruning.formats.card import model_card
from megatron.pruning.formats.checks import check_apart, check_keys, check_tensor
from megatron.pruning.formats.format import SHARD_BYTES, Format, Output, SaveOptions, in_shards
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.hf_config import RUNS_CODE, config_from_hf, config_to_hf, hf_export_problem
from megatron.pruning.model.lineage import CARD_FILE
from megatron.pruning.model.weights import FIRST, LAST, WeightRow, all_weights, weight_shape
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.safetensors_file import SafetensorsFile, read_safetensors
from megatron.pruning.storage.small_files import as_json, parse_json, read_small
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.views import Stored, View, cast, equal

CONFIG_FILE = "config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_WRAPPED = re.compile(r"(?:module\.|_orig_mod\.)*")  # what data parallelism and torch.compile put before a name
_MAX_JSON_BYTES = 10_000_000  # of a config.json or an index

# Buffers that old exports stored: recomputed from the config, not weights.
_IGNORED = re.compile(r"(?:.+\.)?rotary_emb\..+|(?:.+\.)?(?:self_attn|attention)\.(?:bias|masked_bias)")


class HfCheckpoint(Checkpoint):
    """A Llama in Hugging Face's format. Raises ValueError on anything missing, unexpected or of another shape."""

    format, layout = "hf", None

    def __init__(self, path: Path, directory: Path) -> None:
        self.path, self.root, self.tokenizer_folder = path, directory, directory
        self.files = weight_files(path)
        self.config, self.left_behind, self.declared_dtype = read_hf_config(path / CONFIG_FILE)
        self._stored: dict[str, View] = {}
        for file in self.files:
            read = read_safetensors if file.suffix == ".safetensors" else _read_bin
            for stored_key, tensor in read(file, _IGNORED).items():
                key = _WRAPPED.sub("", stored_key)
                if key in self._stored:
                    raise ValueError(f"{key} is in {next(self._stored[key].sources()).path} and again in {file}")
                self._stored[key] = tensor
        self._tie()
        self._check()

    def _tie(self) -> None:
        """Keep of the embedding and the output layer what the config needs, or change what it says.

        A model that calls itself tied has one of them, under either name, or both with the same values. With others it
        is not tied, whatever it says: none of them is dropped.
        """
        embedding, head = FIRST[0].hf_key(None), LAST[-1].hf_key(None)
        if not self.config.tied or head not in self._stored:
            return
        if embedding not in self._stored:
            self._stored[embedding] = self._stored.pop(head)
        elif equal(self._stored[embedding], self._stored[head]):
            del self._stored[head]
        else:
            self.config = dataclasses.replace(self.config, tied=False)

    def _check(self) -> None:
        rows = all_weights(self.config.num_layers, self.config.tied, self.config.features)
        expected = {weight.hf_key(layer): weight for weight, layer in rows}
        check_keys(str(self.path), set(self._stored), set(expected))
        check_apart(self._stored.items())
        for key, weight in expected.items():
            check_tensor(str(self.path), key, self._stored[key], weight_shape(weight, self.config.sizes))

    def weight(self, weight: WeightRow, layer: int | None) -> View:
        return self._stored[weight.hf_key(layer)]


def read_hf_config(path: Path) -> tuple[LlamaConfig, tuple[str, ...], str | None]:
    """Read a config.json: return the config, the settings that would have a reader run code, and the dtype.

    The dtype is None where it is not said, or not one of Llama's. Raises ValueError when the file is not JSON or not a
    Llama's.
    """
    raw = _read_json(path)
    said = raw.get("dtype") or raw.get("torch_dtype")
    dtype = next((ours for ours, theirs in TORCH_NAMES.items() if said == theirs), None)
    return config_from_hf(raw, str(path)), tuple(name for name in RUNS_CODE if raw.get(name) is not None), dtype


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(read_small(path, _MAX_JSON_BYTES), str(path))


def weight_files(path: Path) -> list[Path]:
    """Return the weight files: those an index names, or the single one. Names from inside the index stay in `path`.

    Raises ValueError where one is missing.
    """
    for single, index in ((WEIGHTS_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (path / single).is_file():  # transformers, too, prefers it to an index
            return [path / single]
        if (path / index).is_file():
            files = [path / name for name in indexed_files(path / index)]
            for file in files:
                if not file.is_file():
                    raise ValueError(f"{path / index} names {file.name}, which is not in {path}")
            return files
    raise ValueError(f"{path} has a config.json but neither model.safetensors nor pytorch_model.bin (or their index)")


def indexed_files(index: Path) -> list[str]:
    """Return the names of the files that an index names. Raises ValueError where it names anything else."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to plain file names")
    return sorted(set(names.values()))


def _read_bin(path: Path, ignored: re.Pattern[str]) -> dict[str, Stored]:
    from megatron.pruning.storage.torch_reader import Window, load_torch, stored

    file = File(path)
    content = load_torch(Window(file))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a state dict")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{path} holds a tensor called {reprlib.repr(strange[0])}")
    return {key: stored(file, key, tensor) for key, tensor in content.items() if not ignored.fullmatch(key)}


def hf_output(checkpoint: Checkpoint, options: SaveOptions, shard_bytes: int = SHARD_BYTES) -> Output:
    """Return the weight files and the small files of `checkpoint` in Hugging Face's format.

    Raises ValueError for a shape that transformers would not load.
    """
    if problem := hf_export_problem(checkpoint.config):
        raise ValueError(f"{problem}; for training alone, write it with --format torch")
    views = {weight.hf_key(layer): cast(view, options.dtype) for weight, layer, view in checkpoint.weights()}
    shards = in_shards(((item, item[1].nbytes) for item in views.items()), shard_bytes)
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = [SafetensorsFile(name, dict(shard)) for name, shard in zip(names, shards, strict=True)]
    beside = {
        CONFIG_FILE: as_json(config_to_hf(checkpoint.config, options.dtype or checkpoint.dtype)),
        **checkpoint.carried_files(),
    }
    if checkpoint.lineage.steps:
        beside[CARD_FILE] = model_card(checkpoint)
    if len(shards) > 1:
        where = {key: file.name for file in files for key in file.views}
        total = sum(file.nbytes for file in files)
        beside[INDEX_FILE] = as_json({"metadata": {"total_size": total}, "weight_map": where})
    return files, beside


def _detect(path: Path, iteration: int | None) -> Path | None:
    return path if (path / CONFIG_FILE).is_file() and iteration is None else None


FORMAT = Format(
    name="hf",
    summary="Hugging Face's safetensors",
    mark=CONFIG_FILE,
    detect=_detect,
    open=HfCheckpoint,
    write=hf_output,
    parallel=False,
    weights=(f"{WEIGHTS_FILE}*", "pytorch_model.bin*"),
)
