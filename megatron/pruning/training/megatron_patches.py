"""All that this project changes in Megatron and torch while it trains: a table whose changes end with the training.

megatron-core is installed as its authors made it, and the oldest that is supported is 0.19. Where its training loop
does not do what is needed here, a row of the table puts another value in the place of an attribute, and `applied` puts
back what was there. Nothing else in the project assigns to an attribute of Megatron or torch, except cpu_device.py:
that is one stand-in for a whole device, must be in place before Megatron is imported, and stays until the process ends.
"""

import argparse
import contextlib
import functools
import importlib.util
import queue
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets import utils as dataset_utils
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import checkpointing, get_args, global_vars, initialize, training

from megatron.pruning.training import cpu_device
from megatron.pruning.training.adam_steps import loading_steps
from megatron.pruning.training.direct_start import load_start, start_of
from megatron.pruning.training.strict_loading import checked_dist_load, checked_load, is_dist, one_sentence, source_of


@dataclass(frozen=True)
class Patch:
    """A row of the table: the attribute `name` of `owner` (a module, class or object) is `value` while it is applied.

    `why` is the reason, which holds from megatron-core 0.19 on. A row that is not `needed` in this run changes nothing.
    """

    owner: Any
    name: str
    value: Any
    why: str
    needed: bool = True


def while_parsing(argv: Sequence[str]) -> list[Patch]:
    """Return the row that holds while Megatron parses the command line `argv`, which is without the program's name."""
    why = "Megatron's parse_args takes no command line: it reads that of the process."
    return [Patch(sys, "argv", [sys.argv[0], *argv], why)]


def while_publishing(tokenizer: Any) -> list[Patch]:
    """Return the row that holds while Megatron makes its arguments global, and would build a tokenizer by them."""
    why = "Megatron says what is wrong with a tokenizer after 900 lines of arguments: it has been built before."
    return [Patch(global_vars, "build_tokenizer", lambda args: tokenizer, why)]


def while_training(
    args: argparse.Namespace, config: TransformerConfig, schedules: Callable[..., Any] | None = None
) -> list[Patch]:
    """Return the rows that hold while the stock loop trains a model of this configuration.

    `schedules` makes of Megatron's function that chooses the schedule of a step another.
    """
    return [
        Patch(
            training,
            "get_forward_backward_func",
            schedules and schedules(training.get_forward_backward_func),
            why="A teacher that is cut over the pipeline reads the text of a step before the student does.",
            needed=schedules is not None,
        ),
        Patch(
            training,
            "load_checkpoint",
            load_strictly,
            why="The stock loader warns and trains from random weights where a checkpoint does not fit the model.",
        ),
        Patch(
            dataset_utils,
            "compile_helpers",
            lambda: None,
            why="The stock loop runs make, but the wheel has the helpers built already and no Makefile.",
            needed=importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None,
        ),
        Patch(
            filesystem_async,
            "_results_queue",
            queue.Queue(),
            why="Megatron starts a process that holds the writer's results, and it takes seconds to import all again.",
            needed=not args.async_save,
        ),
        Patch(
            initialize,
            "_warmup_jit_function",
            lambda tp_size=None: None,
            why="The warm-up of swiglu halves a rank's width of the feed-forward, which may be odd after pruning.",
            needed=args.swiglu and args.ffn_hidden_size // args.tensor_model_parallel_size % 2 == 1,
        ),
        Patch(
            config,
            "deallocate_pipeline_outputs",
            False,
            why="gloo may still read a stage's output when Megatron frees it, and virtual pipelines train on nonsense.",
            needed=cpu_device.is_installed(),
        ),
        *(
            Patch(
                optimizer,
                "__init__",
                functools.partialmethod(optimizer.__init__, fused=True),
                why="Megatron never asks torch for the Adam that updates a weight in one pass over memory.",
            )
            for optimizer in (torch.optim.Adam, torch.optim.AdamW)
        ),
        Patch(
            rope_utils,
            "_apply_rotary_pos_emb_bshd",
            _compiled(rope_utils._apply_rotary_pos_emb_bshd),
            why="Without TransformerEngine's kernel Megatron turns queries and keys in ten passes over memory.",
            needed=not (args.apply_rope_fusion or args.disable_jit_fuser),
        ),
    ]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch compiles when it is first called: the compiler takes seconds to import."""
    compiled = functools.cache(lambda: torch.compile(function))
    return lambda *args, **kwargs: compiled()(*args, **kwargs)


def while_loading(
    models: Sequence[torch.nn.Module], optimizer: Any, source: Path, filled: list[torch.nn.Module]
) -> list[Patch]:
    """Return the rows that hold while the stock loader reads the checkpoint in `source`.

    It reads into this rank's `models`, which then are `filled`, and into the `optimizer` if there is one.
    """
    return [
        Patch(
            get_args(),
            "ckpt_format",
            "torch_dist",
            why="--ckpt-format says how to save; the stock loader asks it, and not the files, for what to load too.",
            needed=is_dist(get_args(), source),
        ),
        Patch(
            dist_checkpointing,
            "load",
            functools.partial(checked_dist_load, dist_checkpointing.load, source),
            why="The stock loader compares the names and shapes of all ranks' weights with nothing.",
        ),
        *(
            Patch(
                model,
                "load_state_dict",
                functools.partial(checked_load, model, model.load_state_dict, source, filled),
                why="Where the strict loading of a torch checkpoint fails, Megatron loads once more and is not strict.",
            )
            for model in models
        ),
        *(
            Patch(
                one,
                "load_state_dict",
                functools.partial(loading_steps, one.load_state_dict),
                why="Adam's count of steps is elsewhere in torch's than in the fused ones, and Megatron drops it.",
            )
            for one in [optimizer]
            if one is not None
        ),
    ]


def load_strictly(models: list[Any], optimizer: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Take the place of Megatron's `load_checkpoint`, with its arguments and result: load all of a checkpoint or none.

    Raises ValueError when a weight is missing, is not in this rank's `models` or has another shape there, or when a
    file is missing or cannot be read.
    """
    if (start := start_of(get_args())) is not None:
        return load_start(start, models, optimizer)
    source = source_of(get_args())
    if source is None:  # the run starts afresh, see require_checkpoint
        return checkpointing.load_checkpoint(models, optimizer, *args, **kwargs)
    filled: list[torch.nn.Module] = []
    with one_sentence(source), applied(while_loading(models, optimizer, source, filled)):
        result = checkpointing.load_checkpoint(models, optimizer, *args, **kwargs)
    if len(filled) < len(models) and not is_dist(get_args(), source):
        raise ValueError(
            f"the checkpoint in {source} has {len(filled)} of the {len(models)} virtual pipeline stages of a rank: "
            "convert it with --format torch_dist, which loads in any layout, or leave the virtual pipeline out"
        )
    return result


@contextlib.contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Put the needed rows in place inside of the `with`, and put back what was there in the opposite order.

    What an owner inherited before, it inherits after again. Raises AttributeError where an owner has nothing of the
    row's name: it is a Megatron that the table does not know.
    """
    with contextlib.ExitStack() as stack:
        for patch in patches:
            if patch.needed:
                getattr(patch.owner, patch.name)
                if patch.name in vars(patch.owner):
                    stack.callback(setattr, patch.owner, patch.name, vars(patch.owner)[patch.name])
                else:
                    stack.callback(delattr, patch.owner, patch.name)
                setattr(patch.owner, patch.name, patch.value)
        yield
