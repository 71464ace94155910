"""The modules of which Megatron makes its layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from transformer_engine.pytorch import attention, distributed, fp8, optimizers  # noqa: F401
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init  # noqa: F401


class _Module(torch.nn.Module):
    """A module with a state of its own, which is empty without fp8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0, state


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: Any = None,
        **more: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


LayerNorm = RMSNorm  # a Llama has no other


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        parallel_mode: str | None = None,
        params_dtype: Any = None,
        return_bias: bool = False,
        **more: Any,
    ) -> None:
        super().__init__()
        assert not more.get("bias"), "the models of the tests have none"
        self.parallel_mode, self.sequence_parallel, self.tp_group = parallel_mode, sequence_parallel, tp_group
        self.tp_size, self.return_bias, self.use_bias = tp_size, return_bias, False
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        if init_method:
            init_method(self.weight)
        if parallel_mode:
            from megatron.core.tensor_parallel import layers  # which imports this package

            dimension = ("column", "row").index(parallel_mode)
            layers.set_tensor_model_parallel_attributes(self.weight, True, dimension, 1)

    def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        elif self.parallel_mode == "column":
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        y = functional.linear(x, self.weight)
        if self.parallel_mode == "row" and self.sequence_parallel:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        elif self.parallel_mode == "row":
            y = mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
        return y


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float = 1e-5, **more: Any) -> None:
        super().__init__(in_features, out_features, **more)
        self.eps, self.return_layernorm_output = eps, more.get("return_layernorm_output", False)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=more.get("params_dtype")))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, x: torch.Tensor, **more: Any) -> Any:
        normed = functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        y = super().forward(normed)
        return (y, normed) if self.return_layernorm_output else y


class DotProductAttention(_Module):
    def __init__(self, num_attention_heads: int, kv_channels: int, softmax_scale: float | None = None, **more: Any):
        super().__init__()
        self.scale, self.num_attention_heads = softmax_scale, num_attention_heads

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **more: Any
    ) -> torch.Tensor:
        if more.get("qkv_format") == "thd":  # documents behind each other, [tokens, heads, head_dim]
            assert more["attn_mask_type"] == "padding_causal" and torch.equal(
                *(more[f"cu_seqlens_{x}"] for x in "q kv".split())
            )
            assert (
                more["cu_seqlens_q"].dtype == torch.int32 and more["max_seqlen_q"] >= more["cu_seqlens_q"].diff().max()
            )
            parts = (t.split(more["cu_seqlens_q"].diff().tolist()) for t in (query, key, value))
            return torch.cat(
                [
                    DotProductAttention.forward(self, *(t[:, None] for t in part))[:, 0]
                    for part in zip(*parts, strict=True)
                ]
            )
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class GroupedLinear(_Module):
    """For mixtures of experts."""


class TransformerLayer(_Module):
    """A layer in one piece, which Megatron can use too."""
