"""The shapes of the models that tests make, in a light module: what collects the tests needs no more."""

from typing import Any

import pytest

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
# Biases, norms of queries and keys, groups and tied embeddings are in the fast subset.
EACH_SHAPE = [pytest.param(shape, marks=[pytest.mark.slow] * (shape in ("mha", "llama3"))) for shape in sorted(SHAPES)]
