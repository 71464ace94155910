"""Megatron's own GPTModel, built from any checkpoint that the project reads: no conversion first, one tensor at a time.

The layers are the local ones (local_layers.py), whose norms and linears are modules of their own that a hook can watch.
"""

import argparse
import functools
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models import GPTModelConfig
from megatron.training.models.gpt import GPTModelBuilder

from megatron.pruning.formats.megatron import LOCAL, full_key, rank_views
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import config_to_args
from megatron.pruning.storage import processes
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.views import View, blocks
from megatron.pruning.training import cpu_device
from megatron.pruning.training.local_layers import gpt_config
from megatron.pruning.training.quiet import quiet_imports
from megatron.pruning.training.room import number_here


def join(layout: Layout, world: processes.World | None = None) -> None:
    """Meet the processes that torchrun started (or none), and cut them into tensor, pipeline and data parallel groups.

    Those of a `world` have met already, at a store that serves for both.

    Raises ValueError unless the number of processes is a multiple of the model's ranks.
    """
    count, ranks = processes.count(), layout.tensor * layout.pipeline
    if count % ranks:
        raise ValueError(
            f"{count} processes were started for {layout}, which takes {ranks}, or a multiple of it: start as many"
        )
    processes.be_alone_without_torchrun()
    if not cpu_device.is_installed():
        torch.cuda.set_device(number_here())
    processes.World.joined = True
    torch.distributed.init_process_group(
        "gloo" if cpu_device.is_installed() else "nccl", **({} if world is None else world.meeting_place())
    )
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    model_parallel_cuda_manual_seed(1)  # layers ask for its random state even without dropout


def build(checkpoint: Checkpoint, layout: Layout, dtype: str) -> GPTModel:
    """Return this rank's stage of the model, in eval mode and without gradients, with the weights of `checkpoint`.

    `checkpoint` may be of any format and layout, if it can be cut to `layout`, whose groups `join` has made: this rank
    reads what it will hold. `dtype` is that of the weights and of the computation: fp32, bf16 or fp16.
    """
    with quiet_imports():
        model = GPTModelBuilder(watched_model(checkpoint.config, layout, dtype)).build_model(
            ProcessGroupCollection.use_mpu_process_groups()
        )
    model.requires_grad_(False).eval().cuda()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    views = rank_views(checkpoint, layout, parallel_state.get_tensor_model_parallel_rank(), stage)
    load_weights(model, views, layout.layers_of_stage(checkpoint.config.num_layers, stage).start)
    return model


def watched_model(config: LlamaConfig, layout: Layout, dtype: str) -> GPTModelConfig:
    """Return the configuration of a model that is only looked at: of local layers, without any fused kernel."""
    own = {
        "params_dtype": getattr(torch, TORCH_NAMES[dtype]),
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "transformer_impl": LOCAL,
        "attention_backend": AttnBackend.unfused,
        "perform_initialization": False,
        **dict.fromkeys(("gradient_accumulation_fusion", "masked_softmax_fusion", "apply_rope_fusion"), False),
        **dict.fromkeys(("bias_swiglu_fusion", "bias_dropout_fusion"), False),
        "no_persist_layer_norm": True,
    }
    built = model_config(config, layout, _defaults(), own)
    built.finalize()
    return built


@functools.cache
def _defaults() -> argparse.Namespace:
    """Return Megatron's defaults for this device; making its parser takes longer than making a layer."""
    parser = add_megatron_arguments(argparse.ArgumentParser())
    if cpu_device.is_installed():
        cpu_device.add_defaults(parser)
    defaults: argparse.Namespace = parser.parse_args([])
    return defaults


def model_config(
    config: LlamaConfig, layout: Layout, args: argparse.Namespace, own: Mapping[str, Any]
) -> GPTModelConfig:
    """Return Megatron's configuration of a model of this shape, that computes as `args` and, before them, `own` say."""
    shape = vars(config_to_args(config, layout))
    shape = {name: value for name, value in shape.items() if name not in ("seq_length", "ckpt_format")}
    return gpt_config(argparse.Namespace(**{**vars(args), **shape, **own}))


def load_weights(model: torch.nn.Module, views: dict[tuple[str, int | None], View], first_layer: int = 0) -> None:
    """Read what this rank holds into the parameters of its stage, which are all of them, a block of rows at a time.

    `model` is a GPTModel of local or TransformerEngine's layers, whose names of norms differ; `views` are those of
    `rank_views`, by Megatron name and global layer; `first_layer` is the global number of the stage's first one.
    """
    parameters = dict(model.named_parameters())
    for where, key in parameter_names(parameters, views, first_layer).items():
        parameter, view = parameters.pop(key), views[where]
        assert tuple(parameter.shape) == view.shape, (key, parameter.shape, view.shape)
        start = 0
        for _, bits in blocks(view):
            values = torch.from_numpy(bits).view(getattr(torch, TORCH_NAMES[view.dtype]))
            parameter.data[start : start + len(bits)].copy_(values)
            start += len(bits)
    assert not parameters, sorted(parameters)


def parameter_names(
    parameters: Container[str], views: Iterable[tuple[str, int | None]], first_layer: int
) -> dict[tuple[str, int | None], str]:
    """Return the names of weights in a stage, in that of their two spellings which is among its `parameters`.

    `views` are Megatron names and global layers, as in `load_weights`.
    """
    found = {}
    for name, layer in views:
        local = None if layer is None else layer - first_layer
        key = full_key(name, local)
        found[name, layer] = key if key in parameters else full_key(name, local, te=True)
    return found
