"""A teacher that reads every batch beside the student.

It is any checkpoint that this project reads, and is built as Megatron's own model from the student's flags and the
checkpoint's shape, on the last pipeline stage alone and with all of its layers: the only stage whose logits are
compared, so that no activation of the teacher's width travels. Each rank reads its own part of each tensor from the
teacher's files. The teacher is not a module of the model: optimizer, data parallelism and checkpoints never see it.
"""

import argparse
import dataclasses
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.utils import print_rank_0

from megatron.pruning.formats.megatron import rank_views
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.training.direct_start import open_named
from megatron.pruning.training.distillation import Distillation, logits_of, vocabulary_of
from megatron.pruning.training.divergence import VocabParallelKL
from megatron.pruning.training.stock_model import load_weights, model_config

# Flags of the student that do not hold for a teacher, which is whole on one stage and never trained.
_TEACHER_ARGS: dict[str, Any] = {
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
    "defer_embedding_wgrad_compute": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "cuda_graph_impl": "none",
    "tp_comm_overlap": False,
    "fine_grained_activation_offloading": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
    "fp8": None,
    "fp4": None,
    "use_mup": False,
    "spec": None,
    "yaml_cfg": None,
    "heterogeneous_layers_config_path": None,
    "num_experts": None,
    "mtp_num_layers": None,
}


class OnlineTeacher(Distillation):
    """The teacher of --teacher-load, built right after the student is. `args` are all flags, `model` is the student.

    Raises ValueError when the teacher is not there, is damaged, cannot be cut to this run's layout or computed by
    Megatron, or has another vocabulary than the student.
    """

    whole = validates = True

    def __init__(self, args: argparse.Namespace, model: GPTModelConfig) -> None:
        for flag, used in {
            "a virtual pipeline": args.virtual_pipeline_model_parallel_size is not None,
            "--mtp-num-layers": args.mtp_num_layers is not None,
        }.items():
            if used:
                raise ValueError(f"--teacher-load cannot be combined with {flag}: leave one of them out")
        self.checkpoint = open_named("--teacher-load", args.teacher_load)
        super().__init__(args.kd_alpha, args.kd_temperature, _common_vocabulary(self.checkpoint, args))
        padded = model.vocab_size
        if model.should_pad_vocab:
            padded = Layout(args.tensor_model_parallel_size, 1, args.make_vocab_size_divisible_by).padded_vocab(padded)
        # One pipeline stage, and rows of padding as the student has them.
        self.layout = Layout(args.tensor_model_parallel_size, 1, padded // args.tensor_model_parallel_size)
        self.layout.check_split(self.checkpoint.config.sizes, "the teacher's")
        self.config = model_config(self.checkpoint.config, self.layout, args, _TEACHER_ARGS)
        self.teacher: Any = None
        model.post_wrap_hooks.append(self._build)

    def _build(self, models: list[Any]) -> list[Any]:
        """Build and fill the teacher where the student's logits will be; a hook of Megatron's model builder."""
        if mpu.is_pipeline_last_stage():
            groups = ProcessGroupCollection.use_mpu_process_groups()
            groups.pp = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
            teacher = GPTModelBuilder(self.config).build_model(groups, pre_process=True, post_process=True)
            teacher = teacher.to(device=torch.cuda.current_device(), dtype=self.config.transformer.params_dtype)
            views = rank_views(self.checkpoint, self.layout, mpu.get_tensor_model_parallel_rank(), 0)
            load_weights(teacher, views)
            self.teacher = teacher.requires_grad_(False).eval()
        print_rank_0(f"teacher: {self.checkpoint}")
        return models

    def of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask the teacher about a whole micro batch."""
        if self.teacher is None:
            return {}
        with torch.no_grad():
            logits = self.teacher(
                batch["tokens"], batch["position_ids"], batch.get("attention_mask"), output_processor=logits_of
            )
        return {"output_processor": self._losses, "output_processor_context": logits}

    def divergence(self, student: torch.Tensor, answers: Any) -> torch.Tensor:
        """Return the divergence over the whole vocabulary; `answers` are the teacher's logits, like the student's."""
        group = mpu.get_tensor_model_parallel_group()
        kd: torch.Tensor = VocabParallelKL.apply(student, answers, self.temperature, self.vocab, group)  # type: ignore[no-untyped-call]
        return kd


def _common_vocabulary(teacher: Checkpoint, args: argparse.Namespace) -> int:
    """Return the size of the student's vocabulary. Raises ValueError unless it is the teacher's, too."""
    student, rows = vocabulary_of(args), teacher.config.vocab_size
    if not teacher.vocab_is_known and rows >= student:  # it counts its padding
        teacher.config = dataclasses.replace(teacher.config, vocab_size=student)
    elif student != rows:
        raise ValueError(
            f"--teacher-load {teacher.path} has a vocabulary of {rows} and the model in training one of {student}: "
            "distillation needs a teacher with the same tokenizer"
        )
    return student
