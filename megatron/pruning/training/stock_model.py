"""Megatron's own GPTModel, built from any checkpoint that the project reads: no conversion first, one tensor at a time.

The layers are the local ones (local_layers.py), whose norms and linears are modules of their own that a hook can watch.
"""

import os

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models import GPTModelConfig
from megatron.training.models.gpt import GPTModelBuilder

from megatron.pruning.formats.megatron import full_key, rank_views
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import config_to_args
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.processes import World
from megatron.pruning.storage.views import View, blocks
from megatron.pruning.training import cpu_device
from megatron.pruning.training.local_layers import local_layers
from megatron.pruning.training.quiet import quiet_imports


def join(layout: Layout) -> None:
    """Meet the processes that torchrun started (or none), and cut them into tensor, pipeline and data parallel groups.

    Raises ValueError unless the number of processes is a multiple of the model's ranks.
    """
    world, ranks = int(os.environ.get("WORLD_SIZE", "1")), layout.tensor * layout.pipeline
    if world % ranks:
        raise ValueError(
            f"{world} processes were started for {layout}, which takes {ranks}, or a multiple of it: start as many"
        )
    if "WORLD_SIZE" not in os.environ:  # without torchrun: one process, which meets nobody
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}
    if not cpu_device.is_installed():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    World.joined = True
    torch.distributed.init_process_group("gloo" if cpu_device.is_installed() else "nccl")
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    model_parallel_cuda_manual_seed(1)  # layers ask for its random state even without dropout


def build(checkpoint: Checkpoint, layout: Layout, dtype: str) -> GPTModel:
    """Return this rank's stage of the model, in eval mode and without gradients, with the weights of `checkpoint`.

    Args:
        checkpoint: of any format and layout, one that can be cut to `layout`; this rank reads what it will hold.
        layout: of the model that is built; `join` has made its groups.
        dtype: of the weights and of the computation: fp32, bf16 or fp16.
    """
    with quiet_imports():
        config = _model_config(checkpoint.config, layout, getattr(torch, TORCH_NAMES[dtype]))
        model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    model.requires_grad_(False).eval().cuda()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    views = rank_views(checkpoint, layout, parallel_state.get_tensor_model_parallel_rank(), stage)
    fill(model, views, layout.layers_of_stage(checkpoint.config.num_layers, stage).start)
    return model


def _model_config(config: LlamaConfig, layout: Layout, dtype: torch.dtype) -> GPTModelConfig:
    args = config_to_args(config, layout)
    transformer = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        attention_backend=AttnBackend.unfused,
        perform_initialization=False,
        use_cpu_initialization=cpu_device.is_installed(),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
    )
    built = GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=local_layers,
        vocab_size=args.padded_vocab_size,
        seq_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        share_embeddings_and_output_weights=config.tied,
    )
    built.finalize()
    return built


def fill(model: torch.nn.Module, views: dict[tuple[str, int | None], View], first_layer: int = 0) -> None:
    """Read what this rank holds into the parameters of its stage, which are all of them, a block of rows at a time.

    Args:
        model: a GPTModel of local or TransformerEngine's layers, whose names of norms differ.
        views: as `rank_views` gives them, by Megatron name and global layer.
        first_layer: of this stage.
    """
    parameters = dict(model.named_parameters())
    for (name, layer), view in views.items():
        local = None if layer is None else layer - first_layer
        key = full_key(name, local)
        parameter = parameters.pop(key if key in parameters else full_key(name, local, te=True))
        assert tuple(parameter.shape) == view.shape, (key, parameter.shape, view.shape)
        start = 0
        for _, bits in blocks(view):
            values = torch.from_numpy(bits).view(getattr(torch, TORCH_NAMES[view.dtype]))
            parameter.data[start : start + len(bits)].copy_(values)
            start += len(bits)
    assert not parameters, sorted(parameters)
