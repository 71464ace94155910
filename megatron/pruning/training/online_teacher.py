"""A teacher that reads every batch beside the student.

It is any checkpoint that this project reads, and is built as Megatron's own model from the student's flags and the
checkpoint's shape. Its layers lie on the student's pipeline stages, by a split of their own, so that no rank holds it
whole; each rank reads its own part of each tensor from the teacher's files. In a pipeline the teacher reads all micro
batches of a step before the student does, by Megatron's schedule for a forward pass alone, and the last stage keeps
what its final norm gives: of the logits, which are many times larger, only those of one micro batch are ever there. The
teacher is not a module of the model: optimizer, data parallelism and checkpoints never see it.
"""

import argparse
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.utils import print_rank_0

from megatron.pruning.formats.megatron import rank_views
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.training.direct_start import held_by, open_named
from megatron.pruning.training.distillation import Distillation, ask, logits_of, vocabulary_of
from megatron.pruning.training.divergence import VocabParallelKL
from megatron.pruning.training.hidden_loss import HiddenLoss
from megatron.pruning.training.stock_model import load_weights, model_config

# Flags of the student that do not hold for a teacher, which has a pipeline of its own and is never trained.
_TEACHER_ARGS: dict[str, Any] = {
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
    "defer_embedding_wgrad_compute": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "cuda_graph_impl": "none",
    "inference_cuda_graph_scope": None,  # that of no graphs
    "tp_comm_overlap": False,
    "fine_grained_activation_offloading": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
    "virtual_pipeline_model_parallel_size": None,
    "overlap_p2p_comm": False,  # which virtual pipelines alone can
    "fp8": None,
    "fp4": None,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "use_mup": False,
    "spec": None,
    "yaml_cfg": None,
    "heterogeneous_layers_config_path": None,
    "num_experts": None,
    "mtp_num_layers": None,
}


class Answer(NamedTuple):
    """What the teacher made of a micro batch.

    It is what its final norm gives, `[sequence, batch, hidden]`, and how this rank's logits are made of that.
    """

    hidden_states: torch.Tensor
    logits: Callable[[], torch.Tensor]


class OnlineTeacher(Distillation):
    """The teacher of --teacher-load, built right after the student is. `args` are all flags, `model` is the student.

    Raises ValueError when the teacher is not there, is damaged, cannot be cut to this run's layout or computed by
    Megatron, or has another vocabulary than the student.
    """

    validates = True

    def __init__(self, args: argparse.Namespace, model: GPTModelConfig) -> None:
        if args.mtp_num_layers is not None:
            raise ValueError("--teacher-load cannot be combined with --mtp-num-layers: leave one of them out")
        self.checkpoint = open_named("--teacher-load", args.teacher_load)
        super().__init__(args.kd_alpha, args.kd_temperature, _common_vocabulary(self.checkpoint, args))
        self.tensor, self.pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        padded = model.vocab_size
        if model.should_pad_vocab:
            padded = Layout(self.tensor, 1, args.make_vocab_size_divisible_by).padded_vocab(padded)
        self.vocab_rows = padded // self.tensor  # on a rank, with as many of padding as the student has
        layout = Layout(self.tensor, self.pipeline, self.vocab_rows)
        layout.check_split(self.checkpoint.config.sizes, "the teacher's")
        split = _split(self.checkpoint.config.num_layers, self.pipeline)
        self.config = model_config(self.checkpoint.config, layout, args, {**_TEACHER_ARGS, **split})
        self.teacher: Any = None
        self.hidden, self.student = args.kd_hidden, args.pretrained_checkpoint
        self.hidden_loss_of: HiddenLoss | None = None
        self.answers: deque[Answer] = deque()  # to micro batches that the student has yet to read
        model.post_wrap_hooks.append(self._build)

    def _build(self, models: list[Any]) -> list[Any]:
        """Build and fill this rank's part of the teacher; a hook of Megatron's model builder."""
        transformer = self.config.transformer
        first, last = mpu.is_pipeline_first_stage(ignore_virtual=True), mpu.is_pipeline_last_stage(ignore_virtual=True)
        teacher = GPTModelBuilder(self.config).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), pre_process=first, post_process=last
        )
        teacher = teacher.to(device=torch.cuda.current_device(), dtype=transformer.params_dtype)
        layout = Layout(self.tensor, 1, self.vocab_rows)
        start, views = held_by(teacher, rank_views(self.checkpoint, layout, mpu.get_tensor_model_parallel_rank(), 0))
        load_weights(teacher, views, start)
        self.teacher = teacher.requires_grad_(False).eval()
        if self.hidden and last:
            student = open_named("--pretrained-checkpoint", self.student)
            device = next(teacher.parameters()).device
            self.hidden_loss_of = HiddenLoss(self.checkpoint, student, self.vocab, device)
        most = torch.tensor(sum(parameter.numel() for parameter in teacher.parameters()), device="cuda")
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        print_rank_0(f"teacher: {self.checkpoint}, at most {int(most):,} parameters on a rank")
        return models

    def schedules(self, choose: Callable[..., Any], get_batch: Callable[..., Any]) -> Callable[..., Any]:
        """Let the teacher read all micro batches of a step before it begins, where there is a pipeline."""
        if self.pipeline == 1:
            return choose
        return lambda *which, **ways: functools.partial(self._read_first, choose(*which, **ways), get_batch)

    def _read_first(
        self,
        schedule: Callable[..., Any],
        get_batch: Callable[..., Any],
        *,
        data_iterator: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        **more: Any,
    ) -> Any:
        """Take the micro batches of a step, let the teacher read them, and give them to the student's `schedule`."""
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        taken = [None if one is None else [next(one) for _ in range(num_microbatches)] for one in iterators]
        sizes = {"num_microbatches": num_microbatches, "seq_length": seq_length, "micro_batch_size": micro_batch_size}

        def read(batches: Iterator[Any] | None, stage: Any) -> tuple[torch.Tensor, Callable[..., None]]:
            batch = get_batch(batches, None, micro_batch_size)
            return ask(self.teacher, batch, self._keep), lambda output, non_loss_data: None

        self.answers.clear()
        mine = taken[0] if mpu.is_pipeline_first_stage(ignore_virtual=True) else taken[-1]
        with torch.no_grad():
            get_forward_backward_func(pp_size=self.pipeline, vp_size=None)(
                forward_step_func=read,
                data_iterator=None if mine is None else iter(mine),
                model=[self.teacher],
                forward_only=True,
                collect_non_loss_data=True,
                **sizes,
            )
        again = [None if one is None else iter(one) for one in taken]
        return schedule(data_iterator=again if isinstance(data_iterator, list) else again[0], **sizes, **more)

    def _keep(self, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        """Keep of a micro batch how its logits are made, until the student has its own."""
        self.answers.append(Answer(hidden_states, functools.partial(logits_of, hidden_states, **more)))
        return hidden_states

    def of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask the teacher about a whole micro batch, or take what it has made of it."""
        if "labels" not in batch or batch["labels"] is None:
            return {}
        if self.pipeline == 1:
            with torch.no_grad():
                ask(self.teacher, batch, self._keep)
        return {"output_processor": self._losses, "output_processor_context": self.answers.popleft()}

    def divergence(self, student: torch.Tensor, answers: Any) -> torch.Tensor:
        """Return the divergence over the whole vocabulary; `answers` are an `Answer`."""
        with torch.no_grad():
            teacher = answers.logits()
        group = mpu.get_tensor_model_parallel_group()
        kd: torch.Tensor = VocabParallelKL.apply(student, teacher, self.temperature, self.vocab, group)  # type: ignore[no-untyped-call]
        return kd

    def hidden_loss(self, student: torch.Tensor, answers: Any) -> torch.Tensor | None:
        """Return the hidden loss of every token, where it is asked for."""
        if self.hidden_loss_of is None:
            return None
        return self.hidden_loss_of(student, answers.hidden_states, self.config.transformer.sequence_parallel)


def _split(layers: int, stages: int) -> dict[str, int]:
    """Return the flags of Megatron that cut any number of layers over the stages, as evenly as these can."""
    if layers % stages == 0:
        return {}
    if layers < stages:
        raise ValueError(f"--pipeline-model-parallel-size {stages} is more than the teacher's {layers} layers")
    if stages == 2:
        return {"decoder_first_pipeline_num_layers": layers // 2}
    # The stages in the middle have one number of layers each, and the first and the last share the others.
    ways = [layers - each * (stages - 2) for each in (layers // stages, layers // stages + 1)]
    rest = min(
        (rest for rest in ways if rest >= 2), key=lambda rest: max(-(-rest // 2), (layers - rest) // (stages - 2))
    )
    return {"decoder_first_pipeline_num_layers": rest // 2, "decoder_last_pipeline_num_layers": rest - rest // 2}


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
