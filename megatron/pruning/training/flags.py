"""The stock training flags: defaults for machines without some library, and one sentence for what cannot work."""

import argparse
import contextlib
import importlib.util
import math
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.tensor_parallel import layers
from megatron.training import global_vars
from megatron.training.utils import print_rank_0

from megatron.pruning.model.megatron_args import flag_of
from megatron.pruning.training import cpu_device

LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")  # of a copy
_PERCENT = re.compile(r"%%|%(?!\()")  # as argparse wants one, or as a sign; not that of %(default)s


def add_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Set the defaults that differ from stock (what the user types wins), and add the flags of distillation."""
    # Causal attention needs no mask tensor, and a checkpoint's own format says which one it is. Stock leaves the
    # intervals unset and fails on that after it has built the model.
    parser.set_defaults(create_attention_mask_in_dataloader=False, auto_detect_ckpt_format=True)
    parser.set_defaults(eval_interval=1000, save_interval=1000, distributed_timeout_minutes=None)
    parser.set_defaults(**_without_missing_kernels())
    if cpu_device.is_installed():
        cpu_device.add_defaults(parser)
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher-load", metavar="DIR", help="a checkpoint of any format, shape and layout")
    group.add_argument("--kd-alpha", type=float, metavar="A", help="loss = A * kd loss + (1 - A) * lm loss (default 1)")
    group.add_argument("--kd-temperature", type=float, metavar="T", help="divides both models' logits (default 1)")
    group.add_argument("--kd-hidden", type=float, metavar="A", help="adds A * (1 - cos) of the last hidden states")
    group.add_argument("--kd-save", metavar="DIR", help="train nothing: record the model's answers to the whole text")
    group.add_argument("--kd-top-k", type=int, metavar="K", help="--kd-save keeps the K likeliest tokens (default 256)")
    group.add_argument("--kd-dtype", choices=("fp16", "fp32"), help="of the recorded log-probabilities (default fp16)")
    group.add_argument("--kd-load", metavar="DIR", help="learn from what --kd-save recorded; no teacher is loaded")
    for action in parser._actions:  # stock takes help from docstrings, where "10%)" is no format, and --help ends on it
        action.help = action.help and _PERCENT.sub("%%", action.help)
    return parser


def _without_missing_kernels() -> dict[str, Any]:
    """Return the defaults where stock's need a library that is not here, as Megatron found when it was imported.

    Stock turns these fusions on everywhere, also where it then ends on a kernel that it has not.
    """
    kernels = {
        "apply_rope_fusion": rope_utils.fused_apply_rotary_pos_emb is not None,  # TransformerEngine's
        "gradient_accumulation_fusion": layers._grad_accum_fusion_available,  # apex's, with either kind of layers
        "masked_softmax_fusion": bool(importlib.util.find_spec("scaled_masked_softmax_cuda")),  # apex's too
    }
    missing: dict[str, Any] = {fusion: False for fusion, there in kernels.items() if not there}
    return missing if HAVE_TE else {**missing, "transformer_impl": "local", "no_persist_layer_norm": True}


def refuse_without_libraries(args: argparse.Namespace) -> None:
    """Check the flags that need a GPU or a library that is not required; raise ValueError where theirs is missing."""
    if cpu_device.is_installed():
        cpu_device.refuse(args)
    if args.transformer_impl != "local" and not HAVE_TE:
        raise ValueError(f"--transformer-impl {args.transformer_impl} needs TransformerEngine, which is not installed")
    if args.use_distributed_optimizer and USING_PYTORCH_OPTIMIZER and args.save and not args.no_save_optim:
        # megatron-core 0.19 saves the state of torch's AdamW in a form that it then cannot load
        raise ValueError(
            "--use-distributed-optimizer cannot resume without TransformerEngine or apex, of which none can be used "
            "here: leave it out, or give --no-save-optim"
        )
    saves_aside = args.async_save and args.use_persistent_ckpt_worker  # without that one Megatron goes on without it
    if saves_aside and args.async_strategy == "nvrx" and not importlib.util.find_spec("nvidia_resiliency_ext"):
        raise ValueError(
            "--async-save needs nvidia-resiliency-ext, which is not installed: pip install nvidia-resiliency-ext, or "
            "give --async-strategy mcore"
        )
    _refuse_without_writers(args)


def _refuse_without_writers(args: argparse.Namespace) -> None:
    """Check what the curves are to be written with, on every rank: stock does it on the last, which says it late."""
    for flag, value, library in (
        ("--tensorboard-dir", args.tensorboard_dir, "tensorboard"),
        ("--wandb-project", args.wandb_project, "wandb"),
    ):
        if value and not importlib.util.find_spec(library):
            raise ValueError(f"{flag} {value} needs {library}, which is not installed: pip install {library}")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise ValueError(f"--wandb-project {args.wandb_project} needs --wandb-save-dir, or --save")


def refuse_impossible(args: argparse.Namespace) -> None:
    """Check what every user meets and Megatron ends on in a traceback.

    Raises ValueError when a flag that must be given is not, the processes do not divide into model replicas, the
    learning rate's decay ends before its warm-up, a setting of distillation is out of its range, or a validation or an
    attention is asked for that Megatron has not.
    """
    if args.kd_save:  # nothing is trained: no optimizer is made, or read, and no --lr is needed
        args.skip_train = True
    _refuse_missing(args)
    _go_without_validation(args)
    _refuse_layout(args)
    _validate_whole(args)
    _refuse_warm_up(args)
    _refuse_distillation(args)
    _give_time(args)
    if args.attention_backend.name == "local":
        raise ValueError(
            "--attention-backend local cannot be had in megatron-core 0.19: leave it out, or give "
            "--spec megatron.pruning.training.local_layers unfused_layers for Megatron's own attention"
        )


def _refuse_missing(args: argparse.Namespace) -> None:
    needed = {"--micro-batch-size": args.micro_batch_size, "--seq-length": args.seq_length}
    needed["--train-iters (or --train-samples)"] = args.train_iters or args.train_samples
    if not args.skip_train:
        needed["--lr"] = args.lr is not None
    kinds = (args.data_path, args.train_data_path, args.data_args_path, args.per_split_data_args_path)
    needed["--train-data-path (or --data-path, or --mock-data)"] = args.mock_data or any(kinds)
    missing = [flag for flag, given in needed.items() if not given]
    if missing:
        raise ValueError(f"these flags must be given: {' '.join(missing)}")


def _go_without_validation(args: argparse.Namespace) -> None:
    """Do not ask Megatron to validate on text that was not given: it ends on that after the training."""
    if args.train_data_path and not args.valid_data_path and args.eval_iters:
        print_rank_0("note: without --valid-data-path there is no validation")
        args.eval_iters = 0


def _validate_whole(args: argparse.Namespace) -> None:
    """Set what --full-validation needs, which stock sets otherwise, and check that the user has not.

    Megatron's sampler for it hands out single sequences, one to each copy of the model, so that with another micro
    batch the ranks of a copy wait for each other in vain, and with another global batch the text is read several times.
    Its loop takes the number of steps from the text only where there may be several texts.
    """
    if not args.full_validation:
        return
    if args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank:
        raise ValueError("--full-validation cannot be had with a virtual pipeline: leave one of them out")
    args.multiple_validation_sets = True
    copies = args.world_size // math.prod(getattr(args, name) for name in LAYOUT)
    for name, wanted in (("eval_micro_batch_size", 1), ("eval_global_batch_size", copies)):
        given = getattr(args, name)
        if given not in (None, wanted):
            raise ValueError(
                f"--full-validation takes a sequence at a time on each copy of the model, of which there are {copies}: "
                f"{flag_of(name)} {given} must be {wanted}, or left out"
            )
        setattr(args, name, wanted)


def _give_time(args: argparse.Namespace) -> None:
    """Let ranks wait while others read the weights to start from or a teacher's, unless the user has said how long.

    Each takes its own time for that, and a large model on a slow disk more than the ten minutes of stock, which hold
    again from the first step on. What ends with an error meanwhile ends the others at once (processes.EndedTogether).
    """
    if args.distributed_timeout_minutes is None:
        args.distributed_timeout_minutes = 10
        if args.teacher_load or args.pretrained_checkpoint:
            args.distributed_timeout_minutes = 60
            if args.distributed_timeout_seconds_after_init is None:
                args.distributed_timeout_seconds_after_init = 600


def _refuse_layout(args: argparse.Namespace) -> None:
    sizes = {name: getattr(args, name) for name in LAYOUT if name != LAYOUT[2] or args.context_parallel_size > 1}
    replica = math.prod(sizes.values())
    if args.world_size % replica:
        product = " x ".join(f"{flag_of(name)} {size}" for name, size in sizes.items())
        raise ValueError(f"{args.world_size} processes were started, which is no multiple of {product} = {replica}")


def _refuse_warm_up(args: argparse.Namespace) -> None:
    if args.lr_warmup_fraction is not None:
        if args.lr_warmup_fraction >= 1:
            raise ValueError(f"--lr-warmup-fraction {args.lr_warmup_fraction} must be less than 1")
        return
    for unit in ("iters", "samples"):
        warm_up = getattr(args, f"lr_warmup_{unit}")
        given = [name for name in (f"lr_decay_{unit}", f"train_{unit}") if getattr(args, name) is not None]
        if given and warm_up >= (length := getattr(args, given[0])):  # the first is the length of the decay
            raise ValueError(f"--lr-warmup-{unit} {warm_up} must be less than {flag_of(given[0])} {length}")


def _refuse_distillation(args: argparse.Namespace) -> None:
    """Check the flags of distillation, and set those that were not given; a recorded teacher has its temperature."""
    ways = {"--teacher-load": args.teacher_load, "--kd-load": args.kd_load, "--kd-save": args.kd_save}
    given = [flag for flag, path in ways.items() if path is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} cannot be combined: leave one of them out")
    teacher = "a teacher: give --teacher-load or --kd-load"
    for name, needs, there in (
        ("kd_alpha", teacher, given and not args.kd_save),
        ("kd_temperature", teacher, given),
        ("kd_hidden", "a teacher that reads along: give --teacher-load", args.teacher_load),
        ("kd_hidden", "--pretrained-checkpoint, the model as it was pruned", args.pretrained_checkpoint),
        ("kd_top_k", "--kd-save", args.kd_save),
        ("kd_dtype", "--kd-save", args.kd_save),
    ):
        if getattr(args, name) is not None and not there:
            raise ValueError(f"{flag_of(name)} needs {needs}")
    if args.logits_load_dir:  # stock leaves reading them to the entry script, and would train on without a word
        raise ValueError("--logits-load-dir: Megatron's cached logits are not learned from here, see --kd-save")
    defaults = {"kd_alpha": 1.0, "kd_temperature": 1.0, "kd_hidden": 0.0, "kd_top_k": 256, "kd_dtype": "fp16"}
    for name, default in defaults.items():
        if getattr(args, name) is None and (name != "kd_temperature" or not args.kd_load):
            setattr(args, name, default)
    _refuse_numbers(args)
    if args.kd_save:
        _refuse_recording(args)


def _refuse_numbers(args: argparse.Namespace) -> None:
    if not 0 <= args.kd_alpha <= 1:
        raise ValueError(f"--kd-alpha {args.kd_alpha} must lie between 0 (lm loss alone) and 1 (kd loss alone)")
    if args.kd_temperature is not None and not 0 < args.kd_temperature < math.inf:
        raise ValueError(f"--kd-temperature {args.kd_temperature} must be a number above 0")
    if not 0 <= args.kd_hidden < math.inf:
        raise ValueError(f"--kd-hidden {args.kd_hidden} must be 0 or above")
    if args.kd_top_k < 1:
        raise ValueError(f"--kd-top-k {args.kd_top_k} must be 1 or more")


def _refuse_recording(args: argparse.Namespace) -> None:
    """Check that a teacher can be recorded in this layout."""
    if args.load is None and args.pretrained_checkpoint is None:
        raise ValueError("--kd-save records a checkpoint: name it with --pretrained-checkpoint")
    virtual = (args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank)
    if args.context_parallel_size > 1 or any(virtual):
        raise ValueError(
            "--kd-save cuts the teacher by tensor and pipeline parallelism alone: leave context parallelism and the "
            "virtual pipeline out"
        )


@contextlib.contextmanager
def flags_refused() -> Iterator[None]:
    """Turn the assertions with which Megatron refuses flags, until training begins, into a ValueError.

    Its sentence is Megatron's, which may be no more than the source line of a bare `assert`. An assertion that fails
    later has nothing to do with a flag and keeps its traceback.
    """
    try:
        yield
    except AssertionError as refusal:
        if getattr(global_vars._GLOBAL_ARGS, "curr_iteration", None) is not None:  # set where the first step begins
            raise
        frame = traceback.extract_tb(refusal.__traceback__)[-1]
        words = " ".join(str(refusal).split()) or frame.line
        place = f"{Path(frame.filename).name} line {frame.lineno}"
        raise ValueError(f"Megatron refuses these flags: {words} ({place})") from refusal


@contextlib.contextmanager
def wandb_refused(project: str | None) -> Iterator[None]:
    """Turn that Weights & Biases cannot be reached, or knows nobody of this login, into a ValueError with what to do.

    `project` is that of --wandb-project; without one there is nothing to refuse.
    """
    if not project:
        yield
        return
    from wandb.errors import Error  # it takes a second

    try:
        yield
    except Error as refusal:
        words = str(refusal).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"--wandb-project {project}: {words}; log in with `wandb login` or WANDB_API_KEY, or keep the record on "
            "this machine with WANDB_MODE=offline"
        ) from refusal
