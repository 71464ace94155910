"""Local layers: what Megatron uses where TransformerEngine is not installed, with torch's own attention and norm."""

import argparse
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import GPTModelConfig
from megatron.training.models.gpt import default_layer_spec

from megatron.pruning.training.documents import Documents, EngineDocuments


class TorchAttention(MegatronModule):  # type: ignore[misc]  # of a library without types
    """Causal attention through torch's scaled_dot_product_attention, in memory linear in the sequence.

    The constructor is the one that Megatron's layer specifications call; it raises ValueError for what only
    TransformerEngine's attention does.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **options: Any
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("--context-parallel-size above 1 needs TransformerEngine, which is not installed")
        if config.window_size or config.softmax_type != "vanilla":
            raise ValueError(
                "window attention and other kinds of softmax need TransformerEngine, which is not installed"
            )
        self.scale = options.get("softmax_scale") or config.kv_channels**-0.5
        dropout = options.get("attention_dropout")
        self.dropout = config.attention_dropout if dropout is None else dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: Documents | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Return what the queries gather, `[sequence, batch, heads * head_dim]`.

        Query, key and value are `[sequence, batch, heads or groups, head_dim]`; `attention_mask`, whose True hides, is
        given only with --reset-attention-mask, and `packed_seq_params` where documents are kept apart.
        """
        dtype = query.dtype
        if query.device.type == "cpu":
            # On a CPU torch's attention is fastest with the batch outermost in memory, and its backward pass takes half
            # the time in float32 that it takes in bfloat16.
            wide = torch.promote_types(dtype, torch.float32)
            query, key, value = (t.to(wide).transpose(0, 1).contiguous().transpose(0, 1) for t in (query, key, value))
        elif (dtype == torch.float32 or attention_mask is not None) and query.shape[2] != key.shape[2]:
            # The one kernel that is linear in memory in fp32, or with a mask, wants a key for every head.
            key, value = (t.repeat_interleave(query.shape[2] // t.shape[2], dim=2) for t in (key, value))
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [batch, heads, sequence, head_dim]
        if packed_seq_params is None:
            mixed = self._mix(query, key, value, attention_mask)
        else:
            mixed = self._apart(query, key, value, packed_seq_params)
        # Whole in memory: of anything else torch.matmul makes, without gradients, a small product for every position.
        return mixed.permute(2, 0, 1, 3).flatten(2).to(dtype).contiguous()

    def _mix(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what the queries gather; all are `[batch, heads or groups, sequence, head_dim]`."""
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _apart(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents) -> torch.Tensor:
        """Return what the queries of each document gather in it, in the shapes of `_mix`."""
        batch = query.shape[0]
        # [heads or groups, all sequences behind each other, head_dim], a document after the other
        parts = (torch.split(t.transpose(0, 1).flatten(1, 2), documents.lengths, dim=1) for t in (query, key, value))
        mixed = torch.cat([self._mix(*(t[None] for t in part)) for part in zip(*parts, strict=True)], dim=2)
        return mixed[0].view(mixed.shape[1], batch, -1, mixed.shape[-1]).transpose(0, 1)

    def sharded_state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Return nothing to save: attention has no weights."""
        return {}


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose gain Megatron's sequence parallelism sums over the tensor-parallel ranks.

    The gain has the model's dtype: torch's fused kernel wants one, and a pipeline sends what a layer gives in it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def local_layers(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return this pipeline stage's layers: Megatron's local ones with `TorchAttention` and `LocalRMSNorm`."""
    block = unfused_layers(config, vp_stage)
    for layer in block.layer_specs[:1]:  # all of them are one object
        layer.submodules.self_attention.submodules.core_attention = ModuleSpec(module=TorchAttention)
    return block


def unfused_layers(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return them with Megatron's own attention, whose memory is quadratic in the sequence: something to compare with.

    `--spec megatron.pruning.training.local_layers unfused_layers` chooses it.
    """
    transformer = config.transformer
    layer = get_gpt_layer_local_spec(
        num_experts=transformer.num_moe_experts,
        qk_layernorm=transformer.qk_layernorm,
        normalization=transformer.normalization,
    )
    if transformer.normalization == "RMSNorm":
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalRMSNorm
        if transformer.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    count = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=layer.submodules.input_layernorm)


def engine_layers(config: GPTModelConfig, vp_stage: int | None = None) -> ModuleSpec:
    """Return TransformerEngine's layer, with an attention that keeps documents apart."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention  # none without TransformerEngine

    layer = default_layer_spec(config, vp_stage)
    apart = type("DocumentAttention", (EngineDocuments, TEDotProductAttention), {})
    layer.submodules.self_attention.submodules.core_attention = apart
    return layer


def gpt_config(args: argparse.Namespace) -> GPTModelConfig:
    """Return the model that the flags describe, with these layers where TransformerEngine's are not asked for."""
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor  # a stock flag that stock does not pass on
    if args.transformer_impl == "local" and args.spec is None:
        config.transformer_layer_spec = local_layers
    elif args.dataloader_inter_document_masking:
        config.transformer_layer_spec = engine_layers
    return config
