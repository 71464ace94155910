"""What Megatron's fused CUDA kernels do, in as few passes over memory as torch has on a CPU.

Megatron's unfused functions make a new tensor at every step of a formula: rotating queries and keys takes six passes
forward and eight backward, here two and two. The numbers are the same but for rounding.
"""

import functools
from typing import Any

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import cross_entropy, layers
from megatron.core.transformer import attention
from megatron.training.models import GPTModelConfig
from torch import Tensor

# Up to which a rotation is a matrix product. A larger head's matrix has too many zeros, and all of a longer sequence's
# fill the cache.
LARGEST_HEAD, LARGEST_MATRICES = 64, 2**22

_stock_rotation = rope_utils._apply_rotary_pos_emb_bshd
_stock_linear = layers.linear_with_grad_accumulation_and_async_allreduce


def install(model: GPTModelConfig, sequence: int, torch_attention: bool) -> None:
    """Puts these in the place of Megatron's functions, and lets torch's Adam do all of a weight in one pass.

    Args:
        model: gets the settings that make Megatron call them.
        sequence: tokens in one.
        torch_attention: whether the model's attention takes queries, keys and values of any layout.
    """
    config = model.transformer
    config.bias_activation_fusion = config.gated_linear_unit and config.activation_func == torch.nn.functional.silu
    config.fused_single_qkv_rope = torch_attention and small_rotation(model, sequence)
    if rope_utils._apply_rotary_pos_emb_bshd is rotate:
        return
    rope_utils._apply_rotary_pos_emb_bshd = rotate
    attention.apply_fused_qkv_rotary_pos_emb, attention.HAVE_FUSED_QKV_ROPE = split_and_rotate, True
    cross_entropy.VocabParallelCrossEntropy.calculate_logits_max = staticmethod(logits_and_largest)
    fused_bias_swiglu.SwiGLUFunction = SwiGLU
    layers.linear_with_grad_accumulation_and_async_allreduce = linear
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):
        optimizer.__init__ = _fused(optimizer.__init__)  # type: ignore[method-assign]


def small_rotation(model: GPTModelConfig, sequence: int) -> bool:
    """Whether `split_and_rotate` does all that this model does between its projection and its attention."""
    config = model.transformer
    return (
        (model.position_embedding_type, model.rotary_percent) == ("rope", 1.0)
        and config.kv_channels <= LARGEST_HEAD
        and sequence * config.kv_channels**2 <= LARGEST_MATRICES
        and config.recompute_granularity != "full"  # which would make the matrices anew in every layer
        and config.num_query_groups >= config.tensor_model_parallel_size
        and not (config.rotary_interleaved or config.qk_layernorm or config.no_rope_freq or config.flash_decode)
        and not (config.attention_output_gate or config.multi_latent_attention or config.test_mode)
    )


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
        return _turned(t, cos, sin, t.new_empty(t.shape))

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


def split_and_rotate(mixed: Tensor, freqs: Tensor, _: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values of self-attention.

    Args:
        mixed: [sequence, batch, groups, sizes of queries, key and value]; contiguous.
        freqs: the angles, [sequence, 1, 1, dim].
        sizes: heads of a group times dim, dim, dim.

    Returns:
        [sequence, batch, heads or groups, dim] each, laid out as torch's attention likes it, with the batch outermost.
    """
    matrix = getattr(freqs, "matrix", None)
    if matrix is None or matrix.dtype != mixed.dtype:
        matrix = freqs.matrix = _rotation_matrix(freqs[:, 0, 0]).to(mixed.dtype)  # type: ignore[attr-defined]
    result: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(mixed, matrix)  # type: ignore[no-untyped-call]
    return result


def _rotation_matrix(angles: Tensor) -> Tensor:
    """What rows are multiplied by at each position: angles [sequence, dim] -> [sequence, dim, dim]."""
    half = angles.shape[1] // 2
    sin = angles.sin()
    sin[:, :half].neg_()
    return torch.diag_embed(angles.cos()) + torch.diag_embed(sin).roll(half, 1)


class _SplitAndRotate(torch.autograd.Function):
    """One small matrix product at each position; with few dims to a head, faster than passes of a few numbers a row."""

    @staticmethod
    def forward(context: Any, mixed: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context.save_for_backward(matrix)
        dim = matrix.shape[-1]
        mixed = mixed.view(*mixed.shape[:3], -1, dim)  # [sequence, batch, groups, heads of a group + 2, dim]
        rotated = torch.bmm(mixed.view(len(mixed), -1, dim), matrix).view(mixed.shape)
        parts = (rotated[..., :-2, :], rotated[..., -2:-1, :], mixed[..., -1:, :])
        query, key, value = (part.transpose(0, 1).contiguous().transpose(0, 1).flatten(2, 3) for part in parts)
        return query, key, value

    @staticmethod
    def backward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        (matrix,) = context.saved_tensors
        (sequence, batch, groups, dim), heads = key.shape, query.shape[2] // key.shape[2]
        grad = query.new_empty(sequence, batch, groups, heads + 2, dim)
        for part, slot in ((query, grad[..., :-2, :]), (key, grad[..., -2:-1, :]), (value, grad[..., -1:, :])):
            slot.copy_(part.reshape(slot.shape))
        result = torch.bmm(grad.view(sequence, -1, dim), matrix.mT).view(grad.shape)
        result[..., -1, :] = value
        return result.flatten(3), None


def logits_and_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits in float32, and the largest of each token: torch.max looks for its place, too."""
    logits = logits.float()
    return logits, logits.amax(-1)


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
        # LayerNorm's, one pass, of an x whose mean is taken for zero; and what that takes off with the mean of grad.
        x, weight, scale = context.saved_tensors
        grad = grad.contiguous()
        result, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        taken = torch.mv(grad.view(-1, x.shape[-1]), weight).view(scale.shape).mul_(scale).div_(x.shape[-1])
        return result.add_(taken), grad_weight, None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Megatron's linear layer; torch's own where its backward pass has nothing to communicate or to defer."""
    special = ("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "grad_output_buffer")
    if any(options.get(name) for name in special) or options.get("gtp_remat_size", 1) != 1:
        result: Tensor = _stock_linear(input, weight, bias, **options)
        return result
    return torch.nn.functional.linear(input, weight, bias)


linear.warned = True  # type: ignore[attr-defined]  # what Megatron would warn of concerns CUDA only
