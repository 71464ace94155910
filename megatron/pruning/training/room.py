"""Whether a device has room for a whole model, or one layer at a time is to be held."""

import os

import psutil
import torch

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.storage.dtypes import BYTES

_SHARE_OF_WEIGHTS = 0.8  # of the free memory; the rest is for what is computed


def too_large(checkpoint: Checkpoint, dtype: str, device: str) -> str | None:
    """Return why a model has no room on a device of which each process here takes a copy of it; None where it has."""
    if device == "cuda":
        free, copies = torch.cuda.mem_get_info(number_here())[0], 1
    else:
        free, copies = psutil.virtual_memory().available, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    takes = checkpoint.config.parameters * BYTES[dtype] * copies
    if takes <= _SHARE_OF_WEIGHTS * free:
        return None
    times = f" {copies} times" if copies > 1 else ""
    room = f"{free / 1e9:,.1f} GB are free on {device}"
    return f"{checkpoint.path} takes {takes / 1e9:,.1f} GB in {dtype}{times}, and {room}"


def number_here() -> int:
    """Return which of its machine's GPUs this process has. Raises ValueError where there are fewer."""
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise ValueError(f"process {number} of this machine has no GPU of its own: start at most {gpus}")
    return number
