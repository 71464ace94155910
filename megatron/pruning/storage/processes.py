"""The processes of one run: alone, or the N that torchrun started."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar


def rank() -> int:
    """Return this process's number among those that torchrun started; 0 when it is alone."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdecimal() else 0


def count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() else 1


def be_alone_without_torchrun() -> None:
    """Let a process that torchrun did not start be one that meets nobody, by what torch and Megatron look at."""
    if "WORLD_SIZE" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}


def is_first() -> bool:
    """Return whether this is the process that speaks: alone, or rank 0 of a torchrun."""
    return rank() == 0


@dataclass(frozen=True)
class World:
    """This process's rank among `size`. They share a file system and meet only at barriers."""

    rank: int = 0
    size: int = 1
    # Whether this process has met the others: until then all of them do, and fail in, the same.
    joined: ClassVar[bool] = False

    @classmethod
    def from_environment(cls) -> "World":
        """Join the processes that torchrun started, or stay alone."""
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(f"RANK {rank} and WORLD_SIZE {size} of the environment do not fit each other")
        world = cls(int(rank), int(size))
        if world.size > 1:
            import torch.distributed

            World.joined = True
            # The slowest writer may take hours after the fastest; torchrun ends all when one dies.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        return world

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            import torch.distributed

            try:
                torch.distributed.barrier()
            except RuntimeError as error:
                raise ValueError("another process of this run has ended: see its message") from error

    def leave(self) -> None:
        """Part from the others, after the last barrier."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()
