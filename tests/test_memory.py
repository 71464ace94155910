"""A checkpoint of any size converts and prunes in the same small memory: a few blocks, no tensor, no torch."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import CONVERT, PRUNE, run

from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.hf_config import config_to_hf
from megatron.pruning.model.weights import all_weights, weight_shape
from megatron.pruning.storage.safetensors_file import SafetensorsFile
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.views import Bits, Index, View

pytestmark = pytest.mark.slow

SIZE_1B = LlamaConfig(
    num_layers=22, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32, num_query_groups=4, head_dim=64,
    vocab_size=32000,
)  # fmt: skip
SIZE_70B = LlamaConfig(
    num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8, head_dim=128,
    vocab_size=32000,
)  # fmt: skip
REMAIN_1B = "--hidden-size-remain 1536 --ffn-hidden-size-remain 4224 --num-attention-heads-remain 24".split()
REMAIN_70B = "--hidden-size-remain 6144 --ffn-hidden-size-remain 20480 --num-layers-remain 1".split()


class Hole(View):
    """A weight of zeros that only a sparse file holds."""

    dtype = "bf16"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def sources(self) -> Iterator[File]:
        return iter(())

    def read_into(self, rows: Index, out: Bits) -> None:
        raise AssertionError("the file stays sparse")


def sparse_llama(path: Path, config: LlamaConfig) -> Path:
    """Make a Hugging Face checkpoint of any size that takes no disk space; all weights are zero."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_to_hf(config, "bf16")))
    weights = all_weights(config.num_layers, config.tied)
    views = {weight.hf_key(layer): Hole(weight_shape(weight, config.sizes)) for weight, layer in weights}
    header, *rest = SafetensorsFile("model.safetensors", views).segments({})
    assert isinstance(header.content, bytes)
    (path / "model.safetensors").write_bytes(header.content)
    os.truncate(path / "model.safetensors", rest[-1].stop)
    return path


def anonymous_megabytes(*command: str) -> float:
    """Run python with `command` and return the most anonymous memory that it had at once.

    Mapped files and the page cache, which the kernel drops when it needs them, do not count.
    """
    watch = """
import runpy, sys, threading, time
peak = [0]
def look():
    while True:
        lines = open('/proc/self/status').read().splitlines()
        peak[0] = max(peak[0], int(next(line for line in lines if line.startswith('RssAnon')).split()[1]))
        time.sleep(0.002)
threading.Thread(target=look, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
print('torch was imported' if 'torch' in sys.modules else 'no torch', 'peak', peak[0])
"""
    done = run(sys.executable, "-c", watch, *command)
    assert done.returncode == 0, done.stderr
    assert "no torch" in done.stdout
    return float(done.stdout.split("peak")[-1]) / 1024


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a sparse checkpoint of 1.1B parameters, 2.2 GB."""
    return sparse_llama(tmp_path_factory.mktemp("big") / "hf", SIZE_1B)


def test_converting_a_billion_parameters_takes_less_than_150_megabytes(big: Path, tmp_path: Path) -> None:
    target = ["--save", str(tmp_path / "m"), "--tensor-model-parallel-size", "4"]
    assert anonymous_megabytes(CONVERT, "--load", str(big), *target) < 150


@pytest.mark.parametrize("format", ["hf", "torch", "torch_dist"])
def test_pruning_a_billion_parameters_takes_less_than_150_megabytes(big: Path, tmp_path: Path, format: str) -> None:
    target = ["--save", str(tmp_path / "p"), "--num-layers-remain", "6", "--format", format]
    assert anonymous_megabytes(PRUNE, "--load", str(big), *target, *REMAIN_1B) < 150


def test_pruning_70_billion_parameters_takes_less_than_300_megabytes(tmp_path: Path) -> None:
    source = sparse_llama(tmp_path / "hf", SIZE_70B)
    target = ["--save", str(tmp_path / "p"), "--format", "hf"]
    assert anonymous_megabytes(PRUNE, "--load", str(source), *target, *REMAIN_70B) < 300
