"""What each step takes on a cluster for models of three sizes: estimates, from the formulas here and measured rates.

A page shows the table by `resources.table()`, as tables.py says. Bytes are those of bf16 weights; GB are 10^9 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tables

from megatron.pruning.model.config import LlamaConfig

GPU, USED = 80e9, 0.85  # bytes of a GPU, and the share of them that a plan may fill
TOKENS = 20e9  # of the reference's recovery
SEQUENCE = 4096  # tokens, of training and scoring; one sequence is a micro batch
SCORED = 1024  # sequences, the default of tools/score_importance.py
# Of a reconstruction by default: sequences, with the ninth that is held out, of so many tokens and the one after them.
RECONSTRUCTED = (128 + 15) * (2048 + 1)


@dataclass(frozen=True)
class Pair:
    """A parent, and what it is pruned to."""

    parent: LlamaConfig
    pruned: LlamaConfig


SEVEN = LlamaConfig(32, 4096, 11008, 32, 32, 128, 32000)
PAIRS = {
    "7B -> 3.4B": Pair(SEVEN, LlamaConfig(28, 3072, 8192, 24, 24, 128, 32000)),
    "13B -> 7B": Pair(LlamaConfig(40, 5120, 13824, 40, 40, 128, 32000), SEVEN),
    "70B -> 34B": Pair(
        LlamaConfig(80, 8192, 28672, 64, 8, 128, 32000), LlamaConfig(72, 6144, 20480, 48, 8, 128, 32000)
    ),
}
MEASURED = LlamaConfig(22, 2048, 5632, 32, 4, 64, 32000)  # the model of benchmarks/training.py --model 1b


# Bytes ----------------------------------------------------------------------------------------------------------------


def activations(config: LlamaConfig, sequences: int = 1) -> float:
    """Return the bytes that a backward pass needs of the forward pass, with attention recomputed.

    34 bytes a token, hidden channel and layer are those of Korthikanti et al., 2022 (arXiv 2205.05198); the logits are
    there in bf16 and in fp32.
    """
    tokens = sequences * SEQUENCE
    return tokens * (34.0 * config.hidden_size * config.num_layers + 6.0 * config.vocab_size)


def training_bytes(config: LlamaConfig, gpus: int, sequences: int = 1) -> float:
    """Return the bytes of each GPU: up to 8 share a copy by tensor parallelism, and all share the optimizer's state.

    A parameter has 2 bytes of weight, 4 of gradient, and 12 of fp32 weight and Adam's two moments.
    """
    tensor = min(gpus, 8)
    return config.parameters / tensor * (6 + 12 / (gpus // tensor)) + activations(config, sequences) / tensor


def scoring_bytes(config: LlamaConfig, gpus: int) -> float:
    """Return the bytes of each GPU: the weights, one sequence between two layers, and its logits."""
    return (2.0 * config.parameters + SEQUENCE * (34.0 * config.hidden_size + 6.0 * config.vocab_size)) / gpus


def states_bytes(pair: Pair) -> float:
    """Return the bytes of the hidden states that a reconstruction keeps: of both models, around a layer, in fp32."""
    pruned = pair.pruned
    heads = pruned.num_attention_heads * pruned.head_dim
    return RECONSTRUCTED * 4.0 * (3 * pair.parent.hidden_size + 3 * pruned.hidden_size + heads)


def refit_bytes(pair: Pair) -> float:
    """Return the bytes of a process that refits: layers of both models in fp32, and sums of products in fp64.

    The layers are those that compute, and their weights. The sums are of two texts; the widest weight's are factored in
    a copy of a copy, and solved for in a few of its own size. (One of 70B took 30 GB, of which this makes 33.)
    """
    layers = sum(4.0 * 2 * config.parameters / config.num_layers for config in (pair.parent, pair.pruned))
    ffn, hidden = pair.pruned.ffn_hidden_size, pair.pruned.hidden_size
    return layers + 8.0 * (4 * ffn * ffn + 6 * ffn * hidden + 2 * hidden * hidden)


def evaluation_bytes(config: LlamaConfig, windows: int = 8, length: int = 512) -> float:
    """Return the bytes of the GPU of tools/evaluate.py: weights, and logits in bf16 and twice in fp32."""
    return 2.0 * config.parameters + windows * length * 10.0 * config.vocab_size


def gpus_for(need: Callable[[int], float]) -> str:
    """Return the fewest GPUs, a power of 2, of which each has room for its `need` of bytes, and that in GB."""
    gpus = 1
    while need(gpus) > USED * GPU:
        gpus *= 2
    return f"{gpus} x {need(gpus) / 1e9:.0f}"


# Rates ----------------------------------------------------------------------------------------------------------------


def flops_a_second() -> float:
    """Return the floating-point operations of a second of an H100 that trains, by benchmarks/training.py."""
    arms = _result("training-1b")["arms"]
    return float(max(arm["tokens_per_second"] for arm in arms.values()) * 6 * MEASURED.parameters)


def seconds(case: str, nbytes: float) -> float:
    """Return the seconds of so many bytes of output, at the rate of a case of benchmarks/streaming.py with 7B."""
    found = _result("streaming-7b")["cases"][case]
    return float(nbytes / 1e9 / found["output_gigabytes"] * found["seconds"])


def memory(config: LlamaConfig) -> float:
    """Return the bytes of a conversion: the most of any case with 7B, by the size of the largest weight."""
    most = max(case["anonymous_megabytes"] for case in _result("streaming-7b")["cases"].values())
    return float(most * 1e6 * max(1, config.hidden_size / SEVEN.hidden_size))


def _result(name: str) -> Any:
    return tables._read(tables.RESULTS / f"{name}.json")


# Table ----------------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Pair], str]] = {
    "convert: memory of a node, MB": lambda pair: f"{memory(pair.parent) / 1e6:.0f}",
    "convert: disk, GB": lambda pair: f"{2 * pair.parent.parameters / 1e9:.0f}",
    "convert: seconds": lambda pair: f"{seconds('convert hf to torch', 2 * pair.parent.parameters):.0f}",
    "score: GPUs, GB of each": lambda pair: gpus_for(lambda gpus: scoring_bytes(pair.parent, gpus)),
    "score: GPU minutes": lambda pair: f"{SCORED * SEQUENCE * 2 * pair.parent.parameters / flops_a_second() / 60:.0f}",
    "prune without a text: seconds": lambda pair: f"{seconds('prune hf', 2 * pair.pruned.parameters):.0f}",
    "reconstruct: hidden states of all processes, GB": lambda pair: f"{states_bytes(pair) / 1e9:.0f}",
    "reconstruct: memory of a process beside them, GB": lambda pair: f"{refit_bytes(pair) / 1e9:.0f}",
    "train: GPUs at least, GB of each": lambda pair: gpus_for(lambda gpus: training_bytes(pair.pruned, gpus)),
    "train: GPU hours for 20B tokens": lambda pair: (
        f"{TOKENS * 6 * pair.pruned.parameters / flops_a_second() / 3600:,.0f}"
    ),
    "train: disk of each checkpoint, GB": lambda pair: f"{14 * pair.pruned.parameters / 1e9:.0f}",
    "export: disk, GB": lambda pair: f"{2 * pair.pruned.parameters / 1e9:.0f}",
    "export: seconds": lambda pair: f"{seconds('export torch_dist to hf', 2 * pair.pruned.parameters):.0f}",
    "evaluate: memory of the GPU, GB": lambda pair: f"{evaluation_bytes(pair.pruned) / 1e9:.0f}",
}


def table() -> None:
    """Print what each step takes, by model."""
    rows = [["", *PAIRS]]
    rows += [[tables.said(name), *(row(pair) for pair in PAIRS.values())] for name, row in ROWS.items()]
    tables.show(rows)
    print()
