"""What a model is worth: its loss on text, and what lm-evaluation-harness measures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.storage.progress import Progress
from megatron.pruning.training.hf_model import tokenizer_of
from megatron.pruning.training.tokens import Tokens


def device_named(name: str | None) -> str:
    """Return the device of --device, or a GPU where torch sees one. Raises ValueError for one that is not here."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here; leave it out")
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: torch has no such device here; leave it out") from error
    return name


@torch.no_grad()
def loss(model: PreTrainedModel, data: Tokens, batch: int, name: str, counts: NDArray[np.uint8] | None = None) -> float:
    """Return the mean cross entropy in nats over every token but the first of each window, `[windows, tokens]`.

    With `counts`, of the same shape, it is that of the tokens where these are 1.
    """
    counts = np.ones(data.shape, dtype=np.uint8) if counts is None else counts
    total = 0.0
    progress = Progress(f"reading with {name}", len(data), show=True, unit="windows")
    for part, counted in zip(*(torch.split(torch.from_numpy(t), batch) for t in (data, counts)), strict=True):
        tokens, wanted = part.to(model.device), counted[:, 1:].to(model.device) > 0
        logits = model(tokens[:, :-1]).logits[wanted].float()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:][wanted], reduction="sum"))
        progress.advance(len(part))
    progress.close()
    return total / int(counts[:, 1:].sum())


def task_scores(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tasks: Sequence[str],
    folder: Path | None,
    batch: int,
    limit: int | None,
) -> dict[str, float]:
    """Return what lm-evaluation-harness measures, by "task metric". Raises ValueError without a tokenizer or a task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = tokenizer_of(checkpoint)
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ValueError(f"--tasks {','.join(unknown)}: lm-evaluation-harness has no such task, nor has --task-folder")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }
