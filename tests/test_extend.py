"""A family, a format and a criterion are added from outside, each as docs/en/extend.md shows it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_llama, tensors
from safetensors.torch import save_file

import prune_llama
from megatron.pruning.formats import FORMATS, open_checkpoint, save_checkpoint
from megatron.pruning.formats.format import Format, Output, SaveOptions
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import FAMILIES, Family
from megatron.pruning.model.hf_config import config_from_hf, config_to_hf
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.weights import WeightRow, all_weights, weight_shape
from megatron.pruning.plan.choose import CRITERIA, LAYER_CRITERIA, Criterion, LayerCriterion
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.scores import AxisScores, Scores
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.output import OutputFile
from megatron.pruning.storage.small_files import as_json
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.views import Stored, View, cast

# family: begin
FAMILY = Family("TwoForCausalLM", features=frozenset({"qkv_bias", "qk_norm"}))
# family: end


# format: begin
class RawFile(OutputFile):
    """All weights, one after the other, and nothing else."""

    def parts(self, checksums: Mapping[str, int]) -> Iterator[bytes | str]:
        yield from self.views  # a key stands for the tensor's bytes


class RawCheckpoint(Checkpoint):
    """A Llama in two files: weights.bin, and raw.json with its config."""

    format, layout = "raw", None

    def __init__(self, path: Path, directory: Path) -> None:
        self.path = self.root = self.tokenizer_folder = directory
        content = json.loads((directory / "raw.json").read_text())
        self.config = config_from_hf(content["config"], str(path))
        self.files, self.places, at = [directory / "weights.bin"], {}, 0
        for row, layer in all_weights(self.config.num_layers, self.config.tied, self.config.features):
            self.places[row.name, layer] = at
            at += int(np.prod(weight_shape(row, self.config.sizes))) * BYTES[content["dtype"]]
        self.stored_as = content["dtype"]

    def weight(self, row: WeightRow, layer: int | None) -> View:
        shape = weight_shape(row, self.config.sizes)
        return Stored(File(self.files[0]), self.places[row.name, layer], shape, self.stored_as)


def write_raw(checkpoint: Checkpoint, options: SaveOptions) -> Output:
    dtype = options.dtype or checkpoint.dtype
    views = {row.hf_key(layer): cast(view, dtype) for row, layer, view in checkpoint.weights()}
    content = {"dtype": dtype, "config": config_to_hf(checkpoint.config, dtype)}
    return [RawFile("weights.bin", views)], {"raw.json": as_json(content)}


def detect_raw(path: Path, iteration: int | None) -> Path | None:
    return path if (path / "raw.json").is_file() else None


FORMAT = Format("raw", "weights without headers", "raw.json", detect_raw, RawCheckpoint, write_raw, parallel=False)
# format: end


# criterion: begin
def last(parent: Checkpoint, seed: int, scores: Scores | None) -> AxisScores:
    """Score an index by its number, so that the last ones are kept."""
    return lambda axis, layer: np.arange(parent.config.sizes[axis], dtype=np.float64)


def first_layers(layers: int, drop: int, scores: Scores | None) -> tuple[int, ...]:
    """Drop the first layers."""
    return tuple(range(drop))


CRITERION = Criterion("the last indices", last)
LAYER_CRITERION = LayerCriterion("the first ones", first_layers, needs_scores=False)
# criterion: end


def test_a_family_with_known_rows_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "two", FAMILY)
    source = make_llama(tmp_path / "hf", "gqa")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "two"}
    (source / "config.json").write_text(json.dumps(config))
    state = tensors(source)
    for layer in range(4):
        at = f"model.layers.{layer}.self_attn"
        for name, size in (
            ("q_proj.bias", 48),
            ("k_proj.bias", 24),
            ("v_proj.bias", 24),
            ("q_norm.weight", 6),
            ("k_norm.weight", 6),
        ):
            state[f"{at}.{name}"] = torch.randn(size)
    save_file(state, source / "model.safetensors")
    save_checkpoint(open_checkpoint(source), tmp_path / "m", format="torch", layout=Layout(2, 2))
    save_checkpoint(open_checkpoint(tmp_path / "m"), tmp_path / "back", format="hf")
    back = tensors(tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "two"
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_a_format_is_one_module_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, FORMAT.name, FORMAT)
    source = make_llama(tmp_path / "hf", "gqa")
    prune_llama.main(["--load", str(source), "--save", str(tmp_path / "raw"), "--drop_layers=1", "--format=raw"])
    assert isinstance(open_checkpoint(tmp_path / "raw"), RawCheckpoint)
    prune_llama.main(["--load", str(source), "--save", str(tmp_path / "pruned"), "--drop_layers=1", "--format=hf"])
    save_checkpoint(open_checkpoint(tmp_path / "raw"), tmp_path / "back", format="hf", overwrite=True)
    back, pruned = tensors(tmp_path / "back"), tensors(tmp_path / "pruned")
    assert back.keys() == pruned.keys() and all(torch.equal(back[key], pruned[key]) for key in back)


def test_a_criterion_is_one_function_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "last", CRITERION)
    monkeypatch.setitem(LAYER_CRITERIA, "first", LAYER_CRITERION)
    source, flags = make_llama(tmp_path / "hf", "gqa"), ["--num_layers_remain=3", "--ffn_hidden_size_remain=40"]
    flags += ["--criterion=last", "--layer_criterion=first", "--format=hf"]
    prune_llama.main(["--load", str(source), "--save", str(tmp_path / "p"), *flags])
    plan = Plan.from_json((tmp_path / "p/prune_plan.json").read_text(), "the plan")
    assert plan.layers.tolist() == [1, 2, 3] and plan.ffn[0].tolist() == list(range(32, 72))
    assert "last: the last indices" in " ".join(prune_llama.parser().format_help().split())
