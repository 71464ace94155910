"""Record what a teacher answers to the text of a training, once, in any layout: teacher_cache.py says what is kept.

The model is the teacher, built and filled as the stock loop would build and fill it; the samples are those of the stock
training set, in its order. Each data-parallel copy of the model takes files in turn, and a file appears when all of its
samples have been read: what is there when the run is killed is not read again.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from megatron.training.utils import print_rank_0

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import fingerprint
from megatron.pruning.storage.output import hold_directory, require_room
from megatron.pruning.storage.progress import Progress
from megatron.pruning.training.distillation import ask, logits_of, samples_of, vocabulary_of
from megatron.pruning.training.divergence import TopK, top_k
from megatron.pruning.training.strict_loading import source_of
from megatron.pruning.training.teacher_cache import Facts, TeacherCache

_LOOK = 2.0  # seconds from one look at what others have recorded to the next


def record(args: argparse.Namespace, model: Any, datasets: Callable[..., Any], get_batch: Callable[..., Any]) -> None:
    """Record the model that the flags describe and load, into --kd-save.

    `datasets` and `get_batch` are those of the training. Raises ValueError where the folder holds answers to something
    else, another run writes to it, or the disk has no room.
    """
    config = pretrain_cfg_container_from_args(args, model)
    initialize_megatron()
    train, _, _ = datasets(training.get_train_valid_test_num_samples())
    models, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for stage in models:
        stage.eval()
    with _cache(args) as (cache, missing):
        _read_all(args, models, cache, missing, train, get_batch)
    print_rank_0(f"teacher: recorded in {args.kd_save}; give --kd-load {args.kd_save} to learn from it")


@contextlib.contextmanager
def _cache(args: argparse.Namespace) -> Iterator[tuple[TeacherCache, list[int]]]:
    """Give the cache and the files that are to be written; the first process holds the folder."""
    path, hold = Path(args.kd_save), -1
    said: list[Any] = [None, [], ""]  # what the cache holds, the files, and a sentence where it fails
    try:
        if torch.distributed.get_rank() == 0:
            try:
                facts = _facts(args)
                if not path.exists():
                    path.mkdir(parents=True)
                if path.is_dir():
                    hold = hold_directory(path, tell=True)
                cache = TeacherCache.create(path, facts)
                missing = cache.missing()
                facts, need = cache.facts, cache.bytes_of(missing)
                print_rank_0(
                    f"teacher: {facts.samples * facts.sequence_length:,} tokens of {facts.bytes_per_token:,} bytes; "
                    f"{need / 1e9:.2f} GB are to be written to {path}"
                )
                require_room(path, need, f"--kd-save {path}")
                said = [facts, missing, ""]
            except BlockingIOError:
                said[2] = f"--kd-save {path}: another run is writing it"
            except (ValueError, OSError) as error:
                said[2] = str(error) if str(error).startswith("--") else f"--kd-save {path}: {error}"
        torch.distributed.broadcast_object_list(said, 0)
        if said[2]:
            raise ValueError(said[2])
        yield TeacherCache(path, said[0]), said[1]
    finally:
        if hold >= 0:
            os.close(hold)


def _facts(args: argparse.Namespace) -> Facts:
    vocab = vocabulary_of(args)
    return Facts(
        teacher=fingerprint(open_checkpoint(source_of(args) or Path(args.pretrained_checkpoint))),
        vocab_size=vocab,
        sequence_length=args.seq_length,
        samples=samples_of(args),
        top_k=min(args.kd_top_k, vocab),
        temperature=args.kd_temperature,
        dtype=args.kd_dtype,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        documents_apart=args.dataloader_inter_document_masking,
    )


def _read_all(
    args: argparse.Namespace,
    models: list[Any],
    cache: TeacherCache,
    missing: list[int],
    train: Any,
    get_batch: Callable[..., Any],
) -> None:
    """Write this copy's share of the files."""
    mine = missing[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    size, group = args.micro_batch_size, mpu.get_tensor_model_parallel_group()
    batches = [batch for number in mine for batch in _batches(cache.samples(number), size)]
    loader = None
    if train is not None:
        loader = iter(torch.utils.data.DataLoader(train, batch_sampler=batches, num_workers=args.num_workers))
    writes = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0
    total = sum(len(cache.samples(number)) for number in mine) * args.seq_length
    shown = writes and mpu.get_data_parallel_rank() == 0

    def answer(iterator: Any, stage: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = get_batch(iterator, None, size, whole=True)
        output = ask(stage, batch, logits_of)

        def keep(logits: torch.Tensor, non_loss_data: bool) -> tuple[torch.Tensor, ...]:
            kept = top_k(logits, cache.facts.top_k, cache.facts.temperature, cache.facts.vocab_size, group)
            progress.advance(batch["tokens"].numel())
            return batch["tokens"].cpu(), *(part.transpose(0, 1).cpu() for part in kept)

        return output, keep

    with torch.no_grad(), contextlib.closing(Progress("recording the teacher", total, shown, "tokens")) as progress:
        for number in mine:
            count = len(cache.samples(number))
            kept = get_forward_backward_func()(
                forward_step_func=answer,
                data_iterator=loader,
                model=models,
                num_microbatches=-(-count // size),
                seq_length=args.seq_length,
                micro_batch_size=size,
                forward_only=True,
                collect_non_loss_data=True,
            )
            if writes:
                texts, *answers = (torch.cat(parts)[:count].numpy() for parts in zip(*kept, strict=True))
                cache.write(number, texts, **dict(zip(TopK._fields, answers, strict=True)))
    # Not at a barrier of nccl, which would give up on a copy that is an hour behind.
    while cache.missing():
        time.sleep(_LOOK)
    torch.distributed.barrier()


def _batches(samples: range, size: int) -> Iterator[list[int]]:
    """Yield the samples in batches of one size; the last is filled up with its last sample."""
    for start in range(0, len(samples), size):
        batch = list(samples[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))
