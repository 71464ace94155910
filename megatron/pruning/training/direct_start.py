"""A training that starts from a checkpoint which Megatron's loader does not read, such as one of Hugging Face's.

Nothing is converted first: each rank reads what it holds of every weight, which is then what it would be after a
conversion to this layout. The optimizer is new, the iteration 0, and what is saved is Megatron's.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.utils import print_rank_0

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.formats.checks import compare_weights
from megatron.pruning.formats.megatron import HF_FILES, TRACKER, rank_views, side_files
from megatron.pruning.model.checkpoint import Checkpoint, kept_plan
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import flag_of
from megatron.pruning.model.weights import FIRST, LAST
from megatron.pruning.storage.views import View
from megatron.pruning.training.stock_model import load_weights, parameter_names

Views = dict[tuple[str, int | None], View]

# Flags under which a rank holds no plain part of a weight.
_OTHER_WEIGHTS = ("use_torch_fsdp2", "use_megatron_fsdp", "fp8_param_gather", "fp4_param_gather")


def start_of(args: argparse.Namespace) -> Checkpoint | None:
    """Return the checkpoint of --pretrained-checkpoint if the run starts from it and it has no tracker of Megatron's.

    Raises ValueError when there is no checkpoint, or it is damaged.
    """
    if args.pretrained_checkpoint is None or Path(args.pretrained_checkpoint, TRACKER).is_file():
        return None
    if args.load is not None and Path(args.load, TRACKER).is_file():
        return None
    return open_named("--pretrained-checkpoint", args.pretrained_checkpoint)


@functools.cache
def open_named(flag: str, path: str) -> Checkpoint:
    """Open the checkpoint that a flag names, once in a process. Raises ValueError, with the flag, where it cannot."""
    try:
        return open_checkpoint(Path(path))
    except (ValueError, OSError) as error:
        told = str(error).removeprefix(f"--load {path}")
        raise ValueError(f"{flag} {path}" + (told if told != str(error) else f": {error}")) from error


def refuse_start(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise ValueError where the run cannot start from the checkpoint, by its flags."""
    where = f"--pretrained-checkpoint {checkpoint.path}, of the format {checkpoint.format},"
    if args.use_checkpoint_args:
        raise ValueError(
            f"{where} has no arguments for --use-checkpoint-args: give the flags that "
            f"tools/show_checkpoint.py {checkpoint.path} --megatron-flags prints"
        )
    for name in _OTHER_WEIGHTS:
        if getattr(args, name, False):
            raise ValueError(f"{where} cannot be combined with {flag_of(name)}: convert it first, or leave that out")
    Layout(args.tensor_model_parallel_size).check_split(checkpoint.config.sizes, "the model's")


def start_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return what a conversion would lay beside the weights for an export and a second pruning, by name."""
    files = side_files(checkpoint, Layout(), None)
    found = {name: content for name, content in files.items() if name.startswith(f"{HF_FILES}/")}
    return found | kept_plan(checkpoint.root)


def load_start(checkpoint: Checkpoint, models: list[torch.nn.Module], optimizer: Any) -> tuple[int, int]:
    """Fill this rank's part of the model, and return what the stock loader does: the iteration and operations so far.

    `models` are as many as there are virtual pipeline stages. Raises ValueError unless names and shapes of all weights
    are those of the checkpoint.
    """
    args, config = get_args(), checkpoint.config
    if args.num_layers != config.num_layers:
        raise ValueError(f"{checkpoint.path} has {config.num_layers} layers and this model {args.num_layers}")
    tensor = args.tensor_model_parallel_size
    layout = Layout(tensor, 1, args.padded_vocab_size // tensor)  # rows of padding as the model has them
    views = rank_views(checkpoint, layout, mpu.get_tensor_model_parallel_rank(), 0)
    for model in unwrap_model(models):
        first, held = held_by(model, views)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = {name: held[key].shape for key, name in parameter_names(expected, held, first).items()}
        compare_weights(checkpoint.path, expected, found)
        load_weights(model, held, first)
    args.finetune = True  # as the stock loader says where it starts from --pretrained-checkpoint
    if (args.fp16 or args.bf16) and optimizer is not None:
        optimizer.reload_model_params()  # into its own copy in fp32
    print_rank_0(f"  weights loaded from {checkpoint} at iteration 0")
    return 0, 0


def held_by(model: Any, views: Views) -> tuple[int, Views]:
    """Return the global number of the first layer of a stage, and what the stage holds of all layers' views."""
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    rows = [*(FIRST if model.pre_process else ()), *(LAST if model.post_process else ())]
    outside = {row.megatron for row in rows}
    held = {key: view for key, view in views.items() if (key[0] in outside if key[1] is None else key[1] in layers)}
    embedding, head = ((row.megatron, None) for row in (FIRST[0], LAST[-1]))
    if model.post_process and not model.pre_process and head not in views:  # a tied model's last stage has a copy
        held[head] = views[embedding]
    return min(layers, default=0), held
