"""A teacher that has read the text of this training before: its answers come with the samples (teacher_cache.py)."""

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.utils import print_rank_0

from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.training.distillation import Distillation, samples_of, vocabulary_of
from megatron.pruning.training.divergence import TopK, TopKKL
from megatron.pruning.training.teacher_cache import Facts, TeacherCache

_KEY = "kd_"  # before the names of a recorded teacher's answers in a batch


class RecordedTeacher(Distillation):
    """The teacher whose answers --kd-load has; `args` are all flags.

    Raises ValueError when its answers are not all there, or are not to this run's text.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            self.cache = TeacherCache.open(Path(args.kd_load))
            _compare(self.cache.facts, args)
        except (ValueError, OSError) as error:
            raise ValueError(f"--kd-load {args.kd_load}: {error}") from error
        facts = self.cache.facts
        super().__init__(args.kd_alpha, facts.temperature, facts.vocab_size)
        sequence, k = facts.sequence_length, facts.top_k
        log_probs = getattr(torch, TORCH_NAMES[facts.dtype])
        self.shapes = {
            "log_probs": (log_probs, (sequence, k)),
            "tokens": (torch.int32, (sequence, k)),
            "log_rest": (torch.float32, (sequence,)),
        }
        print_rank_0(f"teacher: {k} answers a token from {args.kd_load}")

    def with_answers(self, dataset: Any) -> Any:
        """Return the training set with the teacher's answers in its samples.

        Raises ValueError where the first samples that this run will read, or its last, are of another text.
        """
        args, answered = get_args(), _Answered(dataset, self.cache)
        last = samples_of(args) - 1
        for sample in {min(args.consumed_train_samples, last), last}:
            answered[sample]
        return answered

    def completed(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """Let all tensor-parallel ranks have the answers that the first has read."""
        source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
        for name, (dtype, shape) in self.shapes.items():
            if mpu.get_tensor_model_parallel_rank() != 0:
                batch[_KEY + name] = torch.empty((size, *shape), dtype=dtype, device=torch.cuda.current_device())
            torch.distributed.broadcast(batch[_KEY + name], source, group=group)
        return batch

    def of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what the teacher answered, with the sequence before the batch as GPTModel has it."""
        if _KEY + "tokens" not in batch:
            return {}
        answers = TopK(*(batch[_KEY + name].transpose(0, 1).contiguous() for name in TopK._fields))
        return {"output_processor": self._losses, "output_processor_context": answers}

    def divergence(self, student: torch.Tensor, answers: Any) -> torch.Tensor:
        """Return the divergence over the tokens that were kept and all others as one; `answers` are a `TopK`."""
        answers = answers._replace(tokens=answers.tokens.long())
        group = mpu.get_tensor_model_parallel_group()
        kd: torch.Tensor = TopKKL.apply(student, *answers, self.temperature, self.vocab, group)  # type: ignore[no-untyped-call]
        return kd


class _Answered(torch.utils.data.Dataset[dict[str, Any]]):
    """A training set whose samples have the teacher's answers in them."""

    def __init__(self, dataset: Any, cache: TeacherCache) -> None:
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        answers = self.cache.read(int(index), sample["tokens"].numpy())
        return {**sample, **{_KEY + name: torch.from_numpy(array) for name, array in answers.items()}}


def _compare(facts: Facts, args: argparse.Namespace) -> None:
    """Raise ValueError unless this run can learn from answers to these facts."""
    asked = {
        "vocab_size": vocabulary_of(args),
        "sequence_length": args.seq_length,
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "documents_apart": args.dataloader_inter_document_masking,
    }
    for name, value in asked.items():
        if getattr(facts, name) != value:
            raise ValueError(f"it was recorded with {name} {getattr(facts, name)}, and this run has {value}")
    if args.kd_temperature not in (None, facts.temperature):
        raise ValueError(f"it was recorded with --kd-temperature {facts.temperature}, not {args.kd_temperature}")
    if facts.samples < samples_of(args):
        raise ValueError(f"it has {facts.samples} samples, and this training reads {samples_of(args)}")
