"""Trains a Llama (recovers a pruned one) with the stock Megatron loop and all of its flags.

    # eight GPUs: recover a pruned checkpoint; the same command again resumes from RECOVERED
    torchrun --nproc-per-node 8 pretrain_gpt.py --use-checkpoint-args --load RECOVERED --pretrained-checkpoint PRUNED \\
        --save RECOVERED --tensor-model-parallel-size 8 --train-data-path DATA --micro-batch-size 4 ...

    # no GPU: the same command line; gloo, the local layers and one thread per process are chosen for you
    python pretrain_gpt.py --use-checkpoint-args --load RECOVERED --pretrained-checkpoint PRUNED --save RECOVERED ...

    # from scratch: leave out --load, or name the same new directory in --load and --save
    python pretrain_gpt.py --num-layers 8 --hidden-size 160 ... --load NEW --save NEW

The loop, the optimizer, the schedules, the checkpoints and the flags are Megatron's (`megatron.training`, from the
wheel of megatron-core). This file adds four things: defaults for machines without a GPU or without TransformerEngine,
local layers whose attention is torch's, a loader that refuses what does not fit (the stock one warns and trains from
random weights), and the files beside a checkpoint (tokenizer, plan, command line) that follow it to --save.
"""
# ruff: noqa: E402 - the stand-in for the device must be in place before Megatron is imported

from megatron.pruning import cpu_device

cpu_device.install()

import argparse
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import checkpointing, get_args, get_timers, get_tokenizer, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.models import GPTModelConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage, print_rank_0
from torch.distributed.checkpoint.api import CheckpointException  # derives from BaseException

TRACKER = "latest_checkpointed_iteration.txt"
CARRIED = ("huggingface", "megatron_args.txt", "prune_plan.json")  # what an export and a second pruning need


def main() -> None:
    """Trains as the command line says.

    Raises:
        ValueError: what the user asked for cannot be done; one sentence.
    """
    if "WORLD_SIZE" not in os.environ:  # started without torchrun: one process, which meets nobody
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    args = read_arguments()
    carry_files(args)

    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # a stock flag that stock does not pass on
    if args.transformer_impl == "local" and args.spec is None:
        model.transformer_layer_spec = local_layers
    if cpu_device.is_installed():
        cpu_device.adjust(model.transformer)

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        # The wheel carries the helpers built and no Makefile, and the stock loop would run make.
        dataset_utils.compile_helpers = lambda: None
    training.load_checkpoint = functools.partial(load_strictly, checkpointing.load_checkpoint)
    config = pretrain_cfg_container_from_args(args, model)
    training.pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Arguments -----------------------------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    """Parses, checks and publishes the stock arguments, in the stock order.

    Raises:
        ValueError: a flag cannot work on this machine, or the checkpoint to load is not there or not readable.
    """
    args = parse_args(extra_args_provider=add_defaults)
    if cpu_device.is_installed():
        cpu_device.refuse(args)
    refuse_without_libraries(args)
    if args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = True
    require_checkpoint(args)
    if args.use_checkpoint_args:
        with one_sentence(source_of(args)):
            checkpointing.load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            checkpointing.load_args_from_checkpoint(args)
    try:
        validate_args(args)
    except AssertionError as refusal:
        raise ValueError(f"these flags do not go together: {str(refusal) or _failed_line(refusal)}") from refusal
    set_global_variables(args)
    return args


def add_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Sets the defaults that differ from stock; whatever the user types wins."""
    # Causal attention needs no mask tensor, and a checkpoint's own format says which one it is. Stock leaves the
    # intervals unset and fails on that after it has built the model.
    parser.set_defaults(create_attention_mask_in_dataloader=False, auto_detect_ckpt_format=True)
    parser.set_defaults(eval_interval=1000, save_interval=1000)
    if not importlib.util.find_spec("transformer_engine"):
        parser.set_defaults(
            transformer_impl="local",
            no_persist_layer_norm=True,
            gradient_accumulation_fusion=bool(importlib.util.find_spec("fused_weight_gradient_mlp_cuda")),
        )
    if cpu_device.is_installed():
        cpu_device.add_defaults(parser)
    return parser


def refuse_without_libraries(args: argparse.Namespace) -> None:
    """Checks the flags that TransformerEngine or apex must be installed for.

    Raises:
        ValueError: one of them is missing.
    """
    if args.transformer_impl != "local" and not importlib.util.find_spec("transformer_engine"):
        raise ValueError(f"--transformer-impl {args.transformer_impl} needs TransformerEngine, which is not installed")
    if args.use_distributed_optimizer and USING_PYTORCH_OPTIMIZER and args.save and not args.no_save_optim:
        # megatron-core 0.19 saves the state of torch's AdamW in a form that it then cannot load
        raise ValueError(
            "--use-distributed-optimizer cannot resume without TransformerEngine or apex, and neither is installed: "
            "leave it out, or give --no-save-optim"
        )


def require_checkpoint(args: argparse.Namespace) -> None:
    """Refuses a --load that would silently start from random weights, and one whose files are not all there.

    A new run may name the same new directory in --load and --save; then its second start resumes. With
    --pretrained-checkpoint the first start takes its weights from there.

    Raises:
        ValueError: there is no whole checkpoint where one was asked for.
    """
    source = source_of(args)
    if source is not None:
        require_files(args, source)
    elif args.pretrained_checkpoint is not None:
        raise ValueError(f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no checkpoint: no {TRACKER}")
    elif args.load is not None:
        new = args.save is not None and Path(args.load).resolve() == Path(args.save).resolve()
        if not new or args.finetune or args.use_checkpoint_args or args.exit_on_missing_checkpoint:
            raise ValueError(f"--load {args.load} holds no checkpoint: no {TRACKER} there")
        print_rank_0(f"no checkpoint in {args.load} yet: starting from random weights")
    elif args.finetune or args.use_checkpoint_args or args.exit_on_missing_checkpoint:
        raise ValueError("no checkpoint was named: give --load")


def source_of(args: argparse.Namespace) -> Path | None:
    """The directory that the stock loader will read: --load if that has a checkpoint, else --pretrained-checkpoint."""
    for directory in (args.load, args.pretrained_checkpoint):
        if directory is not None and Path(directory, TRACKER).is_file():
            return Path(directory)
    return None


def require_files(args: argparse.Namespace, source: Path) -> None:
    """Checks that the checkpoint's files are there, none is cut short, and they are those of this run's layout.

    Raises:
        ValueError: one sentence naming the file.
    """
    newest = (source / TRACKER).read_text().strip()
    if newest != "release" and not newest.isdecimal():
        raise ValueError(f"{source / TRACKER} says {newest!r}, neither a step nor release")
    step = args.ckpt_step if args.ckpt_step else newest
    folder = source / ("release" if step == "release" else f"iter_{int(step):07d}")
    if not folder.is_dir():
        raise ValueError(f"the checkpoint in {source} is not whole: there is no {folder.name} in it")
    files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
    if not files:
        if not (folder / ".metadata").is_file():  # torch_dist and its kin have one
            raise ValueError(f"{folder} holds no checkpoint: neither mp_rank_*/model_optim_rng.pt nor .metadata")
        return
    for file in files:
        with file.open("rb") as content:
            if content.read(2) == b"PK" and not zipfile.is_zipfile(file):
                raise ValueError(f"{file} is cut short")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ranks = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") for t in range(tp) for p in range(pp)]
    found = [file.parent.name for file in files]
    if sorted(ranks) != found and not args.use_mp_args_from_checkpoint_args:
        raise ValueError(
            f"{folder} holds {_some(found)} and this run, tensor size {tp} and pipeline size {pp}, "
            f"reads {_some(ranks)}: reshard it with scripts/transfer.sh"
        )


def carry_files(args: argparse.Namespace) -> None:
    """Copies tokenizer, configuration, plan and command line beside the checkpoint into --save, unless they are there.

    A later export reads them. Rank 0 does it, once, before training.
    """
    source = source_of(args)
    if args.rank != 0 or not args.save or source is None or source.resolve() == Path(args.save).resolve():
        return
    for name in CARRIED:
        origin, target = Path(source, name), Path(args.save, name)
        if not origin.exists() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{name}.partial")
        if origin.is_dir():
            shutil.copytree(origin, aside, dirs_exist_ok=True)
        else:
            shutil.copy2(origin, aside)
        aside.rename(target)


# Strict loading ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_sentence(directory: str | Path | None) -> Iterator[None]:
    """Turns every way in which the stock loader fails, or gives up with exit status 0, into a ValueError.

    Raises:
        ValueError: names the checkpoint and what was wrong.
    """
    try:
        yield
    except ValueError:
        raise
    except SystemExit as leave:
        if leave.code:
            raise
        reason = leave.__context__ or "see the lines above"
        raise ValueError(f"cannot load the checkpoint in {directory}: {_first_line(reason)}") from leave
    except (Exception, CheckpointException) as error:
        raise ValueError(f"cannot load the checkpoint in {directory}: {_first_line(error)}") from error


def load_strictly(stock_load: Callable[..., Any], models: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Loads a checkpoint through the stock loader, and takes all of it or nothing.

    Args:
        stock_load: megatron.training.checkpointing.load_checkpoint.
        models: this rank's model chunks.
        args: passed on.
        kwargs: passed on.

    Returns:
        what the stock loader returns: the iteration and the floating point operations so far.

    Raises:
        ValueError: a weight is missing, is not in this model, or has another shape; or a file is missing or unreadable.
    """
    source = source_of(get_args())
    if source is None:  # a fresh start, see require_checkpoint
        return stock_load(models, *args, **kwargs)
    checked = functools.partial(_checked_dist_load, dist_checkpointing.load, source)
    with contextlib.ExitStack() as patches:
        patches.enter_context(one_sentence(source))
        patches.enter_context(mock.patch.object(dist_checkpointing, "load", checked))
        for model in models:
            load = functools.partial(_checked_load, model, model.load_state_dict, source)
            patches.enter_context(mock.patch.object(model, "load_state_dict", load))
        return stock_load(models, *args, **kwargs)


def _checked_load(
    model: torch.nn.Module, load: Callable[..., Any], source: Path, state: dict[str, Any], strict: bool = True
) -> Any:
    """`model.load_state_dict` that compares names and shapes first and cannot be talked into strict=False."""
    expected = {name: tuple(weight.shape) for name, weight in _weights(model.state_dict()).items()}
    found = {name: tuple(weight.shape) for name, weight in _weights(state).items()}
    _compare(source, expected, found)
    return load(state, strict=False)  # only `_extra_state`, which may be left out, can differ now


def _checked_dist_load(
    load: Callable[..., Any], source: Path, wanted: dict[str, Any], directory: str, *rest: Any, **kw: Any
) -> Any:
    """`dist_checkpointing.load` that compares the names and shapes of all ranks' weights with what is stored."""
    mine: dict[str, tuple[int, ...]] = {}
    for key, part in wanted.items():
        if re.fullmatch(r"model\d*", key):
            for value in nested_values(part):
                pieces = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
                mine |= {piece.key: tuple(piece.global_shape) for piece in pieces if isinstance(piece, ShardedTensor)}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    expected = {name: shape for shapes in everyone for name, shape in shapes.items()}
    stored = dist_checkpointing.load_tensors_metadata(directory)
    found = {name: tuple(tensor.global_shape) for name, tensor in stored.items() if not _is_optimizer(name)}
    _compare(source, expected, found)
    return load(wanted, directory, *rest, **kw)


def _compare(source: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"it lacks {_some(missing)}"] * bool(missing) + [f"this model has no {_some(extra)}"] * bool(extra)
        raise ValueError(f"the checkpoint in {source} does not fit this model: {'; '.join(parts)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"the checkpoint in {source} does not fit this model: {name} is {found[name]} there and {shape} here"
            )


def _weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("_extra_state") and value is not None}


def _is_optimizer(name: str) -> bool:
    return re.match(r"(chained_\d+\.)?optimizer\.", name) is not None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _failed_line(error: BaseException) -> str:
    """The source line of a bare `assert`, which is all that Megatron says about some flags."""
    import traceback

    return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__


# Local layers: what Megatron uses where TransformerEngine is not installed -------------------------------------------


class TorchAttention(MegatronModule):
    """Causal attention through torch's scaled_dot_product_attention, in memory linear in the sequence.

    The constructor is the one that Megatron's layer specifications call; query, key and value are
    `[sequence, batch, heads or groups, head_dim]`, the output is `[sequence, batch, heads * head_dim]`.

    Raises:
        ValueError: for what only TransformerEngine's attention does.
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
        **options: Any,
    ) -> torch.Tensor:
        """Attends; `attention_mask` (True hides) is given only with --reset-attention-mask."""
        dtype = query.dtype
        if query.device.type == "cpu":
            # torch's backward pass of attention on a CPU is half as fast in bfloat16 as in float32
            query, key, value = query.float(), key.float(), value.float()
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [batch, heads, seq, dim]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed.permute(2, 0, 1, 3).flatten(2).to(dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: attention has no weights."""
        return {}


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose gain Megatron's sequence parallelism sums over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def local_layers(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """This pipeline stage's layers, from Megatron's local specification with `TorchAttention` and `LocalRMSNorm`."""
    transformer = config.transformer
    layer = get_gpt_layer_local_spec(
        num_experts=transformer.num_moe_experts,
        qk_layernorm=transformer.qk_layernorm,
        normalization=transformer.normalization,
    )
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(module=TorchAttention)
    norm = layer.submodules.input_layernorm
    if transformer.normalization == "RMSNorm":
        norm = layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalRMSNorm
    count = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


# Data, batch and loss ------------------------------------------------------------------------------------------------


def datasets(samples: list[int | None], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Builds the train, validation and test sets that the data flags describe.

    Args:
        samples: how many samples of each are wanted, at least.
        vp_stage: the virtual pipeline stage that asks.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        multiple_validation_sets=args.multiple_validation_sets,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )

    def built_here() -> bool:
        return is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, built_here, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank asks, `built_here` decides


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next micro batch; values are `[batch, sequence]`, None on middle pipeline stages."""
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        assert data_iterator is not None
        batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One micro batch through this stage: its output, and the function that makes the loss of it on the last stage."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch.get("tokens"), batch.get("position_ids"), batch.get("attention_mask"), labels=batch.get("labels")
    )
    return output, functools.partial(token_loss, batch.get("loss_mask"))


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The language-model loss in nats.

    Args:
        loss_mask: 1.0 where a token counts, `[batch, sequence]`.
        losses: cross entropy of every token, `[batch, sequence]`.

    Returns:
        the sum over tokens that count, their number, and both for the log.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda value: not bool(torch.isfinite(value)),
            message="the loss is not a finite number",
            tolerance=0.0,
            fatal=True,
        )
    tokens = mask.sum().to(torch.int)
    report = torch.cat([loss.detach().clone().view(1), tokens.view(1)])
    return loss, tokens, {"lm loss": report}


def run() -> None:
    """`main` for the shell: what the user can mend becomes one line and exit status 1."""
    try:
        main()
    except ValueError as refusal:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{rank}error: {refusal}", file=sys.stderr, flush=True)
        sys.exit(1)


# The checkpoint writer spawns children that import this file again.
if __name__ == "__main__":
    run()
