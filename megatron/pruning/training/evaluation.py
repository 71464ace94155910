"""What a model is worth: its loss on text, and what lm-evaluation-harness measures."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.storage.dtypes import BYTES, TORCH_NAMES
from megatron.pruning.storage.processes import World
from megatron.pruning.storage.progress import Progress
from megatron.pruning.training import cpu_device
from megatron.pruning.training.hf_model import build, tokenizer_of
from megatron.pruning.training.quiet import quiet_imports
from megatron.pruning.training.room import free_on_gpu, number_here, processes_here
from megatron.pruning.training.tokens import Tokens

# Of a text, by number: tokens `[batch, length + 1]`, and which of the last `length` count.
Portions = Mapping[int, tuple[Tensor, Tensor]]


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


class Evaluation:
    """The loss of models on windows of text, of which every process of `world` reads its share.

    A model is transformers' own, or, `layered`, Megatron's one layer at a time (layerwise.py). `dtype` is what is
    computed in, `batch` how many windows are at once. Call `close` at the end.
    """

    def __init__(self, world: World, layered: bool, dtype: str, device: str, batch: int) -> None:
        self.world, self.layered, self.dtype, self.batch = world, layered, dtype, batch
        number = number_here() if device == "cuda" else None
        if layered:
            if not cpu_device.install() and device == "cpu":
                raise ValueError("one layer at a time is computed on the GPUs that are there: leave out --device cpu")
            with quiet_imports():
                from megatron.pruning.training.stock_model import join
            join(Layout(), world)
            self.device = torch.device("cuda", torch.cuda.current_device())
            return
        if world.size > 1:
            torch.distributed.init_process_group("gloo", **world.meeting_place())
        self.device = torch.device(device, number) if number else torch.device(device)

    def model(self, checkpoint: Checkpoint) -> PreTrainedModel | None:
        """Return the whole model; None where no more than a layer of it is held."""
        return None if self.layered else build(checkpoint, self.dtype, str(self.device))

    @torch.no_grad()
    def loss(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel | None,
        data: Tokens,
        counts: NDArray[np.uint8] | None = None,
    ) -> float:
        """Return the mean cross entropy in nats over every token but the first of each window, `[windows, tokens]`.

        With `counts`, of the same shape, it is that of the tokens where these are 1.
        """
        counts = np.ones(data.shape, dtype=np.uint8) if counts is None else counts
        mine = (torch.from_numpy(of_all[self.world.rank :: self.world.size]) for of_all in (data, counts))
        portions = {
            number: (tokens.to(self.device), some[:, 1:].to(self.device) > 0)
            for number, (tokens, some) in enumerate(zip(*(torch.split(t, self.batch) for t in mine), strict=True))
            if len(tokens)
        }
        what = f"reading with {checkpoint.path}"
        sums = self._layered_sums(checkpoint, portions, what) if model is None else self._sums(model, portions, what)
        if self.world.size > 1:
            self.world.barrier()  # where one that has failed is told of; a sum would be waited for
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    def close(self) -> None:
        """Part from the other processes."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.world.leave()

    def _sums(self, model: PreTrainedModel, portions: Portions, what: str) -> Tensor:
        windows = sum(len(tokens) for tokens, _ in portions.values())
        progress = Progress(what, windows, self.world.rank == 0, unit="windows")
        total = torch.zeros(2, dtype=torch.float64)
        for tokens, counted in portions.values():
            logits = model(tokens[:, :-1], use_cache=False).logits
            for one, labels, counts in zip(logits, tokens[:, 1:], counted, strict=True):  # in fp32 one window's alone
                total[0] += cross_entropy(one[counts].float(), labels[counts], reduction="sum").cpu()
            total[1] += counted.sum().cpu()
            progress.advance(len(tokens))
        progress.close()
        return total

    def _layered_sums(self, checkpoint: Checkpoint, portions: Portions, what: str) -> Tensor:
        from megatron.pruning.training.layerwise import States, loss_sums

        numbers = sum(tokens.numel() for tokens, _ in portions.values()) * checkpoint.config.hidden_size
        on_gpu = not cpu_device.is_installed() and numbers * BYTES[self.dtype] < free_on_gpu() / 2
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        with tempfile.TemporaryDirectory(prefix="hidden-states-") as folder:
            need, free = numbers * BYTES["fp32"] * processes_here(), shutil.disk_usage(folder).free
            if not on_gpu and need > free:
                raise ValueError(
                    f"{folder} has {free / 1e9:.1f} GB free, but the hidden states of the text take "
                    f"{need / 1e9:.1f} GB: take fewer --max-tokens, or a TMPDIR on a larger disk"
                )
            # numpy, which writes the files, has no bf16.
            kept, holder = (dtype, self.device) if on_gpu else (torch.float32, None)
            states = States(Path(folder), kept, self.device, list(portions), holder)
            progress = Progress(what, checkpoint.config.num_layers, self.world.rank == 0, unit="layers")
            sums = loss_sums(checkpoint, portions, states, dtype, progress)
            progress.close()
        return sums


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
