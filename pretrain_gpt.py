"""Train a Llama (recover a pruned one) with the stock Megatron loop and all of its flags.

    # eight GPUs: recover a pruned checkpoint; the same command again resumes from RECOVERED
    torchrun --nproc-per-node 8 pretrain_gpt.py $(python tools/show_checkpoint.py PRUNED --megatron-flags) \\
        --load RECOVERED --pretrained-checkpoint PRUNED --save RECOVERED --train-data-path DATA --micro-batch-size 4 ...

    # no GPU: the same command line; gloo and the local layers are chosen for you
    python pretrain_gpt.py $(python tools/show_checkpoint.py PRUNED --megatron-flags) --load RECOVERED ...

    # from scratch: leave out --load, or name the same new directory in --load and --save
    python pretrain_gpt.py --num-layers 8 --hidden-size 160 ... --load NEW --save NEW

    # distillation: learn the unpruned model's distribution instead of the text's next token
    python pretrain_gpt.py ... --teacher-load UNPRUNED

(Megatron's --use-checkpoint-args works, too, but restores neither the norm's epsilon nor the rope scaling.)

The loop, the optimizer, the schedules, the checkpoints and the flags are Megatron's (`megatron.training`, from the
wheel of megatron-core). This project adds, in megatron/pruning/training: defaults for machines without a GPU or without
TransformerEngine (cpu_device.py, flags.py), local layers whose attention is torch's (local_layers.py), a loader that
refuses what does not fit (strict_loading.py; the stock one warns and trains from random weights), distillation from a
teacher (distillation.py), conversations that are packed whole and masked (documents.py), and the tokenizer of the
checkpoint where none is named (tokenizer.py). What it changes in Megatron to have them is one table
(megatron_patches.py). The files beside a checkpoint (tokenizer, plan, command line) follow it to --save.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron.pruning.cli.entry import run
from megatron.pruning.storage.processes import EndedTogether, be_alone_without_torchrun
from megatron.pruning.training import cpu_device
from megatron.pruning.training.quiet import quiet_imports

cpu_device.install()  # before Megatron is imported

with quiet_imports():
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.enums import ModelType
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args, get_timers, get_tokenizer, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

    from megatron.pruning.training.checkpoint_args import take_arguments
    from megatron.pruning.training.data_checks import check_data
    from megatron.pruning.training.distillation import Distillation
    from megatron.pruning.training.documents import TextDataset, documents_of, keep_documents_apart
    from megatron.pruning.training.flags import (
        add_defaults,
        flags_refused,
        refuse_impossible,
        refuse_without_libraries,
        wandb_refused,
    )
    from megatron.pruning.training.local_layers import gpt_config
    from megatron.pruning.training.megatron_patches import applied, while_parsing, while_publishing, while_training
    from megatron.pruning.training.online_teacher import OnlineTeacher
    from megatron.pruning.training.record_teacher import record
    from megatron.pruning.training.recorded_teacher import RecordedTeacher
    from megatron.pruning.training.strict_loading import carry_files, require_checkpoint
    from megatron.pruning.training.tokenizer import build_tokenizer, name_tokenizer


def main(argv: Sequence[str]) -> None:
    """Train as the command line says; raises ValueError, with one sentence, where what it asks for cannot be done."""
    be_alone_without_torchrun()
    args = read_arguments(argv)
    check_data(args)
    carry_files(args)
    with flags_refused():
        model = gpt_config(args)
        distillation = distillation_of(args, model)
        ahead = functools.partial(distillation.schedules, get_batch=get_batch) if distillation is not None else None
        with applied(while_training(args, model.transformer, ahead)), EndedTogether():
            if args.kd_save:
                record(args, model, datasets, get_batch)
            else:
                config = pretrain_cfg_container_from_args(args, model)
                step = functools.partial(forward_step, distillation=distillation)
                sets = functools.partial(datasets, distillation=distillation)
                sets.is_distributed = True  # type: ignore[attr-defined]  # every rank asks, `built_here` decides
                training.pretrain(config, sets, ModelType.encoder_or_decoder, step)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def distillation_of(args: argparse.Namespace, model: Any) -> Distillation | None:
    """Return the distillation that the flags ask for, if any; `model` is the student's configuration."""
    if args.teacher_load:
        return OnlineTeacher(args, model)
    return RecordedTeacher(args) if args.kd_load else None


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse, check and publish the stock arguments, in the stock order.

    Raises ValueError when a flag cannot work on this machine, or when the checkpoint to load is not there or cannot be
    read.
    """
    with applied(while_parsing(argv)):
        args: argparse.Namespace = parse_args(extra_args_provider=add_defaults)
    refuse_without_libraries(args)
    if args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = True
    keep_documents_apart(args)
    require_checkpoint(args)
    if args.use_checkpoint_args:
        take_arguments(args)
    refuse_impossible(args)
    tokenizer = tokenizer_of(args)
    with flags_refused():
        validate_args(args)
        with applied(while_publishing(tokenizer)), wandb_refused(args.wandb_project):
            set_global_variables(args)
    return args


def tokenizer_of(args: argparse.Namespace) -> Any:
    """Return the tokenizer of the flags or, where they name none, of the checkpoint; these then name it.

    Raises ValueError when there is none, or it does not fit the model.
    """
    checkpoints = {"--load": args.load, "--pretrained-checkpoint": args.pretrained_checkpoint}
    name_tokenizer(args, {flag: path for flag, path in checkpoints.items() if path is not None})
    return build_tokenizer(args, args.vocab_size or args.padded_vocab_size)


# Data, batch and loss ------------------------------------------------------------------------------------------------


def datasets(
    samples: Sequence[int | None], vp_stage: int | None = None, distillation: Distillation | None = None
) -> Any:
    """Build the train, validation and test sets that the data flags describe, of at least so many `samples` each.

    The virtual pipeline stage `vp_stage` asks for them; where it computes the loss, `distillation` may add to them.
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
        inter_document_masking=args.dataloader_inter_document_masking,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )

    def built_here() -> bool:
        # Each stage wants to know how long --full-validation is; those in the middle take nothing of it.
        return bool((has_batch(vp_stage) or args.full_validation) and mpu.get_tensor_model_parallel_rank() == 0)

    kind = MockGPTDataset if args.mock_data else TextDataset
    train, *others = BlendedMegatronDatasetBuilder(kind, samples, built_here, config).build()
    if train is not None and distillation is not None and is_last_stage(vp_stage):
        train = distillation.with_answers(train)
    return train, *others


def is_last_stage(vp_stage: int | None) -> bool:
    """Return whether this rank's stage computes the loss."""
    return bool(mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage))


def has_batch(vp_stage: int | None) -> bool:
    """Return whether this stage needs anything of a batch: those in the middle only where documents begin."""
    return bool(get_args().dataloader_inter_document_masking or is_first_or_last_pipeline_stage(vp_stage))


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    vp_stage: int | None,
    batch_size: int,
    whole: bool = False,
    distillation: Distillation | None = None,
) -> dict[str, Any]:
    """Return this rank's part of the next micro batch; values are `[batch, sequence]`, none on middle pipeline stages.

    The micro batch is of `batch_size` sequences. The first stage has the tokens and the last one the labels; `whole`
    gives both of them all. `distillation` adds to the batch of the last one. Where documents are kept apart each stage
    has `packed_seq_params`, which say where they lie.
    """
    args = get_args()
    if not has_batch(vp_stage):
        return {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        assert data_iterator is not None
        batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=args.dataloader_inter_document_masking,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=1 if whole else args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        is_pipeline_last_stage=is_last_stage(vp_stage),
    )
    if distillation is not None and is_last_stage(vp_stage):
        batch = distillation.completed(batch, batch_size)
    if args.dataloader_inter_document_masking:
        return batch | {"packed_seq_params": documents_of(batch["cu_seqlens"], args.seq_length)}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return batch


def forward_step(
    data_iterator: Any, model: Any, distillation: Distillation | None = None
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Take one micro batch through this stage: return its output, and the function that makes the last stage's loss.

    With a teacher the loss is that of `distillation`. Validation has the language-model loss alone where there are no
    answers to its text.
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    size = args.micro_batch_size if model.training else args.eval_micro_batch_size
    if distillation is not None and not (model.training or distillation.validates):
        distillation = None
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), size, distillation=distillation)
    timers("batch-generator").stop()
    taught = distillation.of(batch) if distillation is not None else {}
    output = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch.get("labels"),
        packed_seq_params=batch.get("packed_seq_params"),
        **taught,
    )
    loss = functools.partial(distillation.loss, token_loss) if distillation is not None and taught else token_loss
    return output, functools.partial(loss, batch.get("loss_mask"))  # type: ignore[arg-type]  # None where no loss is


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the language-model loss in nats, summed over the tokens that count, then their number, then both to log.

    `loss_mask` is 1.0 where a token counts and `losses` the cross entropy of every token, both `[batch, sequence]`.
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


# The writer of --async-save spawns children that import this file again.
if __name__ == "__main__":
    run(main, left="what it has saved stays")
