"""Two ranks of which one ends, as the first word says, while the other waits as for nccl, so many seconds at most.

It waits in code that lets no signal through, and that hears nothing of the other's end.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from commands import replace

from megatron.pruning.storage.processes import EndedTogether


def main(words: Sequence[str]) -> None:
    """Be one of them."""
    end, seconds = words
    replace(EndedTogether, "EVERY", 0.2), replace(EndedTogether, "GRACE", 0.5)
    dist.init_process_group("gloo")
    dist.barrier()
    with EndedTogether():
        if dist.get_rank() == 1:
            raise RuntimeError("CUDA out of memory") if end == "fails" else SystemExit
        try:
            dist.distributed_c10d._get_default_store().wait(["never"], timedelta(seconds=float(seconds)))
        except dist.DistStoreError:
            print("waited to the end", flush=True)
