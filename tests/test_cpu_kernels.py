"""The CPU's kernels beside the Megatron and torch functions that they replace, forward and backward."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models import GPTModelConfig
from torch import Tensor

from megatron.pruning.training import cpu_kernels


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradients of a fixed weighing of it with respect to the inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    weighing = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=result.dtype)
    result.backward(weighing)
    return [result.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(dtype: torch.dtype) -> None:
    half = random(7, 1, 1, 5)
    freqs = torch.cat([half, half], -1)
    mixed = random(7, 3, 4, 30, dtype=dtype)  # queries lie between keys and values, not alone

    def stock(t: Tensor) -> Tensor:
        t = t[..., 10:20]
        return t * (freqs.cos() * 1.5).to(dtype) + _rotate_half(t, False) * (freqs.sin() * 1.5).to(dtype)

    found = gradients(lambda t: cpu_kernels.rotate(t[..., 10:20], freqs, mscale=1.5), mixed)
    same(found, gradients(stock, mixed), 1e-6 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("options", [{"rotary_interleaved": True}, {}])
def test_a_rotation_that_llama_does_not_have_is_left_to_megatron(options: dict[str, bool]) -> None:
    t, freqs = random(7, 3, 4, 10), random(7, 1, 1, 10 if options else 6)
    same(
        gradients(lambda t: cpu_kernels.rotate(t, freqs, **options), t),
        gradients(lambda t: cpu_kernels._stock_rotation(t, freqs, **options), t),
        0,
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_queries_keys_and_values(heads: int) -> None:
    sequence, batch, groups, dim = 7, 3, 2, 10
    half = random(sequence, 1, 1, dim // 2)
    freqs = torch.cat([half, half], -1)
    sizes = [heads * dim, dim, dim]
    mixed = random(sequence, batch, groups, sum(sizes))
    weights = random(sequence, batch, groups * (heads + 2), dim)

    def stock(mixed: Tensor) -> Tensor:
        query, key, value = torch.split(mixed, sizes, 3)
        query = query.reshape(sequence, batch, -1, dim)
        parts = [cpu_kernels._stock_rotation(t, freqs, rotary_interleaved=False) for t in (query, key)]
        return torch.cat([*parts, value], 2) * weights

    def fused(mixed: Tensor) -> Tensor:
        return torch.cat(cpu_kernels.split_and_rotate(mixed, freqs, freqs, sizes), 2) * weights

    same(gradients(fused, mixed), gradients(stock, mixed), 1e-5)
    query, key, value = cpu_kernels.split_and_rotate(mixed.bfloat16(), freqs, freqs, sizes)
    assert query.dtype == torch.bfloat16 and value.transpose(0, 1).is_contiguous()
    wanted = (stock(mixed) / weights)[:, :, groups * heads : -groups]
    torch.testing.assert_close(key.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"kv_channels": 128}, False),
        ({"kv_channels": 64, "sequence": 1024}, True),
        ({"kv_channels": 64, "sequence": 1025}, False),
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, False),
        ({"recompute_granularity": "selective"}, True),
        ({"no_rope_freq": [1]}, False),
        ({"flash_decode": True}, False),
        ({"attention_output_gate": True}, False),
        ({"multi_latent_attention": True}, False),
        ({"test_mode": True}, False),
        ({"num_query_groups": 1, "tensor_model_parallel_size": 2}, False),
        ({"qk_layernorm": True}, False),
        ({"rotary_interleaved": True}, False),
        ({"position_embedding_type": "yarn"}, False),
        ({"rotary_percent": 0.5}, False),
    ],
)
def test_what_is_rotated_by_small_products(change: dict[str, Any], fused: bool) -> None:
    flat: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 2}
    given = flat | change
    sequence = given.pop("sequence", 8)
    names = ("position_embedding_type", "rotary_percent")
    outside = {"position_embedding_type": "rope"} | {name: given.pop(name) for name in names if name in given}
    model = GPTModelConfig(transformer=TransformerConfig(**given), vocab_size=8, **outside)
    assert cpu_kernels.small_rotation(model, sequence) is fused


def test_largest_logits() -> None:
    logits = random(5, 2, 17, dtype=torch.bfloat16)
    widened, largest = cpu_kernels.logits_and_largest(logits)
    assert torch.equal(widened, logits.float()) and torch.equal(largest, widened.max(-1).values)


def test_swiglu() -> None:
    def stock(y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    y = random(33, 2 * 17)
    same(gradients(lambda y: cpu_kernels.SwiGLU.apply(y, False, False), y), gradients(stock, y), 1e-6)


def test_rms_norm() -> None:
    x, weight = random(9, 2, 31), random(31)
    wanted = gradients(lambda x, weight: torch.nn.functional.rms_norm(x, (31,), weight, 1e-5), x, weight)
    same(gradients(lambda x, weight: cpu_kernels.rms_norm(x, weight, 1e-5), x, weight), wanted, 1e-5)
    turned = x.transpose(0, 1)  # a layout of which torch makes no view
    wanted = gradients(lambda x: torch.nn.functional.rms_norm(x, (31,), weight, 1e-5).transpose(0, 1), turned)
    same(gradients(lambda x: cpu_kernels.rms_norm(x, weight, 1e-5).transpose(0, 1), turned), wanted, 1e-5)
    assert not cpu_kernels.rms_norm(torch.zeros(1, 31), weight, 1e-5).any()


def test_megatron_takes_them() -> None:
    program = """
from megatron.pruning import cpu_device
cpu_device.install()
import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.transformer import attention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models import GPTModelConfig
weights = [torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2)]
optimizers = [torch.optim.AdamW([weights[0]], weight_decay=0.1)]
from megatron.pruning import cpu_kernels
config = TransformerConfig(
    num_layers=1, hidden_size=8, num_attention_heads=1, gated_linear_unit=True, activation_func=torch.nn.functional.silu
)
model = GPTModelConfig(transformer=config, vocab_size=8, position_embedding_type="rope")
for torch_attention in (False, True):
    cpu_kernels.install(model, 8, torch_attention)
    assert config.fused_single_qkv_rope is torch_attention
optimizers.append(torch.optim.AdamW([weights[1]], weight_decay=0.1))
assert [optimizer.param_groups[0]["fused"] for optimizer in optimizers] == [None, True]
for weight, optimizer in zip(weights, optimizers):
    for step in range(3):
        weight.grad = torch.cos(weight.detach() * 7 + step)
        optimizer.step()
assert torch.allclose(*weights, rtol=1e-6, atol=1e-6) and not torch.equal(weights[0], torch.linspace(-1, 1, 50))
assert config.bias_activation_fusion
assert rope_utils._apply_rotary_pos_emb_bshd is cpu_kernels.rotate
assert attention.apply_fused_qkv_rotary_pos_emb is cpu_kernels.split_and_rotate and attention.HAVE_FUSED_QKV_ROPE
assert VocabParallelCrossEntropy.calculate_logits_max is cpu_kernels.logits_and_largest
assert fused_bias_swiglu.SwiGLUFunction is cpu_kernels.SwiGLU
assert layers.linear_with_grad_accumulation_and_async_allreduce is cpu_kernels.linear
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
