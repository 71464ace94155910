"""Tiny Llamas that everything is tested on, made by transformers."""

import argparse
import signal
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

# What the rank files of Megatron-LM hold beside tensors and plain values.
_NUMPY_RECONSTRUCT: Any = np.ndarray(0).__reduce__()[0]
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    signal.Signals,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((_NUMPY_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
MEGATRON_CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
)

ROOT = Path(__file__).resolve().parents[1]

SHAPES: dict[str, dict[str, Any]] = {
    # Odd sizes throughout; heads * head_dim != hidden.
    "mha": {
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "gqa": {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
    },
    "tied": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 44,
        "intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "llama3": {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def make_llama(
    path: Path,
    shape: str = "gqa",
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    vocab: int = 101,
    **save: Any,
) -> Path:
    """Save a random Llama, its norms' gains random too, as Hugging Face does it."""
    torch.manual_seed(len(shape) + layers)
    fields = {"model_type": "llama", "max_position_embeddings": 64, "rms_norm_eps": 1e-4} | SHAPES[shape]
    config = AutoConfig.for_model(num_hidden_layers=layers, vocab_size=vocab, **fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 1.0 if "norm" in name else 0.0
            parameter.copy_(gain + 0.15 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path, **save)
    return path


def load_whole(path: Path) -> dict[str, Any]:
    """Return all that a rank file holds, with the real classes of megatron, fit to be changed and saved again."""
    real = [found for name in MEGATRON_CLASSES if (found := locate(name)) is not None]
    with torch.serialization.safe_globals([*PLAIN_CLASSES, *real]):
        return torch.load(path, weights_only=True)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a directory of safetensors, read by their own library."""
    return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


def hf_logits(path: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the model's logits, [batch, sequence, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="session", params=sorted(SHAPES))
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint of each shape."""
    return make_llama(tmp_path_factory.mktemp("llama") / request.param, request.param)


@pytest.fixture(scope="session")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint with grouped-query attention."""
    return make_llama(tmp_path_factory.mktemp("gqa") / "hf", "gqa")
