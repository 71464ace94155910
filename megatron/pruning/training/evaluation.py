"""What a model is worth: its loss on text, and what lm-evaluation-harness measures."""

from collections.abc import Sequence
from pathlib import Path

import torch
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
def loss(model: PreTrainedModel, data: Tokens, batch: int, name: str) -> float:
    """Return the mean cross entropy in nats over every token but the first of each window, `[windows, tokens]`."""
    total = 0.0
    progress = Progress(f"reading with {name}", len(data), show=True, unit="windows")
    for part in torch.split(torch.from_numpy(data), batch):
        part = part.to(model.device)
        logits = model(part[:, :-1]).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        progress.advance(len(part))
    progress.close()
    return total / data[:, 1:].size


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
