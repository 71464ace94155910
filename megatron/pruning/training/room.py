"""Whether a device has room for a whole model, or one layer at a time is to be held."""

import gc
import os
from pathlib import Path

import psutil
import torch

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.storage.dtypes import BYTES

# Of the free memory, what the weights may take, and bytes for what is computed, which is the more of a large device.
_SHARE_OF_WEIGHTS, _COMPUTED = 0.8, 8e9
# Control groups: those of this process, and where they lie. Version 2 has one tree for all, version 1 one for memory.
_GROUPS, _CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_VERSION_2, _VERSION_1 = ("max", "current", "file "), ("limit_in_bytes", "usage_in_bytes", "total_cache ")


def too_large(checkpoint: Checkpoint, dtype: str, device: str) -> str | None:
    """Return why a model has no room on a device of which each process here takes a copy of it; None where it has."""
    free, copies = (free_on_gpu(), 1) if device == "cuda" else (free_memory(), processes_here())
    takes = checkpoint.config.parameters * BYTES[dtype] * copies
    room = max(_SHARE_OF_WEIGHTS * free, free - _COMPUTED)
    if takes <= room:
        return None
    times = f" {copies} times" if copies > 1 else ""
    return (
        f"{checkpoint.path} takes {takes / 1e9:,.1f} GB in {dtype}{times}, and of {free / 1e9:,.1f} GB that are free "
        f"on {device} weights may take {room / 1e9:,.1f}"
    )


def number_here() -> int:
    """Return which of its machine's GPUs this process has. Raises ValueError where there are fewer."""
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise ValueError(f"process {number} of this machine has no GPU of its own: start at most {gpus}")
    return number


def processes_here() -> int:
    """Return how many processes torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_on_gpu() -> int:
    """Return the bytes that are free on this process's GPU, with those that torch keeps for later."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(number_here())[0])


def free_memory() -> int:
    """Return the bytes of memory that are free for this process: of the machine, its container or its job."""
    limits: list[int] = [psutil.virtual_memory().available]
    for line in _lines(_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (_CGROUP / "memory", _VERSION_1) if controllers else (_CGROUP, _VERSION_2)
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            limits += _free_in_group(folder, *names)
            if folder == top:
                break
    return min(limits)


def _free_in_group(folder: Path, most: str, now: str, of_files: str) -> list[int]:
    """Return the bytes that are free in a control group that has a limit; what it caches of files is given up."""
    limit, used, detail = (_lines(folder / f"memory.{name}") for name in (most, now, "stat"))
    if not limit or not used or not limit[0].isdecimal():
        return []
    cached = sum(int(line.split()[1]) for line in detail if line.startswith(of_files))
    return [max(0, int(limit[0]) - int(used[0]) + cached)]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
