"""A 1.1B-parameter checkpoint converts and prunes in under 1 GiB of resident memory: one tensor at a time, no model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from megatron.pruning.config import LlamaConfig, config_to_hf
from megatron.pruning.safetensors_file import SafetensorsFile
from megatron.pruning.table import all_weights, weight_shape
from megatron.pruning.views import Index, View

SIZE_1B = LlamaConfig(
    num_layers=22, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32, num_query_groups=4, head_dim=64,
    vocab_size=32000,
)  # fmt: skip


class Hole(View):
    """A weight of zeros that only a sparse file holds."""

    dtype = "bf16"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def read(self, rows: Index) -> None:
        raise AssertionError("the file stays sparse")


def sparse_llama(path: Path, config: LlamaConfig) -> Path:
    """Make a Hugging Face checkpoint of any size that takes no disk space; all weights are zero."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_to_hf(config, "bf16")))
    weights = all_weights(config.num_layers, config.tied)
    views = {weight.hf_key(layer): Hole(weight_shape(weight, config.sizes)) for weight, layer in weights}
    SafetensorsFile("model.safetensors", views).lay_out(path / "model.safetensors")
    return path


def peak_megabytes(*command: str) -> float:
    """Run python with `command` and return the largest resident memory it reached."""
    # VmHWM, not ru_maxrss: that one remembers the process this one was forked from.
    watch = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
    watch += "print('peak', next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", watch, *command], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("peak")[-1]) / 1024


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint of 1.1B parameters, 2.2 GB."""
    return sparse_llama(tmp_path_factory.mktemp("big") / "hf", SIZE_1B)


def test_converting_a_billion_parameters_takes_less_than_a_gibibyte(big: Path, tmp_path: Path) -> None:
    convert = str(ROOT / "tools/checkpoint_conversion/convert.py")
    target = ["--save", str(tmp_path / "m"), "--tensor-model-parallel-size", "4"]
    assert peak_megabytes(convert, "--load", str(big), *target) < 1024


def test_pruning_from_hugging_face_to_hugging_face_takes_less_than_100_megabytes(big: Path, tmp_path: Path) -> None:
    remain = "--hidden-size-remain 1536 --ffn-hidden-size-remain 4224 --drop-layers 5,9,12,15 --format hf".split()
    assert (
        peak_megabytes(str(ROOT / "prune_llama.py"), "--load", str(big), "--save", str(tmp_path / "p"), *remain) < 100
    )


def test_pruning_a_billion_parameters_takes_less_than_a_gibibyte(big: Path, tmp_path: Path) -> None:
    remain = "--hidden-size-remain 1536 --ffn-hidden-size-remain 4224 --num-attention-heads-remain 24".split()
    target = ["--save", str(tmp_path / "p"), "--drop-layers", "5,9,12,15", "--tensor-model-parallel-size", "4"]
    assert peak_megabytes(str(ROOT / "prune_llama.py"), "--load", str(big), *target, *remain) < 1024
