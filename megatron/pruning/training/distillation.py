"""Distillation: the model in training learns the distribution that a teacher gives to every next token.

    kd loss = temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)), in nats per token
    loss    = alpha * kd loss + (1 - alpha) * lm loss

That is forward KL on the full logits, with alpha 1 the recovery of Minitron (arXiv 2407.14679, table 15); the factor
temperature^2 keeps the gradient's size (arXiv 1503.02531, section 2). How it is computed is in divergence.py.

The teacher is any checkpoint that this project reads. It is built as Megatron's own model from the student's flags and
the checkpoint's shape, on the last pipeline stage alone and with all of its layers: the only stage whose logits are
compared, so that no activation of the teacher's width travels. Each rank reads its own part of each tensor from the
teacher's files. The teacher is not a module of the model: optimizer, data parallelism and checkpoints never see it.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tokenizer
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.utils import print_rank_0

from megatron.pruning.formats.megatron import rank_views
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.training.direct_start import open_named
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


class Distillation:
    """The teacher of one training run, and the loss that it makes.

    `args` are all flags, Megatron's and those of flags.py; `model` is the student's configuration: the teacher is built
    right after the student is. Raises ValueError when the teacher is not there, is damaged, cannot be cut to this run's
    layout or computed by Megatron, or has another vocabulary than the student.
    """

    def __init__(self, args: argparse.Namespace, model: GPTModelConfig) -> None:
        self.alpha, self.temperature = float(args.kd_alpha), float(args.kd_temperature)
        for flag, used in {
            "a virtual pipeline": args.virtual_pipeline_model_parallel_size is not None,
            "--mtp-num-layers": args.mtp_num_layers is not None,
        }.items():
            if used:
                raise ValueError(f"--teacher-load cannot be combined with {flag}: leave one of them out")
        self.checkpoint = open_named("--teacher-load", args.teacher_load)
        self.vocab = _common_vocabulary(self.checkpoint, args)
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
        """Ask the teacher about a whole micro batch, whose tokens are `[batch, sequence]`.

        Return the keyword arguments with which the student's forward pass gives its losses as `loss` takes them; none
        on a stage that computes no loss.
        """
        if self.teacher is None:
            return {}
        with torch.no_grad():
            logits = self.teacher(
                batch["tokens"], batch["position_ids"], batch.get("attention_mask"), output_processor=_logits
            )
        return {"output_processor": self._losses, "output_processor_context": logits}

    def _losses(self, context: torch.Tensor, labels: torch.Tensor, **student: Any) -> torch.Tensor:
        """Return the lm loss and the kd loss of every token, `[2, batch, sequence]`; GPTModel calls it at its end.

        `context` has the teacher's logits, `[sequence, batch, padded vocabulary / ranks]`, `labels` are the next
        tokens, `[batch, sequence]`, and `student` is what else GPTModel gives, see `_logits`.
        """
        logits = _logits(**student)
        group = mpu.get_tensor_model_parallel_group()
        kd = VocabParallelKL.apply(logits, context, self.temperature, self.vocab, group)  # type: ignore[no-untyped-call]
        # Second, since Megatron's cross entropy writes over the logits; and for the log alone, when alpha is 1.
        with torch.set_grad_enabled(self.alpha < 1 and torch.is_grad_enabled()):
            lm = student["compute_language_model_loss"](labels, logits if self.alpha < 1 else logits.detach())
        return torch.stack([lm.float(), kd.transpose(0, 1)])

    def loss(
        self, token_loss: Callable[..., Any], loss_mask: torch.Tensor, losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to train on, summed over the tokens that count, their number, and both losses for the log.

        `token_loss` sums one kind of loss over the tokens where `loss_mask`, `[batch, sequence]`, is 1.0; `losses` is
        what the student's forward pass gave, `[2, batch, sequence]`.
        """
        lm, _, lm_report = token_loss(loss_mask, losses[0])
        kd, tokens, kd_report = token_loss(loss_mask, losses[1])
        loss = self.alpha * kd + (1 - self.alpha) * lm if self.alpha < 1 else kd
        return loss, tokens, {"lm loss": lm_report["lm loss"], "kd loss": kd_report["lm loss"]}


def _logits(
    hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **unused: Any
) -> torch.Tensor:
    """Return this rank's logits, `[sequence, batch, padded vocabulary / ranks]`, of what GPTModel gives at its end."""
    logits: torch.Tensor = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
    return logits


def _common_vocabulary(teacher: Checkpoint, args: argparse.Namespace) -> int:
    """Return the size of the student's vocabulary. Raises ValueError unless it is the teacher's, too."""
    student, rows = args.vocab_size or get_tokenizer().vocab_size, teacher.config.vocab_size
    if not teacher.vocab_is_known and rows >= student:  # it counts its padding
        teacher.config = dataclasses.replace(teacher.config, vocab_size=student)
    elif student != rows:
        raise ValueError(
            f"--teacher-load {teacher.path} has a vocabulary of {rows} and the model in training one of {student}: "
            "distillation needs a teacher with the same tokenizer"
        )
    return int(student)
