"""What Megatron's fused CUDA kernels do, in as few passes over memory as torch has on a CPU.

Megatron's unfused functions make a new tensor at every step of a formula: rotating queries and keys takes six passes
forward and eight backward, here two and two. The numbers are the same but for rounding.
"""

import functools
from typing import Any

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_stock_rotation = rope_utils._apply_rotary_pos_emb_bshd
_stock_linear = layers.linear_with_grad_accumulation_and_async_allreduce


def install(config: TransformerConfig) -> None:
    """Puts these in the place of Megatron's functions, and lets torch's Adam do all of a weight in one pass."""
    config.bias_activation_fusion = config.gated_linear_unit and config.activation_func == torch.nn.functional.silu
    if rope_utils._apply_rotary_pos_emb_bshd is rotate:
        return
    rope_utils._apply_rotary_pos_emb_bshd = rotate
    fused_bias_swiglu.SwiGLUFunction = SwiGLU
    layers.linear_with_grad_accumulation_and_async_allreduce = linear
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):
        optimizer.__init__ = _fused(optimizer.__init__)  # type: ignore[method-assign]


def _fused(init: Any) -> Any:
    @functools.wraps(init)
    def call(self: torch.optim.Optimizer, *args: Any, **options: Any) -> None:
        if options.get("fused") is None and not options.get("foreach"):
            options["fused"] = True
        init(self, *args, **options)

    return call


def rotate(t: Tensor, freqs: Tensor, *args: Any, **options: Any) -> Tensor:
    """Rotary embedding of `t`, [sequence, batch, heads, dim], by angles `freqs`, [sequence, 1, 1, dim].

    What Llama does not do (interleaved pairs, a part of the dim only) is left to Megatron.
    """
    special = args or options.get("rotary_interleaved") or options.get("mla_rotary_interleaved")
    if special or t.dim() != 4 or freqs.shape[-1] != t.shape[-1]:
        rotated: Tensor = _stock_rotation(t, freqs, *args, **options)
        return rotated
    scale = options.get("mscale", 1.0)
    cos, sin = (freqs.cos() * scale).to(t.dtype), (freqs.sin() * scale).to(t.dtype)
    rotated = _Rotation.apply(t, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) of the two halves of the last dim, and its transpose."""

    @staticmethod
    def forward(context: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        # Laid out as torch's attention likes it: [batch, sequence, heads, dim].
        return _turned(t, cos, sin, t.new_empty(t.shape[1], t.shape[0], *t.shape[2:]).transpose(0, 1))

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = context.saved_tensors
        return _turned(grad, cos, -sin.roll(sin.shape[-1] // 2, -1), grad.new_empty(grad.shape)), None, None


def _turned(t: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    torch.mul(t, cos, out=out)
    (low, high), (sin_low, sin_high) = t.chunk(2, -1), sin.chunk(2, -1)
    out_low, out_high = out.chunk(2, -1)
    out_low.addcmul_(high, sin_low, value=-1)
    out_high.addcmul_(low, sin_high)
    return out


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of the two halves of the last dim; their gradients are written side by side."""

    @staticmethod
    def forward(context: Any, y: Tensor, *options: bool) -> Tensor:
        gate, up = y.chunk(2, -1)
        activated = torch.nn.functional.silu(gate)
        context.save_for_backward(y, activated)
        context.options = len(options)  # of Megatron, for storing in fp8 and for offloading: not on a CPU
        return activated * up

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, activated = context.saved_tensors
        (gate, up), result = y.chunk(2, -1), torch.empty_like(y)
        grad_gate, grad_up = result.chunk(2, -1)
        torch.mul(grad, activated, out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return result, *[None] * context.options


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim of `x`, both float32: torch's own is differentiated operation by operation."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        context.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = context.saved_tensors
        normed = x * scale
        product = (grad * normed).reshape(-1, x.shape[-1])
        along = torch.mv(product, weight).div_(x.shape[-1]).view(scale.shape)
        return torch.mul(grad, weight).addcmul_(normed, along, value=-1).mul_(scale), product.sum(0), None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Megatron's linear layer; torch's own where its backward pass has nothing to communicate or to defer."""
    special = ("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "grad_output_buffer")
    if any(options.get(name) for name in special) or options.get("gtp_remat_size", 1) != 1:
        result: Tensor = _stock_linear(input, weight, bias, **options)
        return result
    return torch.nn.functional.linear(input, weight, bias)


linear.warned = True  # type: ignore[attr-defined]  # what Megatron would warn of concerns CUDA only
